"""The depthwise 5x5 convolution as it is written: 25 shifted products, float64. The definition.

x (B, H, W, C), weight (25, C), tap 5 i + j at offset (i - 2, j - 2) -> (B, H, W, C) float64. Differentiable.
"""

import torch.nn.functional as F
from torch import Tensor


def dwconv5(x: Tensor, weight: Tensor) -> Tensor:
    x, weight = x.double(), weight.double()
    rows, columns = x.shape[1:3]
    padded = F.pad(x, (0, 0, 2, 2, 2, 2))
    y = x.new_zeros(x.shape)
    for tap in range(25):
        i, j = divmod(tap, 5)
        y = y + padded[:, i : i + rows, j : j + columns] * weight[tap]
    return y
