import math

import pytest

from linic.bench import anchors
from linic.bench.anchors import Curve
from linic.bench.bdrate import bd_rate
from linic.errors import UsageError

FLAT = Curve("flat", (0.1, 0.2, 0.4, 0.8), (28.0, 31.0, 34.0, 37.0))


# Published in the table of LALIC (arXiv 2502.05741); our own computation from the published points.
@pytest.mark.parametrize("pictures, percent", [("kodak", -15.26), ("clic-professional", -15.41), ("tecnick", -17.63)])
def test_the_published_points_of_lalic_give_its_published_bd_rate_against_vtm(pictures, percent):
    curves = anchors.load(pictures)
    found = bd_rate(curves["LALIC"], curves["VTM-9.1"])
    assert round(found.percent, 2) == percent
    assert found.anchor == "VTM-9.1"


# The numbers of the measurement's own report, made with the package bjontegaard.
@pytest.mark.parametrize("codec, percent", [("jpeg420", 205.2), ("webp", 87.4), ("vvc420", 10.1),
                                            ("avif444_psnr", 41.7)])
def test_our_measured_rivals_have_the_bd_rate_another_program_found(codec, percent):
    curves = anchors.load("kodak")
    assert round(bd_rate(curves[codec], curves["VTM-9.1"]).percent, 1) == percent


def test_a_curve_against_itself_is_zero():
    assert bd_rate(FLAT, FLAT).percent == 0


def test_half_the_rate_everywhere_is_minus_fifty_percent_whatever_the_order_of_points():
    half = Curve("half", tuple(b / 2 for b in reversed(FLAT.bpp)), tuple(reversed(FLAT.psnr)))
    assert math.isclose(bd_rate(half, FLAT).percent, -50)
    assert math.isclose(bd_rate(FLAT, half).percent, 100)


def test_only_the_common_range_counts():
    found = bd_rate(Curve("part", (0.2, 0.4), (31.0, 34.0)), FLAT)
    assert (found.low, found.high) == (31, 34)
    assert abs(found.percent) < 1
    assert "against flat (31.0-34.0 dB)" in str(found)


@pytest.mark.parametrize("curve, reason", [
    (Curve("far", (0.1, 0.2), (50.0, 51.0)), "no PSNR in common"),
    (Curve("one", (0.1,), (30.0,)), "at least two points"),
    (Curve("same", (0.1, 0.2), (30.0, 30.0)), "same PSNR"),
    (Curve("zero", (0.0, 0.2), (30.0, 31.0)), "rates above 0"),
    (Curve("endless", (0.1, 0.2), (30.0, math.inf)), "finite PSNR"),
])
def test_a_curve_that_cannot_be_compared_says_why(curve, reason):
    with pytest.raises(UsageError, match=reason):
        bd_rate(curve, FLAT)


def test_every_anchor_has_a_source_and_rising_points():
    assert set(anchors.PICTURES) == set(anchors.sets())
    for name in anchors.sets():
        for curve in anchors.load(name).values():
            assert curve.source
            assert list(curve.psnr) == sorted(curve.psnr) and list(curve.bpp) == sorted(curve.bpp)


def test_an_unknown_set_names_the_known_ones():
    with pytest.raises(UsageError, match="kodak"):
        anchors.load("kodac")
