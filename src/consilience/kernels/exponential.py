"""Exponentials and logarithms of ratios in loops that a compiler can vectorise, to a few units in the last place.

A call of the C library's functions per element costs several times as much.
"""

from typing import Any

import numpy as np

from consilience.jit import kernel

_LOG2 = 1.4426950408889634
#: log(2) in two parts: multiples of the first are exact.
_LN2_HIGH, _LN2_LOW = 0.6931471803691238, 1.9082149292705877e-10
#: exp(x) is as good as 0 below; its exponent would leave the range of normal numbers.
_LEAST = -708.0


@kernel
def exponentials(values: Any) -> None:
    """Replace ``values`` [n] float64, none above 0, by their exponentials; below -708 they are 0.

    exp(x) = 2^k exp(r) with |r| <= log(2) / 2, and exp(r) by its Taylor polynomial of degree 13.
    """
    for i in range(values.size):
        x = max(values[i], _LEAST)
        k = np.floor(x * _LOG2 + 0.5)
        r = (x - k * _LN2_HIGH) - k * _LN2_LOW
        p = 1.0 / 6227020800.0
        p = p * r + 1.0 / 479001600.0
        p = p * r + 1.0 / 39916800.0
        p = p * r + 1.0 / 3628800.0
        p = p * r + 1.0 / 362880.0
        p = p * r + 1.0 / 40320.0
        p = p * r + 1.0 / 5040.0
        p = p * r + 1.0 / 720.0
        p = p * r + 1.0 / 120.0
        p = p * r + 1.0 / 24.0
        p = p * r + 1.0 / 6.0
        p = p * r + 0.5
        p = p * r + 1.0
        p = p * r + 1.0
        power = (np.int64(np.int32(k)) + np.int64(1023)) << np.int64(52)
        scaled = p * np.int64(power).view(np.float64)
        values[i] = scaled if values[i] >= _LEAST else 0.0


@kernel
def log_ratio(a: Any, b: Any, out: Any) -> None:
    """Write ``log(a / b)`` of positive ``a`` and ``b`` [n] float64 to ``out``.

    log(a / b) = 2 artanh(s) with s = (a - b) / (a + b), which loses nothing where they are near: by its series to s^19
    where |s| <= 0.15 for all, else by the library's logarithm.
    """
    largest = 0.0
    for i in range(a.size):
        s = (a[i] - b[i]) / (a[i] + b[i])
        out[i] = s
        largest = max(largest, abs(s))
    if largest > 0.15:
        for i in range(a.size):
            s = out[i]
            out[i] = np.log1p(s) - np.log1p(-s) if abs(s) <= 0.15 else np.log(a[i] / b[i])
        return
    for i in range(a.size):
        s = out[i]
        t = s * s
        p = 1.0 / 19.0
        p = p * t + 1.0 / 17.0
        p = p * t + 1.0 / 15.0
        p = p * t + 1.0 / 13.0
        p = p * t + 1.0 / 11.0
        p = p * t + 1.0 / 9.0
        p = p * t + 1.0 / 7.0
        p = p * t + 1.0 / 5.0
        p = p * t + 1.0 / 3.0
        p = p * t + 1.0
        out[i] = 2.0 * s * p
