"""The only door to shipping: a training checkpoint -> a weight file for use.

Rounds the weights for storage, turns the normative networks into an integer program (calibrated on pictures), freezes
the frequency tables, writes the card, then codes real files with the result and writes what they cost into the card.
Raises UsageError, WeightsError.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linic import weights
from linic.errors import UsageError
from linic.train import checkpoint

if TYPE_CHECKING:
    from linic.models import Lalic
    from linic.models.lower import Seen

QUALITIES = (10, 50, 90)
CALIBRATION_PICTURES, CALIBRATION_SIDE = 12, 384        # float64, 4 qualities: about a minute


def export(source: str | Path, out: str | Path, *, measure: str | Path | None = None,
           about: dict[str, Any] | None = None, int8: bool = True) -> dict[str, Any]:
    """source: folder of a run (its best weights, else the newest raw ones) or one checkpoint. measure: folder of
    pictures to calibrate on and to code. about: fields for the card (licence, data, history). Returns the card.
    Without pictures to calibrate on, the program has 14-bit weights and coarser units: larger, slower, a bit worse."""
    from linic.models import build

    path = Path(source)
    run = path if path.is_dir() else path.parent
    if path.is_dir():
        path = next((p for p in (run / "best.safetensors", run / "raw.safetensors") if p.exists()), path)
    if not path.is_file():
        raise UsageError(f"{source}: no checkpoint there (best.safetensors or raw.safetensors)")
    tensors, kept = checkpoint.load(path)
    if "preset" not in kept:
        raise UsageError(f"{path}: not a checkpoint of `linic train` (it does not name its preset)")
    model = build(kept["preset"]).eval()
    missing, extra = checkpoint.take_over(model, tensors, str(path))
    if missing or extra:
        raise UsageError(f"{path}: does not fit preset {kept['preset']}: {', '.join([*missing, *extra][:5])}")
    card = {"licence": "MIT", "history": _history(run / "status.json", kept), **(about or {})}
    seen = _calibrate(model, Path(measure)) if measure else None
    card = weights.save(out, model, card, int8=int8, seen=seen)
    if measure:
        card = weights.save(out, model, {**card, "measured": _measure(Path(out), Path(measure))}, int8=int8, seen=seen)
    return card


def _calibrate(model: "Lalic", folder: Path) -> "Seen | None":
    import torch

    from linic.bench import evaluate
    from linic.models.lower import calibrate, can_lower
    from linic.train.data import read_picture

    if not can_lower(model.config):
        return None
    multiple, crops = model.config.multiple, []
    for path in evaluate.pictures_in(folder)[:CALIBRATION_PICTURES]:
        pixels = torch.from_numpy(read_picture(path))
        height, width = (min(side, CALIBRATION_SIDE) // multiple * multiple for side in pixels.shape[:2])
        if height and width:
            crops.append(pixels[:height, :width])
    return calibrate(model, crops) if crops else None


def _history(status: Path, kept: dict[str, Any]) -> list[dict[str, Any]]:
    """What is known of the run and of the weights that it started from, oldest first."""
    if not status.exists():
        return [kept]
    run = json.loads(status.read_text())
    before: list[dict[str, Any]] = []
    if run.get("init"):
        try:
            before = weights.read_card(weights.find(run["init"])).get("history", [])
        except (weights.ModelMissing, weights.WeightsError):
            before = [{"init": run["init"]}]  # a checkpoint: the log knows it
    keys = ("preset", "step", "crops", "skipped", "elapsed_s", "cpu_s", "pictures", "device", "torch")
    return [*before, {k: run[k] for k in keys if k in run} | {"weights": kept.get("weights", "")}]


def _measure(weight_file: Path, folder: Path) -> dict[str, Any]:
    from linic.bench import evaluate

    result = evaluate.evaluate(evaluate.pictures_in(folder), QUALITIES, model=str(weight_file))
    return {"pictures": folder.name, "quality": list(QUALITIES),
            **{k: result["results"][k] for k in ("bpp", "psnr-rgb")}}
