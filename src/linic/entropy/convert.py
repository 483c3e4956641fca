"""Float layers -> integer operators: the arithmetic of the conversion, once, at export.

A register's unit is 2^-bits: the integer x stands for x / 2^bits. `Builder` keeps the unit of every register, rounds
weights, makes the constants of requantisation and collects lines and tensors of a program (program.py). Everything is
computed in float64 or exactly; the result is integers only, so nothing of it happens again on another machine.
Tables are made with mpmath, whose results do not depend on the C library. Raises WeightsError.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt

from linic.entropy.operators import (
    BONUS_LIMIT,
    DECAY_LIMIT,
    EXACT,
    EXP_FIRST,
    EXP_LAST,
    FALL_FIRST,
    WORD,
    Ints,
)
from linic.errors import WeightsError

Floats = npt.NDArray[np.float64]

ACTIVATION = 8191               # 14 bits
OCTAVE = 1024 / math.log(2)     # k, decay and bonus count in 2^-10 octaves
GATE_BITS, GELU_BITS = 8, 9     # units of what enters the tables


def fit(peak: float, most: int, top: int = ACTIVATION, room: float = 1.25) -> int:
    """The finest unit, at most 2^-most, in which `peak` and some room fit `top`."""
    return min(most, math.floor(math.log2(top / max(peak * room, 1e-9))))


def round_weights(weight: Floats, bits: int, moments: Floats | None = None) -> tuple[Ints, Floats]:
    """-> integers of `bits` bits and the scale of each row (float32 numbers, so that a file can hold them). moments: of
    the inputs, for `compensate`."""
    top = 2 ** (bits - 1) - 1
    scale = np.maximum(np.abs(weight).max(1), 1e-12) / top
    scale = np.nextafter(scale.astype(np.float32), np.float32(np.inf)).astype(np.float64)
    if moments is not None:
        return compensate(weight, scale, moments, top), scale
    return np.clip(np.rint(weight / scale[:, None]), -top, top).astype(np.int16), scale


def compensate(weight: Floats, scale: Floats, moments: Floats, top: int) -> Ints:
    """Rounds column after column, the strongest input first, and spreads the error of each over the columns to come, so
    that the error of the products on inputs with these second moments (K, K) is least. Gains 4.5 dB on 8-bit weights.

    Source: optimal brain compression as in GPTQ (Frantar et al., ICLR 2023)."""
    k = len(moments)
    order = np.argsort(-np.diag(moments), kind="stable")
    damped = moments[np.ix_(order, order)] + (0.01 * np.trace(moments) / k + 1e-9) * np.eye(k)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    rest, found = weight[:, order].copy(), np.empty(weight.shape)
    for i in range(k):
        found[:, order[i]] = np.clip(np.rint(rest[:, i] / scale), -top, top)
        error = (rest[:, i] - found[:, order[i]] * scale) / upper[i, i]
        rest[:, i + 1:] -= error[:, None] * upper[i, i + 1:]
    return found.astype(np.int16)


def requantisation(weight: Ints, scale: Floats, bias: Floats, largest: Ints, bits: Sequence[float],
                   low: Sequence[int], high: Sequence[int]) -> Ints:
    """(5, N): m, c, s, low, high of sum_k w_nk x_k -> units of 1 / bits[n] (a factor here, not a power of two).

    scale: what one step of weight times one step of x is worth; largest: |x_k| at most."""
    rows = []
    bound = np.abs(weight.astype(np.float64)) @ largest.astype(np.float64)
    for n in range(len(weight)):
        ratio = float(scale[n]) * bits[n]
        shift = min(45, max(0, 15 - math.floor(math.log2(ratio)))) if ratio > 0 else 0
        while True:
            m, c = round(ratio * 2**shift), round((float(bias[n]) * bits[n] + 0.5) * 2**shift)
            if bound[n] * m + abs(c) < EXACT and m <= 1 << 17:
                break
            if shift == 0:
                raise WeightsError(f"row {n}: sums may reach {bound[n] * m + abs(c):.3g}, beyond 2^53")
            shift -= 1
        rows.append((m, c, shift, low[n], high[n]))
    return np.asarray(rows, np.int64).T


@cache
def table(name: str) -> Ints:
    """exp, fall: powers of two for BiWKV. sigmoid: of x / 2^8, x from -2048, in 2^-15. gelu: of x / 2^9, x from -4096,
    in 2^-10."""
    from mpmath import erfc, exp, mp, mpf, sqrt

    def made(function: Callable[[Any], Any], first: int, last: int) -> Ints:
        with mp.workdps(30):
            return np.array([int(mp.floor(function(mpf(z)) + mpf(1) / 2)) for z in range(first, last + 1)], np.int64)

    if name == "exp":
        return made(lambda z: mpf(2) ** (z / 1024 + 20), EXP_FIRST, EXP_LAST).astype(np.int32)
    if name == "fall":
        return made(lambda z: mpf(2) ** (z / 1024 + 14), FALL_FIRST, BONUS_LIMIT).astype(np.int32)
    if name == "sigmoid":
        return made(lambda z: 2**15 / (1 + exp(-z / 2**GATE_BITS)), -2048, 2047).astype(np.int32)
    assert name == "gelu", name
    step = 2**GELU_BITS
    gelu = made(lambda z: z / step * erfc(-z / step / sqrt(mpf(2))) / 2 * 1024, -8 * step, 8 * step)
    return np.minimum(gelu, ACTIVATION).astype(np.int16)


class Builder:
    """Lines and tensors of a program; every method adds lines and returns the new register's name."""

    def __init__(self) -> None:
        self.lines: list[list[Any]] = []
        self.tensors: dict[str, Ints] = {}
        self.scales: dict[str, Floats] = {}     # of rounded weights: a float network can be had back
        self.bits: dict[str, int] = {}
        self.largest: dict[str, Ints] = {}
        self.known: dict[Any, str] = {}

    def line(self, kind: str, out: str, args: Sequence[str], tensors: Sequence[str] = (), numbers: Sequence[int] = (),
             *, bits: int, largest: Any) -> str:
        free = (f"{out}.{i}" for i in count(2))
        while out in self.bits:
            out = next(free)
        self.lines.append([kind, out, [*args], [*tensors], [int(n) for n in numbers]])
        self.bits[out], self.largest[out] = bits, np.asarray(largest, np.int64)
        return out

    def finish(self) -> dict[str, Ints]:
        """The tensors, each in the smallest type that holds it."""
        kinds = [np.iinfo(t) for t in (np.int8, np.int16, np.int32, np.int64)]
        return {name: t.astype(next(k.dtype for k in kinds if k.min <= t.min() and t.max() <= k.max))
                for name, t in self.tensors.items()}

    def channels(self, x: str) -> int:
        return len(self.largest[x])

    def shared(self, name: str) -> str:
        self.tensors.setdefault(f"table.{name}", table(name))
        return f"table.{name}"

    def once(self, name: str, tensor: Ints) -> str:
        """The name of this tensor, or of an equal one that is there already."""
        key = tensor.shape, tensor.tobytes()
        if key not in self.known:
            self.known[key], self.tensors[name] = name, tensor
        return self.known[key]

    def linear(self, x: str, name: str, weight: Floats, bias: Floats | None,
               parts: Sequence[tuple[int, float, int, int]], weight_bits: int, moments: Floats | None = None) -> str:
        """parts: for each run of rows, (rows, units a 1 has, low, high). moments: see round_weights."""
        bits = np.concatenate([np.full(n, float(b)) for n, b, _, _ in parts])
        low, high = (np.concatenate([np.full(p[0], p[i]) for p in parts]) for i in (2, 3))
        if f"{name}.weight" not in self.tensors:
            self.tensors[f"{name}.weight"], self.scales[f"{name}.weight"] = round_weights(weight, weight_bits, moments)
        rounded, scale = self.tensors[f"{name}.weight"], self.scales[f"{name}.weight"]
        bias = np.zeros(len(weight)) if bias is None else bias
        requant = requantisation(rounded, scale * 2.0 ** -self.bits[x], bias, self.largest[x], bits.tolist(),
                                 low.tolist(), high.tolist())
        self.tensors[f"{name}.requant"] = requant
        power = math.log2(bits[0])
        return self.line("linear", name, [x], [f"{name}.weight", f"{name}.requant"], bits=round(power),
                         largest=np.maximum(np.abs(low), np.abs(high)))

    def depthwise(self, x: str, name: str, kernel: Floats, bits: int) -> str:
        """kernel (25, C)."""
        largest = self.largest[x]
        top = np.minimum(8191.0, np.floor(WORD / 25 / np.maximum(largest, 1)))
        scale = np.maximum(np.abs(kernel).max(0), 1e-12) / top
        rounded = np.rint(kernel / scale).astype(np.int16)
        n = kernel.shape[1]
        requant = requantisation((np.abs(rounded.astype(np.int64)).sum(0) * 1)[:, None], scale * 2.0 ** -self.bits[x],
                                 np.zeros(n), largest.max(keepdims=True), [2.0**bits] * n, [-ACTIVATION] * n,
                                 [ACTIVATION] * n)
        self.tensors[f"{name}.weight"], self.tensors[f"{name}.requant"] = rounded, requant
        return self.line("depthwise", name, [x], [f"{name}.weight", f"{name}.requant"], bits=bits,
                         largest=[ACTIVATION] * n)

    def rescale(self, x: str, name: str, factor: Floats, offset: Floats, bits: int, limit: int,
                low: int | None = None) -> str:
        """y = x factor + offset (each (1 or 101, C), floats) in units of 2^-bits, clamped to low .. limit."""
        largest = float(self.largest[x].max())
        ratio = factor * 2.0 ** (bits - self.bits[x])
        shift = max(0, min(30, 52 - math.ceil(math.log2(max(float(np.abs(ratio).max()) * largest, 1.0)
                                                         + float(np.abs(offset).max()) * 2.0**bits + 1))))
        m = np.rint(ratio * 2.0**shift).astype(np.int64)
        c = np.rint((offset * 2.0**bits + 0.5) * 2.0**shift).astype(np.int64)
        low = -limit if low is None else low
        tensors = [self.once(f"{name}.m", m), self.once(f"{name}.c", c)]
        return self.line("rescale", name, [x], tensors, (shift, low, limit), bits=bits,
                         largest=[max(limit, -low)] * self.channels(x))

    def change_unit(self, x: str, name: str, bits: int, limit: int = ACTIVATION) -> str:
        """The same values in another unit; nothing where they have it already and fit."""
        if bits == self.bits[x] and (self.largest[x] <= limit).all():
            return x
        n = self.channels(x)
        return self.rescale(x, name, np.ones((1, n)), np.zeros((1, n)), bits, limit)

    def add(self, a: str, b: str, name: str, limit: int, low: int | None = None) -> str:
        assert self.bits[a] == self.bits[b], (a, b, self.bits[a], self.bits[b])
        return self.line("add", name, [a, b], (), (-limit if low is None else low, limit), bits=self.bits[a],
                         largest=np.minimum(self.largest[a] + self.largest[b], limit))

    def slice(self, x: str, name: str, start: int, stop: int, bits: int) -> str:
        return self.line("slice", name, [x], (), (start, stop), bits=bits, largest=self.largest[x][start:stop])

    def concat(self, xs: Sequence[str], name: str) -> str:
        if len(xs) == 1:
            return xs[0]
        assert len({self.bits[x] for x in xs}) == 1, [(x, self.bits[x]) for x in xs]
        largest = np.concatenate([self.largest[x] for x in xs])
        return self.line("concat", name, xs, bits=self.bits[xs[0]], largest=largest)

    def simple(self, kind: str, x: str, name: str, numbers: Sequence[int] = ()) -> str:
        """half, shuffle, around, patches."""
        largest = self.largest[x]
        if kind == "shuffle":
            largest = largest.reshape(numbers[0] ** 2, -1).max(0)
        elif kind in ("around", "patches"):
            largest = np.tile(largest, 12 if kind == "around" else len(numbers) // 2)
        return self.line(kind, name, [x], (), numbers, bits=self.bits[x], largest=largest)

    def norm(self, x: str, name: str) -> str:
        return self.line("norm", name, [x], bits=9, largest=[ACTIVATION] * self.channels(x))

    def gate(self, r: str, x: str, name: str) -> str:
        """sigmoid(r) x; r in the gate's unit, within +-8."""
        g = self.line("lookup", f"{name}.sigmoid", [r], [self.shared("sigmoid")], (-2048,), bits=15,
                      largest=[1 << 15] * self.channels(r))
        return self.line("gate", name, [g, x], bits=self.bits[x], largest=self.largest[x])

    def gelu(self, x: str, name: str) -> str:
        return self.line("lookup", name, [x], [self.shared("gelu")], (-8 << GELU_BITS,), bits=10,
                         largest=[ACTIVATION] * self.channels(x))

    def square(self, k: str, name: str) -> str:
        """k^2 of k >= 0 within 14 bits."""
        return self.line("square", name, [k], (), (13, ACTIVATION), bits=2 * self.bits[k] - 13,
                         largest=[ACTIVATION] * self.channels(k))

    def biwkv(self, k: str, v: str, name: str, w: Floats, u: Floats) -> str:
        """w before division by T, and u, in nats."""
        self.tensors[f"{name}.decay"] = np.clip(np.rint(w * OCTAVE), 0, DECAY_LIMIT).astype(np.int32)
        self.tensors[f"{name}.bonus"] = np.clip(np.rint(u * OCTAVE), -BONUS_LIMIT, BONUS_LIMIT).astype(np.int32)
        tensors = [f"{name}.decay", f"{name}.bonus", self.shared("exp"), self.shared("fall")]
        return self.line("biwkv", name, [k, v], tensors, bits=self.bits[v], largest=self.largest[v])
