"""Every recipe of recipes/ trains its own model for three steps, with small batches."""

import pytest
import torch
from mrt_helpers import WEIGHTS
from safetensors.torch import save_file
from train_helpers import ROOT, Clock, encoded, picture

from linic.models import Mrt, build
from linic.train import checkpoint, loop, recipe
from linic.train.loop import train

DECODERS = ("g_s.", "decoder.")


def phases_of(chosen: recipe.Recipe) -> list[dict[str, object]]:
    """A step of each kind of phase, or three of the only one."""
    kinds = list(dict.fromkeys((p.rounding, p.perceptual, p.stage) for p in chosen.phases))[-3:]
    if any(p.stage == "codes" for p in chosen.phases):
        kinds[0] = ("noise", False, "codes")
    side = 192 if chosen.loss.distortion == "ms-ssim" else 64
    return [{"start": i / len(kinds), "crop": 96 if perceptual else side, "batch": 1, "rounding": rounding,
             "perceptual": perceptual, "stage": stage} for i, (rounding, perceptual, stage) in enumerate(kinds)]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda p: p.stem)
def test_a_recipe_trains_its_model_for_three_steps(path, tmp_path, monkeypatch):
    asked = recipe.load(path)
    changes = {"phases": phases_of(asked), "evaluation.pictures": 1}
    if asked.codes:
        changes |= {"codes.examples": 1, "codes.squeeze": 32, "codes.vgg": 16}
    small = recipe.load(path, changes)
    networks = small.codes is not None or any(p.perceptual for p in small.phases)
    if networks and not WEIGHTS.is_dir():
        pytest.skip(f"no weights of the measures: {WEIGHTS} is no folder")
    model = build(small.model.preset)
    extreme = isinstance(model, Mrt)
    side = 256 if extreme else max(p.crop for p in small.phases)        # a start as a linear codec looks at 256 px
    for folder, first in (("train", 0), ("valid", 100)):
        (tmp_path / folder).mkdir()
        for i in range(2):
            size = side if folder == "train" else min(side, 192)
            (tmp_path / folder / f"{i}.png").write_bytes(encoded(picture(first + i, size, size)))
    monkeypatch.setattr(type(model), "start_crops", (32, 256) if extreme else (64, 64))
    monkeypatch.setattr(checkpoint, "save", lambda *_: None)            # files of a GB; others test them
    if small.critic:
        save_file(model.state_dict(), tmp_path / "trained.safetensors")
    numbers = []
    step = loop.Trainer.step
    monkeypatch.setattr(loop.Trainer, "step", lambda self, progress: numbers.append(step(self, progress)))
    before = {k: v.clone() for k, v in model.state_dict().items() if k.startswith(DECODERS)}
    result = train(small, data=tmp_path / "train", valid=tmp_path / "valid", out=tmp_path / "run", budget_s=4,
                   clock=Clock(), device="cpu", model=model, measures=WEIGHTS if networks else None,
                   init=tmp_path / "trained.safetensors" if small.critic else None)
    assert result["step"] == 3 and result["skipped"] == 0
    assert result["state"] == ("stopped" if small.schedule.steps else "done")       # of millions of steps
    assert all(row is not None and 0 < row[1] < 24 for row in numbers)              # bpp; a loss is finite or skipped
    assert not extreme or result["gates"][-1]["gates"]["rcm"]["value"] < 1
    after = model.state_dict()
    assert all(torch.isfinite(after[k]).all() for k in before)
    assert not any(torch.equal(after[k], v) for k, v in before.items() if k.endswith("proj.weight"))
    assert any(not torch.equal(after[k], v) for k, v in before.items())
