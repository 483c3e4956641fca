"""The depthwise 5x5 convolution in plain torch, any device and dtype.

The weight's gradient is 25 shifted products: the libraries' own is several times slower (oneDNN; cuDNN too).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor, weight: Tensor) -> Tensor:
    channels = x.shape[3]
    kernel = weight.t().reshape(channels, 1, 5, 5)
    with torch.autocast(x.device.type, enabled=False):  # the caller has chosen the dtype
        y = F.conv2d(x.contiguous().permute(0, 3, 1, 2), kernel, padding=2, groups=channels)
    return y.permute(0, 2, 3, 1).contiguous()


def backward(x: Tensor, weight: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape[1:3]
    padded = F.pad(x, (0, 0, 2, 2, 2, 2))
    taps = [(padded[:, i : i + rows, j : j + columns] * g).sum((0, 1, 2)) for i in range(5) for j in range(5)]
    return forward(g, weight.flip(0)), torch.stack(taps)
