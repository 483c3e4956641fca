"""BD-rate: by how many percent a codec's files are larger (+) or smaller (-) than an anchor's at equal PSNR.

A monotone cubic (PCHIP) of log rate over PSNR through all points of each curve, integrated exactly over the range of
PSNR that both have. Bjontegaard, VCEG-M33 (2001); PCHIP as in the field's later practice. Raises UsageError.
"""
import math
from dataclasses import dataclass

import numpy as np

from linic.bench.anchors import Curve
from linic.errors import BackendMissing, UsageError


@dataclass(frozen=True)
class BdRate:
    percent: float
    anchor: str
    low: float  # dB, the common range
    high: float

    def __str__(self) -> str:
        return f"{self.percent:+.2f} % against {self.anchor} ({self.low:.1f}-{self.high:.1f} dB)"


def bd_rate(test: Curve, anchor: Curve) -> BdRate:
    try:
        from scipy.interpolate import PchipInterpolator
    except ImportError as error:
        raise BackendMissing("BD-rate needs scipy: pip install linic[bench]") from error
    (quality_a, rate_a), (quality_t, rate_t) = _points(anchor), _points(test)
    low, high = max(quality_a[0], quality_t[0]), min(quality_a[-1], quality_t[-1])
    if not low < high:
        raise UsageError(f"{test.name} ({quality_t[0]:.1f}-{quality_t[-1]:.1f} dB) and {anchor.name} "
                         f"({quality_a[0]:.1f}-{quality_a[-1]:.1f} dB) have no PSNR in common")
    log_ratio = (PchipInterpolator(quality_t, rate_t).integrate(low, high)
                 - PchipInterpolator(quality_a, rate_a).integrate(low, high)) / (high - low)
    return BdRate(100 * math.expm1(float(log_ratio)), anchor.name, float(low), float(high))


def _points(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """(PSNR ascending, log bpp)."""
    quality, rate = np.array(curve.psnr, dtype=float), np.array(curve.bpp, dtype=float)
    if len(quality) < 2 or len(quality) != len(rate):
        raise UsageError(f"{curve.name}: BD-rate needs at least two points, and a rate for each")
    if not (np.isfinite(quality).all() and np.isfinite(rate).all() and (rate > 0).all()):
        raise UsageError(f"{curve.name}: BD-rate needs finite PSNR and rates above 0")
    order = np.argsort(quality)
    if (np.diff(quality[order]) <= 0).any():
        raise UsageError(f"{curve.name}: two points have the same PSNR")
    return quality[order], np.log(rate[order])
