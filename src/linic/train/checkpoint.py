"""Weights and training state on disk, as safetensors: whole or not at all.

A run's folder:
    raw.safetensors, ema.safetensors    newest weights; trunk: raw before the decay began; best: best on validation
    state.safetensors                   all that --resume needs, in one file so that its parts belong together
    status.json                         where the run stands, for people and scripts
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn, optim

from linic import weights
from linic.errors import UsageError
from linic.models import PRESETS, AnyConfig, Config, Lalic, preset, widen

FORMAT = "linic-training 1"


def replace(path: Path, write: Any) -> None:
    """`write(temporary path)`, then rename: a reader and a crash see the old file or the new one."""
    beside = path.with_name(path.name + ".tmp")
    write(beside)
    with open(beside, "r+b") as f:
        os.fsync(f.fileno())            # else a power cut may leave the new name with no data
    os.replace(beside, path)


def write_json(path: Path, content: Any) -> None:
    replace(path, lambda p: p.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8"))


def save(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """`about` must be JSON; it travels in the file's metadata."""
    host = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    metadata = {"format": FORMAT, "about": json.dumps(about)}

    def write(beside: Path) -> None:
        save_file(host, beside, metadata)
        mask = os.umask(0)
        os.umask(mask)
        beside.chmod(0o666 & ~mask)     # safetensors leaves 0600

    replace(path, write)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as f:
            about = (f.metadata() or {}).get("about", "{}")
            names = list(f.keys())
            return {k: f.get_tensor(k) for k in names}, json.loads(about)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise UsageError(f"{path}: not a checkpoint: {error}") from error


def take_over(model: nn.Module, tensors: dict[str, Tensor], source: str) -> tuple[list[str], list[str]]:
    """Loads what fits by name. Returns the names not in `tensors`, and those the model does not have."""
    own = model.state_dict()
    for name in own.keys() & tensors.keys():
        if own[name].shape != tensors[name].shape:
            raise UsageError(f"{source}: {name} has shape {tuple(tensors[name].shape)}, the model's has "
                             f"{tuple(own[name].shape)}: weights of another preset?")
    if not own.keys() & tensors.keys():
        raise UsageError(f"{source}: no tensor has a name of this model: weights of another family?")
    missing, extra = model.load_state_dict(tensors, strict=False)
    return missing, extra


def initialise(model: nn.Module, init: str | Path,
               say: Callable[[str], None] = lambda line: None) -> tuple[list[str], list[str]]:
    """`init`: a checkpoint of this loop, or what linic.weights knows by name or path. A smaller model of the same
    family is widened (models/widen.py). Returns what `take_over` does."""
    tensors, config = _read(model, init)
    if isinstance(config, Config) and isinstance(model, Lalic) and widen.smaller(config, model.config):
        small = Lalic(config)
        take_over(small, tensors, str(init))
        widen.widen(small, model)
        say(f"{init}: {config.name} widened to {model.config.name}")
        return [], []
    return take_over(model, tensors, str(init))


def _read(model: nn.Module, init: str | Path) -> tuple[dict[str, Tensor], AnyConfig | None]:
    """Weights, and the configuration that they belong to, where that is known."""
    if Path(init).is_file():
        tensors, about = load(Path(init))
        if about or model.state_dict().keys() & tensors.keys():
            return tensors, preset(about["preset"]) if about.get("preset") in PRESETS else None
    found = weights.load(init).model
    return found.state_dict(), found.config


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{k}": v for k, v in tensors.items()}


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.partition("/")[2]: v for k, v in tensors.items() if k.startswith(prefix + "/")}


def optimiser_tensors(optimiser: optim.Optimizer) -> dict[str, Tensor]:
    state = optimiser.state_dict()["state"]
    return {f"{i}.{key}": torch.as_tensor(v) for i, entry in state.items() for key, v in entry.items()}


def restore_optimiser(optimiser: optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Moments only: rates and decay come from the recipe."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def json_like(value: Any) -> Any:
    """As it comes back from a file: tuples are lists, numbers that JSON does not know are null."""
    if isinstance(value, dict):
        return {str(k): json_like(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_like(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
