"""Distances between two pictures, arrays uint8 (H, W, 3) in 0..255.

PSNR in dB, one squared error over the three channels. MS-SSIM in 0..1 as pytorch-msssim computes it on RGB, the
number CompressAI reports. Raises UsageError where shapes differ, BackendMissing without pytorch-msssim.
"""
import math

import numpy as np

from linic.errors import BackendMissing, UsageError

# Five scales of an 11-pixel window: 11 * 2^4 pixels is the smallest side on which all of them exist.
MS_SSIM_SIDE = 176


def _check(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape or a.dtype != np.uint8 or b.dtype != np.uint8:
        raise UsageError(f"two uint8 pictures of one shape are needed, not {a.dtype} {a.shape} and {b.dtype} {b.shape}")


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """dB; infinite for equal pictures."""
    _check(a, b)
    error = np.mean(np.square(a.astype(np.int32) - b.astype(np.int32), dtype=np.float64))
    return float(10 * math.log10(255**2 / error)) if error else math.inf


def ms_ssim(a: np.ndarray, b: np.ndarray) -> float | None:
    """None where a side is too short for five scales."""
    _check(a, b)
    if min(a.shape[:2]) < MS_SSIM_SIDE:
        return None
    import torch
    try:
        from pytorch_msssim import ms_ssim as measure
    except ImportError as error:
        raise BackendMissing("MS-SSIM needs pytorch-msssim: pip install linic[bench]") from error
    x, y = (torch.from_numpy(p.copy()).permute(2, 0, 1)[None].float() for p in (a, b))
    return float(measure(x, y, data_range=255))


def decibel(similarity: float) -> float:
    """MS-SSIM on the scale on which its upper end can be read: -10 log10(1 - x)."""
    return math.inf if similarity >= 1 else -10 * math.log10(1 - similarity)
