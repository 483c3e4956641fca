"""Weight files: safetensors with a card, or the same gzipped. Load, save, list, digest; the shipped ones are in data/.

A file holds, beside the card (JSON in the safetensors metadata under "linic"):
    net.NAME            float16, or int8 with net.NAME::scale (float32, one a row): the model's parameters
    int.NAME            integers: tensors of the normative program, whose lines the card has. Where NAME is a parameter,
                        int.NAME::scale (float32, one a row) gives it back, and there is no net.NAME
    tables.freqs        uint32: the frequency tables, the scale table first, then (LALIC) one a channel of z
    tables.lengths, tables.lows    int32
    adversarial.NAME    MRT: a second decoder, stored as net.NAME is, NAME from the parts that `second` names
The program is one of entropy/program.py (LALIC) or steps.py (MRT). Without one (models imported from elsewhere) the
normative networks run in float64, on the writer's machine only. A file is checked against its own configuration before
any memory is taken for the model. Where files lie and how one is found: installed.py.
"""

import gzip
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

from linic.errors import WeightsError
from linic.weights.installed import (
    FORMAT,
    SHIPPED,
    add,
    available,
    find,
    find_digest,
    folders,
    own_folder,
    read_card,
    whole,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from linic.entropy.convert import Builder
    from linic.entropy.program import Program
    from linic.entropy.steps import StepProgram
    from linic.models import AnyConfig, Lalic, Model
    from linic.models.lowering import Seen
    from linic.rangecoder import Tables

__all__ = ["SHIPPED", "TRAINING_ONLY", "Weights", "add", "available", "find", "find_digest", "folders", "known_answer",
           "load", "load_program", "normative_keys", "own_folder", "read_card", "save", "second"]
_TYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint32")
# Of free blocks; see save().
_INT8 = ("kvr.weight", "kr.weight", "out.weight", "qkv.weight", "wide.weight", "narrow.weight", "conv1.weight",
         "conv2.weight")
_FREE = ("g_a.", "g_s.", "h_a.", "encoder.", "decoder.")
TRAINING_ONLY = ("rate_control",)   # not stored: zeros


@dataclass
class Weights:
    """A loaded file. `digest`: 8 bytes that name everything that steers the range coder."""

    card: dict[str, Any]
    model: "Model"  # eval mode, float32, training form (Omni-Shift not merged)
    program: "Program | StepProgram | None"
    tables: "Tables"
    digest: bytes
    adversarial: "dict[str, Tensor] | None" = None  # of the model's state: its decoder tuned against a critic


def load(name: str | os.PathLike[str]) -> Weights:
    """A model with its weights, by name or path. Raises ModelMissing, WeightsError."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load as parse

    from linic.errors import UsageError
    from linic.models import build
    from linic.models.config import MrtConfig, from_dict
    from linic.models.lower_mrt import refused

    path = find(name)
    card = read_card(path)
    try:
        tensors = parse(whole(path))
    except (SafetensorError, KeyError) as error:
        raise WeightsError(f"{path}: {error}") from error
    for key, tensor in tensors.items():
        if str(tensor.dtype).removeprefix("torch.") not in _TYPES:
            raise WeightsError(f"{path}: {key} is {tensor.dtype}, not one of {', '.join(_TYPES)}")
    try:
        config = from_dict(card["config"], f"{path}: config")
        if (blocks := _blocks(config)) > len(tensors):       # each has several
            raise WeightsError(f"{path}: {len(tensors)} tensors, and its configuration claims {blocks} blocks")
        if isinstance(config, MrtConfig) and (reason := refused(config) or (not card.get("program") and "no program")):
            raise WeightsError(f"{path}: a model that makes no files: {reason}")
        with torch.device("meta"):  # shapes only: a hostile configuration must not take memory
            model = build(config)
    except UsageError as error:
        raise WeightsError(str(error)) from error
    shapes = {key: meta.shape for key, meta in model.state_dict().items()}
    state = {key: torch.zeros(shape) if key in TRAINING_ONLY else _read(path, tensors, "net", key, shape)
             for key, shape in shapes.items()}
    adversarial = None
    if any(key.startswith("adversarial.") for key in tensors):
        adversarial = {key: _read(path, tensors, "adversarial", key, shape)
                       for key, shape in shapes.items() if second(key)}
    model.load_state_dict(state, assign=True)
    arrays = {key: t.numpy() for key, t in tensors.items() if key.startswith(("tables.", "int.")) and "::" not in key}
    program, tables = _program(path, card, arrays)
    digest = _digest(card, program, _steering(model, tensors))
    _compare(path, card, digest)
    if (found := _checksum(tensors)) != card.get("checksum"):
        raise WeightsError(f"{path}: the checksum of its tensors is {found}, its card says {card.get('checksum')}: "
                           "damaged file")
    return Weights(card, model.eval(), program, tables, digest, adversarial)


def second(key: str) -> bool:
    """Whether a parameter is one of those that a second decoder has of its own."""
    return key.startswith("decoder.") or key == "gain_dec"


def _blocks(config: "AnyConfig") -> int:
    if config.family == "mrt":
        return config.encoder_pairs + config.decoder_pairs + sum(config.pixel_depths) + config.rcm_depth
    nets = config.transform, config.hyper
    return 2 * sum(sum(net.depths) for net in nets) + len(config.context.groups) * config.context.depth


def _read(path: Path, tensors: "dict[str, Tensor]", prefix: str, key: str, shape: tuple[int, ...]) -> "Tensor":
    """A parameter in float32, or a WeightsError where it is not there as it should be."""
    import torch

    name = f"{prefix}.{key}"
    if name not in tensors and prefix == "net":
        name = f"int.{key}"
    stored = tensors.get(name)
    if stored is None or stored.shape != shape:
        raise WeightsError(f"{path}: {key} should have shape {tuple(shape)}, "
                           f"the file has {'nothing' if stored is None else tuple(stored.shape)}")
    value = stored.float()
    if not stored.is_floating_point():
        scale = tensors.get(f"{name}::scale")
        if scale is None or stored.ndim == 0 or scale.shape != stored.shape[:1]:
            raise WeightsError(f"{path}: {key} is {stored.dtype} and has no scale for each row")
        value = value * scale.view(-1, *[1] * (stored.ndim - 1)).float()
    if not torch.isfinite(value).all():
        raise WeightsError(f"{path}: {key} is not finite")
    return value


def load_program(name: str | os.PathLike[str]) -> "tuple[Program | StepProgram, Tables, bytes]":
    """The normative part of a model alone: program, tables, digest. Needs NumPy, not torch. Raises ModelMissing,
    WeightsError (also where the model has no program)."""
    from safetensors import SafetensorError
    from safetensors.numpy import load as parse

    path = find(name)
    card = read_card(path)
    try:
        arrays = {key: array for key, array in parse(whole(path)).items()
                  if key.startswith(("tables.", "int.")) and "::" not in key}
    except (SafetensorError, KeyError, TypeError, AttributeError) as error:    # the last three: types that NumPy lacks
        raise WeightsError(f"{path}: {error}") from error
    program, tables = _program(path, card, arrays)
    if program is None:
        raise WeightsError(f"{path}: has no integer program: its files are verified by decoding them, with torch")
    digest = _digest(card, program, {k: v for k, v in arrays.items() if k.startswith("tables.")})
    _compare(path, card, digest)
    return program, tables, digest


def known_answer(program: "Program | StepProgram", tables: "Tables", backend: Any = None) -> str:
    """What a program's card must state; on `backend`, or on NumPy."""
    from linic.entropy import program as programs
    from linic.entropy import steps

    backend = backend or steps.Numpy(program)
    if isinstance(program, steps.StepProgram):
        return steps.known_answer(program, tables, backend)
    return programs.known_answer(program, tables, backend)


def _program(path: Path, card: dict[str, Any],
             arrays: "dict[str, np.ndarray]") -> "tuple[Program | StepProgram | None, Tables]":
    from linic.entropy.program import Program
    from linic.entropy.steps import StepProgram
    from linic.rangecoder import Tables

    try:
        tables = Tables(*(arrays[f"tables.{part}"] for part in ("freqs", "lengths", "lows")))
    except KeyError as error:
        raise WeightsError(f"{path}: no {error} in it") from error
    if card.get("program") is None:
        return None, tables
    scales = card["config"].get("scales")
    if type(scales) is not int or not 0 < scales <= len(tables):
        raise WeightsError(f"{path}: {scales!r} scales and {len(tables)} tables")
    kind = StepProgram if card["config"].get("family") == "mrt" else Program
    program = kind(card["program"], {k.removeprefix("int."): v for k, v in arrays.items()}, scales)
    if len(tables) != scales + program.z_channels:
        raise WeightsError(f"{path}: {len(tables)} tables; the program needs {scales + program.z_channels}")
    if program.latents != card["config"].get("latents"):
        raise WeightsError(f"{path}: the program codes {program.latents} latents, the configuration has others")
    return program, tables


def _compare(path: Path, card: dict[str, Any], digest: bytes) -> None:
    if digest.hex() != card.get("digest"):
        raise WeightsError(f"{path}: its digest is {digest.hex()}, its card says {card.get('digest')}: damaged file")


def save(path: str | os.PathLike[str], model: "Model", card: dict[str, Any], int8: bool = True,
         seen: "Seen | None" = None, adversarial: "dict[str, Tensor] | None" = None) -> dict[str, Any]:
    """Write a model for use; returns the card as written. Beside, then rename. seen: of the family's `calibrate`
    (models/lower.py, lower_mrt.py), for an integer program with 8-bit weights; without it they have 14. adversarial:
    MRT's second decoder, the parameters of the model's state that `second` names.

    Matrices and convolutions of the free nets' blocks go as int8 with a scale a row where `int8`; all else as float16
    (bf16 has as many bytes and three fewer digits). The linear path through the resampling layers carries the picture
    itself: in int8 it cost up to .4 dB. What goes costs MRT .002 dB. Frequency tables are made here, once. With a
    path that ends in .gz the file is gzipped, and weights keep 8 of float16's 10 digits: the others are noise to gzip.
    """
    import torch
    from safetensors.torch import save as serialise

    from linic.models import Mrt
    from linic.models.config import to_dict
    from linic.models.lower_mrt import scales
    from linic.picture import write_whole
    from linic.rangecoder.tables import laplace_tables

    config = model.config
    builder, program = _lowered(model, seen)
    tensors: dict[str, Tensor] = {}
    zipped = str(path).endswith(".gz")
    if program is not None:
        tensors = {f"int.{key}": torch.from_numpy(value) for key, value in builder.finish().items()}
    for key, value in model.state_dict().items():
        if program is not None and key in builder.scales and program.tensors[key].shape == value.shape:
            tensors[f"int.{key}::scale"] = torch.from_numpy(builder.scales[key]).float()
        elif key not in TRAINING_ONLY:
            small = int8 and key.endswith(_INT8) and key.startswith(_FREE)
            tensors |= _stored(f"net.{key}", value, small, zipped)
    for key, value in (adversarial or {}).items():
        tensors |= _stored(f"adversarial.{key}", value, int8 and key.endswith(_INT8), zipped)
    tables = laplace_tables(scales(model.config)) if isinstance(model, Mrt) else _gaussian(model, tensors)
    for name in ("freqs", "lengths", "lows"):
        tensors[f"tables.{name}"] = torch.from_numpy(getattr(tables, name).copy())
    config_data = json.loads(json.dumps(to_dict(config)))
    lines = answer = None
    if program is not None:
        lines, answer = program.lines(), known_answer(program, tables)
    digest = _digest({"config": config_data}, program, _steering(model, tensors))
    tensors = {k: v.contiguous() for k, v in tensors.items()}
    card = {"format": FORMAT, "name": config.name, **card, "config": config_data, "program": lines,
            "known_answer": answer, "digest": digest.hex(),
            "checksum": _checksum(tensors), "parameters": sum(p.numel() for p in model.parameters())}
    if adversarial:
        card["decoders"] = ["faithful", "adversarial"]
    data = serialise(tensors, {"linic": json.dumps(card)})
    write_whole(path, gzip.compress(data, mtime=0) if zipped else data)
    return card


def _lowered(model: "Model", seen: "Seen | None") -> "tuple[Builder, Program | StepProgram] | tuple[Any, None]":
    """The normative part as integers; no program where the family's bounds are not kept."""
    from linic.entropy.program import Program
    from linic.entropy.steps import StepProgram
    from linic.models import Mrt, lower, lower_mrt

    if isinstance(model, Mrt):
        builder = lower_mrt.lower(model, seen)
        return builder, StepProgram(builder.lines, builder.finish(), model.config.scales)
    if not lower.can_lower(model.config):
        return None, None
    builder = lower.lower(model, seen)
    return builder, Program(builder.lines, builder.finish(), model.config.scales)


def _stored(name: str, value: "Tensor", int8: bool, zipped: bool) -> "dict[str, Tensor]":
    import torch

    value = value.detach().float().cpu()
    if int8:
        scale = value.abs().flatten(1).amax(1).clamp_min(1e-12) / 127
        each = scale.view(-1, *[1] * (value.ndim - 1))
        return {name: torch.round(value / each).to(torch.int8), f"{name}::scale": scale}
    if zipped and name.endswith("weight") and value.ndim > 1:
        mantissa, exponent = torch.frexp(value)         # 1/2 <= |mantissa| < 1: one digit and 8 more
        value = torch.ldexp(torch.round(mantissa * 512) / 512, exponent)
    half = value.half()
    if not torch.isfinite(half).all():
        raise WeightsError(f"{name.partition('.')[2]} does not fit float16 (largest {value.abs().max():.4g}): "
                           "not a sound model")
    return {name: half}


def _gaussian(model: "Lalic", tensors: "dict[str, Tensor]") -> "Tables":
    """Of y's scales, then of z's channels."""
    import numpy as np

    from linic.rangecoder import tables

    # The tables belong to the density as stored, not as trained.
    for key, value in model.density.state_dict().items():
        value.copy_(tensors[f"net.density.{key}"].float())
    y = tables.gaussian_tables(tables.scale_table(model.config.scales))
    z = model.density.double().probabilities(model.config.hyper_latents)
    model.density.float()
    freqs = [tables.quantise(p) for _, p in z]
    return tables.Tables(np.concatenate([y.freqs, *(np.asarray(f, np.uint32) for f in freqs)]),
                         np.concatenate([y.lengths, np.asarray([len(f) for f in freqs], np.int32)]),
                         np.concatenate([y.lows, np.asarray([low for low, _ in z], np.int32)]))


def _steering(model: "Model", tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
    normative = normative_keys(model)
    return {k: v for k, v in tensors.items() if k.startswith("tables.") or k.removeprefix("net.") in normative}


def normative_keys(model: "Model") -> set[str]:
    """Names of the parameters that steer the range coder."""
    mine = {id(p) for net in model.normative() for p in net.parameters()}
    return {k for k, v in model.state_dict(keep_vars=True).items() if id(v) in mine} | (
        {"ln_prior"} & set(model.state_dict()))


def _checksum(tensors: "dict[str, Tensor]") -> str:
    """CRC-32 of all bytes, in the order of the names: against damage, where the digest names the normative part."""
    crc = 0
    for key in sorted(tensors):
        crc = crc32(tensors[key].view(-1).numpy().tobytes(), crc)
    return f"{crc:08x}"


def _digest(card: dict[str, Any], program: "Program | StepProgram | None", tensors: Mapping[str, Any]) -> bytes:
    """First 8 bytes of SHA-256 over everything that steers the range coder. With a program: its own digest, then the
    tables (`tensors`: name, type, shape, bytes, in order of their names). Without: the configuration takes the
    program's place, and the float parameters of the normative networks come among the tensors."""
    if program is not None:
        h = hashlib.sha256(program.digest())
        tensors = {k: v for k, v in tensors.items() if k.startswith("tables.")}
    else:
        config = {k: v for k, v in card["config"].items() if k != "name"}
        h = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for key in sorted(tensors):
        array = tensors[key] if hasattr(tensors[key], "astype") else tensors[key].contiguous().numpy()
        h.update(f"{key} {array.dtype.name} {array.shape}\n".encode())
        h.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return h.digest()[:8]
