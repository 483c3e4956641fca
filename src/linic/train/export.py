"""The only door to shipping: a training checkpoint -> a weight file for use.

Rounds the weights for storage, turns the normative networks into an integer program (calibrated on pictures), freezes
the frequency tables, writes the card, then codes real files with the result and writes what they cost into the card.
MRT's decoder that was tuned against a critic comes from a checkpoint of its own and goes into the same file.
Raises UsageError, WeightsError.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linic import weights
from linic.errors import ModelMissing, UsageError, WeightsError
from linic.train import checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from linic.models import Model
    from linic.models.lowering import Seen

QUALITIES = (10, 50, 90)
CALIBRATION_PICTURES, CALIBRATION_SIDE = 12, 384        # float64, 4 qualities: about a minute


def export(source: str | Path, out: str | Path, *, measure: str | Path | None = None,
           about: dict[str, Any] | None = None, int8: bool = True,
           adversarial: str | Path | None = None) -> dict[str, Any]:
    """source: folder of a run (its best weights, else the newest raw ones) or one checkpoint. measure: folder of
    pictures to calibrate on and to code. about: fields for the card (licence, data, history). adversarial: a run or
    checkpoint that went on from `source` with all but the decoder frozen. Returns the card.
    Without pictures to calibrate on, the program has 14-bit weights and coarser units: larger, slower, a bit worse."""
    path, run = _newest(source)
    model, kept = _model(path)
    history, second = _history(run / "status.json", kept), None
    if adversarial is not None:
        path, run = _newest(adversarial)
        other, kept = _model(path)
        second = _second_decoder(model, other, str(path))
        history.append(_history(run / "status.json", kept)[-1])
    card = {"licence": "MIT", "history": history, **(about or {})}
    seen = _calibrate(model, Path(measure)) if measure else None
    card = weights.save(out, model, card, int8, seen, second)
    if measure:
        measured = _measure(Path(out), Path(measure))
        card = weights.save(out, model, {**card, "measured": measured}, int8, seen, second)
    return card


def _newest(source: str | Path) -> tuple[Path, Path]:
    """A checkpoint, and the folder of its run."""
    path = Path(source)
    run = path if path.is_dir() else path.parent
    if path.is_dir():
        path = next((p for p in (run / "best.safetensors", run / "raw.safetensors") if p.exists()), path)
    if not path.is_file():
        raise UsageError(f"{source}: no checkpoint there (best.safetensors or raw.safetensors)")
    return path, run


def _model(path: Path) -> "tuple[Model, dict[str, Any]]":
    """A checkpoint's model, and what it says of itself."""
    from linic.models import build

    tensors, kept = checkpoint.load(path)
    if "preset" not in kept:
        raise UsageError(f"{path}: not a checkpoint of `linic train` (it does not name its preset)")
    model = build(kept["preset"]).eval()
    missing, extra = checkpoint.take_over(model, tensors, str(path))
    if missing or extra:
        raise UsageError(f"{path}: does not fit preset {kept['preset']}: {', '.join([*missing, *extra][:5])}")
    return model, kept


def _second_decoder(model: "Model", other: "Model", source: str) -> "dict[str, Tensor]":
    """The decoder of `other`, for the same files: what makes them must not have moved."""
    import torch

    if model.config.family != "mrt" or other.config != model.config:
        raise UsageError(f"{source}: {other.config.name} is no second decoder for {model.config.name}")
    mine, theirs = model.state_dict(), other.state_dict()
    for key, value in mine.items():
        # Checkpoints may have travelled as bf16.
        same = torch.equal(value.bfloat16(), theirs[key].bfloat16())
        if not (same or weights.second(key) or key in weights.TRAINING_ONLY):
            raise UsageError(f"{source}: {key} differs: its training did not keep the stream frozen")
    return {key: value for key, value in theirs.items() if weights.second(key)}


def _calibrate(model: "Model", folder: Path) -> "Seen | None":
    import torch

    from linic.bench import evaluate
    from linic.models import Mrt, lower, lower_mrt
    from linic.train.data import read_picture

    if not isinstance(model, Mrt) and not lower.can_lower(model.config):
        return None
    multiple, crops = model.config.multiple, []
    for path in evaluate.pictures_in(folder)[:CALIBRATION_PICTURES]:
        pixels = torch.from_numpy(read_picture(path))
        height, width = (min(side, CALIBRATION_SIDE) // multiple * multiple for side in pixels.shape[:2])
        if height and width:
            crops.append(pixels[:height, :width])
    if not crops:
        return None
    return lower_mrt.calibrate(model, crops) if isinstance(model, Mrt) else lower.calibrate(model, crops)


def _history(status: Path, kept: dict[str, Any]) -> list[dict[str, Any]]:
    """What is known of the run and of the weights that it started from, oldest first."""
    if not status.exists():
        return [kept]
    run = json.loads(status.read_text())
    before: list[dict[str, Any]] = []
    if run.get("init"):
        try:
            before = weights.read_card(weights.find(run["init"])).get("history", [])
        except (ModelMissing, WeightsError):
            before = [{"init": Path(run["init"]).name}]  # a checkpoint: the log knows it
    keys = ("preset", "step", "crops", "skipped", "elapsed_s", "cpu_s", "pictures", "device", "torch")
    return [*before, {k: run[k] for k in keys if k in run} | {"weights": kept.get("weights", "")}]


def _measure(weight_file: Path, folder: Path) -> dict[str, Any]:
    from linic.bench import evaluate

    result = evaluate.evaluate(evaluate.pictures_in(folder), QUALITIES, model=str(weight_file))
    return {"pictures": folder.name, "quality": list(QUALITIES),
            **{k: result["results"][k] for k in ("bpp", "bpp_payload", "psnr-rgb")}}
