"""Weight files: safetensors with a card. Load, save, list, digest; the shipped ones are package data (data/).

A file holds, beside the card (JSON in the safetensors metadata under "linic"):
    net.NAME            float16, or int8 with net.NAME::scale (float32, one a row): the model's parameters
    int.NAME            integers: tensors of the normative program, whose lines the card has. Where NAME is a parameter,
                        int.NAME::scale (float32, one a row) gives it back, and there is no net.NAME
    tables.freqs        uint32: the frequency tables, the scale table first, then one a channel of z
    tables.lengths, tables.lows    int32
Without a program (models imported from elsewhere) the normative networks run in float64, on the writer's machine only.
Listing reads headers only and imports neither torch nor numpy. A file is checked against its own configuration
before any memory is taken for the model.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

from linic.errors import ModelMissing, WeightsError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from linic.entropy.program import Program
    from linic.models import Lalic
    from linic.models.lower import Seen
    from linic.rangecoder import Tables

SHIPPED = Path(__file__).parent / "data"
HEADER_LIMIT = 1 << 22
FORMAT = 1
LARGEST = 64 << 20      # bytes of a file to install
HOW_TO_GET = "`linic models add PATH|URL` installs one; LINIC_MODELS names further folders"
_TYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint32")
_INT8 = ("kvr.weight", "kr.weight", "out.weight")  # of free blocks; see save()


@dataclass
class Weights:
    """A loaded file. `digest`: 8 bytes that name everything that steers the range coder."""

    card: dict[str, Any]
    model: "Lalic"  # eval mode, float32, training form (Omni-Shift not merged)
    program: "Program | None"
    tables: "Tables"
    digest: bytes


def folders() -> list[Path]:
    """Where weight files are looked for: LINIC_MODELS (a path list) first, then what `add` has brought, then the
    shipped ones."""
    named = [Path(p) for p in os.environ.get("LINIC_MODELS", "").split(os.pathsep) if p]
    return [*named, own_folder(), SHIPPED]


def own_folder() -> Path:
    """Of this user: $XDG_DATA_HOME/linic/models, by default ~/.local/share/linic/models."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "linic" / "models"


def add(source: str) -> dict[str, Any]:
    """Installs a weight file for this user, from a path or an http(s) address, after checking all of it; returns its
    card, with `path`. Raises UsageError, WeightsError."""
    from urllib.error import URLError
    from urllib.request import urlopen

    from linic.errors import UsageError

    folder = own_folder()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"new{os.getpid()}.tmp"
    try:
        with (urlopen(source, timeout=60) if source.startswith(("http://", "https://")) else open(source, "rb")) as f:
            data = f.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise UsageError(f"{source}: larger than {LARGEST >> 20} MiB, no weight file of linic is")
        temporary.write_bytes(data)
        try:
            card = _checked(temporary)
        except WeightsError as error:
            raise WeightsError(str(error).replace(str(temporary), source)) from error
        path = folder / f"{card['name']}-{card['digest']}.safetensors"
        os.replace(temporary, path)
    except (URLError, OSError) as error:
        raise UsageError(f"{source}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return {**card, "path": str(path)}


def _checked(path: Path) -> dict[str, Any]:
    """The card of a file that loads and whose program, if it has one, gives its known answer."""
    from linic.entropy.program import Numpy, known_answer

    loaded = load(path)
    card, program, tables = loaded.card, loaded.program, loaded.tables
    if program and known_answer(program, tables, Numpy(program)) != card.get("known_answer"):
        raise WeightsError(f"{path}: its program does not give the answer that its card states: damaged file")
    return card


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
        # add() makes a path of the name.
        if not isinstance(card["config"], dict) or not re.fullmatch(r"\w[\w.-]{0,63}", card["name"]):
            raise WeightsError(f"{path}: a card without configuration, or its name is none")
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError) as error:
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
                card = read_card(path)
                card.pop("program", None)   # long, and `linic models show` prints it
                entry = {**entry, **card}
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
                       f"{HOW_TO_GET}")


def find_digest(digest: bytes, hint: str = "") -> Path:
    """The file of the model that wrote a picture. `hint`: the name that the picture's model code stands for."""
    models = [m for m in available() if "error" not in m]
    for model in models:
        if model.get("digest") == digest.hex():
            return Path(model["path"])
    raise ModelMissing(f"the file needs model {hint or 'unknown'} with digest {digest.hex()}. Installed: "
                       + (", ".join(f"{m['name']} {m.get('digest')}" for m in models) or "none")
                       + f". {HOW_TO_GET}")


def load(name: str | os.PathLike[str]) -> Weights:
    """A model with its weights, by name or path. Raises ModelMissing, WeightsError."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from linic.errors import UsageError
    from linic.models import build
    from linic.models.config import from_dict

    path = find(name)
    card = read_card(path)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, KeyError) as error:
        raise WeightsError(f"{path}: {error}") from error
    for key, tensor in tensors.items():
        if str(tensor.dtype).removeprefix("torch.") not in _TYPES:
            raise WeightsError(f"{path}: {key} is {tensor.dtype}, not one of {', '.join(_TYPES)}")
    try:
        config = from_dict(card["config"], f"{path}: config")
        nets = config.transform, config.hyper
        blocks = 2 * sum(sum(net.depths) for net in nets) + len(config.context.groups) * config.context.depth
        if blocks > len(tensors):       # each has several
            raise WeightsError(f"{path}: {len(tensors)} tensors, and its configuration claims {blocks} blocks")
        with torch.device("meta"):  # shapes only: a hostile configuration must not take memory
            model = build(config)
    except UsageError as error:
        raise WeightsError(str(error)) from error
    state = {}
    for key, meta in model.state_dict().items():
        name = f"net.{key}" if f"net.{key}" in tensors else f"int.{key}"
        stored = tensors.get(name)
        if stored is None or stored.shape != meta.shape:
            raise WeightsError(f"{path}: {key} should have shape {tuple(meta.shape)}, "
                               f"the file has {'nothing' if stored is None else tuple(stored.shape)}")
        value = stored.float()
        if not stored.is_floating_point():
            scale = tensors.get(f"{name}::scale")
            if scale is None or stored.ndim == 0 or scale.shape != stored.shape[:1]:
                raise WeightsError(f"{path}: {key} is {stored.dtype} and has no scale for each row")
            value = value * scale.view(-1, *[1] * (stored.ndim - 1)).float()
        if not torch.isfinite(value).all():
            raise WeightsError(f"{path}: {key} is not finite")
        state[key] = value
    model.load_state_dict(state, assign=True)
    arrays = {key: t.numpy() for key, t in tensors.items() if key.startswith(("tables.", "int.")) and "::" not in key}
    program, tables = _program(path, card, arrays)
    digest = _digest(card, program, _steering(model, tensors))
    _compare(path, card, digest)
    if (found := _checksum(tensors)) != card.get("checksum"):
        raise WeightsError(f"{path}: the checksum of its tensors is {found}, its card says {card.get('checksum')}: "
                           "damaged file")
    return Weights(card, model.eval(), program, tables, digest)


def load_program(name: str | os.PathLike[str]) -> "tuple[Program, Tables, bytes]":
    """The normative part of a model alone: program, tables, digest. Needs NumPy, not torch. Raises ModelMissing,
    WeightsError (also where the model has no program)."""
    from safetensors import SafetensorError, safe_open

    path = find(name)
    card = read_card(path)
    try:
        with safe_open(path, framework="numpy") as f:
            names = [k for k in f.keys()  # noqa: SIM118
                     if k.startswith(("tables.", "int.")) and "::" not in k]
            arrays = {key: f.get_tensor(key) for key in names}
    except (SafetensorError, OSError, TypeError, AttributeError) as error:     # the last two: types that NumPy lacks
        raise WeightsError(f"{path}: {error}") from error
    program, tables = _program(path, card, arrays)
    if program is None:
        raise WeightsError(f"{path}: has no integer program: its files are verified by decoding them, with torch")
    digest = _digest(card, program, {k: v for k, v in arrays.items() if k.startswith("tables.")})
    _compare(path, card, digest)
    return program, tables, digest


def _program(path: Path, card: dict[str, Any], arrays: "dict[str, np.ndarray]") -> "tuple[Program | None, Tables]":
    from linic.entropy.program import Program
    from linic.rangecoder import Tables

    try:
        tables = Tables(*(arrays[f"tables.{part}"] for part in ("freqs", "lengths", "lows")))
    except KeyError as error:
        raise WeightsError(f"{path}: no {error} in it") from error
    if card.get("program") is None:
        return None, tables
    scales = card["config"].get("scales")
    if type(scales) is not int or not 0 < scales < len(tables):
        raise WeightsError(f"{path}: {scales!r} scales and {len(tables)} tables")
    program = Program(card["program"], {k.removeprefix("int."): v for k, v in arrays.items()}, scales)
    if len(tables) != scales + program.z_channels:
        raise WeightsError(f"{path}: {len(tables)} tables; the program needs {scales + program.z_channels}")
    if program.latents != card["config"].get("latents"):
        raise WeightsError(f"{path}: the program codes {program.latents} latents, the configuration has others")
    return program, tables


def _compare(path: Path, card: dict[str, Any], digest: bytes) -> None:
    if digest.hex() != card.get("digest"):
        raise WeightsError(f"{path}: its digest is {digest.hex()}, its card says {card.get('digest')}: damaged file")


def save(path: str | os.PathLike[str], model: "Lalic", card: dict[str, Any], int8: bool = True,
         seen: "Seen | None" = None) -> dict[str, Any]:
    """Write a model for use; returns the card as written. Beside, then rename. seen: of models.lower.calibrate, for an
    integer program with 8-bit weights; without it they have 14.

    Matrices of the free nets' blocks go as int8 with a scale a row where `int8`; all else as float16 (bf16 has as
    many bytes and three fewer digits). The linear path through the resampling layers carries the picture itself: in
    int8 it cost up to .4 dB. Frequency tables are made here, once.
    """
    import numpy as np
    import torch
    from safetensors.torch import save_file

    from linic.entropy.program import Numpy, Program, known_answer
    from linic.models.config import to_dict
    from linic.models.lower import can_lower, lower
    from linic.rangecoder import tables as rangetables

    config, program = model.config, None
    tensors: dict[str, Tensor] = {}
    if can_lower(config):
        builder = lower(model, seen)
        made = builder.finish()
        program = Program(builder.lines, made, config.scales)
        tensors = {f"int.{key}": torch.from_numpy(value) for key, value in made.items()}
    for key, value in model.state_dict().items():
        value = value.detach().float().cpu()
        if program is not None and key in builder.scales and program.tensors[key].shape == value.shape:
            tensors[f"int.{key}::scale"] = torch.from_numpy(builder.scales[key]).float()
        elif int8 and key.endswith(_INT8) and key.startswith(("g_a.", "g_s.", "h_a.")):
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
    lines = answer = None
    if program:
        stored = rangetables.Tables(*(tensors[f"tables.{part}"].numpy() for part in ("freqs", "lengths", "lows")))
        lines, answer = program.lines(), known_answer(program, stored, Numpy(program))
    digest = _digest({"config": config_data}, program, _steering(model, tensors))
    tensors = {k: v.contiguous() for k, v in tensors.items()}
    card = {"format": FORMAT, "name": config.name, **card, "config": config_data, "program": lines,
            "known_answer": answer, "digest": digest.hex(),
            "checksum": _checksum(tensors), "parameters": sum(p.numel() for p in model.parameters())}
    temporary = Path(f"{path}.tmp{os.getpid()}")
    save_file(tensors, temporary, {"linic": json.dumps(card)})
    os.replace(temporary, path)
    return card


def _steering(model: "Lalic", tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
    normative = normative_keys(model)
    return {k: v for k, v in tensors.items() if k.startswith("tables.") or k.removeprefix("net.") in normative}


def normative_keys(model: "Lalic") -> set[str]:
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


def _digest(card: dict[str, Any], program: "Program | None", tensors: Mapping[str, Any]) -> bytes:
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
