"""BiWKV as it is written: O(T^2), float64, log-sum-exp. The definition that every backend is tested against.

w, u (C,); k, v (B, T, C) -> y (B, T, C) float64. Differentiable. Memory B T^2 C: for tests.
"""

import torch
from torch import Tensor


def biwkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w, u, k, v = (t.double() for t in (w, u, k, v))
    t = torch.arange(k.shape[1], device=k.device)
    distance = (t[:, None] - t).abs()[..., None]  # (t, i, 1)
    others = k[:, None] - (distance - 1) * w  # (B, t, i, C): what i weighs at t, in logarithms
    log_weight = torch.where(distance == 0, k[:, None] + u, others)
    return (torch.softmax(log_weight, 2) * v[:, None]).sum(2)
