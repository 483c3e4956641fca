"""A larger model out of a smaller trained one, computing nearly what the smaller one computes.

Source of the idea: Chen et al., "Net2Net" (arXiv 1511.05641). What is our own is the residual stream: every added
channel of it carries the mean of the old ones. Then the mean over all channels is the old mean, the added channels are
zero after LayerNorm, and the variance is smaller by exactly c/C, which LayerNorm's weight takes back.

    exact         writers of the stream (resampling, rows, Spatial Mix): their added rows are means of the old rows
    approximate   Channel Mix: its gate follows the product, and the mean of gated values has no row of its own
    silent        added blocks and hidden units: nothing reads them yet, but they read, so they learn at once
    silent        added latents and features: zero, yet with readers; latents' scale is below the skip threshold
    random        what added units read; over an added part of the stream its sum is zero, which makes it silent

Added units read QUIETly. Adam's first steps move all the zeros that follow them in one direction, and squared ReLUs are
never negative: read aloud, thousands of them shift the mean of every channel (loss 1.0534 instead of 1.0460 after 200
steps of lalic-s from lalic-xs).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn

from linic.errors import UsageError
from linic.models.config import Config, Net, to_dict
from linic.models.lalic import Lalic

QUIET = 0.1
LN_PRIOR = -3.5         # of an added latent: at the highest quality still below the scale that is coded
DENSITY = (-6.0, 0.0, -6.0), (-1.0, 0.0, 1.0), (-3.0, -3.0, -3.0)   # of an added z: .0001 bits for the symbol 0


@dataclass(frozen=True)
class Axis:
    """Where the smaller model's `old` channels lie among the larger one's `size`."""

    old: Tensor
    size: int

    @property
    def new(self) -> Tensor:
        fresh = torch.ones(self.size, dtype=torch.bool)
        fresh[self.old] = False
        return fresh.nonzero()[:, 0]

    def __add__(self, other: "Axis") -> "Axis":
        return Axis(torch.cat([self.old, self.size + other.old]), self.size + other.size)

    def times(self, n: int) -> "Axis":
        """n such parts, one after the other."""
        return Axis(torch.cat([i * self.size + self.old for i in range(n)]), n * self.size)


def first(small: int, large: int) -> Axis:
    return Axis(torch.arange(small), large)


def obstacle(small: Config, large: Config) -> str:
    """Why `large` cannot be widened from `small`; "" if it can."""
    for key in ("family", "style", "variable_rate", "density", "scales", "linear_scale", "init"):
        if getattr(small, key) != getattr(large, key):
            return f"{key} differs"
    if (small.context.channel, small.context.aggregation) != ("linear", "mlp") or small.style.layer_scale:
        return "only linear contexts with mlp aggregation, without layer scale, can be widened"
    for key in ("transform", "hyper", "context"):
        a, b = to_dict(small)[key], to_dict(large)[key]
        for field in a:
            more = field in ("widths", "depths", "hidden", "groups", "width", "depth")
            if field == "kernels" and any(k > 1 for k in a[field]):
                return f"{key} has convolutions"
            if field == "shortcut" and a[field] != "none":
                return f"{key} has shortcuts"
            if not more and a[field] != b[field]:
                return f"{key}.{field} differs"
            if more and isinstance(a[field], tuple) and len(a[field]) != len(b[field]):
                return f"{key}.{field} has another length"
            if more and any(x > y for x, y in zip(_tuple(a[field]), _tuple(b[field]))):
                return f"{key}.{field} is larger in {small.name}"
    for key in ("latents", "hyper_latents", "hyper_features"):
        if getattr(small, key) > getattr(large, key):
            return f"{key} is larger in {small.name}"
    if small.density != "mixture" and small.hyper_latents != large.hyper_latents:
        return "only a mixture density can be widened"
    return ""


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def smaller(small: Config, large: Config) -> bool:
    """Whether `large` is another size of `small`, and can be widened from it."""
    return not obstacle(small, large) and replace(small, name=large.name) != large


@torch.no_grad()
def widen(small: Lalic, large: Lalic) -> None:
    """Fills `large`, as `build` made it, from the trained `small`. Raises UsageError where `obstacle` finds one."""
    a, b = small.config, large.config
    if why := obstacle(a, b):
        raise UsageError(f"{b.name} cannot start from {a.name}: {why}")
    groups = [first(i, j) for i, j in zip(a.context.groups, b.context.groups)]
    pixels, latents = first(3, 3), _sum(groups)
    z, features = first(a.hyper_latents, b.hyper_latents), first(a.hyper_features, b.hyper_features)
    main, hyper = _widths(a.transform, b.transform), _widths(a.hyper, b.hyper)
    s: Any
    t: Any
    for s, t, axes in ((small.g_a, large.g_a, [pixels, *main, latents]), (small.h_a, large.h_a, [latents, *hyper, z]),
                       (small.g_s, large.g_s, [latents, *reversed(main), pixels]),
                       (small.h_s, large.h_s, [z, *reversed(hyper), features])):
        for i, (stage_s, stage_t) in enumerate(zip(s.stages, t.stages)):
            _stage(stage_t, stage_s, axes[i], axes[i + 1])
        _resample(t.head, s.head, axes[-2], axes[-1], "zero")
    before = [_sum(groups[:k]) for k in range(len(groups) + 1)]
    width = first(a.context.width, b.context.width)
    for k, (s, t) in enumerate(zip(small.contexts, large.contexts)):
        if k:
            _linear(t.channel.first, s.channel.first, width, [before[k]], "mean")
            _vector(t.channel.row.weight, s.channel.row.weight, width, "mean")
            _blocks(t.channel.blocks, s.channel.blocks, width)
        _aggregation(t, s, width, features, groups[k], bool(k))
    for name, value in zip(("logit", "mean", "ln_scale"), DENSITY):
        of_t, of_s = getattr(large.density, name), getattr(small.density, name)
        of_t[:] = torch.tensor(value)
        of_t[z.old] = of_s
    if a.variable_rate:
        large.ln_prior.fill_(LN_PRIOR)
        large.ln_prior[latents.old] = small.ln_prior
        for name in ("gain_enc", "gain_dec"):
            getattr(large, name)[:, latents.old] = getattr(small, name)


def _sum(axes: Iterable[Axis]) -> Axis:
    return list(accumulate(axes, initial=Axis(torch.arange(0), 0)))[-1]


def _widths(small: Net, large: Net) -> list[Axis]:
    return [first(i, j) for i, j in zip(small.widths, large.widths)]


# --- tensors --------------------------------------------------------------------------------------------------------

Rows = Literal["mean", "zero", "random"]


def _vector(large: Tensor, small: Tensor, out: Axis, rows: Rows) -> None:
    """(..., C): the old channels, and what the rule says for the new ones."""
    large[..., out.old] = small
    if rows != "random":
        large[..., out.new] = small.mean(-1, keepdim=True) if rows == "mean" else 0.0


def _matrix(large: Tensor, small: Tensor, out: Axis, into: list[Axis], rows: Rows, *, deaf: bool = False) -> None:
    """(out, in). `into`: the parts of the input. `deaf`: what is old (or a mean of it) does not read what is new."""
    at = 0
    for part in into:
        columns = at + part.new
        large[:, columns] -= large[:, columns].mean(1, keepdim=True)
        at += part.size
    whole = _sum(into)
    if deaf:
        large[:, whole.new] = 0.0
    large[out.old[:, None], whole.old] = small
    if rows == "mean":
        large[out.new] = large[out.old].mean(0)
    else:
        large[out.new] *= 0.0 if rows == "zero" else QUIET


def _linear(large: nn.Linear, small: nn.Linear, out: Axis, into: list[Axis], rows: Rows, *, deaf: bool = False) -> None:
    _matrix(large.weight, small.weight, out, into, rows, deaf=deaf)
    if large.bias is not None:
        _vector(large.bias, small.bias, out, rows)


# --- modules --------------------------------------------------------------------------------------------------------


def _resample(large: Any, small: Any, into: Axis, out: Axis, rows: Rows) -> None:
    """Down or Up: f^2 parts of the input, or of the output."""
    parts = large.factor**2
    if type(large).__name__ == "Down":
        _linear(large.proj, small.proj, out, [into] * parts, rows)
        return
    for i in range(parts):
        t, s = slice(i * out.size, (i + 1) * out.size), slice(i * len(out.old), (i + 1) * len(out.old))
        _matrix(large.proj.weight[t], small.proj.weight[s], out, [into], rows)
        _vector(large.proj.bias[t], small.proj.bias[s], out, rows)


def _stage(large: Any, small: Any, into: Axis, out: Axis) -> None:
    _resample(large.resample, small.resample, into, out, "mean")
    if large.row is not None:
        _vector(large.row.weight, small.row.weight, out, "mean")
    _blocks(large.blocks, small.blocks, out)


def _blocks(large: Any, small: Any, c: Axis) -> None:
    """The old blocks, then silent ones."""
    for t, s in zip(large, small):
        if t.spatial is not None:
            _norm(t.spatial, s.spatial, c)
            n = len(s.spatial.kvr.weight) // len(c.old)
            for i in range(n):
                _matrix(t.spatial.kvr.weight[i * c.size : (i + 1) * c.size], s.spatial.kvr.weight.chunk(n)[i], c, [c],
                        "random")
            _linear(t.spatial.out, s.spatial.out, c, [c], "mean", deaf=True)
            if hasattr(t.spatial, "w"):
                _vector(t.spatial.w, s.spatial.w, c, "random")
                _vector(t.spatial.u, s.spatial.u, c, "random")
        _norm(t.channel, s.channel, c)
        hidden = first(s.channel.out.in_features, t.channel.out.in_features)
        (t_hidden, t_gate), (s_hidden, s_gate) = (
            m.kr.weight.split([m.out.in_features, m.out.out_features]) for m in (t.channel, s.channel))
        _matrix(t_hidden, s_hidden, hidden, [c], "random")
        _matrix(t_gate, s_gate, c, [c], "mean")
        _linear(t.channel.out, s.channel.out, c, [hidden], "mean", deaf=True)
    for t in large[len(small):]:
        t.channel.kr.weight *= QUIET
        for mix in (t.spatial, t.channel):
            if mix is not None:
                mix.out.weight.zero_()


def _norm(large: Any, small: Any, c: Axis) -> None:
    """LayerNorm and Omni-Shift of a mix."""
    _vector(large.norm.weight, small.norm.weight * (len(c.old) / c.size) ** 0.5, c, "random")
    _vector(large.norm.bias, small.norm.bias, c, "zero")
    if large.shift is not None:
        large.shift.alpha.copy_(small.shift.alpha)
        for name in ("k1", "k3", "k5"):
            _vector(getattr(large.shift, name), getattr(small.shift, name), c, "random")


def _aggregation(large: Any, small: Any, width: Axis, features: Axis, group: Axis, channel: bool) -> None:
    """Hidden layers without a residual stream: what is old is deaf to what is new, but for the streams it reads."""
    t, s = large.aggregate, small.aggregate
    pair = first(2 * len(group.old), 2 * group.size)
    _linear(large.taps, small.taps, pair, [group] * 12, "random")
    _linear(t.first, s.first, width, [width, features] if channel else [features], "random")
    _vector(t.row.weight, s.row.weight, width, "zero")
    _linear(t.spatial, s.spatial, width, [pair], "random", deaf=True)
    _linear(t.middle, s.middle, width, [width], "random", deaf=True)
    _linear(t.mean, s.mean, group, [width], "zero", deaf=True)
    _linear(t.scale, s.scale, group, [width], "zero", deaf=True)
