"""Normative programs on torch: the same integers as operators.py, which defines and documents every operator.

Registers are int32. Where sums or products need more, float64 carries them: every value below 2^53 is exact, and the
checks at load have made sure of it; a rescaling beyond that takes int64. Where the carrier is `native`, compiled
kernels (native.py) take the place of nearly all of this.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from linic.entropy import carriers
from linic.entropy.native import Native
from linic.entropy.operators import EXACT, EXP_FIRST, FALL_FIRST, SPAN, TAPS, Ints, Op
from linic.entropy.program import Lines
from linic.entropy.steps import LOWEST_KEY


class Torch:
    """A program made ready on a device. carrier: one of carriers.CARRIERS instead of the best. `carriers`: which one
    each weight width got, and why."""

    def __init__(self, program: Lines, device: str | torch.device = "cpu", carrier: str | None = None):
        self.device, self._asked = torch.device(device), carrier
        self.program = program
        self.tensors = {name: torch.from_numpy(np.ascontiguousarray(t)).to(self.device)
                        for name, t in program.tensors.items()}
        self.carriers: dict[int, tuple[str, str]] = {}
        self._products: dict[str, carriers.Product] = {}
        self._ready: dict[str, tuple[Tensor, ...]] = {}
        self._cache: dict[Any, Any] = {}
        self._native: Native | None = None
        self._prepare()

    def _prepare(self) -> None:
        linears = [op for op in self.program.ops if op.kind == "linear"]
        by_width: dict[int, list[Op]] = {}
        for op in linears:
            by_width.setdefault(self._bits(op), []).append(op)
        for bits, ops in by_width.items():
            shapes = {tuple(self.tensors[op.tensors[0]].shape) for op in ops}
            largest = sorted(shapes, key=lambda s: s[0] * s[1])[-3:]        # few, and the worst: 50 ms in all
            self.carriers[bits] = carriers.choose(self.device.type, bits, largest, self._asked)      # type: ignore[arg-type]
        if self.carriers and all(name == "native" for name, _ in self.carriers.values()):
            self._native = Native(self.program.ops, self.program.tensors, self.program.specs, self._plain)
        made: dict[tuple[str, str], carriers.Product] = {}
        for op in linears:
            name = self.carriers[self._bits(op)][0]
            if name == "native":
                if self._native and op.out not in self._native.left:
                    continue
                name = "f64"
            if (self.program.specs[op.args[0]].largest > 8191).any():
                name = "i64" if name == "i64" else "f64"        # digits have 14 bits
            key = op.tensors[0], name           # lines may share weights, at inputs of different width
            if key not in made:
                made[key] = carriers.carry(name, self.tensors[op.tensors[0]])
            self._products[op.out] = made[key]
        for op in self.program.ops:
            if op.kind in ("linear", "depthwise", "near"):
                m, c, s, low, high = self.tensors[op.tensors[1]].double()
                step = torch.pow(2.0, -s)       # exact: a power of two
                self._ready[op.tensors[1]] = m * step, c * step, low, high

    def _bits(self, op: Op) -> int:
        return 8 if self.tensors[op.tensors[0]].abs().max() <= 127 else 14

    def run(self, op: Op, quality: int, inputs: Sequence[Any]) -> Any:
        """A register: a tensor, or what `numpy` and later lines make one of (native.py)."""
        return self._native.run(op, quality, inputs) if self._native else self._plain(op, quality, *inputs)

    def _plain(self, op: Op, quality: int, *inputs: Tensor) -> Tensor:
        result: Tensor = getattr(self, f"_{op.kind}")(op, quality, *inputs)
        return result

    def numpy(self, register: Any) -> Ints:
        tensor: Tensor = self._native.tensor(register) if self._native else register
        return tensor.cpu().numpy()

    def register(self, values: Ints) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, np.int32)).to(self.device)

    def _requantise(self, total: Tensor, name: str) -> Tensor:
        """total (..., N): float64, or int64 of the reference carrier."""
        factor, offset, low, high = self._ready[name]
        if total.dtype == torch.int64:
            m, c, s, first, last = self.tensors[name]
            return torch.clamp((total * m + c) >> s, first, last).int()
        return torch.clamp(total.mul_(factor).add_(offset).floor_(), low, high).int()

    def _linear(self, op: Op, quality: int, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[3])
        total = self._products[op.out](rows)
        return self._requantise(total, op.tensors[1]).view(*x.shape[:3], -1)

    def _depthwise(self, op: Op, quality: int, x: Tensor) -> Tensor:
        h, w = x.shape[1:3]
        padded, weight = F.pad(x, (0, 0, 2, 2, 2, 2)), self.tensors[op.tensors[0]].int()
        total = padded[:, :h, :w] * weight[0]
        for tap in range(1, 25):
            i, j = divmod(tap, 5)
            total.addcmul_(padded[:, i:i + h, j:j + w], weight[tap])
        return self._requantise(total.double(), op.tensors[1])

    def _patches(self, op: Op, quality: int, x: Tensor) -> Tensor:
        h, w = x.shape[1:3]
        padded = F.pad(x, (0, 0, 2, 2, 2, 2))
        return torch.cat([padded[:, 2 + i:2 + i + h, 2 + j:2 + j + w]
                          for i, j in zip(op.numbers[::2], op.numbers[1::2])], 3)

    def _norm(self, op: Op, quality: int, x: Tensor) -> Tensor:
        c, t = x.shape[3], x.double()
        total = t.sum(3, keepdim=True)
        d = (t.square().sum(3, keepdim=True) * c - total.square() + 1) * 64
        inverse = torch.floor(2.0**40 / isqrt(d))
        y = t.mul_(c).sub_(total).mul_(inverse).add_(2.0**27).mul_(2.0**-28).floor_()
        return y.clamp_(-8191, 8191).int()

    def _square(self, op: Op, quality: int, x: Tensor) -> Tensor:
        shift, high = op.numbers
        return (x * x).bitwise_right_shift_(shift).clamp_(max=high)

    def _lookup(self, op: Op, quality: int, x: Tensor) -> Tensor:
        index = (x - op.numbers[0]).view(-1) if x.is_contiguous() else (x - op.numbers[0]).reshape(-1)
        return self._int32(op.tensors[0]).index_select(0, index).view(x.shape)

    def _gate(self, op: Op, quality: int, g: Tensor, x: Tensor) -> Tensor:
        return (g * x).add_(1 << 14).bitwise_right_shift_(15)

    def _biwkv(self, op: Op, quality: int, k: Tensor, v: Tensor) -> Tensor:
        b, h, w, c = k.shape
        t = h * w
        e, left, right = self._distances(op.tensors[0], t, op.tensors[3])
        exp, bonus = self._int64(op.tensors[2]), self._int32(op.tensors[1])
        # (B, C, T): sums along the last axis are several times faster.
        k, v64 = k.reshape(b, t, c).transpose(1, 2), v.reshape(b, t, c).transpose(1, 2).contiguous().long()
        x = (k - k.amax(2, keepdim=True)).clamp_min_(-SPAN).sub_(EXP_FIRST)
        p, q = (exp.index_select(0, (x + d).reshape(-1)).view(b, c, t) for d in (e, -e))
        s = exp.index_select(0, (x + bonus[:, None]).reshape(-1)).view(b, c, t) << 14

        def total(before: Tensor, after: Tensor, own: Tensor) -> Tensor:
            sums = own
            if t > 1:
                sums[..., 1:] += before.cumsum(2)[..., :-1] * left
                sums[..., :-1] += after.flip(2).cumsum(2).flip(2)[..., 1:] * right
            return sums

        num, den = total(p * v64, q * v64, s * v64), total(p, q, s)
        y = torch.div(num.add_(den >> 1), den, rounding_mode="floor").int()
        return y.transpose(1, 2).reshape(b, h, w, c)

    # Of step programs (steps.py); history (B, T + 1, C), positions (n, ...).

    def positions(self, values: Ints) -> Tensor:
        return torch.from_numpy(values).to(self.device)

    def history(self, batch: int, rows: int, channels: int) -> Tensor:
        return torch.zeros(batch, rows, channels, dtype=torch.int32, device=self.device)

    def store(self, history: Tensor, tokens: Tensor, register: Any) -> None:
        tensor: Tensor = self._native.tensor(register) if self._native else register
        history.index_copy_(1, tokens, tensor[:, 0])

    def _past(self, op: Op, quality: int, history: Tensor, neighbours: Tensor) -> Tensor:
        return history.index_select(1, neighbours.view(-1)).view(len(history), 1, len(neighbours), -1)

    def _known(self, op: Op, quality: int, history: Tensor, neighbours: Tensor) -> Tensor:
        known = (neighbours < history.shape[1] - 1).int() * op.numbers[0]
        return known.expand(len(history), 1, *known.shape)

    def _near(self, op: Op, quality: int, x: Tensor, past: Tensor) -> Tensor:
        weight, c = self._int32(op.tensors[0]), x.shape[3]
        total = (past.view(*x.shape[:3], -1, c) * weight[1:]).sum(3, dtype=torch.int32).addcmul_(x, weight[0])
        return self._requantise(total.double(), op.tensors[1])

    def _causal(self, op: Op, quality: int, k: Tensor, v: Tensor, before: Tensor) -> Tensor:
        bonus, weights = self._int32(op.tensors[1]), self._weights(op.tensors[2])
        shape, flat = (len(k), *before.shape, k.shape[2]), before.view(-1)                     # B, n, 1 + t, C
        there = (before < k.shape[1] - 1).int()[:, :, None]
        # Where there is no token: a key below all others, and weight 0, which `weights` begins with.
        x = k.index_select(1, flat).view(shape).add_((1 - there) * (4 * LOWEST_KEY))
        x = x.sub_(x.amax(2, keepdim=True)).clamp_min_(-SPAN)
        own = x[:, :, 0] + bonus
        x.sub_(self._fall(op.tensors[0], shape[2])).clamp_min_(EXP_FIRST)
        x[:, :, 0] = own
        a = weights.index_select(0, x.add_(1 - EXP_FIRST).mul_(there).view(-1)).view(shape)
        num, den = (a * v.index_select(1, flat).view(shape)).sum(2), a.sum(2)
        # A quotient below 2^13 that is no integer is 1 / den >= 2^-34 away from one: far more than float64 rounds.
        return num.add_(torch.floor(den * 0.5)).div_(den).floor_().int()[:, None]

    def _weights(self, name: str) -> Tensor:
        """0, then EXP, float64."""
        key = "weights", name
        if key not in self._ready:
            self._ready[key] = (F.pad(self.tensors[name].double(), (1, 0)),)    # type: ignore[index]
        return self._ready[key][0]      # type: ignore[index]

    def _fall(self, name: str, count: int) -> Tensor:
        """Decay over 0 (twice, the first for the token itself), 1, 2 ... tokens."""
        key = "fall", name, count
        if key not in self._cache:
            if len(self._cache) > 1024:
                self._cache.clear()
            distance = torch.arange(-1, count - 1, device=self.device, dtype=torch.int32).clamp_min_(0)
            self._cache[key] = distance[:, None] * self._int32(name)
        found: Tensor = self._cache[key]
        return found

    def _distances(self, name: str, t: int, fall: str) -> tuple[Tensor, Tensor, Tensor]:
        """e (C, T), FALL[-e_{t-1}] for t >= 1, FALL[e_{t+1}] for t < T - 1."""
        key = name, t
        if key not in self._cache:
            decay, table = self._int64(name), self._int64(fall)
            e = torch.div((2 * torch.arange(t, device=self.device) - (t - 1)) * decay[:, None], 2 * t,
                          rounding_mode="floor")
            if len(self._cache) > 64:
                self._cache.clear()
            self._cache[key] = e.int(), table[-e[:, :-1] - FALL_FIRST], table[e[:, 1:] - FALL_FIRST]
        found: tuple[Tensor, Tensor, Tensor] = self._cache[key]
        return found

    def _add(self, op: Op, quality: int, a: Tensor, b: Tensor) -> Tensor:
        return (a + b).clamp_(*op.numbers)

    def _rescale(self, op: Op, quality: int, x: Tensor) -> Tensor:
        shift, low, high = op.numbers
        m, c = (t[quality if len(t) > 1 else 0] for t in (self._int64(n) for n in op.tensors))
        if self._exact(op):
            step = 2.0**-shift
            return (x.double() * (m.double() * step)).add_(c.double() * step).floor_().clamp_(low, high).int()
        return ((x.long() * m).add_(c) >> shift).clamp_(low, high).int()

    def _exact(self, op: Op) -> bool:
        """Whether float64 holds every |x m + c|."""
        key = "exact", op.out
        if key not in self._ready:
            m, c = (self.program.tensors[n] for n in op.tensors)
            largest = self.program.specs[op.args[0]].largest
            reach = np.abs(m.astype(float)).max(0) * largest + np.abs(c.astype(float)).max(0)
            self._ready[key] = (torch.tensor(bool((reach < EXACT).all())),)     # type: ignore[index]
        return bool(self._ready[key][0])        # type: ignore[index]

    def _concat(self, op: Op, quality: int, *xs: Tensor) -> Tensor:
        return torch.cat(xs, 3)

    def _slice(self, op: Op, quality: int, x: Tensor) -> Tensor:
        return x[..., op.numbers[0]:op.numbers[1]]

    def _shuffle(self, op: Op, quality: int, x: Tensor) -> Tensor:
        (f,), (b, h, w, c) = op.numbers, x.shape
        cells = x.reshape(b, h, w, f, f, c // (f * f)).permute(0, 1, 3, 2, 4, 5)
        return cells.reshape(b, h * f, w * f, c // (f * f))

    def _half(self, op: Op, quality: int, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        pairs, parity = x.reshape(b, h // 2, 2, w // 2, 2, c), op.numbers[0]
        return torch.stack([pairs[:, :, 0, :, parity], pairs[:, :, 1, :, 1 - parity]], 2).view(b, h, w // 2, c)

    def _join(self, op: Op, quality: int, anchors: Tensor, others: Tensor) -> Tensor:
        b, h, w, c = anchors.shape
        a, o = anchors.view(b, h // 2, 2, w, c), others.view(b, h // 2, 2, w, c)
        even, odd = torch.stack([a[:, :, 0], o[:, :, 0]], 3), torch.stack([o[:, :, 1], a[:, :, 1]], 3)
        return torch.stack([even, odd], 2).view(b, h, 2 * w, c)

    def _around(self, op: Op, quality: int, anchors: Tensor) -> Tensor:
        b, h, w, c = anchors.shape
        flat = F.pad(anchors.reshape(b, h * w, c), (0, 0, 0, 1))       # one row of zeros for what lies outside
        return flat.index_select(1, self._neighbours(h, w)).view(b, h, w, 12 * c)

    def _neighbours(self, h: int, w: int) -> Tensor:
        """For each non-anchor where its 12 neighbours lie among the anchors; h w where outside."""
        key = "around", h, w
        if key not in self._cache:
            row = torch.arange(h)[:, None].expand(h, w)
            column = 2 * torch.arange(w)[None] + (1 - row % 2)
            found = []
            for i, j in TAPS:
                r, c = row + i, column + j
                inside = (r >= 0) & (r < h) & (c >= 0) & (c < 2 * w)
                found.append(torch.where(inside, r * w + c.div(2, rounding_mode="floor"), h * w))
            self._cache[key] = torch.stack(found, 2).reshape(-1).to(self.device)
        index: Tensor = self._cache[key]
        return index

    def _int32(self, name: str) -> Tensor:
        return self._as(name, torch.int32)

    def _int64(self, name: str) -> Tensor:
        return self._as(name, torch.int64)

    def _as(self, name: str, dtype: torch.dtype) -> Tensor:
        key = name, dtype
        if key not in self._ready:
            self._ready[key] = (self.tensors[name].to(dtype),)      # type: ignore[index]
        return self._ready[key][0]      # type: ignore[index]


def isqrt(d: Tensor) -> Tensor:
    """floor(sqrt(d)) of float64 integers below 2^53; see operators.isqrt."""
    root = d.sqrt().floor()
    root -= (root * root > d).double()
    root += ((root + 1).square() <= d).double()
    return root


_: Callable[..., Any] = Torch      # a Backend (program.py, steps.py)
