"""Exact integer layers, each beside its float twin. So far: Linear, the seam for the integer programs to come.

Activations are integers of 14 bits in units of `unit_in`, weights of `bits` bits with a scale a row:
    acc_n = sum_k w_nk x_k;   y_n = clamp((acc_n m_n + c_n) >> s_n, low, high)
m_n 2^-s_n approximates unit_in scale_n / unit_out; c_n holds the bias and the rounding half. Every bound is checked
in Python's integers when the layer is made, so any carrier whose sums stay exact gives the same result: int64, the
definition, and float64 (all values below 2^53), which is faster. Source: integer networks of Balle, Johnston, Minnen
(ICLR 2019); the ranges are ours.
"""

from dataclasses import dataclass

import numpy as np

ACTIVATION_LOW, ACTIVATION_HIGH = -8192, 8191
_ACCUMULATOR_BITS = 53


@dataclass(frozen=True)
class IntegerLinear:
    """weight (N, K) int64, multiplier, offset, shift (N,) int64."""

    weight: np.ndarray
    multiplier: np.ndarray
    offset: np.ndarray
    shift: np.ndarray
    low: int = ACTIVATION_LOW
    high: int = ACTIVATION_HIGH

    @classmethod
    def from_float(cls, weight: np.ndarray, bias: np.ndarray | None, unit_in: float, unit_out: float,
                   bits: int = 14) -> "IntegerLinear":
        """The integer twin of y = weight x + bias. Raises ValueError where a bound of the arithmetic breaks."""
        weight = np.asarray(weight, np.float64)
        bias = np.zeros(len(weight)) if bias is None else np.asarray(bias, np.float64)
        top = 2 ** (bits - 1) - 1
        scale = np.maximum(np.abs(weight).max(1), 1e-12) / top
        rounded = np.rint(weight / scale[:, None]).astype(np.int64)
        multiplier, offset, shift = [], [], []
        for n in range(len(weight)):
            ratio = unit_in * float(scale[n]) / unit_out
            s = max(0, min(45, 15 - int(np.floor(np.log2(ratio)))))  # m in [2^15, 2^16]
            m, c = round(ratio * 2**s), round((float(bias[n]) / unit_out + 0.5) * 2**s)
            largest = int(np.abs(rounded[n]).sum()) * -ACTIVATION_LOW
            if largest * m + abs(c) >= 2**_ACCUMULATOR_BITS:
                raise ValueError(f"row {n}: |acc m + c| may reach {largest * m + abs(c)}, beyond 2^53")
            multiplier.append(m)
            offset.append(c)
            shift.append(s)
        return cls(rounded, np.asarray(multiplier, np.int64), np.asarray(offset, np.int64),
                   np.asarray(shift, np.int64))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """x (..., K) int64 in the activation range -> (..., N). The definition."""
        acc = x @ self.weight.T
        return np.clip((acc * self.multiplier + self.offset) >> self.shift, self.low, self.high)

    def in_float64(self, x: np.ndarray) -> np.ndarray:
        """The same integers, carried by float64: every step is exact, so order and FMA cannot matter."""
        step = np.ldexp(1.0, -self.shift)
        acc = x.astype(np.float64) @ self.weight.T.astype(np.float64)
        y = np.floor(acc * (self.multiplier * step) + self.offset * step)
        return np.clip(y, self.low, self.high).astype(np.int64)
