"""A small recipe, and folders of pictures to train on and to judge by."""

import dataclasses
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))         # pytest's importlib mode does not: train_helpers lies here

from train_helpers import ROOT, encoded, picture

from linic.train import recipe as recipes


@pytest.fixture
def xs() -> recipes.Recipe:
    return recipes.load(ROOT / "recipes" / "lalic-xs.toml")


@pytest.fixture
def small(xs: recipes.Recipe) -> recipes.Recipe:
    """Of the xs recipe, what fits pictures of 96x128 and a clock of seconds."""
    return dataclasses.replace(
        xs, phases=(recipes.Phase(0.0, 64, 2), recipes.Phase(0.5, 64, 3)),
        intervals=recipes.Intervals(4, 5, 6), ema=recipes.Ema(0.9, 2),
        evaluation=recipes.Evaluation(2, (10.0, 90.0)))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "train"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.png").write_bytes(encoded(picture(i)))
    return folder


@pytest.fixture
def valid(tmp_path: Path) -> Path:
    folder = tmp_path / "valid"
    folder.mkdir()
    for i in range(100, 103):
        (folder / f"{i}.png").write_bytes(encoded(picture(i, 70, 100)))
    return folder
