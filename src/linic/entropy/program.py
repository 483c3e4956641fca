"""Normative programs: everything between the symbols of z and the last mean of y, as data.

A weight file holds a flat list of integer operators (operators.py) and the integer tensors that they name. Two more
kinds of line talk to the range coder:

    symbols -> z; numbers: channels                         z, one table a channel, tables count from `scales`
    code(mean, index) -> y_hat; numbers: channel, parity, skip      one half of a group: y_hat = (symbol << 8) + mean

mean and y_hat are in steps of 1/256 of a symbol, index is the table; where index < skip nothing is coded and the symbol
is 0. The result is the register `y`. No control flow, no computed shapes: the size of z's grid and the quality are all
that a run is given. `Program` checks every line at load; `plan` is the walk's plan (walk.py) on a backend: NumPy, the
definition, or torch (fast.py). Raises WeightsError. Programs that run token by token: steps.py.
"""

import hashlib
import json
import math
from collections.abc import Generator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

import numpy as np

from linic.entropy.operators import (
    MEAN_LIMIT,
    MOST_TOKENS,
    OPERATORS,
    SYMBOL_LIMIT,
    WORD,
    Z_LIMIT,
    Ints,
    Op,
    Operator,
    Spec,
    need,
    spec_of,
)
from linic.entropy.walk import Step, walk
from linic.errors import Damaged, LimitExceeded, WeightsError
from linic.rangecoder import Encoder, Tables

RESULT = "y"
# Lines; channels of all registers together; tensor entries that all lines together read.
MOST_OPS, MOST_IN_ALL, MOST_READ = 20_000, 1 << 21, 1 << 27


class Backend(Protocol):
    """Where a program runs: registers are arrays of its own."""

    def run(self, op: Op, quality: int, inputs: Sequence[Any]) -> Any: ...
    def numpy(self, register: Any) -> Ints: ...
    def register(self, values: Ints) -> Any: ...


class Numpy:
    """int64 everywhere: slow, and the definition."""

    def __init__(self, program: "Lines"):
        self.tensors, self.operators = program.tensors, program.operators

    def run(self, op: Op, quality: int, inputs: Sequence[Ints]) -> Ints:
        return self.operators[op.kind].run(op, quality, *inputs, *(self.tensors[t] for t in op.tensors))

    def numpy(self, register: Ints) -> Ints:
        return register

    def register(self, values: Ints) -> Ints:
        return values.astype(np.int64)


class Lines:
    """What all programs share: lines, parsed and checked one by one, and the tensors that they name.

    `lines`: as in the weight file, [kind, out, [args], [tensors], [numbers]] each. `specs`: of every register. A kind
    of program has `operators` and, beside them, lines that take what `others` says; it checks each line in `_check`,
    the whole in `_end`."""

    operators: ClassVar[Mapping[str, type[Operator]]]
    others: ClassVar[Mapping[str, tuple[int, int, int]]]

    def __init__(self, lines: Any, tensors: Mapping[str, Ints], scales: int):
        counts = {kind: operator.counts for kind, operator in self.operators.items()} | dict(self.others)
        self.ops, self.scales = [_parse(line, counts) for line in _list(lines, MOST_OPS)], scales
        missing = sorted({t for op in self.ops for t in op.tensors} - set(tensors))
        if missing:
            raise WeightsError(f"program: tensor {missing[0]!r} is not in the file")
        self.tensors = {name: tensors[name] for op in self.ops for name in op.tensors}
        for name, tensor in self.tensors.items():
            if tensor.dtype.kind != "i" or tensor.size == 0:
                raise WeightsError(f"program: tensor {name!r} is {tensor.dtype} {tensor.shape}, not integers")
        self.specs: dict[str, Spec] = {}
        self.z_channels = self.latents = 0
        total = read = 0
        for op in self.ops:
            if op.out in self.specs:
                raise WeightsError(f"program: register {op.out!r} is written twice")
            inputs = [self._input(op, name) for name in op.args]
            read += sum(self.tensors[t].size for t in op.tensors)
            need(read <= MOST_READ, op, f"more than {MOST_READ} tensor entries in all")
            self.specs[op.out] = self._check(op, inputs)
            total += self.specs[op.out].channels
            need(total <= MOST_IN_ALL, op, f"more than {MOST_IN_ALL} channels in all")
        self._end()

    def _input(self, op: Op, name: str) -> Spec:
        if name not in self.specs:
            raise WeightsError(f"program: {op.kind} -> {op.out} reads {name!r}, which nothing has written")
        return self.specs[name]

    def _check(self, op: Op, inputs: list[Spec]) -> Spec:
        raise NotImplementedError

    def _end(self) -> None:
        raise NotImplementedError

    def lines(self) -> list[list[Any]]:
        return [[op.kind, op.out, [*op.args], [*op.tensors], [*op.numbers]] for op in self.ops]

    def digest(self) -> bytes:
        """SHA-256 over the lines and, in order of their names, each tensor's name, type, shape and bytes."""
        h = hashlib.sha256(json.dumps([self.scales, self.lines()], separators=(",", ":")).encode())
        for name in sorted(self.tensors):
            tensor = np.ascontiguousarray(self.tensors[name])
            h.update(f"{name} {tensor.dtype.name} {tensor.shape}\n".encode())
            h.update(tensor.astype(tensor.dtype.newbyteorder("<")).tobytes())
        return h.digest()

    def __str__(self) -> str:
        """A line each, with the tensors' shapes and the range of the result."""
        rows = []
        for op in self.ops:
            spec = self.specs[op.out]
            named = [f"{t} {self.tensors[t].dtype.name}{list(self.tensors[t].shape)}" for t in op.tensors]
            inside = ", ".join([*op.args, *named, *map(str, op.numbers)])
            rows.append(f"{op.out} = {op.kind}({inside})    # {spec.channels} ch{self._grid(spec)}, "
                        f"{spec.low.min()} .. {spec.high.max()}")
        return "\n".join(rows)

    def _grid(self, spec: Spec) -> str:
        return ""


class Program(Lines):
    """Of a picture at once: every line runs one time."""

    operators, others = OPERATORS, MappingProxyType({"symbols": (0, 0, 1), "code": (2, 0, 3)})
    y_scale = 4
    _open = 0       # channels of anchors whose others are to come

    def _check(self, op: Op, inputs: list[Spec]) -> Spec:
        if op.kind == "symbols":
            need(not self.z_channels and 0 < op.numbers[0] <= 4096, op, "symbols come once")
            self.z_channels = op.numbers[0]
            limit = np.full(self.z_channels, Z_LIMIT)
            return spec_of(op, -limit, limit, Spec(limit, limit, 1))
        if op.kind == "code":
            (mean, index), (channel, parity, skip) = inputs, op.numbers
            need(mean.half and index.half and mean.scale == index.scale == self.y_scale
                 and mean.channels == index.channels, op, "mean and index are not two halves of one grid")
            need((mean.largest <= MEAN_LIMIT).all() and (index.low >= 0).all() and (index.high < self.scales).all(), op,
                 "mean or index out of range")
            # Anchors of a group, then its others: every latent is coded once, in order.
            need(parity == (self._open > 0) and self._open in (0, mean.channels) and channel == self.latents
                 and 0 <= skip <= self.scales, op, "out of order")
            self._open = 0 if parity else mean.channels
            self.latents += mean.channels * parity
            return spec_of(op, mean.low - (SYMBOL_LIMIT << 8), mean.high + (SYMBOL_LIMIT << 8), mean)
        return OPERATORS[op.kind].check(op, *inputs, *(self.tensors[t].astype(np.int64) for t in op.tensors))

    def _lifetimes(self) -> list[list[str]]:
        """The registers that nobody reads after each line."""
        last = {name: i for i, op in enumerate(self.ops) for name in (op.out, *op.args)}
        last[RESULT] = len(self.ops)
        out: list[list[str]] = [[] for _ in range(len(self.ops) + 1)]
        for name, i in last.items():
            out[i].append(name)
        return out[:-1]

    def _end(self) -> None:
        result = self.specs.get(RESULT)
        if (result is None or result.half or result.scale != self.y_scale or result.channels != self.latents
                or self._open):
            raise WeightsError(f"program: its result {RESULT!r} is not y_hat on the whole grid")
        self._released = self._lifetimes()

    def _grid(self, spec: Spec) -> str:
        return f", {'half of ' if spec.half else ''}x{spec.scale}"


def plan(program: Program, backend: Backend, quality: int, z_size: tuple[int, int], z: Ints | None = None,
         y_q8: Ints | None = None) -> Generator[Step, Ints, Ints]:
    """The coding plan of one picture. z (h, w, Nz), y_q8 (H, W, M) in steps of 1/256: integers in the encoder, None in
    the decoder. Returns y_hat_q8 (H, W, M), int32. Raises LimitExceeded: a picture of more than 2^14 positions of y.
    z and y_q8 of several pictures may come with a batch in front: their symbols make one stream, picture by picture
    within each step."""
    scale = program.y_scale
    if z_size[0] * z_size[1] * scale * scale > MOST_TOKENS:
        raise LimitExceeded(0, f"a tile of {z_size[1] * 64}x{z_size[0] * 64} pixels; 2048x2048 can be coded as one")
    batched = z is not None and z.ndim == 4
    if z is not None and y_q8 is not None and not batched:
        z, y_q8 = z[None], y_q8[None]
    registers: dict[str, Any] = {}
    halves = [None if y_q8 is None else OPERATORS["half"].run(Op("half", "", (), (), (p,)), 0, y_q8) for p in (0, 1)]
    for op, released in zip(program.ops, program._released):
        inputs = [registers[a] for a in op.args]
        if op.kind == "symbols":
            table = np.arange(program.scales, program.scales + program.z_channels, dtype=np.int32)
            shape = 1 if z is None else len(z), *z_size, program.z_channels
            symbols = yield Step(np.tile(table, math.prod(shape[:3])), None if z is None else _flat(z))
            if (np.abs(symbols) > Z_LIMIT).any():
                raise Damaged(0, f"a symbol of z beyond {Z_LIMIT}: fetch the file again")
            registers[op.out] = backend.register(symbols.reshape(shape))
        elif op.kind == "code":
            channel, parity, skip = op.numbers
            mean, index = (backend.numpy(x) for x in inputs)
            coded = index >= skip
            wanted, half = None, halves[parity]
            if half is not None:
                want = half[..., channel:channel + mean.shape[3]]
                wanted = np.clip((want - mean + 128) >> 8, -SYMBOL_LIMIT, SYMBOL_LIMIT)[coded].astype(np.int32)
            symbols = yield Step(index[coded].astype(np.int32), wanted)
            values = np.zeros(mean.shape, np.int64)
            values[coded] = symbols
            registers[op.out] = backend.register((values << 8) + mean)
        else:
            registers[op.out] = backend.run(op, quality, inputs)
        for name in released:
            del registers[name]
    y_hat = backend.numpy(registers[RESULT]).astype(np.int32)
    return y_hat if batched else y_hat[0]


def _flat(values: Ints) -> Ints:
    return values.reshape(-1).astype(np.int32)


def known_answer(program: Program, tables: Tables, backend: Backend) -> str:
    """SHA-256 over what made-up latents become: their bytes in a file, and y_hat. The weight file has it as NumPy gives
    it; a machine that gives another may not decode."""
    rows, columns, quality = 2, 3, 40
    z = noise(rows * columns * program.z_channels, 1) % 5 - 2
    y_q8 = noise(16 * rows * columns * program.latents, 2) % 4096 - 2048
    coder = Encoder(tables)
    y_hat = walk(plan(program, backend, quality, (rows, columns), z.reshape(rows, columns, -1),
                      y_q8.reshape(4 * rows, 4 * columns, -1)), coder)
    return hashlib.sha256(coder.finish() + y_hat.astype("<i4").tobytes()).hexdigest()


def noise(count: int, seed: int) -> Ints:
    """0 .. 65535, the same everywhere: a multiplicative hash of the position."""
    x = (np.arange(count, dtype=np.uint64) + np.uint64(seed * 1_000_003)) * np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(29)
    return ((x * np.uint64(0xBF58476D1CE4E5B9)) >> np.uint64(48)).astype(np.int64)


def _list(value: Any, most: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        raise WeightsError(f"program: expected a list of at most {most} entries, found {str(value)[:60]}")
    return value


def _parse(line: Any, counts: Mapping[str, tuple[int, int, int]]) -> Op:
    if not isinstance(line, list) or len(line) != 5 or not all(isinstance(x, str) for x in line[:2]):
        raise WeightsError(f"program: no operator: {str(line)[:80]}")
    kind, out, *parts = line
    if kind not in counts:
        raise WeightsError(f"program: unknown operator {kind[:40]!r}: written by a later linic? Update yours")
    for part, count, types in zip(parts, counts[kind], (str, str, int)):
        right = all(type(x) is types for x in _list(part, 256))
        if not right or (count >= 0 and len(part) != count) or (types is int and any(abs(x) > WORD for x in part)):
            raise WeightsError(f"program: {kind} -> {out[:40]}: {str(part)[:60]} is not what it takes")
    return Op(kind, out, *(tuple(p) for p in parts))
