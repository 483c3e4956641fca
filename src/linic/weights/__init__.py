"""Weight files: safetensors with a card. Load, save, list, digest; the shipped ones are package data (data/).

A file holds, beside the card (JSON in the safetensors metadata under "linic"):
    net.NAME            float16, or int8 with net.NAME::scale (float32, one a row): the model's parameters
    tables.freqs        uint32: the frequency tables, the scale table first, then one a channel of z
    tables.lengths, tables.lows    int32
Listing reads headers only and imports neither torch nor numpy. A file is checked against its own configuration
before any memory is taken for the model.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linic.errors import ModelMissing, WeightsError

if TYPE_CHECKING:
    from torch import Tensor

    from linic.models import Lalic
    from linic.rangecoder import Tables

SHIPPED = Path(__file__).parent / "data"
HEADER_LIMIT = 1 << 22
FORMAT = 0  # 1 begins with the integer programs
_INT8 = ("kvr.weight", "kr.weight", "out.weight")  # of free blocks; see save()


@dataclass
class Weights:
    """A loaded file. `digest`: 8 bytes that name everything that steers the range coder."""

    card: dict[str, Any]
    model: "Lalic"  # eval mode, float32, training form (Omni-Shift not merged)
    tables: "Tables"
    digest: bytes


def folders() -> list[Path]:
    """Where weight files are looked for: LINIC_MODELS (a path list) first, then the shipped ones."""
    return [Path(p) for p in os.environ.get("LINIC_MODELS", "").split(os.pathsep) if p] + [SHIPPED]


def read_card(path: Path) -> dict[str, Any]:
    """The card of a weight file, out of its header alone. Raises WeightsError."""
    try:
        with path.open("rb") as f:
            size = int.from_bytes(f.read(8), "little")
            if size > min(HEADER_LIMIT, path.stat().st_size - 8):
                raise WeightsError(f"{path}: not a safetensors file (its header claims {size} bytes)")
            metadata = json.loads(f.read(size)).get("__metadata__", {})
        card = json.loads(metadata["linic"])
        if card["format"] != FORMAT:
            raise WeightsError(f"{path}: weight format {card['format']}; this linic reads {FORMAT}")
        assert isinstance(card["name"], str) and isinstance(card["config"], dict)
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{path}: no linic card in it. Weight files are made by `linic export`") from error
    return card


def available() -> list[dict[str, Any]]:
    """The card of every installed model, with `path` and `bytes`; a broken file has `error` instead of a card."""
    found: list[dict[str, Any]] = []
    for folder in folders():
        for path in sorted(folder.glob("*.safetensors")):
            entry: dict[str, Any] = {"name": path.stem, "path": str(path), "bytes": path.stat().st_size}
            try:
                entry = {**read_card(path), **entry, "name": read_card(path)["name"]}
            except WeightsError as error:
                entry["error"] = str(error)
            found.append(entry)
    return found


def find(name: str | os.PathLike[str]) -> Path:
    """The file of a model by name, or the path itself where it is one. Raises ModelMissing."""
    if os.sep in str(name) or str(name).endswith(".safetensors"):
        if not Path(name).is_file():
            raise ModelMissing(f"no weight file {name}")
        return Path(name)
    models = [m for m in available() if "error" not in m]
    for model in models:
        if model["name"] == name:
            return Path(model["path"])
    raise ModelMissing(f"no model {str(name)!r}. Installed: {', '.join(m['name'] for m in models) or 'none'}. "
                       "Put its weight file into a folder and name that folder in LINIC_MODELS")


def find_digest(digest: bytes, hint: str = "") -> Path:
    """The file of the model that wrote a picture. `hint`: the name that the picture's model code stands for."""
    models = [m for m in available() if "error" not in m]
    for model in models:
        if model.get("digest") == digest.hex():
            return Path(model["path"])
    raise ModelMissing(f"the file needs model {hint or 'unknown'} with digest {digest.hex()}. Installed: "
                       + (", ".join(f"{m['name']} {m.get('digest')}" for m in models) or "none")
                       + ". Put its weight file into a folder and name that folder in LINIC_MODELS")


def load(name: str | os.PathLike[str]) -> Weights:
    """A model with its weights, by name or path. Raises ModelMissing, WeightsError."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from linic.errors import UsageError
    from linic.models import build
    from linic.models.config import from_dict
    from linic.rangecoder import Tables

    path = find(name)
    card = read_card(path)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: {error}") from error
    try:
        with torch.device("meta"):  # shapes only: a hostile configuration must not take memory
            model = build(from_dict(card["config"], f"{path}: config"))
    except UsageError as error:
        raise WeightsError(str(error)) from error
    state = {}
    for key, meta in model.state_dict().items():
        stored = tensors.get(f"net.{key}")
        if stored is None or stored.shape != meta.shape:
            raise WeightsError(f"{path}: {key} should have shape {tuple(meta.shape)}, "
                               f"the file has {'nothing' if stored is None else tuple(stored.shape)}")
        value = stored.float()
        if stored.dtype == torch.int8:
            scale = tensors.get(f"net.{key}::scale")
            if scale is None or scale.shape != stored.shape[:1]:
                raise WeightsError(f"{path}: {key} is int8 and has no scale for each row")
            value = value * scale[:, None]
        if not torch.isfinite(value).all():
            raise WeightsError(f"{path}: {key} is not finite")
        state[key] = value
    model.load_state_dict(state, assign=True)
    digest = _digest(card["config"], tensors, normative_keys(model))
    if digest.hex() != card.get("digest"):
        raise WeightsError(f"{path}: its digest is {digest.hex()}, its card says {card.get('digest')}: damaged file")
    try:
        tables = Tables(*(tensors[f"tables.{part}"].numpy() for part in ("freqs", "lengths", "lows")))
    except KeyError as error:
        raise WeightsError(f"{path}: no {error} in it") from error
    return Weights(card, model.eval(), tables, digest)


def save(path: str | os.PathLike[str], model: "Lalic", card: dict[str, Any], int8: bool = True) -> dict[str, Any]:
    """Write a model for use; returns the card as written. Beside, then rename.

    Matrices of the free nets' blocks go as int8 with a scale a row where `int8`; all else as float16 (bf16 has as
    many bytes and three fewer digits). The linear path through the resampling layers carries the picture itself: in
    int8 it cost up to .4 dB. Frequency tables are made here, once.
    """
    import numpy as np
    import torch
    from safetensors.torch import save_file

    from linic.models.config import to_dict
    from linic.rangecoder import tables as rangetables

    config = model.config
    tensors: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        value = value.detach().float().cpu()
        if int8 and key.endswith(_INT8) and key.startswith(("g_a.", "g_s.", "h_a.")):
            scale = value.abs().amax(1).clamp_min(1e-12) / 127
            tensors[f"net.{key}"] = torch.round(value / scale[:, None]).to(torch.int8)
            tensors[f"net.{key}::scale"] = scale
        else:
            half = value.half()
            if not torch.isfinite(half).all():
                raise WeightsError(f"{key} does not fit float16 (largest {value.abs().max():.4g}): not a sound model")
            tensors[f"net.{key}"] = half
    # The tables belong to the density as stored, not as trained.
    for key, value in model.density.state_dict().items():
        value.copy_(tensors[f"net.density.{key}"].float())
    gaussian = rangetables.gaussian_tables(rangetables.scale_table(config.scales))
    parts = [(gaussian.freqs, gaussian.lengths, gaussian.lows)]
    z = model.density.double().probabilities(config.hyper_latents)
    model.density.float()
    freqs = [rangetables.quantise(p) for _, p in z]
    parts.append((np.concatenate([np.asarray(f, np.uint32) for f in freqs]),
                  np.asarray([len(f) for f in freqs], np.int32), np.asarray([low for low, _ in z], np.int32)))
    for name, arrays in zip(("freqs", "lengths", "lows"), zip(*parts)):
        tensors[f"tables.{name}"] = torch.from_numpy(np.concatenate(arrays).copy())
    config_data = json.loads(json.dumps(to_dict(config)))
    digest = _digest(config_data, tensors, normative_keys(model))
    card = {"format": FORMAT, "name": config.name, **card, "config": config_data, "digest": digest.hex(),
            "parameters": sum(p.numel() for p in model.parameters())}
    temporary = Path(f"{path}.tmp{os.getpid()}")
    save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, {"linic": json.dumps(card)})
    os.replace(temporary, path)
    return card


def normative_keys(model: "Lalic") -> set[str]:
    """Names of the parameters that steer the range coder."""
    mine = {id(p) for net in model.normative() for p in net.parameters()}
    return {k for k, v in model.state_dict(keep_vars=True).items() if id(v) in mine} | (
        {"ln_prior"} & set(model.state_dict()))


def _digest(config: dict[str, Any], tensors: "dict[str, Tensor]", normative: set[str]) -> bytes:
    """First 8 bytes of SHA-256 over the configuration and the normative tensors and tables, in order of their names:
    name, type, shape, bytes."""
    h = hashlib.sha256(json.dumps({k: v for k, v in config.items() if k != "name"}, sort_keys=True).encode())
    for key in sorted(tensors):
        if key.startswith("tables.") or key.removeprefix("net.") in normative:
            t = tensors[key].contiguous()
            h.update(f"{key} {t.dtype} {tuple(t.shape)}\n".encode())
            h.update(t.numpy().tobytes())
    return h.digest()[:8]
