"""The depthwise 5x5 convolution by the compiled loop (dwconv5.inc): float32, CPU. Signatures of torch_form.py."""

import torch
from torch import Tensor

from linic.kernels import native


def forward(x: Tensor, weight: Tensor) -> Tensor:
    return _convolve(x.contiguous(), weight.contiguous(), turned=0)


def backward(x: Tensor, weight: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    assert native.lib is not None
    x, g = x.contiguous(), g.contiguous()
    gw = x.new_empty(x.shape[0], 25, x.shape[3])
    status = native.lib.linic_dwconv5_weight(
        x.data_ptr(), g.data_ptr(), gw.data_ptr(), *x.shape, torch.get_num_threads()
    )
    native.check(status)
    return _convolve(g, weight.contiguous(), turned=1), gw.sum(0)


def _convolve(x: Tensor, weight: Tensor, turned: int) -> Tensor:
    assert native.lib is not None
    y = x.new_empty(x.shape)
    pointers = x.data_ptr(), weight.data_ptr(), y.data_ptr()
    native.check(native.lib.linic_dwconv5_forward(*pointers, *x.shape, turned, torch.get_num_threads()))
    return y
