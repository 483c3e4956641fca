"""BiWKV in plain torch, linear in T, any device, float32 and float64. Two forms; the values choose.

*Sums*: prefix sums of e^{k - max k + p w} with positions p centred on 0. Right while |w| T <= LIMIT and
|u| <= MAX_U: then no weight overflows, and what underflows is less than e^-27 of the sum.
*Scan*: every partial sum carries its own exponent, as a running log-sum-exp does; always right, seven to ten times
slower, in float64 inside (an exponent of 10^5 has no digits left in float32).

forward -> (y, aux), backward(..., y, aux, g) -> gradients. aux is the denominator (sums) or its logarithm (scan).
The choice reads w and u: free on a CPU, one synchronisation on a GPU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# 1.5 |w| T has to stay clear of the exponent range (e^87, e^708), see above.
LIMIT = {torch.float32: 40.0, torch.float64: 400.0}
MAX_U = 30.0
CHUNK = 64
NOTHING = -1e30  # exponent of an empty sum: finite, so that differences of two are not NaN


def forward(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    form = _forward_sums if _narrow(w, u, k.shape[1]) else _forward_scan
    return form(w, u, k, v)


def backward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, y: Tensor, aux: Tensor, g: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    form = _backward_sums if _narrow(w, u, k.shape[1]) else _backward_scan
    return form(w, u, k, v, y, aux, g)


def _narrow(w: Tensor, u: Tensor, tokens: int) -> bool:
    # NaN compares false and goes to the scan, which hands it on.
    return bool((w.abs().amax() * tokens <= LIMIT[w.dtype]) & (u.abs().amax() <= MAX_U))


# Sums. x, h are stacks (2, B, T, C): numerator's and denominator's share of every token.


def _forward_sums(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    x = _shares(k, v)
    left, right = _both_sides(x, w)
    n, d = (left[i] + right[i] + u.exp() * x[i] for i in range(2))  # d is kept: alone, not as half of a stack
    return n / d, d


def _backward_sums(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, y: Tensor, d: Tensor, g: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # The kernel is symmetric: the gradients of numerator and denominator run through the same two filters.
    x = _shares(k, v)
    e = x[1]
    h = g / d
    hs = torch.stack([h, -h * y])
    left, right = _both_sides(x, w)
    to_left, to_right = _both_sides(hs, w)
    # r = e^-w: at every t, what came from one side pairs with what goes to the other.
    gw = -(-w).exp() * (left * to_right + right * to_left).sum((0, 1, 2))
    gu = u.exp() * (e * h * (v - y)).sum((0, 1))
    fn, fd = to_left.add_(to_right).addcmul_(u.exp(), hs)
    return gw, gu, e * (v * fn + fd), e * fn


def _shares(k: Tensor, v: Tensor) -> Tensor:
    e = (k - k.amax(1, keepdim=True)).exp()
    return torch.stack([e * v, e])


def _both_sides(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over i < t and over i > t of e^{-(|t-i|-1) w} x_i."""
    tokens = x.shape[2]
    p = (torch.arange(tokens, device=x.device, dtype=x.dtype) - (tokens - 1) / 2)[:, None] * w  # (T, C)
    left = _running_sum(x * p.exp())
    # A running sum of the flip, never total - running sum: that cancels (8e-4 instead of 1e-7).
    right = _running_sum((x * (-p).exp()).flip(2)).flip(2)
    left = F.pad(left[:, :, :-1], (0, 0, 1, 0)) * (w - p).exp()
    right = F.pad(right[:, :, 1:], (0, 0, 0, 1)) * (w + p).exp()
    return left, right


def _running_sum(x: Tensor) -> Tensor:
    """Running sum over dim 2 of (2, B, T, C)."""
    if x.device.type == "cpu" or x.shape[2] <= CHUNK:
        return x.cumsum(2)
    return _running_sum_in_two_levels(x)


def _running_sum_in_two_levels(x: Tensor) -> Tensor:
    """For a GPU: one scan along T has too little parallelism there and drifts (the CPU's accumulates in double)."""
    tokens = x.shape[2]
    inner = F.pad(x, (0, 0, 0, -tokens % CHUNK)).unflatten(2, (-1, CHUNK)).cumsum(3)
    inner[:, :, 1:] += inner[:, :, :-1, -1].cumsum(2)[:, :, :, None]
    return inner.flatten(2, 3)[:, :, :tokens]


# Scan. A sum is a pair (m, a): m e^a, with m (2, B, T, C) and a (B, T, C).


def _forward_scan(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    dtype = k.dtype
    w, u, k, v = _widen(w, u, k, v)
    ones_v = torch.stack([v, torch.ones_like(v)])
    (ml, al), (mr, ar) = _scan_both_sides(w, k, ones_v)
    top = torch.maximum(torch.maximum(al, ar), u + k)
    n, d = ml * (al - top).exp() + mr * (ar - top).exp() + ones_v * (u + k - top).exp()
    return (n / d).to(dtype), (top + d.log()).to(dtype)


def _backward_scan(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, y: Tensor, log_d: Tensor, g: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Every exp below is of ln(weight of i at t) for some i and t, or of a part of it: never above 0 but by rounding.
    dtype = k.dtype
    y, log_d = _forward_scan(*_widen(w, u, k, v))  # again: the logarithm has to be as exact as the exponents
    w, u, k, v, g = _widen(w, u, k, v, g)
    gs = torch.stack([g, -g * y])
    (ml, al), (mr, ar) = _scan_both_sides(w, k, torch.stack([v, torch.ones_like(v)]))
    (nl, bl), (nr, br) = _scan_both_sides(w, -log_d, gs)
    through = (ml * nr).sum(0) * (al + br - w).exp() + (mr * nl).sum(0) * (ar + bl - w).exp()
    own = (u + k - log_d).exp()
    fn, fd = nl * (k + bl).exp() + nr * (k + br).exp() + gs * own
    grads = -through.sum((0, 1)), (own * g * (v - y)).sum((0, 1)), v * fn + fd, fn
    gw, gu, gk, gv = (grad.to(dtype) for grad in grads)
    return gw, gu, gk, gv


def _widen(*tensors: Tensor) -> list[Tensor]:
    # Metal has no float64: there the scan stays valid but loses digits where |w| T is in the thousands.
    return [t if t.device.type == "mps" else t.double() for t in tensors]


def _scan_both_sides(w: Tensor, a: Tensor, x: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Sums over i < t and over i > t of e^{a_i - (|t-i|-1) w} x_i."""
    ml, al = _shift(*_scan(w, a, x))
    mr, ar = _shift(*_scan(w, a.flip(1), x.flip(2)))
    return (ml, al), (mr.flip(2), ar.flip(1))


def _shift(m: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """One token later: the sum over i <= t-1 stands at t, nothing at 0."""
    return F.pad(m[..., :-1, :], (0, 0, 1, 0)), F.pad(a[..., :-1, :], (0, 0, 1, 0), value=NOTHING)


def _scan(w: Tensor, a: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over i <= t of e^{a_i - (t-i) w} x_i. a (..., T, C), m (2, ..., T, C) holds x."""
    tokens = a.shape[-2]
    if tokens <= CHUNK:
        return _scan_by_doubling(w, a, m)
    # Within chunks; over the chunks' totals, whose tokens lie CHUNK apart; then what each chunk inherits.
    pad = (0, 0, 0, -tokens % CHUNK)
    a = F.pad(a, pad, value=NOTHING).unflatten(-2, (-1, CHUNK))
    m = F.pad(m, pad).unflatten(-2, (-1, CHUNK))
    m, a = _scan_by_doubling(w, a, m)
    carry_m, carry_a = _shift(*_scan(CHUNK * w, a[..., -1, :], m[..., -1, :]))
    steps = torch.arange(1, CHUNK + 1, device=w.device, dtype=w.dtype)[:, None]
    m, a = _add(m, a, carry_m.unsqueeze(-2), carry_a.unsqueeze(-2) - steps * w)
    return m.flatten(-3, -2)[..., :tokens, :], a.flatten(-3, -2)[..., :tokens, :]


def _scan_by_doubling(w: Tensor, a: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """After the pass with step s every token holds the sum over the 2 s tokens that end at it."""
    step = 1
    while step < a.shape[-2]:
        later_m, later_a = _add(m[..., step:, :], a[..., step:, :], m[..., :-step, :], a[..., :-step, :] - step * w)
        m, a = torch.cat([m[..., :step, :], later_m], -2), torch.cat([a[..., :step, :], later_a], -2)
        step *= 2
    return m, a


def _add(m1: Tensor, a1: Tensor, m2: Tensor, a2: Tensor) -> tuple[Tensor, Tensor]:
    top = torch.maximum(a1, a2)
    return m1 * (a1 - top).exp() + m2 * (a2 - top).exp(), top
