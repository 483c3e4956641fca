"""Normative programs on the compiled integer kernels (kernels/exact): the same integers as operators.py defines.

Most operators make a row of their result from the same row of their inputs, some from rows elsewhere. Such lines do
not run at once: they wait in a `Chain` until something needs one of their results, then go over the picture together, a
few rows at a time, and what lies between them never leaves the cache. A register is a tensor, or `Later` while its
chain waits. What no kernel here computes (products beyond `fits`, other operators) is torch's.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from linic.entropy.operators import (
    BONUS_LIMIT,
    EXP_FIRST,
    EXP_LAST,
    FALL_FIRST,
    OPERATORS,
    QUALITIES,
    WORD,
    Ints,
    Op,
    Spec,
)
from linic.entropy.program import RESULT
from linic.kernels import exact

WHOLE = ("biwkv", "depthwise")                                  # at once
ROW_WISE = ("linear", "norm", "square", "lookup", "gate", "add", "rescale", "concat", "slice")
MOVES = ("half", "join", "around", "patches", "shuffle")        # rows from elsewhere, as they are


def fits(op: Op, x: Spec, weight: Ints, requant: Ints) -> bool:
    """Whether the kernels can do this linear or depthwise line: inputs of 16 bits, sums and results of 32."""
    w = np.abs(weight.astype(float))
    bound = w @ x.largest.astype(float) if op.kind == "linear" else w.sum(0) * x.largest
    m, c, s = requant[:3].astype(float)
    return bool((x.largest <= 32767).all() and (bound <= WORD).all()
                and ((bound * m + np.abs(c)) * 2.0**-s < WORD).all())


class Later:
    """A register whose line waits; `tensor` once it has run, unless its chain alone has read it."""

    __slots__ = ("chain", "name", "tensor")

    def __init__(self, chain: "Chain", name: str):
        self.chain: Chain | None = chain
        self.name, self.tensor = name, torch.empty(0)


class Chain:
    """Lines over the rows of one grid, and what they read: tensor, distance of two rows, kind of slot."""

    def __init__(self, quality: int, shape: Sequence[int]):
        self.quality, self.shape = quality, shape
        self.ops: list[Op] = []
        self.outside: dict[Any, tuple[Tensor, int, int]] = {}
        self.results: list[Later] = []

    def take(self, other: "Chain") -> None:
        """The lines of another chain over the same grid; neither reads what the other makes."""
        self.ops += other.ops
        self.outside |= other.outside
        self.results += other.results
        for result in other.results:
            result.chain = self


class Plan:
    """A chain made ready: the steps, what they read and write, and the room for what lies between."""

    def __init__(self) -> None:
        self.inputs: list[Any] = []
        self.outputs: list[tuple[str, int]] = []                    # buffers and their channels
        self.views: dict[str, tuple[str, int, int]] = {}            # register -> buffer, first channel, channels
        self.inside: list[tuple[int, int, int]] = []                # slots of the scratch
        self.scratch = 0
        self.steps: npt.NDArray[np.int64] = np.zeros((0, 0), np.int64)


class Native:
    """fallback: torch's operators. left: the products that it runs. wait: False runs every line by itself."""

    def __init__(self, ops: Sequence[Op], tensors: Mapping[str, Ints], specs: Mapping[str, Spec],
                 fallback: Callable[..., Tensor], wait: bool = True):
        self.tensors, self.specs, self._fallback, self._wait = tensors, specs, fallback, wait
        self._ready: dict[Any, Any] = {}
        self._plans: dict[tuple[str, ...], Plan] = {}
        self._indices: dict[Any, Tensor] = {}
        self._readers: dict[str, set[str]] = {RESULT: {"the caller"}}
        self.left: set[str] = set()
        for op in ops:
            for name in op.args:
                self._readers.setdefault(name, set()).add(op.out)
            own = [tensors[t] for t in op.tensors]
            if op.kind in ("linear", "depthwise") and not fits(op, specs[op.args[0]], *own):
                self.left.add(op.out)

    def run(self, op: Op, quality: int, inputs: Sequence[Any]) -> Any:
        if op.out in self.left or op.kind not in (*WHOLE, *ROW_WISE, *MOVES):
            return self._fallback(op, quality, *(self.tensor(x) for x in inputs))
        if op.kind in WHOLE:
            return getattr(self, f"_{op.kind}")(op, *(self.tensor(x) for x in inputs))
        if op.kind in MOVES:
            chain = self._moved(op, quality, [self.tensor(x) for x in inputs])
        else:
            waiting = list(dict.fromkeys(x.chain for x in inputs if isinstance(x, Later) and x.chain
                                         and x.chain.quality == quality))
            if op.kind == "slice" and not waiting:
                return self.tensor(inputs[0])[..., op.numbers[0]:op.numbers[1]]
            chain = waiting[0] if waiting else Chain(quality, self.tensor(inputs[0]).shape[:3])
            for other in waiting[1:]:
                chain.take(other)
            for name, x in zip(op.args, inputs):
                if not isinstance(x, Later) or x.chain is not chain:
                    chain.outside[name] = *exact.strided(self.tensor(x)), exact.BY_ROWS
        result = Later(chain, op.out)
        chain.ops.append(op)
        chain.results.append(result)
        return result if self._wait else self.tensor(result)

    def tensor(self, x: Any) -> Tensor:
        if not isinstance(x, Later):
            found: Tensor = x
            return found
        if x.chain:
            self._execute(x.chain, x.name)
        assert x.tensor.ndim == 4, f"{x.name} is read by its own chain only"
        return x.tensor

    def _moved(self, op: Op, quality: int, sources: Sequence[Tensor]) -> Chain:
        """A chain that begins with rows from elsewhere."""
        cells = op.numbers[0] ** 2 if op.kind == "shuffle" else 1
        index = self._index(op, cells, *sources[0].shape[:3])
        chain = Chain(quality, index.shape[:3])
        chain.outside[op.out, "index"] = index, index.shape[3], exact.BY_ROWS
        for i, x in enumerate(sources):
            x, stride = exact.strided(x if cells == 1 else x.contiguous())
            chain.outside[op.out, i] = x, stride // cells, exact.WHOLE
        return chain

    def _index(self, op: Op, cells: int, b: int, h: int, w: int) -> Tensor:
        """Which row each part of each row comes from: the operator itself tells, moving numbers of rows."""
        key = op.kind, op.numbers, b, h, w
        found = self._indices.get(key)
        if found is None:
            if len(self._indices) > 64:
                self._indices.clear()
            rows = 1 + np.arange(b * h * w * cells).reshape(b, h, w, cells)
            more = [rows + rows.size] if op.kind == "join" else []
            index = OPERATORS[op.kind].run(op, 0, rows, *more) - 1
            if more:
                index = np.concatenate([np.where(index < rows.size, index, exact.KEPT),
                                        np.where(index < rows.size, exact.KEPT, index - rows.size)], 3)
            found = self._indices[key] = torch.from_numpy(np.ascontiguousarray(index, np.int32))
        return found

    def _execute(self, chain: Chain, asked: str) -> None:
        key = asked, *(op.out for op in chain.ops)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._plan(chain, asked)
        made = {name: torch.empty(*chain.shape, channels, dtype=torch.int32) for name, channels in plan.outputs}
        slots = [(x.data_ptr(), stride, where) for x, stride, where in (chain.outside[name] for name in plan.inputs)]
        slots += [(x.data_ptr(), x.shape[3], exact.BY_ROWS) for x in made.values()] + plan.inside
        exact.chain(plan.steps, slots, plan.scratch, chain.quality, math.prod(chain.shape))
        for result in chain.results:
            result.chain = None
            if result.name in plan.views:
                name, first, channels = plan.views[result.name]
                result.tensor = made[name][..., first:first + channels]

    def _plan(self, chain: Chain, asked: str) -> Plan:
        plan, ops, inside = Plan(), chain.ops, {op.out for op in chain.ops}
        plan.inputs = list(chain.outside)
        home: dict[Any, tuple[Any, int]] = {name: (name, 0) for name in plan.inputs}    # register -> buffer, channel
        reads: dict[str, list[Any]] = {}
        for op in ops:
            moved = op.kind in MOVES
            reads[op.out] = [(op.out, i) for i in (*range(len(op.args)), "index")] if moved else list(op.args)
            buffer, first = home[reads[op.out][0]]
            home[op.out] = (buffer, first + op.numbers[0]) if op.kind == "slice" else (op.out, 0)
        for name in reads:
            if name == asked or self._readers.get(name, {"the caller"}) - inside:
                plan.views[name] = *home[name], self.specs[name].channels
        written = dict.fromkeys(buffer for buffer, _, _ in plan.views.values())
        plan.outputs = [(name, self.specs[name].channels) for name in written]
        slot = {name: i for i, name in enumerate([*plan.inputs, *written])}
        outside = len(slot)
        last = {home[name][0]: i for i, op in enumerate(ops) for name in (op.out, *reads[op.out])}
        free: dict[int, list[int]] = {}                 # slots of the scratch by their channels
        steps = []
        for i, op in enumerate(ops):
            channels = self.specs[op.out].channels
            if op.kind != "slice" and op.out not in slot:
                if not free.get(channels):
                    free[channels] = [outside + len(plan.inside)]
                    plan.inside.append((plan.scratch, channels, exact.INSIDE))
                    plan.scratch += channels
                slot[op.out] = free[channels].pop()
            steps += self._steps(op, slot.get(op.out, 0), [(slot[home[name][0]], home[name][1])
                                                           for name in reads[op.out]])
            for name in {home[name][0] for name in (op.out, *reads[op.out])}:
                if last[name] == i and slot[name] >= outside:
                    free.setdefault(self.specs[name].channels, []).append(slot[name])
        plan.steps = exact.steps(steps)
        return plan

    def _steps(self, op: Op, out: int, where: Sequence[tuple[int, int]]) -> list[exact.Step]:
        """where: slot and first channel of what it reads."""
        channels = self.specs[op.out].channels
        if op.kind == "slice":
            return []
        if op.kind == "concat":
            parts = [self.specs[name].channels for name in op.args]
            return [exact.Step("copy", (out, sum(parts[:i])), x, x, parts[i]) for i, x in enumerate(where)]
        if op.kind in MOVES:
            *sources, (index, _) = where
            if op.kind == "join":
                return [exact.Step("gather", (out, 0), x, (index, i), channels) for i, x in enumerate(sources)]
            part = channels if op.kind == "shuffle" else self.specs[op.args[0]].channels
            return [exact.Step("gather", (out, i * part), sources[0], (index, i), part)
                    for i in range(channels // part)]
        tensors: list[tuple[int, int]] = []
        if op.kind == "linear":
            tensors = [(self._weight(op).data_ptr(), 0), (self._requant(op).ctypes.data, 0)]
        elif op.kind == "rescale":
            rows = [self._as(name, torch.int64) for name in op.tensors]
            tensors = [(t.data_ptr(), channels if len(t) > 1 else 0) for t in rows]
        elif op.kind == "lookup":
            tensors = [(self._as(op.tensors[0], torch.int32).data_ptr(), 0)]
        inputs = self.specs[op.args[0]].channels
        return [exact.Step(op.kind, (out, 0), where[0], where[-1], channels, inputs, op.numbers, tensors)]

    def _biwkv(self, op: Op, k: Tensor, v: Tensor) -> Tensor:
        return exact.biwkv(k, v, *(self._as(name, torch.int32) for name in op.tensors))

    def _depthwise(self, op: Op, x: Tensor) -> Tensor:
        return exact.depthwise(x, self._weight(op), self._requant(op))

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._ready:
            self._ready[key] = make()
        return self._ready[key]

    def _as(self, name: str, dtype: torch.dtype) -> Tensor:
        """Kept here: the kernels have its address only."""
        return self._once((name, dtype), lambda: torch.from_numpy(self.tensors[name]).to(dtype).contiguous())

    def _weight(self, op: Op) -> Tensor:
        weight = torch.from_numpy(self.tensors[op.tensors[0]])
        if op.kind == "linear":
            return self._once(("linear", op.tensors[0]), lambda: exact.pack_weight(weight))
        pad = (0, -weight.shape[1] % exact.BLOCK)
        return self._once(("depthwise", op.tensors[0]), lambda: torch.nn.functional.pad(weight.int(), pad))

    def _requant(self, op: Op) -> npt.NDArray[np.void]:
        name = op.tensors[1]
        return self._once(("requant", name), lambda: exact.pack_requant(self.tensors[name].astype(np.int64)))


def product(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """(R, K) int32 -> (R, N) int64: the kernels' sums alone, for carriers.self_test."""
    n, k = weight.shape
    plain = np.array([1, 0, 0, -WORD, WORD])[:, None] * np.ones(n, np.int64)
    packed, requant = exact.pack_weight(weight), exact.pack_requant(plain)
    steps = exact.steps([exact.Step("linear", (1, 0), (0, 0), (0, 0), n, k, (),
                                    ((packed.data_ptr(), 0), (requant.ctypes.data, 0)))])

    def run(x: Tensor, kept: Any = (packed, requant)) -> Tensor:
        x, y = x.contiguous(), torch.empty(len(x), n, dtype=torch.int32)
        exact.chain(steps, [(x.data_ptr(), k, exact.BY_ROWS), (y.data_ptr(), n, exact.BY_ROWS)], 0, 0, len(x))
        return y.long()

    return run


def self_test() -> str:
    """"" when every kernel gives what operators.py defines, else what went wrong."""
    return _self_test(exact.describe()) if exact.lib else exact.missing


@cache
def _self_test(isa: str) -> str:
    """Every operator on bounded random and extreme inputs; one by one, then as chains."""
    random, c = np.random.default_rng(1), 21
    exp, fall = (np.rint(2.0 ** (np.arange(*z) / 1024 + bits)).astype(np.int64)
                 for z, bits in (((EXP_FIRST, EXP_LAST + 1), 20), ((FALL_FIRST, BONUS_LIMIT + 1), 14)))

    def requant(n: int, limit: int) -> Ints:
        return np.stack([random.integers(0, 1 << 17, n), random.integers(-(1 << 45), 1 << 45, n),
                         random.integers(28, 46, n), np.full(n, -limit), np.full(n, limit)])

    tensors: dict[str, Ints] = {
        "w": random.integers(-127, 128, (3 * c, 37)), "wq": requant(3 * c, 8191),
        "d": random.integers(-99, 99, (25, 37)), "dq": requant(37, 8191),
        "m": random.integers(-(1 << 32), 1 << 32, (QUALITIES, 37)), "c": random.integers(-(1 << 52), 1 << 52, (1, 37)),
        "decay": random.integers(0, 11820, c), "bonus": random.integers(-5910, 5911, c), "exp": exp, "fall": fall,
        "table": random.integers(0, 32768, 16384), "v": random.integers(-40, 41, (8, 2 * c)), "vq": requant(8, WORD)}
    tensors["wq"][2] = 25       # into the clamps
    ops = [Op(*line) for line in (
        ("half", "a", ("x",), (), (0,)), ("half", "b", ("x",), (), (1,)), ("norm", "norm", ("b",), (), ()),
        ("join", "joined", ("a", "norm"), (), ()), ("around", "near", ("norm",), (), ()),
        ("patches", "beside", ("x",), (), (0, 0, -2, 1)), ("rescale", "wide", ("x",), ("m", "c"), (30, -32767, 32767)),
        ("add", "sum", ("joined", "wide"), (), (-8191, 8000)), ("depthwise", "window", ("sum",), ("d", "dq"), ()),
        ("linear", "kvr", ("window",), ("w", "wq"), ()), ("slice", "k", ("kvr",), (), (0, c)),
        ("slice", "v", ("kvr",), (), (c, 2 * c)), ("slice", "r", ("kvr",), (), (2 * c, 3 * c)),
        ("biwkv", "mean", ("k", "v"), ("decay", "bonus", "exp", "fall"), ()),
        ("lookup", "g", ("r",), ("table",), (-8192,)), ("gate", "gated", ("g", "mean"), (), ()),
        ("square", "squares", ("g",), (), (17, 8000)), ("concat", "all", ("gated", "squares"), (), ()),
        ("linear", "y", ("all",), ("v", "vq"), ()), ("shuffle", "cells", ("y",), (), (2,)))]
    limit = np.full(37, 32767)
    specs = {"x": Spec(-limit, limit, 2)}
    for op in ops:
        specs[op.out] = OPERATORS[op.kind].check(op, *(specs[a] for a in op.args), *(tensors[t] for t in op.tensors))
    x = random.integers(-32767, 32768, (2, 6, 4, 37))
    x[0, 0, :3], x[0, 0, 3] = [[32767], [-32767], [0]], np.where(np.arange(37) % 2, 32767, -32767)
    wanted: dict[str, Ints] = {"x": x}
    for op in ops:
        own = [tensors[t] for t in op.tensors]
        wanted[op.out] = OPERATORS[op.kind].run(op, 40, *(wanted[a] for a in op.args), *own)
    for wait in (False, True):
        kernels = Native(ops, tensors, specs, lambda *_: torch.zeros(0), wait)
        got: dict[str, Any] = {"x": torch.from_numpy(x).int()}
        for op in ops:
            got[op.out] = kernels.run(op, 40, [got[a] for a in op.args])
        for name in ("near", "beside", "cells") if wait else wanted:
            if not np.array_equal(kernels.tensor(got[name]).numpy(), wanted[name]):
                return f"wrong {name} ({isa})"
    return ""
