import math

import numpy as np
import pytest

from linic.bench.metrics import decibel, ms_ssim, psnr
from linic.errors import UsageError


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_psnr_of_a_known_error():
    black = np.zeros((8, 8, 3), np.uint8)
    assert math.isclose(psnr(black, black + 1), 20 * math.log10(255))
    assert psnr(black, black + 255) == 0
    assert psnr(black, black) == math.inf


def test_psnr_is_the_same_both_ways():
    a, b = noise(9, 5), noise(9, 5, seed=1)
    assert psnr(a, b) == psnr(b, a)


def test_ms_ssim_is_one_for_equal_pictures_and_less_for_others():
    a = noise(176, 180)
    assert ms_ssim(a, a) == pytest.approx(1, abs=1e-6)
    assert ms_ssim(a, noise(176, 180, seed=1)) < 0.5


def test_ms_ssim_of_a_short_side_is_not_defined():
    assert ms_ssim(noise(175, 400), noise(175, 400)) is None


@pytest.mark.parametrize("measure", [psnr, ms_ssim])
def test_different_shapes_or_types_are_refused(measure):
    with pytest.raises(UsageError, match="one shape"):
        measure(noise(8, 8), noise(8, 9))
    with pytest.raises(UsageError, match="uint8"):
        measure(noise(8, 8), noise(8, 8).astype(float))


def test_decibel_of_similarity():
    assert decibel(0.99) == pytest.approx(20)
    assert decibel(1.0) == math.inf
