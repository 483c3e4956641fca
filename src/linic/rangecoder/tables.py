"""Frequency tables: checked arrays for the coder, and how export makes them from exact probabilities.

A table is n >= 2 frequencies >= 1 of sum 2^24: entry e < n - 1 stands for the symbol low + e, entry n - 1 is the
escape. All tables lie end to end in one array. `quantise` and the makers of tables are for export only: a decoder
reads tables from the weight file and never computes one. Raises WeightsError (tables that are not right).
"""
from collections.abc import Callable, Sequence
from decimal import Decimal, localcontext
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from linic.errors import WeightsError

PRECISION = 24
TOTAL = 1 << PRECISION
LIMIT = 16383                       # |symbol|: keeps y_hat in Q8 below 2^24, exact in float32
SCALES, SCALE_MIN, SCALE_MAX = 128, "0.11", "256"
DIGITS = 30

IntArray = npt.NDArray[Any]


class Tables:
    """freqs uint32 (all tables end to end), lengths int32 (entries per table), lows int32 (symbol of entry 0)."""

    def __init__(self, freqs: npt.ArrayLike, lengths: npt.ArrayLike, lows: npt.ArrayLike):
        self.freqs = _integers("freqs", freqs, np.uint32)
        self.lengths = _integers("lengths", lengths, np.int32)
        self.lows = _integers("lows", lows, np.int32)
        self._check()
        self._starts = [0, *accumulate(self.lengths.tolist())]
        self._rows: dict[int, tuple[int, list[int]]] = {}
        self.models: dict[int, Any] = {}       # fast.py keeps constriction's here, made when first used

    def __len__(self) -> int:
        return len(self.lengths)

    def frequencies(self, table: int) -> IntArray:
        return self.freqs[self._starts[table]:self._starts[table + 1]]

    def row(self, table: int) -> tuple[int, list[int]]:
        """(low, cumulative frequencies from 0 to 2^24) in Python's integers."""
        if table not in self._rows:
            self._rows[table] = int(self.lows[table]), [0, *accumulate(self.frequencies(table).tolist())]
        return self._rows[table]

    def _check(self) -> None:
        if len(self.lengths) == 0 or len(self.lows) != len(self.lengths):
            raise WeightsError(f"tables: {len(self.lengths)} lengths and {len(self.lows)} lows; one of each a table, "
                               "at least one table")
        lengths, lows = self.lengths.astype(np.int64), self.lows.astype(np.int64)
        _refuse(lengths < 2, "entries", lengths, "at least 2, the escape included")
        highs = lows + lengths - 2
        _refuse(lows < -LIMIT, "as lowest symbol", lows, f"at least {-LIMIT}")
        _refuse(highs > LIMIT, "as highest symbol", highs, f"at most {LIMIT}")
        if lengths.sum() != len(self.freqs):
            raise WeightsError(f"tables: lengths add up to {lengths.sum()}, there are {len(self.freqs)} frequencies")
        starts = np.cumsum(lengths) - lengths
        least = np.minimum.reduceat(self.freqs, starts)
        _refuse(least < 1, "as smallest frequency", least, "at least 1")
        sums = np.add.reduceat(self.freqs.astype(np.int64), starts)
        _refuse(sums != TOTAL, "as sum of frequencies", sums, f"{TOTAL}")


def _integers(name: str, values: npt.ArrayLike, kind: Any) -> IntArray:
    given = np.asarray(values)
    if given.ndim != 1 or (given.dtype.kind not in "iu" and given.size):
        raise WeightsError(f"tables: {name} is {given.dtype} {given.shape}, not a row of integers")
    kept = given.astype(kind)
    if not np.array_equal(kept, given):
        raise WeightsError(f"tables: {name} has values outside {np.dtype(kind)}")
    kept.flags.writeable = False
    return kept


def _refuse(bad: IntArray, what: str, values: IntArray, rule: str) -> None:
    if bad.any():
        table = int(np.argmax(bad))
        raise WeightsError(f"table {table}: has {values[table]} {what}, must be {rule}")


def quantise(probabilities: Sequence[Any]) -> list[int]:
    """Frequencies >= 1 of sum 2^24 from probabilities >= 0 (float, Fraction, mpmath; any sum), exactly.

    Every entry gets 1; the other 2^24 - n are shared in proportion and rounded down; what is left goes one by one
    to the largest remainders, the earlier entry first where two are equal.
    """
    exact = [_fraction(p) for p in probabilities]
    total, spare = sum(exact), TOTAL - len(exact)
    if len(exact) < 2 or spare < 0 or min(exact) < 0 or total == 0:
        raise WeightsError("a table needs at least 2 probabilities, none negative, not all zero")
    shares = [p * spare / total for p in exact]
    whole = [share.numerator // share.denominator for share in shares]
    by_remainder = sorted(range(len(exact)), key=lambda i: (whole[i] - shares[i], i))
    for i in by_remainder[:spare - sum(whole)]:
        whole[i] += 1
    return [1 + w for w in whole]


def _fraction(p: Any) -> Fraction:
    if hasattr(p, "man_exp"):                           # mpmath's mpf: mantissa * 2^exponent
        mantissa, exponent = p.man_exp
        return Fraction(int(mantissa)) * Fraction(2) ** int(exponent)
    return Fraction(p)


def scale_table(count: int = SCALES, low: str = SCALE_MIN, high: str = SCALE_MAX) -> list[float]:
    """low * (high / low)^(i / (count - 1)), i = 0..count - 1, each the float64 nearest to the true value.

    In decimals because pow() of the C libraries differs in the last bit from machine to machine.
    """
    with localcontext() as context:
        context.prec = 50
        first, ratio = Decimal(low), Decimal(high) / Decimal(low)
        return [float(first * (ratio.ln() * i / (count - 1)).exp()) for i in range(count)]


def gaussian_tables(scales: Sequence[float]) -> Tables:
    """One table a scale: N(0, scale^2) over unit bins -r..r; r >= 1 is the smallest with less than 2^-24 outside."""
    from mpmath import erfc, mpf, sqrt  # slow to import; export only

    return _symmetric(scales, lambda x, scale: erfc(x / (sqrt(mpf(2)) * scale)))


def laplace_tables(scales: Sequence[float]) -> Tables:
    """The same of the density exp(-|x| / scale) / (2 scale)."""
    from mpmath import exp

    return _symmetric(scales, lambda x, scale: exp(-x / scale))


def _symmetric(scales: Sequence[float], beyond: Callable[[Any, Any], Any]) -> Tables:
    """beyond(x, scale): P(|X| > x), with mpmath."""
    from mpmath import mp

    with mp.workdps(DIGITS):
        rows = [_row(beyond, mp.mpf(scale)) for scale in scales]
    return Tables(np.concatenate([np.array(row, np.uint32) for row in rows]),
                  [len(row) for row in rows], [1 - len(row) // 2 for row in rows])


def _row(beyond: Callable[[Any, Any], Any], scale: Any) -> list[int]:
    from mpmath import mpf

    outside = [mpf(1)]                              # outside[k] = P(|X| > k - 1/2), from k = 0: everything
    while len(outside) < 3 or outside[-1] >= mpf(2) ** -PRECISION:
        outside.append(beyond(len(outside) - mpf(1) / 2, scale))
    sides = [(a - b) / 2 for a, b in pairwise(outside[1:])]
    return quantise([*reversed(sides), 1 - outside[1], *sides, outside[-1]])
