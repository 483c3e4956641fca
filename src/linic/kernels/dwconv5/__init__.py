"""The depthwise 5x5 convolution, channels last, zeros outside the picture: the token shift of the RWKV blocks.

Here because the libraries' weight gradient takes 4-7 times longer than it has to, and would rule a training step.
Registered as torch.ops.linic.dwconv5: opaque to torch.compile, known to the FLOP counter, differentiable once.
Raises UsageError, BackendMissing. Not bit-exact across backends: never feed its result to the range coder.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from linic.errors import UsageError
from linic.kernels.choice import choose, compute_dtype, implementation, nobody_watches


def dwconv5(x: Tensor, weight: Tensor, backend: str | None = None) -> Tensor:
    """x (B, H, W, C), weight (25, C), tap 5 i + j at offset (i - 2, j - 2) -> (B, H, W, C), dtype of x.
    Any floats; half precision is computed in float32, float64 stays."""
    if x.dim() != 4 or weight.shape != (25, x.shape[3]) or 0 in x.shape[1:]:
        shapes = f"x {tuple(x.shape)}, weight {tuple(weight.shape)}"
        raise UsageError(f"dwconv5 takes x (B, H, W, C) with H, W, C >= 1 and weight (25, C), not {shapes}")
    dtype = compute_dtype(x, weight)
    name = choose("dwconv5", x.device.type, dtype, backend)
    if name == "triton":  # converts in registers: half precision is half the memory to read
        return _forward(x, weight.to(dtype), name)
    inputs = x.to(dtype), weight.to(dtype)
    if nobody_watches(x.device.type):
        return implementation("dwconv5", name).forward(*inputs).to(x.dtype)
    return _forward(*inputs, name).to(x.dtype)


@torch.library.custom_op("linic::dwconv5", mutates_args=())
def _forward(x: Tensor, weight: Tensor, backend: str) -> Tensor:
    return implementation("dwconv5", backend).forward(x, weight)


@torch.library.custom_op("linic::dwconv5_backward", mutates_args=())
def _backward(x: Tensor, weight: Tensor, g: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return implementation("dwconv5", backend).backward(x, weight, g)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape)


@_backward.register_fake
def _(x: Tensor, weight: Tensor, g: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(*ctx.saved_tensors, g, ctx.backend), None


_forward.register_autograd(_gradients, setup_context=_save)


@register_flop_formula(torch.ops.linic.dwconv5)
def _flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * 25 * math.prod(x)


@register_flop_formula(torch.ops.linic.dwconv5_backward)
def _flops_backward(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * 2 * 25 * math.prod(x)
