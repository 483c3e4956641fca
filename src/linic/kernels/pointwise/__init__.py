"""Chains of elementwise operations as one step of autograd each, compiled. float32 on a CPU: see choice.fusible.

    gaussian(d, s, least)    max(P(unit bin around d), least) under N(0, e^s)    plain: entropy/rounding.py
    gelu(x, limit)           gelu(bounded(x, -limit, limit))                     plain: models/lalic.py

Tensors of any shape, those of `gaussian` of the same. The gradient passes outside a bound where descent leads back.
Differentiable once. Not bit-exact across processors: never feed its result to the range coder.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linic.kernels import native


def gaussian(d: Tensor, s: Tensor, least: float) -> Tensor:
    p: Tensor = _Gaussian.apply(d, s, least)
    return p


def gelu(x: Tensor, limit: float) -> Tensor:
    y: Tensor = _Gelu.apply(x, limit)
    return y


class _Gaussian(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, d: Tensor, s: Tensor, least: float) -> Tensor:
        assert native.lib is not None
        d, s = d.contiguous(), s.contiguous()
        p, ctx.least = torch.empty_like(d), least
        native.lib.linic_gaussian_forward(*_pointers(d, s, p), least, d.numel(), torch.get_num_threads())
        ctx.save_for_backward(d, s, p)
        return p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        assert native.lib is not None
        d, s, p = ctx.saved_tensors
        gd, gs, g = torch.empty_like(d), torch.empty_like(s), g.contiguous()
        pointers = _pointers(d, s, p, g, gd, gs)
        native.lib.linic_gaussian_backward(*pointers, ctx.least, d.numel(), torch.get_num_threads())
        return gd, gs, None


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        assert native.lib is not None
        x = x.contiguous()
        y, ctx.limit = torch.empty_like(x), limit
        native.lib.linic_gelu_forward(*_pointers(x, y), limit, x.numel(), torch.get_num_threads())
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        assert native.lib is not None
        (x,) = ctx.saved_tensors
        gx, g = torch.empty_like(x), g.contiguous()
        native.lib.linic_gelu_backward(*_pointers(x, g, gx), ctx.limit, x.numel(), torch.get_num_threads())
        return gx, None


def _pointers(*tensors: Tensor) -> list[int]:
    return [t.data_ptr() for t in tensors]
