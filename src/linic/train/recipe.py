"""A training recipe: a TOML file <-> frozen dataclasses.

Every key has one home, here; budget, folders and device are flags and never keys. All keys are needed but those with
a default, which switches something off. Unknown, missing or impossible keys raise RecipeError with file and key.
Progress, 0 to 1, is elapsed time / budget, or steps / `schedule.steps` where a recipe counts steps, as papers do.
A field whose key is a word of Python ends in an underscore.
"""

import copy
import difflib
import math
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from linic.errors import RecipeError


@dataclass(frozen=True)
class Model:
    preset: str
    bf16: Literal["off", "free", "all"]     # operands of products: the free nets' blocks; all but the ends (lalic.py)


@dataclass(frozen=True)
class Slower:
    """Parameters whose names hold the regular expression `where` move at `share` of the rate."""

    where: str
    share: float


@dataclass(frozen=True)
class Optimiser:
    """See optimisers.py. Weight decay spares vectors (biases, gains, decays)."""

    lr: float
    betas: tuple[float, float]
    weight_decay: float
    clip: float                         # norm of the whole gradient
    kind: Literal["adamw", "soap", "muon"] = "adamw"    # soap, muon: for matrices, with AdamW for all else
    period: int = 10                    # soap: steps between two turns of the eigenbasis
    largest: int = 256                  # soap: longer sides of a matrix keep the unit basis
    # adamw: what has more inputs than this moves so much slower that its sums change no faster. 0: all alike.
    inputs: int = 0
    slower: tuple[Slower, ...] = ()     # adamw too, beside `inputs`; the first that fits


@dataclass(frozen=True)
class Quality:
    """Drawn evenly in `range` for each crop; `ends` is the share of draws at each end, which has neighbours on one
    side only."""

    range: tuple[float, float]
    ends: float


@dataclass(frozen=True)
class Perceptual:
    """Weights of the terms of perceptual.py beside 100 mse, in phases that say so."""

    lpips: float
    vgg: float
    wd: float
    phase: float
    seam: float = 0.0
    count: int = 2                      # crops of a batch that VGG sees, and the side of what it sees of them
    window: int = 128


@dataclass(frozen=True)
class Codes:
    """Discrete targets (codes.py): k-means codes of 16 px patches, made of training crops when a run begins."""

    squeeze: int                        # codes of SqueezeNet's last features
    vgg: int                            # codes of VGG19n's local means and deviations
    axes: int                           # principal axes of the features, in which codes are found
    examples: int                       # training crops of 256 px that the codes are made of
    count: int                          # crops of a batch whose VGG codes are asked for
    weight: float                       # of the cross-entropy, in phases with stage = "codes"
    later: float = 0.0                  # and in all others


@dataclass(frozen=True)
class Critic:
    """The critic of a run that trains the decoder alone (critic.py)."""

    width: int                          # channels of the first layer; 64: 2.8 M parameters
    lr: float
    betas: tuple[float, float]
    weight: float                       # of its verdict in the decoder's loss, where `share` is 0
    matching: float                     # of the distance of its features there
    lecam: float                        # in its own loss
    rise: float                         # share of the run in which both rise from 0
    share: float = 0.0                  # norm of the verdict's gradient at the picture over that of all but the critic


@dataclass(frozen=True)
class Loss:
    """See loss.py. `lambda`: of a model for one rate, instead of a drawn quality."""

    exponent: float = 0.0               # (lambda * 65025 * mse + bpp) * (lambda / 0.013) ** -exponent
    even: float = 0.0                   # what a crop counts: its loss ** -even
    distortion: Literal["mse", "ms-ssim"] = "mse"
    lambda_: float | None = None
    perceptual: Perceptual | None = None        # MRT only


@dataclass(frozen=True)
class Schedule:
    shape: Literal["cosine", "linear", "steps"]
    warmup: float                       # share of the run in which the rate rises
    decay: float = 0.0                  # linear only: share at the end in which it falls to zero
    milestones: tuple[float, ...] = ()  # steps only: progress at which the rate is multiplied by `drop`
    drop: float = 0.1
    steps: int | None = None            # of the whole run; without it, a budget of time plans the run

    @property
    def decay_start(self) -> float:
        """Progress at which the trunk is kept. A cosine falls from the start and has no trunk."""
        if self.shape == "linear":
            return 1 - self.decay
        return self.milestones[0] if self.milestones else math.inf

    def factor(self, progress: float) -> float:
        """Of the learning rate. Never quite 0 at the start: the first step must move."""
        rise = min(1.0, progress / self.warmup + 1e-3) if self.warmup else 1.0
        if self.shape == "cosine":
            return rise * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        if self.shape == "steps":
            return rise * self.drop ** sum(m <= progress for m in self.milestones)
        return rise * max(0.0, min(1.0, (1 - progress) / self.decay))


@dataclass(frozen=True)
class Phase:
    start: float                        # progress from which it holds
    crop: int                           # pixels, square
    batch: int                          # of all processes together
    rounding: Literal["noise", "round", "dead-zone"] = "dead-zone"      # of MRT's latents (mrt.py)
    perceptual: bool = False
    stage: Literal["picture", "codes"] = "picture"   # codes: what `codes` says, and a picture a quarter as large


@dataclass(frozen=True)
class Ema:
    decay: float                        # reached after a warm-up: min(decay, (n + 1) / (n + 10))
    every: int                          # steps


@dataclass(frozen=True)
class Evaluation:
    pictures: int
    qualities: tuple[float, ...] = (50.0,)      # means nothing to a model for one rate


@dataclass(frozen=True)
class Intervals:
    log_seconds: float
    save_seconds: float
    evaluate_seconds: float
    gate_seconds: float | None = None   # MRT's gates (gates.py); always after an evaluation


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
class Noise:
    """Of a sensor: normal, its deviation `sigma` / 255 at white, falling with the square root of the value."""

    share: float                        # of the crops from `pools`
    sigma: tuple[float, float]
    pools: tuple[float, ...] = ()       # scales; none: all


@dataclass(frozen=True)
class Data:
    pools: tuple[Pool, ...]
    transpose: float                    # share
    flip: float = 0.5                   # share, left to right
    exclude_origins: tuple[str, ...] = ("non-commercial",)
    colour: Colour | None = None
    permute: float = 0.0                # share whose channels change places
    noise: Noise | None = None


@dataclass(frozen=True)
class Recipe:
    seed: int
    model: Model
    optimiser: Optimiser
    loss: Loss
    schedule: Schedule
    phases: tuple[Phase, ...]
    ema: Ema
    evaluation: Evaluation
    intervals: Intervals
    data: Data
    quality: Quality | None = None      # None: loss.lambda
    codes: Codes | None = None          # MRT only, as is
    critic: Critic | None = None

    def phase_at(self, progress: float) -> Phase:
        return [p for p in self.phases if p.start <= progress][-1]


def load(path: str | Path, changes: Mapping[str, Any] | None = None) -> Recipe:
    """`changes`: see `changed`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as a recipe: {error}") from error
    return parse(text, str(path), changes)


def parse(text: str, source: str = "recipe", changes: Mapping[str, Any] | None = None) -> Recipe:
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{source}: not TOML: {error}") from error
    return from_table(changed(table, changes or {}, source), source)


def changed(table: dict[str, Any], changes: Mapping[str, Any], source: str = "recipe") -> dict[str, Any]:
    """A copy with values put in by dotted key: {"optimiser.lr": 1e-3, "phases.0.crop": 64}."""
    table = copy.deepcopy(table)
    for key, value in changes.items():
        *path, last = key.split(".")
        at: Any = table
        try:
            for part in path:
                at = at[int(part)] if isinstance(at, list) else at.setdefault(part, {})
            at[int(last) if isinstance(at, list) else last] = value
        except (AttributeError, IndexError, TypeError, ValueError):
            raise RecipeError(f"{source}: no place for {key}.{_did_you_mean(key)}") from None
    return table


def change(text: str) -> tuple[str, Any]:
    """"optimiser.lr=1e-3" -> key and value. The value is TOML; what is none is a string."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise RecipeError(f"--set {text}: write KEY=VALUE, such as optimiser.lr=1e-3")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value


def from_table(table: dict[str, Any], source: str = "recipe") -> Recipe:
    """Of plain dicts and lists, as TOML gives them."""
    recipe = _table(Recipe, table, "", source)
    for right, message in _rules(recipe):
        if not right:
            raise RecipeError(f"{source}: {message}")
    return recipe


def _rules(r: Recipe) -> list[tuple[bool, str]]:
    starts, o, s, d = [p.start for p in r.phases], r.optimiser, r.schedule, r.data
    pairs = [("quality.range", r.quality.range)] if r.quality else []
    shares = [("schedule.decay", s.decay), ("schedule.warmup", s.warmup), ("data.transpose", d.transpose),
              ("data.flip", d.flip), ("data.permute", d.permute)]
    if d.colour:
        pairs += [("data.colour.gamma", d.colour.gamma), ("data.colour.gains", d.colour.gains)]
        shares += [("data.colour.share", d.colour.share)]
    if d.noise:
        pairs += [("data.noise.sigma", d.noise.sigma)]
        shares += [("data.noise.share", d.noise.share)]
    return [
        ((r.quality is None) != (r.loss.lambda_ is None), "one of [quality] and loss.lambda is needed, and not both"),
        (r.loss.lambda_ is None or (r.loss.lambda_ > 0 and not r.loss.exponent),
         "loss.lambda must be above 0, and loss.exponent weighs drawn qualities only"),
        (0 <= r.loss.even <= 1, f"loss.even is {r.loss.even}: 0 (all crops count alike) to 1"),
        ((s.shape == "steps") == bool(s.milestones) and list(s.milestones) == sorted(set(s.milestones))
         and all(0 < m < 1 for m in s.milestones),
         "schedule.milestones belong to shape steps, which needs them: shares of the run, rising, between 0 and 1"),
        (0 < s.drop < 1 and (s.steps is None or s.steps > 0), "schedule: drop lies between 0 and 1, steps above 0"),
        (not d.noise or set(d.noise.pools) <= {p.scale for p in d.pools},
         "data.noise.pools must be scales of data.pools"),
        (o.lr > 0 and o.clip > 0 and o.weight_decay >= 0,
         "optimiser: lr and clip must be above 0, weight_decay not below"),
        (all(0 <= b < 1 for b in o.betas), "optimiser.betas must lie in [0, 1)"),
        (o.period > 0 and o.largest > 0, "optimiser: period and largest must be above 0"),
        *((0 <= x.share <= 1, f"optimiser.slower {x.where!r} is {x.share}: a share, 0 to 1") for x in o.slower),
        (not r.quality or 0 <= r.quality.ends < 0.5, "quality.ends must be a share of the draws below 0.5"),
        *((a <= b, f"{key} is [{a}, {b}]: the smaller number comes first") for key, (a, b) in pairs),
        *((0 <= v <= 1, f"{key} is {v}: a share, 0 to 1") for key, v in shares),
        ((s.shape == "linear") == (s.decay > 0), "schedule.decay belongs to a linear schedule, which needs it above 0"),
        (bool(starts) and starts[0] == 0 and starts == sorted(set(starts)) and starts[-1] < 1,
         f"phases start at {starts}: the first at 0, each later than the one before, all below 1"),
        (all(p.crop > 0 and p.batch > 0 for p in r.phases), "phases need crop and batch above 0"),
        (r.loss.perceptual is not None or not any(p.perceptual for p in r.phases),
         "perceptual phases need [loss.perceptual]"),
        *_codes_and_critic(r),
        (0 <= r.ema.decay < 1 and r.ema.every > 0, "ema.decay must lie in [0, 1), ema.every above 0"),
        (bool(r.evaluation.qualities) and r.evaluation.pictures > 0, "evaluation needs a picture and a quality"),
        (min(r.intervals.log_seconds, r.intervals.save_seconds, r.intervals.evaluate_seconds,
             math.inf if r.intervals.gate_seconds is None else r.intervals.gate_seconds) > 0,
         "intervals must be above 0"),
        (all(p.scale > 0 and p.share >= 0 for p in r.data.pools)
         and abs(sum(p.share for p in r.data.pools) - 1) < 1e-3, "the shares of data.pools must be 1 in sum"),
    ]


def _codes_and_critic(r: Recipe) -> list[tuple[bool, str]]:
    c, k, first = r.codes, r.critic, any(p.stage == "codes" for p in r.phases)
    rules = [(c is not None or not first, 'phases with stage = "codes" need [codes]'),
             (not any(p.stage == "codes" and p.perceptual for p in r.phases), "a phase for codes cannot be perceptual"),
             (c is None or k is None, "[critic] trains the decoder alone: it goes without [codes]")]
    if c:
        rules += [(first or c.later > 0, '[codes] needs a phase with stage = "codes", or codes.later above 0'),
                  (min(c.squeeze, c.vgg, c.axes, c.examples, c.count) > 0 and min(c.weight, c.later) >= 0,
                   "codes: numbers must be above 0, weights not below"),
                  (c.axes <= 512 and 256 * c.examples >= max(c.squeeze, c.vgg),
                   "codes: axes are at most 512, and a crop has 256 patches to make codes of")]
    if k:
        rules += [(k.width > 0 and k.lr > 0 and all(0 <= b < 1 for b in k.betas),
                   "critic: width and lr must be above 0, betas in [0, 1)"),
                  (min(k.weight, k.matching, k.lecam, k.share) >= 0 and 0 <= k.rise <= 1,
                   "critic: weights must not be below 0, rise is a share")]
    return rules


def _table(kind: Any, table: dict[str, Any], where: str, source: str) -> Any:
    known = {f.name.rstrip("_"): f for f in fields(kind)}
    for key in table:
        if key not in known:
            raise RecipeError(f"{source}: unknown key {where}{key}.{_did_you_mean(where + key)}")
    for name, field in known.items():
        if name not in table and field.default is MISSING:
            raise RecipeError(f"{source}: key {where}{name} is missing")
    return kind(**{known[key].name: _value(known[key].type, value, where + key, source)
                   for key, value in table.items()})


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
    if get_origin(kind) is UnionType:
        return _describe(args[0])
    if is_dataclass(kind):
        return "a table"
    return {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}[kind]


def _keys(kind: Any, where: str = "") -> list[str]:
    out = []
    for f in fields(kind):
        inner = next((k for k in (f.type, *get_args(f.type)) if is_dataclass(k)), None)
        out += [where + f.name.rstrip("_"), *(_keys(inner, f"{where}{f.name}.") if inner else [])]
    return out


def _did_you_mean(key: str) -> str:
    keys = _keys(Recipe)
    plain = "".join(c for i, c in enumerate(key) if c not in "[]" and not (c.isdigit() and key[i - 1] == "["))
    leaf = plain.rpartition(".")[2]
    close = [k for k in keys if k.rpartition(".")[2] == leaf] or difflib.get_close_matches(plain, keys, 1)
    return f" Did you mean {close[0]}?" if close else ""
