"""BiWKV by the compiled loop (biwkv.inc): float32, CPU. Same signatures as torch_form.py, which takes what it refuses.

k and v may be strided over batch and token (slices of one (B, T, 3C) tensor): they are read in place.
"""

import torch
from torch import Tensor

from linic.kernels import native
from linic.kernels.biwkv import torch_form


def forward(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    assert native.lib is not None
    w, u, k, v = w.contiguous(), u.contiguous(), _rows(k), _rows(v)
    y, den = k.new_empty(k.shape), k.new_empty(k.shape)
    inputs, outputs = _arguments(w, u, k, v), (y.data_ptr(), den.data_ptr())
    done = native.check(native.lib.linic_biwkv_forward(*inputs, *outputs, *k.shape, torch.get_num_threads()))
    return (y, den) if done else torch_form.forward(w, u, k, v)


def backward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, y: Tensor, den: Tensor, g: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert native.lib is not None
    w, u, k, v = w.contiguous(), u.contiguous(), _rows(k), _rows(v)
    y, den, g = y.contiguous(), den.contiguous(), g.contiguous()
    B, T, C = k.shape
    gk, gv, gw, gu = k.new_empty(B, T, C), k.new_empty(B, T, C), k.new_empty(B, C), k.new_empty(B, C)
    inputs, outputs = _arguments(w, u, k, v), (t.data_ptr() for t in (y, den, g, gk, gv, gw, gu))
    # It refuses by w, u and k alone: here what it refused in forward, and then y and den are torch_form's.
    if not native.check(native.lib.linic_biwkv_backward(*inputs, *outputs, B, T, C, torch.get_num_threads())):
        return torch_form.backward(w, u, k, v, y, den, g)
    return gw.sum(0), gu.sum(0), gk, gv


def _rows(t: Tensor) -> Tensor:
    """Channels side by side in memory; batch and token may lie anyhow."""
    return t if t.stride(2) == 1 else t.contiguous()


def _arguments(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    of_k, of_v = (k.data_ptr(), k.stride(0), k.stride(1)), (v.data_ptr(), v.stride(0), v.stride(1))
    return (w.data_ptr(), u.data_ptr(), *of_k, *of_v)
