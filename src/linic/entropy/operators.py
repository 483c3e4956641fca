"""The integer operators of normative programs: what each one computes, and what it asks of its inputs.

`run` is the definition, on NumPy's int64; fast.py computes the same on torch. `check` (tensors as int64) derives the
bounds of the result from those of the inputs and of the tensors, once, when a program is loaded, and raises
WeightsError where any sum or index could leave its range: no later step has to look.
Arrays are (B, H, W, C); >> and // round towards minus infinity.
A unit 2^-p is what 1 stands for: a matter of the converter (convert.py), programs do not know it.
Sources: integer networks of Balle, Johnston, Minnen (ICLR 2019); BiWKV as in kernels/biwkv; the ranges are ours.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from linic.errors import WeightsError

Ints = npt.NDArray[Any]

QUALITIES = 101
EXACT = 1 << 53                 # below it float64 holds every integer
WORD = (1 << 31) - 1            # results fit int32
MOST_CHANNELS, MOST_TOKENS = 1 << 14, 1 << 14
SPAN = 14 << 10                 # k counts down to 14 octaves below the largest of its channel
DECAY_LIMIT, BONUS_LIMIT = 11819, 5910          # 8 nats and 5.77 octaves, in 2^-10 octaves
EXP_FIRST, EXP_LAST = -SPAN - DECAY_LIMIT // 2 - 1, BONUS_LIMIT
FALL_FIRST = -BONUS_LIMIT
SYMBOL_LIMIT, MEAN_LIMIT, Z_LIMIT = 16383, 65536, 255
# The 12 taps of a 5x5 window around a non-anchor at which anchors lie.
TAPS = [(i, j) for i in range(-2, 3) for j in range(-2, 3) if (i + j) % 2]


@dataclass(frozen=True)
class Spec:
    """What is known of a register before anything runs. low, high: (C,) int64; scale: its grid relative to z's;
    half: one checkerboard half of that grid, (H, W / 2)."""

    low: Ints
    high: Ints
    scale: int
    half: bool = False

    @property
    def channels(self) -> int:
        return len(self.low)

    @property
    def largest(self) -> Ints:
        return np.maximum(np.abs(self.low), np.abs(self.high))


@dataclass(frozen=True)
class Op:
    """One line of a program: out = kind(args; tensors; numbers)."""

    kind: str
    out: str
    args: tuple[str, ...]
    tensors: tuple[str, ...]
    numbers: tuple[int, ...]


class Operator:
    """`counts`: registers, tensors, numbers (-1: any number of them)."""

    counts: ClassVar[tuple[int, int, int]]

    @staticmethod
    def check(op: Op, *inputs: Any) -> Spec:
        raise NotImplementedError

    @staticmethod
    def run(op: Op, quality: int, *inputs: Any) -> Ints:
        raise NotImplementedError


def need(right: Any, op: Op, what: str) -> None:
    if not right:
        raise WeightsError(f"program: {op.kind} -> {op.out}: {what}")


def spec_of(op: Op, low: Any, high: Any, like: Spec, **changed: Any) -> Spec:
    low, high = np.asarray(low, np.int64), np.asarray(high, np.int64)
    need(0 < len(low) <= MOST_CHANNELS, op, f"{len(low)} channels; 1 to {MOST_CHANNELS} are possible")
    need((low <= high).all() and (low >= -WORD).all() and (high <= WORD).all(), op, "results must fit 32 bits")
    return replace(like, low=low, high=high, **changed)


def same_grid(op: Op, *specs: Spec) -> None:
    need(len({(s.scale, s.half) for s in specs}) == 1, op, "the inputs lie on different grids")


def requantised(op: Op, bound: Ints, requant: Ints, like: Spec) -> Spec:
    """Of sums with |sum| <= bound (float: never wraps), clamp((sum m + c) >> s, low, high)."""
    need(requant.shape == (5, len(bound)), op, f"requantisation is {requant.shape}, not (5, {len(bound)})")
    m, c, s, low, high = requant
    need((m >= 0).all() and (m <= 1 << 17).all() and (s >= 0).all() and (s <= 45).all(), op, "m or s out of range")
    need((np.abs(c.astype(float)) < EXACT).all(), op, "|c| reaches 2^53")
    need((bound < EXACT).all() and (bound * m + np.abs(c.astype(float)) < EXACT).all(), op, "|sum m + c| reaches 2^53")
    return spec_of(op, low, high, like)


def requantise(total: Ints, requant: Ints) -> Ints:
    m, c, s, low, high = requant
    return np.clip((total * m + c) >> s, low, high)


class Linear(Operator):
    """sum_k w_nk x_k, requantised. weight (N, K); requant (5, N): m, c, s, low, high."""

    counts = 1, 2, 0

    @staticmethod
    def check(op: Op, x: Spec, weight: Ints, requant: Ints) -> Spec:
        need(weight.ndim == 2 and weight.shape[1] == x.channels, op, f"weight {weight.shape} for {x.channels} channels")
        need((weight >= -8191).all() and (weight <= 8191).all(), op, "weights beyond 14 bits")
        return requantised(op, np.abs(weight).astype(float) @ x.largest.astype(float), requant, x)

    @staticmethod
    def run(op: Op, quality: int, x: Ints, weight: Ints, requant: Ints) -> Ints:
        return requantise(x @ weight.astype(np.int64).T, requant)


class Depthwise(Operator):
    """5x5 window of each channel, zeros outside, requantised. weight (25, C), tap 5 i + j at offset (i - 2, j - 2)."""

    counts = 1, 2, 0

    @staticmethod
    def check(op: Op, x: Spec, weight: Ints, requant: Ints) -> Spec:
        need(weight.shape == (25, x.channels) and not x.half, op, f"weight {weight.shape} for {x.channels} channels")
        need((weight >= -8191).all() and (weight <= 8191).all(), op, "weights beyond 14 bits")
        bound = np.abs(weight).sum(0) * x.largest
        need((bound <= WORD).all(), op, "sums must fit 32 bits")
        return requantised(op, bound.astype(float), requant, x)

    @staticmethod
    def run(op: Op, quality: int, x: Ints, weight: Ints, requant: Ints) -> Ints:
        h, w = x.shape[1:3]
        padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
        return requantise(sum(padded[:, i:i + h, j:j + w] * weight[5 * i + j].astype(np.int64)
                              for i in range(5) for j in range(5)), requant)


class Patches(Operator):
    """im2col: the pixels at the offsets (numbers: dy, dx, dy, dx ...) side by side, zeros outside. With Linear, any
    convolution."""

    counts = 1, 0, -1

    @staticmethod
    def check(op: Op, x: Spec) -> Spec:
        n = len(op.numbers) // 2
        need(n and len(op.numbers) % 2 == 0 and all(abs(v) <= 2 for v in op.numbers) and not x.half, op, "offsets")
        return spec_of(op, np.tile(np.minimum(x.low, 0), n), np.tile(np.maximum(x.high, 0), n), x)

    @staticmethod
    def run(op: Op, quality: int, x: Ints) -> Ints:
        h, w = x.shape[1:3]
        padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
        return np.concatenate([padded[:, 2 + i:2 + i + h, 2 + j:2 + j + w]
                               for i, j in zip(op.numbers[::2], op.numbers[1::2])], 3)


class Norm(Operator):
    """LayerNorm without gain and bias, in units of 2^-9: with S = sum x, D = 64 (C sum x^2 - S^2 + 1),
    R = floor(sqrt(D)): clamp(((C x - S) floor(2^40 / R) + 2^27) >> 28, -8191, 8191)."""

    counts = 1, 0, 0

    @staticmethod
    def check(op: Op, x: Spec) -> Spec:
        need(x.channels * int(x.largest.max()) <= 1 << 23, op, "channels times the largest value exceed 2^23")
        return spec_of(op, [-8191] * x.channels, [8191] * x.channels, x)

    @staticmethod
    def run(op: Op, quality: int, x: Ints) -> Ints:
        c = x.shape[3]
        total = x.sum(3, keepdims=True)
        d = 64 * (c * (x * x).sum(3, keepdims=True) - total * total + 1)
        return np.clip(((c * x - total) * ((1 << 40) // isqrt(d)) + (1 << 27)) >> 28, -8191, 8191)


def isqrt(d: Ints) -> Ints:
    """floor(sqrt(d)), d below 2^53."""
    root = np.sqrt(d.astype(np.float64)).astype(np.int64)
    root -= root * root > d         # correctly rounded it is right already; this frees it from the hardware
    root += (root + 1) * (root + 1) <= d
    return root


class Square(Operator):
    """min(x^2 >> shift, high) of x >= 0; numbers: shift, high."""

    counts = 1, 0, 2

    @staticmethod
    def check(op: Op, x: Spec) -> Spec:
        shift, high = op.numbers
        need((x.low >= 0).all() and (x.high <= 32767).all() and 0 <= shift <= 30 and high > 0, op, "range")
        return spec_of(op, 0 * x.low, np.minimum(x.high * x.high >> shift, high), x)

    @staticmethod
    def run(op: Op, quality: int, x: Ints) -> Ints:
        return np.minimum(x * x >> op.numbers[0], op.numbers[1])


class Lookup(Operator):
    """table[x - first]: sigmoid, GELU, any activation; number: first."""

    counts = 1, 1, 1

    @staticmethod
    def check(op: Op, x: Spec, table: Ints) -> Spec:
        (first,) = op.numbers
        need(table.ndim == 1 and (x.low >= first).all() and (x.high < first + len(table)).all(), op,
             f"inputs {x.low.min()} to {x.high.max()} and a table of {table.size} from {first}")
        return spec_of(op, [int(table.min())] * x.channels, [int(table.max())] * x.channels, x)

    @staticmethod
    def run(op: Op, quality: int, x: Ints, table: Ints) -> Ints:
        return table.astype(np.int64)[x - op.numbers[0]]


class Gate(Operator):
    """(g x + 2^14) >> 15, g from 0 to 2^15."""

    counts = 2, 0, 0

    @staticmethod
    def check(op: Op, g: Spec, x: Spec) -> Spec:
        same_grid(op, g, x)
        need(g.channels == x.channels and (g.low >= 0).all() and (g.high <= 1 << 15).all()
             and (x.largest <= 1 << 15).all(), op, "range")
        return spec_of(op, np.minimum(x.low, 0), np.maximum(x.high, 0), x)

    @staticmethod
    def run(op: Op, quality: int, g: Ints, x: Ints) -> Ints:
        return (g * x + (1 << 14)) >> 15


class BiWkv(Operator):
    """BiWKV over the tokens in row order. k in 2^-10 octaves, v at most 14 bits; tensors: decay (C,) before division
    by T and bonus (C,) in 2^-10 octaves, EXP[z] = round(2^(z / 1024 + 20)), FALL[z] = round(2^(z / 1024 + 14)).

        e_i = (2 i - (T - 1)) decay // (2 T);    x_i = max(k_i - max_j k_j, -14 * 1024)
        p_i = EXP[x_i + e_i], q_i = EXP[x_i - e_i], s_i = EXP[x_i + bonus] 2^14
        P_t = sum_{i<t} p_i v_i, D_t = sum_{i<t} p_i;    Q_t = sum_{i>t} q_i v_i, E_t = sum_{i>t} q_i
        num = P_t FALL[-e_{t-1}] + Q_t FALL[e_{t+1}] + s_t v_t;    den the same without v
        y_t = (num + (den >> 1)) // den

    All sums stay below 2^63 while T <= 2^14.
    """

    counts = 2, 4, 0

    @staticmethod
    def check(op: Op, k: Spec, v: Spec, decay: Ints, bonus: Ints, exp: Ints, fall: Ints) -> Spec:
        same_grid(op, k, v)
        need(not k.half and k.channels == v.channels and decay.shape == bonus.shape == (k.channels,), op, "shapes")
        need((v.largest <= 8192).all() and (k.largest <= 1 << 20).all(), op, "v beyond 14 bits or k beyond 20")
        need((decay >= 0).all() and (decay <= DECAY_LIMIT).all() and (bonus >= -BONUS_LIMIT).all()
             and (bonus <= BONUS_LIMIT).all(), op,
             "decay or bonus out of range")
        need(exp.shape == (EXP_LAST - EXP_FIRST + 1,) and fall.shape == (2 * BONUS_LIMIT + 1,), op, "table lengths")
        need((exp >= 1).all() and (exp <= 1 << 26).all() and (fall >= 1).all() and (fall <= 1 << 20).all(), op,
             "tables out of range")
        # What the sums can reach at most, with these tables: the terms of one side, at the largest distance factors.
        reach = _reach(decay, exp.astype(float), fall.astype(float))
        need(reach * 8193 < 2.0**63, op, "sums could leave 63 bits")
        return spec_of(op, v.low, v.high, v)        # a mean of v: rounding cannot leave its range

    @staticmethod
    def run(op: Op, quality: int, k: Ints, v: Ints, decay: Ints, bonus: Ints, exp: Ints, fall: Ints) -> Ints:
        shape = b, h, w, c = k.shape
        t = h * w
        k, v = k.reshape(b, t, c), v.reshape(b, t, c)
        exp, fall = exp.astype(np.int64), fall.astype(np.int64)
        e = (2 * np.arange(t)[:, None] - (t - 1)) * decay.astype(np.int64) // (2 * t)
        x = np.maximum(k - k.max(1, keepdims=True), -SPAN)
        p, q, s = exp[x + e - EXP_FIRST], exp[x - e - EXP_FIRST], exp[x + bonus - EXP_FIRST] << 14
        edge = np.zeros((b, 1, c), np.int64)
        fall_left, fall_right = fall[-e[:-1] - FALL_FIRST], fall[e[1:] - FALL_FIRST]

        def total(left: Ints, right: Ints, own: Ints) -> Ints:
            before = np.cumsum(left, 1)[:, :-1] * fall_left
            after = np.cumsum(right[:, ::-1], 1)[:, ::-1][:, 1:] * fall_right
            return np.concatenate([edge, before], 1) + np.concatenate([after, edge], 1) + own

        num, den = total(p * v, q * v, s * v), total(p, q, s)
        return ((num + (den >> 1)) // den).reshape(shape)


def _reach(decay: Ints, exp: npt.NDArray[np.float64], fall: npt.NDArray[np.float64]) -> float:
    """The largest den: at most T terms EXP[e_i] FALL[-e_t], i < t, and the own one."""
    far = int(decay.max(initial=0)) // 2 + 1
    own = exp.max() * 2.0**14
    # EXP and FALL grow with their argument in an honest table; in another one the largest products are taken.
    zero = -EXP_FIRST
    honest = bool((np.diff(exp) >= 0).all() and (np.diff(fall) >= 0).all())
    if honest:
        steps = np.arange(-far, far + 1)
        worst = (np.maximum.accumulate(exp[steps + zero]) * fall[-steps - FALL_FIRST]).max()
    else:
        worst = exp.max() * fall.max()
    return float(MOST_TOKENS * worst + own)


class Add(Operator):
    """clamp(a + b, low, high); numbers: low, high."""

    counts = 2, 0, 2

    @staticmethod
    def check(op: Op, a: Spec, b: Spec) -> Spec:
        same_grid(op, a, b)
        need(a.channels == b.channels and (a.largest + b.largest <= WORD).all(), op, "range")
        low, high = op.numbers
        need(low <= high, op, "low above high")
        return spec_of(op, np.clip(a.low + b.low, low, high), np.clip(a.high + b.high, low, high), a)

    @staticmethod
    def run(op: Op, quality: int, a: Ints, b: Ints) -> Ints:
        return np.clip(a + b, op.numbers[0], op.numbers[1])


class Rescale(Operator):
    """clamp((x m_qc + c_qc) >> shift, low, high), a row of m and c per quality or one for all: changes of unit, gains,
    quality rows. Tensors: m, c, each (1 or 101, C); numbers: shift, low, high."""

    counts = 1, 2, 3

    @staticmethod
    def check(op: Op, x: Spec, m: Ints, c: Ints) -> Spec:
        shift, low, high = op.numbers
        for t in (m, c):
            need(t.ndim == 2 and t.shape[0] in (1, QUALITIES) and t.shape[1] == x.channels, op, f"a row is {t.shape}")
        reach = np.abs(m.astype(float)).max(0) * x.largest + np.abs(c.astype(float)).max(0)
        need((reach < 2.0**62).all() and 0 <= shift <= 62 and low <= high, op, "range")
        ends = [np.clip(((x_ * m + c) >> shift), low, high) for x_ in (x.low, x.high)]
        return spec_of(op, np.minimum(*ends).min(0), np.maximum(*ends).max(0), x)

    @staticmethod
    def run(op: Op, quality: int, x: Ints, m: Ints, c: Ints) -> Ints:
        m, c = (t[quality if len(t) > 1 else 0].astype(np.int64) for t in (m, c))
        shift, low, high = op.numbers
        return np.clip((x * m + c) >> shift, low, high)


class Concat(Operator):
    """Channels side by side."""

    counts = -1, 0, 0

    @staticmethod
    def check(op: Op, *xs: Spec) -> Spec:
        need(xs, op, "nothing to join")
        same_grid(op, *xs)
        return spec_of(op, np.concatenate([x.low for x in xs]), np.concatenate([x.high for x in xs]), xs[0])

    @staticmethod
    def run(op: Op, quality: int, *xs: Ints) -> Ints:
        return np.concatenate(xs, 3)


class Slice(Operator):
    """Channels start to stop - 1; numbers: start, stop."""

    counts = 1, 0, 2

    @staticmethod
    def check(op: Op, x: Spec) -> Spec:
        start, stop = op.numbers
        need(0 <= start < stop <= x.channels, op, f"channels {start} to {stop} of {x.channels}")
        return spec_of(op, x.low[start:stop], x.high[start:stop], x)

    @staticmethod
    def run(op: Op, quality: int, x: Ints) -> Ints:
        return x[..., op.numbers[0]:op.numbers[1]]


class Shuffle(Operator):
    """Depth to space: channel (i f + j) C + c of a cell becomes channel c of its pixel (i, j); number: f."""

    counts = 1, 0, 1

    @staticmethod
    def check(op: Op, x: Spec) -> Spec:
        (f,) = op.numbers
        need(1 <= f <= 4 and x.channels % (f * f) == 0 and not x.half and x.scale * f <= 64, op, f"factor {f}")
        low, high = x.low.reshape(f * f, -1).min(0), x.high.reshape(f * f, -1).max(0)
        return spec_of(op, low, high, x, scale=x.scale * f)

    @staticmethod
    def run(op: Op, quality: int, x: Ints) -> Ints:
        (f,), (b, h, w, c) = op.numbers, x.shape
        cells = x.reshape(b, h, w, f, f, c // (f * f)).transpose(0, 1, 3, 2, 4, 5)
        return cells.reshape(b, h * f, w * f, c // (f * f))


class Half(Operator):
    """One half of the checkerboard, rows kept, columns packed; number: 0 (row + column even, the anchors) or 1."""

    counts = 1, 0, 1

    @staticmethod
    def check(op: Op, x: Spec) -> Spec:
        need(op.numbers[0] in (0, 1) and not x.half and x.scale % 2 == 0, op, "half of what has no halves")
        return spec_of(op, x.low, x.high, x, half=True)

    @staticmethod
    def run(op: Op, quality: int, x: Ints) -> Ints:
        b, h, w, c = x.shape
        pairs, parity = x.reshape(b, h, w // 2, 2, c), op.numbers[0]
        out = np.empty((b, h, w // 2, c), x.dtype)
        out[:, 0::2], out[:, 1::2] = pairs[:, 0::2, :, parity], pairs[:, 1::2, :, 1 - parity]
        return out


class Join(Operator):
    """Two halves, anchors first, become the whole."""

    counts = 2, 0, 0

    @staticmethod
    def check(op: Op, anchors: Spec, others: Spec) -> Spec:
        same_grid(op, anchors, others)
        need(anchors.half and anchors.channels == others.channels, op, "not two halves")
        return spec_of(op, np.minimum(anchors.low, others.low), np.maximum(anchors.high, others.high), anchors,
                       half=False)

    @staticmethod
    def run(op: Op, quality: int, anchors: Ints, others: Ints) -> Ints:
        b, h, w, c = anchors.shape
        out = np.empty((b, h, w, 2, c), anchors.dtype)
        out[:, 0::2, :, 0], out[:, 0::2, :, 1] = anchors[:, 0::2], others[:, 0::2]
        out[:, 1::2, :, 1], out[:, 1::2, :, 0] = anchors[:, 1::2], others[:, 1::2]
        return out.reshape(b, h, 2 * w, c)


class Around(Operator):
    """At every non-anchor its 12 anchors in a 5x5 window (TAPS), side by side, zeros outside: the rows of a masked 5x5
    convolution."""

    counts = 1, 0, 0

    @staticmethod
    def check(op: Op, anchors: Spec) -> Spec:
        need(anchors.half, op, "needs the anchors")
        return spec_of(op, np.tile(np.minimum(anchors.low, 0), 12), np.tile(np.maximum(anchors.high, 0), 12), anchors)

    @staticmethod
    def run(op: Op, quality: int, anchors: Ints) -> Ints:
        b, h, w, c = anchors.shape
        full = np.zeros((b, h + 4, 2 * w + 4, c), anchors.dtype)
        full[:, 2:-2, 2:-2] = Join.run(op, quality, anchors, np.zeros_like(anchors))
        windows = [full[:, 2 + i:2 + i + h, 2 + j:2 + j + 2 * w] for i, j in TAPS]
        half = Op("half", op.out, op.args, (), (1,))
        return np.concatenate([Half.run(half, quality, x) for x in windows], 3)


OPERATORS: dict[str, type[Operator]] = {
    "linear": Linear, "depthwise": Depthwise, "patches": Patches, "norm": Norm, "square": Square, "lookup": Lookup,
    "gate": Gate, "biwkv": BiWkv, "add": Add, "rescale": Rescale, "concat": Concat, "slice": Slice, "shuffle": Shuffle,
    "half": Half, "join": Join, "around": Around,
}
