"""Every recipe of recipes/ trains its own model for three steps, with small batches."""

import pytest
import torch
from train_helpers import ROOT, Clock, encoded, picture

from linic.models import build
from linic.train import checkpoint, loop, recipe
from linic.train.loop import train


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda p: p.stem)
def test_a_recipe_trains_its_model_for_three_steps(path, tmp_path, monkeypatch):
    side = 192 if recipe.load(path).loss.distortion == "ms-ssim" else 64
    for folder, first in (("train", 0), ("valid", 100)):
        (tmp_path / folder).mkdir()
        for i in range(2):
            (tmp_path / folder / f"{i}.png").write_bytes(encoded(picture(first + i, side, side)))
    monkeypatch.setattr(loop, "KLT_CROPS", 64)
    monkeypatch.setattr(checkpoint, "save", lambda *_: None)        # files of a GB; others test them
    small = recipe.load(path, dict(map(recipe.change, (
        f"phases=[{{start = 0.0, crop = {side}, batch = 1}}]", "evaluation.pictures=1"))))
    numbers = []
    step = loop.Trainer.step
    monkeypatch.setattr(loop.Trainer, "step", lambda self, progress: numbers.append(step(self, progress)))
    model = build(small.model.preset)
    before = {k: v.clone() for k, v in model.state_dict().items() if k.startswith("g_s.")}
    result = train(small, data=tmp_path / "train", valid=tmp_path / "valid", out=tmp_path / "run", budget_s=4,
                   clock=Clock(), device="cpu", model=model)
    assert result["step"] == 3 and result["skipped"] == 0
    assert result["state"] == ("stopped" if small.schedule.steps else "done")       # of millions of steps
    assert all(row is not None and 0 < row[1] < 24 for row in numbers)              # bpp; a loss is finite or skipped
    after = model.state_dict()
    assert all(torch.isfinite(after[k]).all() for k in before)
    assert not any(torch.equal(after[k], v) for k, v in before.items() if k.endswith("proj.weight"))
