"""The compiled parts of a mix (norm.inc, attend.inc, channel.inc). x and its gradient are float32, (B, H, W, C); what
goes into a product and what comes out of it is float32 or bf16, (tokens, ...). All of it is contiguous."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from linic.kernels import native

if TYPE_CHECKING:
    from linic.kernels.mix import Limits


def norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor | None, eps: float, half: bool
) -> tuple[Tensor, Tensor]:
    """-> the product's operand (tokens, C); mean and 1/deviation of each token (tokens, 2)."""
    c = x.shape[3]
    s = x.new_empty(x.numel() // c, c, dtype=torch.bfloat16 if half else torch.float32)
    stats = x.new_empty(len(s), 2)
    status = _lib().linic_norm_forward(
        *_pointers(x, weight, bias, kernel, stats, s), eps, half, *x.shape, torch.get_num_threads()
    )
    native.check(status)
    return s, stats


def norm_backward(
    x: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor | None, stats: Tensor, g: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """g: gradient of the operand; residual: what comes on top of gx. -> gradients of x, weight, bias, kernel."""
    b, c = len(x), x.shape[3]
    gx = torch.empty_like(x)
    gaffine = x.new_empty(-(-len(g) // _lib().linic_chunk()), 2, c)
    gn, gkernel = (None, None) if kernel is None else (torch.empty_like(x), x.new_empty(b, 25, c))
    pointers = _pointers(x, weight, bias, kernel, stats, g, residual, gx, gn, gaffine, gkernel)
    status = _lib().linic_norm_backward(*pointers, g.dtype == torch.bfloat16, *x.shape, torch.get_num_threads())
    native.check(status)
    gweight, gbias = gaffine.sum(0)
    return gx, gweight, gbias, None if gkernel is None else gkernel.sum(0)


def attend_forward(
    kvr: Tensor, w: Tensor, u: Tensor, tokens: tuple[int, int], limits: Limits, keep: bool
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """tokens: B, T. -> operand, BiWKV's y and denominator (None unless `keep`), each (B T, C); None: refused."""
    c = len(w)
    p = kvr.new_empty(len(kvr), c)
    y, den = (w.new_empty(p.shape), w.new_empty(p.shape)) if keep else (None, None)
    status = _lib().linic_attend_forward(
        *_pointers(kvr, w, u, y, den, p), *_attend_options(kvr, limits), *tokens, c, torch.get_num_threads()
    )
    return (p, y, den) if native.check(status) else None


def attend_backward(
    kvr: Tensor, w: Tensor, u: Tensor, y: Tensor, den: Tensor, g: Tensor, tokens: tuple[int, int], limits: Limits
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of kvr, w, u."""
    c = len(w)
    gkvr, gw, gu = torch.empty_like(kvr), w.new_empty(tokens[0], c), w.new_empty(tokens[0], c)
    pointers = _pointers(kvr, w, u, y, den, g, gkvr, gw, gu)
    options = _attend_options(kvr, limits)
    native.check(_lib().linic_attend_backward(*pointers, *options, *tokens, c, torch.get_num_threads()))
    return gkvr, gw.sum(0), gu.sum(0)


def square_forward(kr: Tensor, hidden: int, limits: Limits) -> Tensor:
    """-> relu(k)^2 (tokens, hidden)"""
    square = kr.new_empty(len(kr), hidden)
    _lib().linic_square_forward(*_pointers(kr, square), limits.k, *_channel_options(kr, hidden))
    return square


def square_backward(kr: Tensor, g: Tensor, gkr: Tensor, limits: Limits) -> None:
    """Writes k's part of gkr."""
    _lib().linic_square_backward(*_pointers(kr, g, gkr), limits.k, *_channel_options(kr, g.shape[1]))


def gate_forward(x: Tensor, kr: Tensor, o: Tensor, limits: Limits) -> Tensor:
    """x + sigmoid(r) * o, like x."""
    y = torch.empty_like(x)
    _lib().linic_gate_forward(*_pointers(x, kr, o, y), limits.r, *_channel_options(kr, kr.shape[1] - x.shape[3]))
    return y


def gate_backward(g: Tensor, kr: Tensor, o: Tensor, gkr: Tensor, limits: Limits) -> Tensor:
    """-> the gradient of o; writes r's part of gkr."""
    go = torch.empty_like(o)
    _lib().linic_gate_backward(*_pointers(g, kr, o, go, gkr), limits.r, *_channel_options(kr, kr.shape[1] - g.shape[3]))
    return go


def add_product(x: Tensor, a: Tensor, weight: Tensor) -> Tensor:
    """x + a weight', like x."""
    c = x.shape[3]
    if a.dtype == torch.float32:
        return torch.addmm(x.view(-1, c), a, weight.t()).view(x.shape)
    return add(x.view(-1, c), a @ weight.t()).view(x.shape)


def add(x: Tensor, o: Tensor) -> Tensor:
    """x (tokens, C) or (C,) + o (tokens, C), bf16 -> (tokens, C)"""
    y = x.new_empty(o.shape)
    _lib().linic_add(*_pointers(x, o, y), x.dim() == 1, *o.shape, torch.get_num_threads())
    return y


def _lib() -> Any:
    assert native.lib is not None
    return native.lib


def _pointers(*tensors: Tensor | None) -> list[int | None]:
    return [None if t is None else t.data_ptr() for t in tensors]


def _attend_options(kvr: Tensor, limits: Limits) -> tuple[float, float, float, bool, bool]:
    return limits.k, limits.v, limits.r, kvr.dtype == torch.bfloat16, limits.hard


def _channel_options(kr: Tensor, hidden: int) -> tuple[bool, int, int, int, int]:
    return kr.dtype == torch.bfloat16, len(kr), kr.shape[1] - hidden, hidden, torch.get_num_threads()
