"""Presets are data: a TOML file in presets/ becomes one frozen `Config`. Every field of the file is a field here."""

import dataclasses
import tomllib
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from linic.errors import UsageError

FOLDER = Path(__file__).parent / "presets"
LARGEST, MOST = 4096, 64  # of a number; numbers in a list


@dataclass(frozen=True)
class Style:
    """How blocks are made, in all nets of a model."""

    attention: Literal["biwkv", "aft", "none"] = "biwkv"  # aft: w = u = 0, a softmax average; none: wkv is v
    shift: bool = True  # Omni-Shift before both mixes (contexts have a switch of their own)
    scan: Literal["row", "column", "alternating"] = "row"  # order in which BiWKV sees the tokens
    bounds: Literal["linic", "authors"] = "linic"  # linic: bounded w, u, k (integer.md 8); authors: raw w/T and u/T
    layer_scale: bool = False  # gamma1, gamma2 of the paper
    zero_init: bool = True  # residual branches start at zero


@dataclass(frozen=True)
class Net:
    """One transform and its mirror. Entry i: stage i of the analysis; the last factor and kernel are the head's."""

    factors: tuple[int, ...]  # down-sampling of each stage, then of the head
    kernels: tuple[int, ...]  # 1: space-to-depth + Linear; 3, 5: strided convolution
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    hidden: int  # Channel Mix: hidden width / width
    spatial: tuple[bool, ...]  # whether the stage's blocks have a Spatial Mix
    shortcut: Literal["none", "wavelet"] = "none"  # parallel to each strided stage (lalic.py); the transform only


@dataclass(frozen=True)
class Context:
    """RWKV-SCCTX and its relatives: groups of latent channels, each coded in two checkerboard halves."""

    groups: tuple[int, ...]
    channel: Literal["linear", "rwkv", "conv", "conv-plus"]  # what turns earlier groups into features
    aggregation: Literal["mlp", "mix", "conv"]  # what turns features into means and scales
    width: int
    depth: int = 1
    hidden: int = 2
    shift: bool = False


@dataclass(frozen=True)
class Config:
    """Of the family LALIC."""

    name: str
    family: Literal["lalic"]
    transform: Net
    hyper: Net
    context: Context
    latents: int  # channels of y (M)
    hyper_latents: int  # channels of z (Nz)
    hyper_features: int  # channels that h_s gives to the contexts (H)
    style: Style = dataclasses.field(default_factory=Style)
    variable_rate: bool = True  # gains, quality rows; off: one rate a checkpoint, as in the paper
    density: Literal["mixture", "factorized"] = "mixture"  # of z
    scales: int = 128  # entries of the scale table
    linear_scale: bool = False  # the scale head gives sigma (paper) instead of ln sigma relative to a prior
    init: Literal["klt", "orthogonal", "torch"] = "klt"  # of the resampling: principal axes, random axes, torch's own

    @property
    def multiple(self) -> int:
        """Height and width of a picture must be multiples of this."""
        n = 1
        for f in self.transform.factors + self.hyper.factors:
            n *= f
        return n


@dataclass(frozen=True)
class MrtConfig:
    """Of the family MRT (mrt.py)."""

    name: str
    family: Literal["mrt"]
    width: int  # of the pairs, at 1/16
    heads: int
    stem: tuple[int, ...]  # widths at 1/4 and 1/8 in the encoder
    pixels: tuple[int, ...]  # widths at 1/8, 1/4 and 1/2 in the decoder
    pixel_depths: tuple[int, ...]  # residual blocks there
    decoder_pairs: int = dataclasses.field(metadata={"least": 0})
    rcm_width: int
    rcm_depth: int
    encoder_pairs: int = dataclasses.field(default=0, metadata={"least": 0})
    latents: int = 16  # channels of a token
    window: int = 8  # cells of 32 px: a Transformer's window, at most
    hidden: int = 2  # hidden width / width, in Channel Mix and Transformer
    mlp: int = dataclasses.field(default=0, metadata={"least": 0})  # the same in the Transformer alone; 0: `hidden`
    rwkv: bool = True  # the halves of a pair, for ablations
    transformer: bool = True
    tokens: Literal["cells", "frequencies", "slots"] = "cells"  # 32 px cells; of windows: cosine groups, or queries
    slots: int = 64  # latent tokens of a full window, where they are no cells
    order: Literal["staggered", "windows", "sequence"] = "staggered"  # of coding, and what is seen: tokens.py
    rcm: Literal["rwkv", "attention"] = "rwkv"  # what reads the tokens already coded
    scales: int = 128  # entries of the scale table
    grain: int = dataclasses.field(default=0, metadata={"least": 0})  # channels of noise that the decoder draws with
    init: Literal["klt", "dct", "torch"] = "klt"  # principal axes; the same and cosine transforms; torch's own
    style: Style = dataclasses.field(default_factory=lambda: Style(scan="alternating"))

    @property
    def multiple(self) -> int:
        """Height and width of a picture must be multiples of this: the side of a cell, or of a patch."""
        return 32 if self.tokens == "cells" else 16


AnyConfig = Config | MrtConfig


def _sane(value: Any, least: int = 1) -> bool:
    """A configuration also comes out of weight files, which may be hostile."""
    return type(value) is bool or (type(value) is int and least <= value <= LARGEST)


def _make(cls: Any, data: dict[str, Any], where: str) -> Any:
    if not isinstance(data, dict):
        raise UsageError(f"{where}: {str(data)[:80]} should be a table of fields")
    fields, hints, values = {f.name: f for f in dataclasses.fields(cls)}, typing.get_type_hints(cls), {}
    if unknown := set(data) - set(fields):
        raise UsageError(f"{where}: unknown field {sorted(unknown)[0]!r}. Known: {', '.join(sorted(fields))}")
    for name, value in data.items():
        hint, at = hints[name], f"{where}.{name}"
        if dataclasses.is_dataclass(hint):
            value = _make(hint, value, at)
        elif typing.get_origin(hint) is tuple:
            if not isinstance(value, (list, tuple)) or len(value) > MOST or not all(map(_sane, value)):
                raise UsageError(f"{at}: {str(value)[:80]} should be at most {MOST} whole numbers up to {LARGEST}")
            value = tuple(value)
        elif typing.get_origin(hint) is Literal and value not in typing.get_args(hint):
            raise UsageError(f"{at}: {value!r} is none of {', '.join(map(repr, typing.get_args(hint)))}")
        elif isinstance(hint, type) and not isinstance(hint, types.GenericAlias) and type(value) is not hint:
            raise UsageError(f"{at}: {value!r} should be of type {hint.__name__}")
        least = fields[name].metadata.get("least", 1)
        if type(value) is int and not _sane(value, least):
            raise UsageError(f"{at}: {value} should be from {least} to {LARGEST}")
        values[name] = value
    try:
        return cls(**values)
    except TypeError as error:
        raise UsageError(f"{where}: {error}") from None


def from_dict(data: dict[str, Any], where: str = "preset") -> AnyConfig:
    """A configuration out of plain dicts and lists (TOML or JSON)."""
    if isinstance(data, dict) and data.get("family") == "mrt":
        return _mrt(_make(MrtConfig, data, where), where)
    config: Config = _make(Config, data, where)
    for key, net in (("transform", config.transform), ("hyper", config.hyper)):
        n = len(net.widths)
        if not (len(net.depths) == len(net.spatial) == n and len(net.factors) == len(net.kernels) == n + 1):
            raise UsageError(f"{where}.{key}: {n} widths need {n} depths, {n} spatial, {n + 1} factors and kernels")
    if config.hyper.shortcut != "none":
        raise UsageError(f"{where}.hyper.shortcut: only the transform can have shortcuts")
    if sum(config.context.groups) != config.latents:
        raise UsageError(f"{where}.context.groups sum to {sum(config.context.groups)}, latents is {config.latents}")
    return config


def _mrt(config: MrtConfig, where: str) -> MrtConfig:
    c = config
    for right, what in (
            (len(c.stem) == 2 and len(c.pixels) == len(c.pixel_depths) == 3,
             "stem needs 2 widths, pixels and pixel_depths need 3"),
            (c.width % c.heads == 0, f"width {c.width} is no multiple of heads {c.heads}"),
            (c.window % 2 == 0 and c.window <= 16, f"window {c.window} should be even and at most 16"),
            (c.stem[0] <= c.pixels[1] and c.stem[1] <= c.pixels[0] and c.pixels[2] >= 12,
             "the decoder's widths hold the encoder's at the start: pixels[0] >= stem[1], pixels[1] >= stem[0], "
             "pixels[2] >= 12"),
            (c.init in {"cells": ("klt", "torch"), "frequencies": ("dct", "torch"), "slots": ("torch",)}[c.tokens],
             f"tokens {c.tokens!r} cannot start with init {c.init!r}"),
            (c.tokens == "cells" or c.order != "staggered", f"tokens {c.tokens!r} need order 'windows' or 'sequence'"),
            (c.tokens == "cells" or (c.transformer and c.encoder_pairs > 0),
             f"tokens {c.tokens!r} read patches in the Transformer of an encoder pair: there is none"),
            (c.tokens == "cells" or (c.slots % 8 == 0 and c.slots <= 256), f"slots {c.slots} should be 8, 16, ... 256"),
            (c.rcm == "rwkv" or c.rcm_width % 32 == 0, "attention in RCM has heads of 32 channels"),
            (c.grain <= 16, f"grain {c.grain} should be at most 16")):
        if not right:
            raise UsageError(f"{where}: {what}")
    return config


def to_dict(config: AnyConfig) -> dict[str, Any]:
    return dataclasses.asdict(config)


def presets() -> list[str]:
    return sorted(p.stem for p in FOLDER.glob("*.toml"))


def preset(name: str) -> AnyConfig:
    """The preset of that name. Raises UsageError with the names that exist."""
    path = FOLDER / f"{name}.toml"
    if name not in presets():
        raise UsageError(f"no preset {name!r}. Presets: {', '.join(presets())}")
    with path.open("rb") as f:
        data = tomllib.load(f)
    base = data.pop("base", None)  # an ablation names what it starts from and lists what differs
    if base is not None:
        data = _merge(to_dict(preset(base)), data)
    return from_dict({"name": name, **data}, path.name)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = {k: v for k, v in base.items() if k != "name"}
    for key, value in over.items():
        out[key] = {**out[key], **value} if isinstance(value, dict) else value
    return out
