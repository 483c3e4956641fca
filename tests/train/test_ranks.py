import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_helpers import ROOT

from linic.errors import RecipeError, UsageError
from linic.train import loop, recipe
from linic.train.ranks import Ranks


def small_recipe(path: Path) -> Path:
    """Eight steps of four crops."""
    text = (ROOT / "recipes" / "lalic-xs.toml").read_text()
    phase = "[[phases]]\nstart = 0.0\ncrop = 64\nbatch = 4\n\n"
    text = re.sub(r"\[\[phases\]\].*?(?=\[ema\])", phase, text, flags=re.S)
    text = text.replace("[schedule]", "[schedule]\nsteps = 8").replace("pictures = 4", "pictures = 2")
    path.write_text(re.sub(r"(log|save|evaluate)_seconds = \d+", r"\1_seconds = 3", text))
    return path


def test_two_processes_take_the_steps_of_one_and_hold_the_same_weights(pictures, valid, tmp_path):
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests' / 'train'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           ROOT / "tests" / "train" / "ranks_run.py", small_recipe(tmp_path / "small.toml"), pictures,
                           valid, tmp_path], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]

    def of(name: str) -> dict[str, torch.Tensor]:
        return load_file(tmp_path / f"{name}.safetensors")

    ours, alone = of("steps-0"), of("steps-alone")
    assert all(torch.allclose(ours[k], alone[k], atol=1e-6, rtol=1e-5) for k in alone)
    for name in ("steps", "whole", "cut", "late"):
        a, b = of(f"{name}-0"), of(f"{name}-1")
        assert all(torch.equal(a[k], b[k]) for k in a), name
    written = load_file(tmp_path / "whole" / "raw.safetensors")
    assert all(torch.equal(written[k], v) for k, v in of("whole-0").items())
    status = json.loads((tmp_path / "whole" / "status.json").read_text())
    assert (status["step"], status["crops"], status["processes"]) == (8, 32, 2) and status["best"]
    assert json.loads((tmp_path / "cut" / "status.json").read_text())["step"] == 8
    assert json.loads((tmp_path / "late" / "status.json").read_text())["step"] == 2
    for line in ("stopped by a signal", "the time is over at step 2 of 8", "further shards"):
        assert done.stderr.count(line) == 1


def test_what_several_processes_cannot_do_is_said_at_once(xs):
    us = Ranks(0, 3)
    with pytest.raises(RecipeError, match="a batch of 8 cannot be shared by 3 processes"):
        loop._check_share(xs, us)
    with pytest.raises(UsageError, match="leave the graph rungs out of --speed"):
        loop._choice(xs, "cpu", "compiled-graph", us)
    assert recipe.load(ROOT / "recipes" / "lalic-paper.toml").phases[0].batch % 8 == 0
