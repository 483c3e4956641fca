"""Rate and distortion of one batch.

    ((lambda * distortion + bpp) * (lambda / 0.013) ** -exponent), mean over the batch

Distortion: 65025 * mse, 65025 = 255^2: lambda weighs the error of the 0-255 scale, as in the papers; or
1 - MS-SSIM. lambda: the recipe's, or that of each crop's quality. The power makes the loss of every quality about as
large, so that none rules the gradient. `even` does so for crops: each counts by its loss to the power of -even, 1 being
the mean of logarithms. For validation it counts nothing.

MRT, whose output has its own lambda, has it the other way round, which makes all qualities equal at once:

    lambda * bpp + 100 * mse (+ the terms of perceptual.py, weighed)
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linic.errors import UsageError
from linic.models.lalic import quality_to_lambda
from linic.train.perceptual import Perceptual
from linic.train.recipe import Loss

REFERENCE_LAMBDA = 0.013
# Lambdas in use for MS-SSIM (2.4 .. 60.5, CompressAI) are 1250 to 1330 times those for mse: 16.64 beside .013.
MS_SSIM_LAMBDA = 1280.0
FLAT = 0.01     # loss of a crop without content: with `even`, less counts as this
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
WINDOW = 11
SMALLEST_SIDE = WINDOW << (len(SCALES) - 1)


@dataclass(frozen=True)
class Terms:
    """All (B,)."""

    loss: Tensor
    mse: Tensor                         # of values in [0, 1]
    bpp: Tensor                         # all latents
    aside: Tensor                       # bits per pixel of z; MRT: LPIPS on SqueezeNet, where it is in the loss


def bits(likelihoods: Tensor) -> Tensor:
    """(B, ...) -> (B,)"""
    return -torch.log2(likelihoods).flatten(1).sum(1)


def weigh(loss: Loss, quality: Any, distortion: Any, bpp: Any) -> Any:
    """One formula for training and evaluation, numbers or tensors. `distortion`: mse of [0, 1], or 1 - MS-SSIM."""
    lam = quality_to_lambda(quality) if loss.lambda_ is None else loss.lambda_
    power = (lam / REFERENCE_LAMBDA) ** -loss.exponent if loss.exponent else 1.0
    if loss.distortion == "mse":
        lam = lam * 65025
    elif loss.lambda_ is None:
        lam = lam * MS_SSIM_LAMBDA
    return (lam * distortion + bpp) * power


def rate_distortion(out: dict[str, Any], x: Tensor, quality: Tensor, loss: Loss,
                    judge: Perceptual | None = None) -> Terms:
    """`out` of a model for x (B, 3, H, W) in [0, 1] at quality (B,). judge: with the weights of loss.perceptual."""
    mse = (out["x_hat"] - x).square().mean((1, 2, 3))
    pixels = x.shape[2] * x.shape[3]
    if "bits" in out:
        bpp, aside = out["bits"] / pixels, torch.zeros_like(mse)
        total = extreme(out["lambda"], mse, bpp)
        if judge is not None and loss.perceptual is not None:
            terms, w = judge(out["x_hat"], x), loss.perceptual
            total = total + (w.lpips * terms.lpips + w.vgg * terms.vgg + w.wd * terms.wd + w.phase * terms.phase
                             + w.seam * terms.seam)
            aside = aside + terms.lpips.detach()
        return Terms(total, mse, bpp, aside)
    bpp_z = bits(out["likelihoods"]["z"]) / pixels
    bpp = bits(out["likelihoods"]["y"]) / pixels + bpp_z
    distortion = mse if loss.distortion == "mse" else 1 - ms_ssim(out["x_hat"], x)
    total = weigh(loss, quality, distortion, bpp)
    if loss.even:
        total = total * total.detach().clamp_min(FLAT) ** -loss.even
    return Terms(total, mse, bpp, bpp_z)


def extreme(lambda_: Any, mse: Any, bpp: Any) -> Any:
    return lambda_ * bpp + 100 * mse


def ms_ssim(a: Tensor, b: Tensor) -> Tensor:
    """(B, C, H, W), values in [0, 1] -> (B,), differentiable, float32: mean over channels, as pytorch-msssim has it.

    Source: Wang, Simoncelli, Bovik 2003; Gaussian window of 11 pixels, sigma 1.5, no padding. UsageError where a side
    is too short for five scales.
    """
    if min(a.shape[2:]) < SMALLEST_SIDE:
        raise UsageError(f"MS-SSIM of {a.shape[3]}x{a.shape[2]} pixels: five scales need {SMALLEST_SIDE} on each side")
    offset = torch.arange(WINDOW, device=a.device, dtype=torch.float32) - WINDOW // 2
    window = torch.exp(-offset.square() / 4.5)
    window = (window / window.sum()).expand(a.shape[1], 1, 1, WINDOW)

    def blurred(t: Tensor) -> Tensor:
        t = F.conv2d(t, window, groups=t.shape[1])
        return F.conv2d(t, window.mT, groups=t.shape[1])

    # Plain layout: channels last would go to cuDNN, whose TF32 has no digits left for variance = E[x^2] - E[x]^2.
    a, b = a.float().contiguous(), b.float().contiguous()
    product = torch.ones((), device=a.device)
    for i, weight in enumerate(SCALES):
        if i:
            a, b = (F.avg_pool2d(t, 2, padding=(t.shape[2] % 2, t.shape[3] % 2)) for t in (a, b))
        mean_a, mean_b = blurred(a), blurred(b)
        aa, bb, ab = blurred(a * a) - mean_a**2, blurred(b * b) - mean_b**2, blurred(a * b) - mean_a * mean_b
        similar = (2 * ab + 0.03**2) / (aa + bb + 0.03**2)                                  # contrast and structure
        if i == len(SCALES) - 1:
            similar = similar * (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
        # Not below a millionth: a power below 1 has no finite slope at 0.
        product = product * similar.mean((2, 3)).clamp_min(1e-6) ** weight
    return product.mean(1)
