"""BiWKV: every token reads every other, weighed by its key and by distance, in linear time.

    y_t = ( sum_{i!=t} e^{k_i-(|t-i|-1)w} v_i + e^{u+k_t} v_t ) / ( sum_{i!=t} e^{k_i-(|t-i|-1)w} + e^{u+k_t} )

Source: the formula of the papers (Vision-RWKV, arXiv 2403.02308; LALIC, arXiv 2502.05741). The authors' CUDA kernel
computes something slightly different where T is small; we follow the paper.
Registered as torch.ops.linic.biwkv: opaque to torch.compile, known to the FLOP counter, differentiable once.
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


def biwkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor, backend: str | None = None) -> Tensor:
    """w (C,) decay a token, already divided by T; u (C,) bonus of the token itself, as it enters the exponent;
    k, v (B, T, C) -> (B, T, C), dtype of v. Any floats; half precision is computed in float32, float64 stays.
    Any finite w and k are right, slower where |w| T is large or w negative."""
    if k.dim() != 3 or v.shape != k.shape or w.shape != k.shape[2:] or u.shape != w.shape or 0 in k.shape[1:]:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in zip("wukv", (w, u, k, v)))
        raise UsageError(f"biwkv takes w, u (C,) and k, v (B, T, C) with T, C >= 1, not {shapes}")
    dtype = compute_dtype(w, u, k, v)
    name = choose("biwkv", k.device.type, dtype, backend)
    if name == "triton":  # converts in registers: half precision is half the memory to read
        return _forward(w.to(dtype), u.to(dtype), k, v, name)[0]
    inputs = w.to(dtype), u.to(dtype), k.to(dtype), v.to(dtype)
    if nobody_watches(k.device.type):
        return implementation("biwkv", name).forward(*inputs)[0].to(v.dtype)
    return _forward(*inputs, name)[0].to(v.dtype)


@torch.library.custom_op("linic::biwkv", mutates_args=())
def _forward(w: Tensor, u: Tensor, k: Tensor, v: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """-> y and what the backend's backward wants to see again: (B, T, C), Triton's (B, chunks, 6, C) float32."""
    return implementation("biwkv", backend).forward(w, u, k, v)


@torch.library.custom_op("linic::biwkv_backward", mutates_args=())
def _backward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, y: Tensor, aux: Tensor, g: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return implementation("biwkv", backend).backward(w, u, k, v, y, aux, g)


@_forward.register_fake
def _(w: Tensor, u: Tensor, k: Tensor, v: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        return v.new_empty(v.shape), w.new_empty(implementation("biwkv", backend).aux_shape(k))
    return k.new_empty(k.shape), k.new_empty(k.shape)


@_backward.register_fake
def _(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, y: Tensor, aux: Tensor, g: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return w.new_empty(w.shape), u.new_empty(u.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else a (B, T, C) of zeros for aux, every time


def _gradients(ctx: Any, g: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if g is None:
        return None, None, None, None, None
    return *_backward(*ctx.saved_tensors, g, ctx.backend), None


_forward.register_autograd(_gradients, setup_context=_save)


# An element takes 7 multiply-adds (two carries of two filters, the sums, the bonus), an exp and a division;
# backward 20 (four filters of two carries, the products for w and u, gk, gv), an exp and a division.
@register_flop_formula(torch.ops.linic.biwkv)
def _flops(w: Sequence[int], u: Sequence[int], k: Sequence[int], *_: Any, **__: Any) -> int:
    return (2 * 7 + 2) * math.prod(k)


@register_flop_formula(torch.ops.linic.biwkv_backward)
def _flops_backward(w: Sequence[int], u: Sequence[int], k: Sequence[int], *_: Any, **__: Any) -> int:
    return (2 * 20 + 2) * math.prod(k)
