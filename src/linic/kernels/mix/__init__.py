"""Whole mixes of an RWKV block as one step of autograd each: compiled code between torch's matrix products.

    spatial_mix    x + out(sigmoid(r) * BiWKV(bound(k), v))      [k | v | r] = kvr(shift(norm(x)))
    channel_mix    x + sigmoid(r) * out(relu(k)^2)               [k | r] = kr(shift(norm(x)))

x is float32 on a CPU. The readable definition is the plain path of linic/models/blocks.py: the same values and
gradients within float32 noise, or bf16 noise where `half`: then operands and results of the products, and their
gradients, are bf16, and all else is float32. choice.fusible says where it may stand in. Differentiable once.
Results do not depend on the number of threads, but on the processor: never feed them to the range coder.
Raises MemoryError.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linic.kernels.mix import cpu


class Norm(NamedTuple):
    """LayerNorm, and the depthwise 5x5 after it, if any."""

    weight: Tensor  # (C,)
    bias: Tensor  # (C,)
    kernel: Tensor | None  # (25, C), as dwconv5 takes it
    eps: float


class Limits(NamedTuple):
    """Bounds of k, v and r: clamps whose gradient leads back (linic/entropy/rounding.py: bounded); but k of a Spatial
    Mix becomes k_max tanh(k / k_max) unless `hard`, and k of a Channel Mix is clamped as torch does it."""

    k: float = math.inf
    v: float = math.inf
    r: float = math.inf
    hard: bool = True


# (kvr, w, u) -> operand of the out product in plain torch, for values that the compiled loop refuses: NaN, infinities.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def spatial_mix(
    x: Tensor, norm: Norm, kvr: Tensor, out: Tensor, w: Tensor, u: Tensor, limits: Limits, half: bool, attend: Attend
) -> Tensor:
    """x (B, H, W, C); kvr (3C, C) and out (C, C), weights of Linears; w, u (C,) as biwkv takes them -> like x."""
    y: Tensor = _Spatial.apply(x, *norm, kvr, out, w, u, limits, half, attend)
    return y


def channel_mix(x: Tensor, norm: Norm, kr: Tensor, out: Tensor, limits: Limits, half: bool) -> Tensor:
    """x (B, H, W, C); kr (hidden + C, C) and out (C, hidden), weights of Linears -> like x."""
    y: Tensor = _Channel.apply(x, *norm, kr, out, limits, half)
    return y


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear of (..., C) with operands in bf16; the result is float32."""
    y: Tensor = _Project.apply(x, weight, bias)
    return y


class _Spatial(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor | None, eps: float, w_kvr: Tensor,
        w_out: Tensor, w: Tensor, u: Tensor, limits: Limits, half: bool, attend: Attend,
    ) -> Tensor:  # fmt: skip
        keep = any(ctx.needs_input_grad)
        x, weight, bias, kernel, w, u = _contiguous(x, weight, bias, kernel, w, u)
        w_kvr, w_out = _operand(w_kvr, half), _operand(w_out, half)
        s, stats = cpu.norm_forward(x, weight, bias, kernel, eps, half)
        kvr = s @ w_kvr.t()
        if not keep:
            del s
        tokens = len(x), x.shape[1] * x.shape[2]
        p, y, den = cpu.attend_forward(kvr, w, u, tokens, limits, keep) or (None, None, None)
        if p is None:
            p = attend(kvr.view(*tokens, -1).float(), w, u).flatten(0, 1).to(kvr.dtype)
        if keep:
            ctx.save_for_backward(x, weight, bias, kernel, w_kvr, w_out, w, u, stats, s, kvr, p, y, den)
            ctx.options = tokens, limits, attend
        return cpu.add_product(x, p, w_out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, kernel, w_kvr, w_out, w, u, stats, s, kvr, p, y, den = ctx.saved_tensors
        tokens, limits, attend = ctx.options
        g = g.contiguous()
        go = g.view(p.shape).to(p.dtype)
        gp = go @ w_out
        if y is None:
            gkvr, gw, gu = _attend_backward(attend, kvr, w, u, gp, tokens)
        else:
            gkvr, gw, gu = cpu.attend_backward(kvr, w, u, y, den, gp, tokens, limits)
        gnorm = cpu.norm_backward(x, weight, bias, kernel, stats, gkvr @ w_kvr, g)
        return *gnorm, None, _outer(gkvr, s), _outer(go, p), gw, gu, None, None, None


class _Channel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor | None, eps: float, w_kr: Tensor,
        w_out: Tensor, limits: Limits, half: bool,
    ) -> Tensor:  # fmt: skip
        keep = any(ctx.needs_input_grad)
        x, weight, bias, kernel = _contiguous(x, weight, bias, kernel)
        w_kr, w_out = _operand(w_kr, half), _operand(w_out, half)
        s, stats = cpu.norm_forward(x, weight, bias, kernel, eps, half)
        kr = s @ w_kr.t()
        if not keep:
            del s
        square = cpu.square_forward(kr, w_out.shape[1], limits)
        o = square @ w_out.t()
        if keep:
            ctx.save_for_backward(x, weight, bias, kernel, w_kr, w_out, stats, s, kr, square, o)
            ctx.limits = limits
        return cpu.gate_forward(x, kr, o, limits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, kernel, w_kr, w_out, stats, s, kr, square, o = ctx.saved_tensors
        g, gkr = g.contiguous(), torch.empty_like(kr)
        go = cpu.gate_backward(g, kr, o, gkr, ctx.limits)
        cpu.square_backward(kr, go @ w_out, gkr, ctx.limits)
        gnorm = cpu.norm_backward(x, weight, bias, kernel, stats, gkr @ w_kr, g)
        return *gnorm, None, _outer(gkr, s), _outer(go, square), None, None


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        a, w = x.reshape(-1, x.shape[-1]).bfloat16(), weight.bfloat16()
        ctx.save_for_backward(a, w)
        ctx.shape, ctx.biased = x.shape, bias is not None
        o = a @ w.t()
        y = o.float() if bias is None else cpu.add(bias.contiguous(), o)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        a, w = ctx.saved_tensors
        g = g.reshape(len(a), len(w))
        go = g.bfloat16()
        gx = (go @ w).float().view(ctx.shape) if ctx.needs_input_grad[0] else None
        return gx, _outer(go, a), g.sum(0) if ctx.biased else None


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.contiguous() for t in tensors]


def _operand(weight: Tensor, half: bool) -> Tensor:
    return (weight.bfloat16() if half else weight).contiguous()


def _outer(g: Tensor, a: Tensor) -> Tensor:
    """The gradient of a Linear's weight from those of its outputs and its inputs."""
    return (g.t() @ a).float()


def _attend_backward(
    attend: Attend, kvr: Tensor, w: Tensor, u: Tensor, gp: Tensor, tokens: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    kvr, w, u = (t.detach().requires_grad_() for t in (kvr, w, u))
    with torch.enable_grad():
        p = attend(kvr.view(*tokens, -1).float(), w, u).flatten(0, 1)
    gkvr, gw, gu = torch.autograd.grad(p, (kvr, w, u), gp.to(p.dtype))
    return gkvr, gw, gu
