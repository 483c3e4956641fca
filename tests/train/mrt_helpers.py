"""A small MRT and smooth pictures, for tests of seconds; the networks of the measures, where they are."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from train_helpers import ROOT

from linic.models import Mrt, MrtConfig, preset
from linic.train import recipe

WEIGHTS = Path(os.environ.get("LINIC_MEASURES") or ROOT.parent / "shared" / "data" / "weights")
needs_weights = pytest.mark.skipif(not WEIGHTS.is_dir(), reason=f"no weights of the measures: {WEIGHTS} is no folder")


def small_mrt(seed: int = 0, **changes) -> Mrt:
    """Of mrt-xs, started as a linear codec of smooth pictures."""
    torch.manual_seed(seed)
    config = preset("mrt-xs")
    assert isinstance(config, MrtConfig)
    model = Mrt(dataclasses.replace(config, width=32, heads=2, stem=(12, 24), pixels=(24, 16, 12),
                                    pixel_depths=(1, 1, 1), decoder_pairs=2, rcm_width=16, rcm_depth=1, **changes))
    model.init_klt(smooth(32, 256).permute(0, 2, 3, 1).contiguous())
    return model


def smooth(count: int, side: int, seed: int = 0) -> torch.Tensor:
    """(count, 3, side, side) in [0, 1]."""
    coarse = torch.rand(count, 3, side // 16, side // 16, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1).contiguous(memory_format=torch.channels_last)


def load(name: str, *changes: str) -> recipe.Recipe:
    return recipe.load(ROOT / "recipes" / f"{name}.toml", dict(map(recipe.change, changes)))
