"""Step programs: a normative network that runs once a step of a coding order, over that step's tokens (MRT's RCM).

As program.py, but every register holds the n tokens of one step, (B, 1, n, C), and some lines look back at what earlier
steps have left in a register:

    order; kind (0 staggered, 1 windows), window, latents       the first line; its register is not to be read
    past(x)                     x of the neighbours (OFFSETS) side by side, zeros where not yet known or outside
    known(y); value             one channel a neighbour: value where it is known, else 0
    near(x, past)               each channel weighed over a token and its neighbours, requantised
    causal(k, v); sequence      weighted mean of v over a sequence so far, the token itself included
    code(mean, index) -> y; skip        as in program.py: y_hat = (symbol << 8) + mean, symbol 0 where index < skip

`past` and `known` may read y, the result, before the line that writes it: they see earlier steps only. Of the operators
of program.py those run here that make a token of the same token. The order of a frame is part of the format: `order`.
Raises WeightsError, LimitExceeded. On torch: fast.py.
"""

import hashlib
from collections.abc import Generator, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np

from linic.entropy import program as programs
from linic.entropy.operators import (
    BONUS_LIMIT,
    DECAY_LIMIT,
    EXP_FIRST,
    EXP_LAST,
    MEAN_LIMIT,
    OPERATORS,
    SPAN,
    SYMBOL_LIMIT,
    WORD,
    Ints,
    Op,
    Operator,
    Spec,
    need,
    requantise,
    requantised,
    same_grid,
    spec_of,
)
from linic.entropy.program import RESULT, Lines, noise
from linic.entropy.walk import Step, walk
from linic.errors import LimitExceeded, WeightsError
from linic.rangecoder import Encoder, Tables

KINDS = ("staggered", "windows")        # their numbers in a program
OFFSETS = {     # row, column of the neighbours that may be known; staggered rows know those above two columns ahead
    "staggered": ((0, -1), (0, -2), (-1, -2), (-1, -1), (-1, 0), (-1, 1), (-2, -1), (-2, 0), (-2, 1), (-2, 2)),
    "windows": ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1), (0, -2), (-2, 0), (0, 2), (2, 0)),
}
SEQUENCES = {"staggered": 2, "windows": 1}      # rows, columns; windows
MOST_SIDE, MOST_WINDOW = 64, 16         # tokens; sequences have at most 256
MOST_LATENTS = 4096
MOST_KEPT = 1 << 15                     # channels of all registers that later steps look at
MOST_CHANNELS = 1 << 16                 # of all registers; a step has at most 1,024 tokens
LOWEST_KEY = -(1 << 20)


# --- the order -------------------------------------------------------------------------------------------------------


class Places(NamedTuple):
    """One step: positions in the frame (h w: none). tokens (n,) ascending; neighbours (n, offsets); before: for each
    kind of sequence (n, 1 + t), the token itself, then those before it, the nearest first."""

    tokens: Ints
    neighbours: Ints
    before: tuple[Ints, ...]


@lru_cache(maxsize=8)
def order(kind: str, window: int, h: int, w: int) -> tuple[Places, ...]:
    """The steps of a frame.

    staggered: each row two columns behind the one above; sequences: its row, its column. windows: the fewest windows
    of at most `window` cells a side, sizes differing by at most 1, in lockstep, each in row order; sequence: its own.
    """
    row, column = (a.reshape(-1) for a in np.indices((h, w)))
    none = h * w
    position = np.arange(none).reshape(h, w)
    if kind == "staggered":
        when, sequences = 2 * row + column, [list(position), list(position.T)]
    else:
        columns, grid, parts = _cuts(w, window), np.empty((h, w), np.int64), []
        for top, bottom in _cuts(h, window):
            for left, right in columns:
                i, j = np.indices((bottom - top, right - left))
                grid[top:bottom, left:right] = i * max(b - a for a, b in columns) + j
                parts.append(position[top:bottom, left:right].reshape(-1))
        when, sequences = grid.reshape(-1), [parts]
    neighbours = np.full((none, len(OFFSETS[kind])), none)
    for n, (down, right) in enumerate(OFFSETS[kind]):
        r, c = row + down, column + right
        inside = (r >= 0) & (r < h) & (c >= 0) & (c < w)
        there = np.where(inside, r * w + c, 0)
        neighbours[:, n] = np.where(inside & (when[there] < when), there, none)
    before = []
    for lists in sequences:
        table = np.full((none, max(map(len, lists))), none)
        for tokens in lists:
            for at, token in enumerate(tokens):
                table[token, :at + 1] = tokens[at::-1]
        before.append(table)
    steps = []
    for step in np.unique(when):
        tokens = np.flatnonzero(when == step)
        # No longer than the longest of this step.
        cut = (table[tokens, :(table[tokens] < none).sum(1).max()] for table in before)
        steps.append(Places(tokens, neighbours[tokens], tuple(map(np.ascontiguousarray, cut))))
    return tuple(steps)


def _cuts(n: int, most: int) -> list[tuple[int, int]]:
    count = -(-n // most)
    return [(i * n // count, (i + 1) * n // count) for i in range(count)]


# --- the operators ---------------------------------------------------------------------------------------------------
# `run` takes, for what looks back, the history (B, h w + 1, C) of a register, whose last row is 0, and positions.


class Past(Operator):
    """The neighbours' values side by side, in the order of OFFSETS."""

    counts = 1, 0, 0

    @staticmethod
    def check(op: Op, x: Spec, neighbours: int) -> Spec:
        return spec_of(op, np.tile(np.minimum(x.low, 0), neighbours), np.tile(np.maximum(x.high, 0), neighbours), x)

    @staticmethod
    def run(op: Op, quality: int, history: Ints, neighbours: Ints) -> Ints:
        return history[:, neighbours].reshape(len(history), 1, len(neighbours), -1)


class Known(Operator):
    """A channel a neighbour; number: its value where the neighbour is known."""

    counts = 1, 0, 1

    @staticmethod
    def check(op: Op, y: Spec, neighbours: int) -> Spec:
        need(op.numbers[0] > 0, op, "a value that says nothing")
        return spec_of(op, [0] * neighbours, [op.numbers[0]] * neighbours, y)

    @staticmethod
    def run(op: Op, quality: int, history: Ints, neighbours: Ints) -> Ints:
        known = (neighbours < history.shape[1] - 1) * np.int64(op.numbers[0])
        return np.broadcast_to(known, (len(history), 1, *known.shape))


class Near(Operator):
    """x w_0 + sum_j past_j w_j, each channel for itself, requantised. weight (1 + neighbours, C); requant (5, C)."""

    counts = 2, 2, 0

    @staticmethod
    def check(op: Op, x: Spec, past: Spec, weight: Ints, requant: Ints) -> Spec:
        same_grid(op, x, past)
        need(weight.ndim == 2 and weight.shape[1] == x.channels and past.channels == (len(weight) - 1) * x.channels, op,
             f"weight {weight.shape} for {x.channels} and {past.channels} channels")
        need((weight >= -8191).all() and (weight <= 8191).all(), op, "weights beyond 14 bits")
        bound = (np.abs(weight) * np.concatenate([x.largest, past.largest]).reshape(weight.shape)).sum(0)
        need((bound <= WORD).all(), op, "sums must fit 32 bits")
        return requantised(op, bound.astype(float), requant, x)

    @staticmethod
    def run(op: Op, quality: int, x: Ints, past: Ints, weight: Ints, requant: Ints) -> Ints:
        both = np.concatenate([x, past], 3).reshape(*x.shape[:3], *weight.shape)
        return requantise((both * weight.astype(np.int64)).sum(3), requant)


class Causal(Operator):
    """Causal WKV over a sequence, each channel for itself. k and decay (C,) a token, bonus (C,), in 2^-10 octaves, v of
    14 bits; EXP as in BiWkv; number: which of the order's sequences. For the token at t of its sequence, i = 0 .. t:

        x_i = max(k_i - max_j k_j, -14 * 1024);    a_i = EXP[max(x_i - (t - 1 - i) decay, first)] for i < t
        a_t = EXP[x_t + bonus];    y = (sum a_i v_i + (den >> 1)) // den, den = sum a_i

    From the whole past rather than from a rounded state: exact, and nothing feeds back. Sums stay below 2^48.
    """

    counts = 2, 3, 1

    @staticmethod
    def check(op: Op, k: Spec, v: Spec, sequences: int, decay: Ints, bonus: Ints, exp: Ints) -> Spec:
        same_grid(op, k, v)
        need(0 <= op.numbers[0] < sequences, op, f"sequence {op.numbers[0]} of {sequences}")
        need(k.channels == v.channels and decay.shape == bonus.shape == (k.channels,), op, "shapes")
        need((v.largest <= 8192).all() and (k.largest <= -LOWEST_KEY).all(), op, "v beyond 14 bits or k beyond 20")
        need((decay >= 0).all() and (decay <= DECAY_LIMIT).all() and (bonus >= -BONUS_LIMIT).all()
             and (bonus <= BONUS_LIMIT).all(), op, "decay or bonus out of range")
        need(exp.shape == (EXP_LAST - EXP_FIRST + 1,) and (exp >= 1).all() and (exp <= 1 << 26).all(), op, "table")
        return spec_of(op, v.low, v.high, v)        # a mean of v: rounding cannot leave its range

    @staticmethod
    def run(op: Op, quality: int, k: Ints, v: Ints, before: Ints, decay: Ints, bonus: Ints, exp: Ints) -> Ints:
        there = (before < k.shape[1] - 1)[:, :, None]
        keys = np.where(there, k[:, before], LOWEST_KEY)                        # B, n, 1 + t, C
        x = np.maximum(keys - keys.max(2, keepdims=True), -SPAN)
        distance = np.arange(-1, before.shape[1] - 1)[:, None]
        z = np.where(distance < 0, x + bonus, np.maximum(x - distance * decay.astype(np.int64), EXP_FIRST))
        a = np.where(there, exp.astype(np.int64)[z - EXP_FIRST], 0)
        num, den = (a * v[:, before]).sum(2), a.sum(2)
        return ((num + (den >> 1)) // den)[:, None]


# --- the program -----------------------------------------------------------------------------------------------------

SAME_TOKEN = ("linear", "norm", "square", "lookup", "gate", "add", "rescale", "concat", "slice")
LOOKING_BACK = ("past", "known", "causal")


class StepProgram(Lines):
    """`kind`, `window`: of its order. `kept`: channels of each register that later steps look at."""

    operators = MappingProxyType({name: OPERATORS[name] for name in SAME_TOKEN}
                                 | {"past": Past, "known": Known, "near": Near, "causal": Causal})
    others = MappingProxyType({"order": (0, 0, 3), "code": (2, 0, 1)})
    kind, window = "", 0

    def _input(self, op: Op, name: str) -> Spec:
        if name == self.ops[0].out:
            raise WeightsError(f"program: {op.kind} -> {op.out} reads {name!r}, which is no register")
        if name == RESULT and op.kind in ("past", "known") and self.latents:
            limit = np.full(self.latents, MEAN_LIMIT + (SYMBOL_LIMIT << 8))
            return Spec(-limit, limit, 1)
        return super()._input(op, name)

    def _check(self, op: Op, inputs: list[Spec]) -> Spec:
        need((op.kind == "code") == (op.out == RESULT), op, f"{RESULT!r} and nothing else is coded")
        if op.kind == "order":
            kind, window, latents = op.numbers
            need(not self.specs and kind in (0, 1) and 0 < latents <= MOST_LATENTS
                 and (1 < window <= MOST_WINDOW if kind else window == 0), op, "not an order, or not the first line")
            self.kind, self.window, self.latents = KINDS[kind], window, latents
            return spec_of(op, [0], [0], Spec(np.zeros(1), np.zeros(1), 1))
        need(self.latents, op, "the first line must tell the order")
        if op.kind == "code":
            (mean, index), (skip,) = inputs, op.numbers
            need(mean.channels == index.channels == self.latents and 0 <= skip <= self.scales, op,
                 f"{mean.channels} means and {index.channels} indices of {self.latents} latents")
            need((mean.largest <= MEAN_LIMIT).all() and (index.low >= 0).all() and (index.high < self.scales).all(), op,
                 "mean or index out of range")
            return spec_of(op, mean.low - (SYMBOL_LIMIT << 8), mean.high + (SYMBOL_LIMIT << 8), mean)
        context = {"past": [len(OFFSETS[self.kind])], "causal": [SEQUENCES[self.kind]]}
        context["known"] = context["past"]
        tensors = (self.tensors[t].astype(np.int64) for t in op.tensors)
        return self.operators[op.kind].check(op, *inputs, *context.get(op.kind, []), *tensors)

    def _end(self) -> None:
        if RESULT not in self.specs:
            raise WeightsError(f"program: it codes no {RESULT!r}")
        read = {name for op in self.ops if op.kind in LOOKING_BACK for name in op.args}
        self.kept = {name: self.specs[name].channels for name in sorted(read | {RESULT})}
        if (channels := sum(spec.channels for spec in self.specs.values())) > MOST_CHANNELS:
            raise WeightsError(f"program: its registers have {channels} channels; {MOST_CHANNELS} at most")
        if sum(self.kept.values()) > MOST_KEPT:
            raise WeightsError(f"program: later steps look at {sum(self.kept.values())} channels; {MOST_KEPT} at most")


class Backend(programs.Backend, Protocol):
    """Where a step program runs. A history: (B, h w + 1, C), zeros at first; positions: whatever `positions` makes."""

    def positions(self, values: Ints) -> Any: ...
    def history(self, batch: int, rows: int, channels: int) -> Any: ...
    def store(self, history: Any, tokens: Any, register: Any) -> None: ...


class Numpy(programs.Numpy):
    """int64 everywhere: slow, and the definition."""

    def positions(self, values: Ints) -> Ints:
        return values

    def history(self, batch: int, rows: int, channels: int) -> Ints:
        return np.zeros((batch, rows, channels), np.int64)

    def store(self, history: Ints, tokens: Ints, register: Ints) -> None:
        history[:, tokens] = register[:, 0]


def plan(program: StepProgram, backend: Backend, quality: int, size: tuple[int, int], y_q8: Ints | None = None,
         rounding: Ints | Sequence[int] = (128,)) -> Generator[Step, Ints, Ints]:
    """The coding plan of one frame of (h, w) tokens. y_q8 (h, w, C) in steps of 1/256: integers in the encoder, None in
    the decoder. Returns y_hat_q8 (h, w, C), int32. Symbols of a step: by position in the frame, then channel.

    rounding, (1,) or (C,), in 1/256: a distance d to the mean becomes the symbol (|d| + rounding) >> 8 with d's sign;
    less than 128 leaves a dead zone. The encoder's choice alone.
    y_q8 of several frames may come with a batch in front: one stream, frame by frame within each step."""
    h, w = size
    if not (1 <= h <= MOST_SIDE and 1 <= w <= MOST_SIDE):
        raise LimitExceeded(0, f"a tile of {w * 32}x{h * 32} pixels; 2048x2048 can be coded as one")
    wanted = None if y_q8 is None else y_q8.reshape(-1, h * w, program.latents)
    batch, added = 1 if wanted is None else len(wanted), np.asarray(rounding, np.int64)
    past = {name: backend.history(batch, h * w + 1, channels) for name, channels in program.kept.items()}
    for places in order(program.kind, program.window, h, w):
        tokens, neighbours = backend.positions(places.tokens), backend.positions(places.neighbours)
        before = [backend.positions(table) for table in places.before]
        registers: dict[str, Any] = {}
        for op in program.ops[1:]:
            if op.kind == "code":
                mean, index = (backend.numpy(registers[name]) for name in op.args)
                coded, asked = index >= op.numbers[0], None
                if wanted is not None:
                    asked = _symbols(wanted[:, None, places.tokens] - mean, added)[coded].astype(np.int32)
                symbols = yield Step(index[coded].astype(np.int32), asked)
                values = np.zeros(mean.shape, np.int64)
                values[coded] = symbols
                made = backend.register((values << 8) + mean)
            elif op.kind in LOOKING_BACK:
                where = before[op.numbers[0]] if op.kind == "causal" else neighbours
                made = backend.run(op, quality, [*(past[name] for name in op.args), where])
            else:
                made = backend.run(op, quality, [registers[name] for name in op.args])
            registers[op.out] = made
            if op.out in past:
                backend.store(past[op.out], tokens, made)
    y_hat = backend.numpy(past[RESULT])[:, :-1].astype(np.int32)
    return y_hat.reshape((h, w, -1) if y_q8 is None else y_q8.shape)


def _symbols(distance: Ints, added: Ints) -> Ints:
    return np.sign(distance) * np.minimum((np.abs(distance) + added) >> 8, SYMBOL_LIMIT)


def known_answer(program: StepProgram, tables: Tables, backend: Backend) -> str:
    """SHA-256 over what made-up latents become: see program.known_answer. Two windows of different size."""
    h, w, quality = 3, 9, 40
    y_q8 = noise(h * w * program.latents, 2) % 4096 - 2048
    coder = Encoder(tables)
    y_hat = walk(plan(program, backend, quality, (h, w), y_q8.reshape(h, w, -1)), coder)
    return hashlib.sha256(coder.finish() + y_hat.astype("<i4").tobytes()).hexdigest()
