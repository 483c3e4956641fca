"""Rate and distortion of one batch.

    ((lambda * 65025 * mse + bpp) * (lambda / 0.013) ** -exponent), mean over the batch

65025 = 255^2: lambda weighs the error of the 0-255 scale, as in the papers. The power makes the loss of every quality
about as large, so that none rules the gradient.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linic.models.lalic import quality_to_lambda

REFERENCE_LAMBDA = 0.013


@dataclass(frozen=True)
class Terms:
    """All (B,)."""

    loss: Tensor
    mse: Tensor                         # of values in [0, 1]
    bpp: Tensor                         # y and z
    bpp_z: Tensor


def bits(likelihoods: Tensor) -> Tensor:
    """(B, ...) -> (B,)"""
    return -torch.log2(likelihoods).flatten(1).sum(1)


def weigh(lam: Any, mse: Any, bpp: Any, exponent: float) -> Any:
    """One formula for training and evaluation, numbers or tensors."""
    return (lam * 65025 * mse + bpp) * (lam / REFERENCE_LAMBDA) ** -exponent


def rate_distortion(out: dict[str, Any], x: Tensor, quality: Tensor, exponent: float) -> Terms:
    """`out` of a model for x (B, 3, H, W) in [0, 1] at quality (B,)."""
    mse = (out["x_hat"] - x).square().mean((1, 2, 3))
    pixels = x.shape[2] * x.shape[3]
    bpp_z = bits(out["likelihoods"]["z"]) / pixels
    bpp = bits(out["likelihoods"]["y"]) / pixels + bpp_z
    return Terms(weigh(quality_to_lambda(quality), mse, bpp, exponent), mse, bpp, bpp_z)
