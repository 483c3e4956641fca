"""Frequency tables: what is refused, the exact rule of quantise, and the Gaussian tables for ever the same."""
import hashlib
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linic.errors import WeightsError
from linic.rangecoder import LIMIT, Tables
from linic.rangecoder.tables import TOTAL, gaussian_tables, laplace_tables, quantise, scale_table

GOOD = np.array([TOTAL - 1, 1, 1, TOTAL - 2, 1], np.uint32)


@pytest.mark.parametrize(
    "freqs, lengths, lows, message",
    [(GOOD, [2, 3], [0], "one of each a table"),
     (GOOD[:0], [], [], "at least one table"),
     (GOOD, [2, 2], [0, 0], "add up to 4, there are 5"),
     (GOOD, [4, 1], [0, 0], "table 1: has 1 entries"),
     (GOOD, [5, 0], [0, 0], "table 1: has 0 entries"),
     (GOOD, [-1, 6], [0, 0], "table 0: has -1 entries"),
     (np.array([TOTAL - 1, 1, 1, TOTAL - 1, 0]), [2, 3], [0, 0], "table 1: has 0 as smallest frequency"),
     (np.array([TOTAL - 1, 2, 1, TOTAL - 2, 1]), [2, 3], [0, 0], "table 0: has 16777217 as sum"),
     (GOOD, [2, 3], [0, LIMIT], "table 1: has 16384 as highest symbol"),
     (GOOD, [2, 3], [-LIMIT - 1, 0], "table 0: has -16384 as lowest symbol"),
     (GOOD.astype(float), [2, 3], [0, 0], "freqs is float64"),
     (GOOD.astype(np.int64) - TOTAL, [2, 3], [0, 0], "outside uint32"),
     (GOOD, [[2, 3]], [0, 0], "lengths is int64"),
     (GOOD, [2, 3], [0, 1 << 31], "outside int32")])
def test_tables_that_are_not_right_are_refused_by_name(freqs, lengths, lows, message):
    with pytest.raises(WeightsError, match=message):
        Tables(freqs, lengths, lows)


def test_tables_are_read_only_copies():
    mine = GOOD.copy()
    tables = Tables(mine, [2, 3], [0, -1])
    mine[0] = 7
    assert tables.frequencies(0).tolist() == [TOTAL - 1, 1] and len(tables) == 2
    with pytest.raises(ValueError):
        tables.freqs[0] = 7


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1e9), min_size=2, max_size=300).filter(any))
def test_constriction_takes_the_frequencies_exactly(probabilities):
    constriction = pytest.importorskip("constriction")
    from linic.rangecoder.fast import model_of

    row = quantise(probabilities)
    model = model_of(Tables(np.array(row, np.uint32), [len(row)], [0]), 0)
    left, scale = 0, (1 << 40) - 1
    for entry, frequency in enumerate(row):
        coder = constriction.stream.queue.RangeEncoder()
        coder.encode(np.array([entry], np.int32), model)
        assert coder.pos() == (0, (scale * left, scale * frequency))
        left += frequency


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e300) | st.fractions(0, 1), min_size=2, max_size=50).filter(any))
def test_quantised_frequencies_are_positive_exact_in_sum_and_near(probabilities):
    row = quantise(probabilities)
    exact = [Fraction(p) for p in probabilities]
    assert min(row) >= 1 and sum(row) == TOTAL
    for frequency, p in zip(row, exact):
        assert abs(frequency - 1 - p / sum(exact) * (TOTAL - len(row))) < 1


def test_what_is_left_goes_to_the_largest_remainders_the_earlier_first():
    assert quantise([1, 1, 1]) == [5592406, 5592405, 5592405]
    assert quantise([Fraction(1, 3)] * 2) == [TOTAL // 2] * 2
    assert quantise([0, 1]) == [1, TOTAL - 1]


@pytest.mark.parametrize("bad", [[], [1], [0, 0], [1, -1]])
def test_quantise_refuses_what_is_no_distribution(bad):
    with pytest.raises(WeightsError):
        quantise(bad)


def test_scales_run_from_011_to_256_in_equal_ratios():
    scales = scale_table()
    assert len(scales) == 128 and scales[0] == 0.11 and scales[-1] == 256
    assert np.allclose(np.diff(np.log(scales)), np.log(256 / 0.11) / 127, rtol=1e-12)
    assert hashlib.sha256(np.array(scales, "<f8").tobytes()).hexdigest() == SCALES_DIGEST


SCALES_DIGEST = "4e9d1720882bb1c52f19f005746caa1d0529dc57af1556f1889320bf6ae297df"


def test_gaussian_tables_are_the_ones_of_every_weight_file():
    tables = gaussian_tables(scale_table())
    assert len(tables) == 128 and len(tables.freqs) == 47104
    assert tables.lengths[0] == 4 and tables.lows[0] == -1                     # r is never below 1
    for i, scale in enumerate(scale_table()):
        row, r = tables.frequencies(i).astype(int), -int(tables.lows[i])
        assert len(row) == 2 * r + 2 and row[-1] in (1, 2)
        assert np.abs(row[:-1] - row[-2::-1]).max() <= 1                       # symmetric up to one unit
        assert r == 1 or 5.0 * scale < r + 0.5 < 5.5 * scale + 1               # 2^-24 is at 5.4 sigma
    kept = tables.freqs.astype("<u4"), tables.lengths.astype("<i4"), tables.lows.astype("<i4")
    assert hashlib.sha256(b"".join(a.tobytes() for a in kept)).hexdigest() == TABLES_DIGEST


TABLES_DIGEST = "50f1beada0447b3f63de52e6da0dcd15abb5f57185be8b467b02321f094abe34"


def test_laplace_tables_have_the_exact_masses_of_their_scales():
    scales = scale_table(128, "0.06", "24")
    assert scales[0] == 0.06 and scales[-1] == 24
    assert np.allclose(np.diff(np.log(scales)), np.log(400) / 127, rtol=1e-12)
    tables = laplace_tables(scales)
    assert len(tables) == 128 and len(tables.freqs) == 17544 and tables.lengths[0] == 4
    for i, scale in enumerate(scales):
        row, r = tables.frequencies(i).astype(int), -int(tables.lows[i])
        assert len(row) == 2 * r + 2 and row[-1] in (1, 2)
        assert np.exp(-(r + 0.5) / scale) < 2.0**-24 and (r == 1 or np.exp(-(r - 0.5) / scale) >= 2.0**-24)
        sides = np.arange(1, r + 1)
        side = np.exp(-(sides - 0.5) / scale) * -np.expm1(-1 / scale) / 2
        mass = np.concatenate([side[::-1], [-np.expm1(-0.5 / scale)], side]) * (TOTAL - len(row))
        assert np.abs(row[:-1] - 1 - mass).max() < 1.001
    kept = tables.freqs.astype("<u4"), tables.lengths.astype("<i4"), tables.lows.astype("<i4")
    assert hashlib.sha256(b"".join(a.tobytes() for a in kept)).hexdigest() == LAPLACE_DIGEST


LAPLACE_DIGEST = "b558fca7030bdf5e0457b2c01eb937c899630843b9bf5a360fc02d685b9f8926"
