"""A training recipe: a TOML file <-> frozen dataclasses.

Every key has one home, here; budget, folders and device are flags and never keys. All keys are needed but those with
a default, which switches something off. Unknown, missing or impossible keys raise RecipeError with file and key.
Progress is elapsed time / budget, 0 to 1: nothing in a recipe counts steps.
"""

import difflib
import math
import tomllib
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from linic.errors import RecipeError


@dataclass(frozen=True)
class Model:
    preset: str
    bf16: bool                          # block Linears of the free nets


@dataclass(frozen=True)
class Optimiser:
    """AdamW. Weight decay spares vectors (biases, gains, decays)."""

    lr: float
    betas: tuple[float, float]
    weight_decay: float
    clip: float                         # norm of the whole gradient


@dataclass(frozen=True)
class Quality:
    """Drawn evenly in `range` for each crop; `ends` is the share of draws at each end, which has neighbours on one
    side only."""

    range: tuple[float, float]
    ends: float


@dataclass(frozen=True)
class Loss:
    exponent: float                     # (lambda * 65025 * mse + bpp) * (lambda / 0.013) ** -exponent


@dataclass(frozen=True)
class Schedule:
    shape: Literal["cosine", "linear"]
    warmup: float                       # share of the run in which the rate rises
    decay: float = 0.0                  # linear only: share at the end in which it falls to zero

    @property
    def decay_start(self) -> float:
        """Progress at which the trunk is kept. A cosine falls from the start and has no trunk."""
        return 1 - self.decay if self.shape == "linear" else math.inf

    def factor(self, progress: float) -> float:
        """Of the learning rate. Never quite 0 at the start: the first step must move."""
        rise = min(1.0, progress / self.warmup + 1e-3) if self.warmup else 1.0
        if self.shape == "cosine":
            return rise * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return rise * max(0.0, min(1.0, (1 - progress) / self.decay))


@dataclass(frozen=True)
class Phase:
    start: float                        # progress from which it holds
    crop: int                           # pixels, square
    batch: int


@dataclass(frozen=True)
class Ema:
    decay: float                        # reached after a warm-up: min(decay, (n + 1) / (n + 10))
    every: int                          # steps


@dataclass(frozen=True)
class Evaluation:
    pictures: int
    qualities: tuple[float, ...]


@dataclass(frozen=True)
class Intervals:
    log_seconds: float
    save_seconds: float
    evaluate_seconds: float


@dataclass(frozen=True)
class Pool:
    """Crops from pictures resized by `scale`: exact area means below 1, Lanczos above."""

    scale: float
    share: float


@dataclass(frozen=True)
class Colour:
    share: float
    gamma: tuple[float, float]
    gains: tuple[float, float]          # of each channel


@dataclass(frozen=True)
class Data:
    pools: tuple[Pool, ...]
    transpose: float                    # share; horizontal flips are half of all crops
    exclude_origins: tuple[str, ...] = ("non-commercial",)
    colour: Colour | None = None


@dataclass(frozen=True)
class Recipe:
    seed: int
    model: Model
    optimiser: Optimiser
    quality: Quality
    loss: Loss
    schedule: Schedule
    phases: tuple[Phase, ...]
    ema: Ema
    evaluation: Evaluation
    intervals: Intervals
    data: Data

    def phase_at(self, progress: float) -> Phase:
        return [p for p in self.phases if p.start <= progress][-1]


def load(path: str | Path) -> Recipe:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as a recipe: {error}") from error
    return parse(text, str(path))


def parse(text: str, source: str = "recipe") -> Recipe:
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{source}: not TOML: {error}") from error
    recipe = _table(Recipe, table, "", source)
    for right, message in _rules(recipe):
        if not right:
            raise RecipeError(f"{source}: {message}")
    return recipe


def _rules(r: Recipe) -> list[tuple[bool, str]]:
    starts, o, s = [p.start for p in r.phases], r.optimiser, r.schedule
    pairs = [("quality.range", r.quality.range)]
    if r.data.colour:
        pairs += [("data.colour.gamma", r.data.colour.gamma), ("data.colour.gains", r.data.colour.gains)]
    shares = [("schedule.decay", s.decay), ("schedule.warmup", s.warmup), ("data.transpose", r.data.transpose)]
    shares += [("data.colour.share", r.data.colour.share)] if r.data.colour else []
    return [
        (o.lr > 0 and o.clip > 0 and o.weight_decay >= 0,
         "optimiser: lr and clip must be above 0, weight_decay not below"),
        (all(0 <= b < 1 for b in o.betas), "optimiser.betas must lie in [0, 1)"),
        (0 <= r.quality.ends < 0.5, f"quality.ends is {r.quality.ends}: a share of the draws below 0.5"),
        *((a <= b, f"{key} is [{a}, {b}]: the smaller number comes first") for key, (a, b) in pairs),
        *((0 <= v <= 1, f"{key} is {v}: a share, 0 to 1") for key, v in shares),
        ((s.shape == "linear") == (s.decay > 0), "schedule.decay belongs to a linear schedule, which needs it above 0"),
        (bool(starts) and starts[0] == 0 and starts == sorted(set(starts)) and starts[-1] < 1,
         f"phases start at {starts}: the first at 0, each later than the one before, all below 1"),
        (all(p.crop > 0 and p.batch > 0 for p in r.phases), "phases need crop and batch above 0"),
        (0 <= r.ema.decay < 1 and r.ema.every > 0, "ema.decay must lie in [0, 1), ema.every above 0"),
        (bool(r.evaluation.qualities) and r.evaluation.pictures > 0, "evaluation needs a picture and a quality"),
        (min(r.intervals.log_seconds, r.intervals.save_seconds, r.intervals.evaluate_seconds) > 0,
         "intervals must be above 0"),
        (all(p.scale > 0 and p.share >= 0 for p in r.data.pools)
         and abs(sum(p.share for p in r.data.pools) - 1) < 1e-3, "the shares of data.pools must be 1 in sum"),
    ]


def _table(kind: Any, table: dict[str, Any], where: str, source: str) -> Any:
    known = {f.name: f for f in fields(kind)}
    for key in table:
        if key not in known:
            raise RecipeError(f"{source}: unknown key {where}{key}.{_did_you_mean(where + key)}")
    for name, field in known.items():
        if name not in table and field.default is MISSING:
            raise RecipeError(f"{source}: key {where}{name} is missing")
    return kind(**{key: _value(known[key].type, value, where + key, source) for key, value in table.items()})


def _value(kind: Any, value: Any, where: str, source: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    if origin is Literal and value in args:
        return value
    if origin is tuple and isinstance(value, list):
        kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) == len(value):
            return tuple(_value(k, v, f"{where}[{i}]", source) for i, (k, v) in enumerate(zip(kinds, value)))
    if origin is UnionType:
        return _value(args[0], value, where, source)
    if is_dataclass(kind) and isinstance(value, dict):
        return _table(kind, value, where + ".", source)
    raise RecipeError(f"{source}: {where} is {value!r}, expected {_describe(kind)}")


def _describe(kind: Any) -> str:
    args = get_args(kind)
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, args))
    if get_origin(kind) is tuple:
        number = "" if args[-1] is Ellipsis else f"{len(args)} x "
        return f"a list of {number}{_describe(args[0])}"
    if get_origin(kind) is UnionType or is_dataclass(kind):
        return "a table"
    return {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}[kind]


def _keys(kind: Any, where: str = "") -> list[str]:
    out = []
    for f in fields(kind):
        inner = next((k for k in (f.type, *get_args(f.type)) if is_dataclass(k)), None)
        out += [where + f.name, *(_keys(inner, f"{where}{f.name}.") if inner else [])]
    return out


def _did_you_mean(key: str) -> str:
    keys = _keys(Recipe)
    plain = "".join(c for i, c in enumerate(key) if c not in "[]" and not (c.isdigit() and key[i - 1] == "["))
    leaf = plain.rpartition(".")[2]
    close = [k for k in keys if k.rpartition(".")[2] == leaf] or difflib.get_close_matches(plain, keys, 1)
    return f" Did you mean {close[0]}?" if close else ""
