"""Rows whose multipliers differ from vector to vector within a tensor."""

from typing import Any

import numpy as np

from consilience.jit import kernel


@kernel
def spread(factors: Any, start: int, inner: int, out: Any) -> None:
    """Write to ``out`` [n] the factors [G] of elements ``start ...``: element i has number (i // inner) % G."""
    stop, at = start + out.size, start
    while at < stop:
        number = (at // inner) % factors.size
        if inner == 1:
            end = min(at + factors.size - number, stop)
            part, target = factors[number : number + end - at], out[at - start : end - start]
            for i in range(target.size):
                target[i] = out.dtype.type(part[i])
        else:
            end = min((at // inner + 1) * inner, stop)
            out[at - start : end - start] = out.dtype.type(factors[number])
        at = end


@kernel
def vector_sum(rows: Any, base: Any, start: int, weights: Any, out: Any, inner: int, factors: Any) -> None:
    """``out = sum_k factors[k] * rows[k]`` with ``factors`` [K, G] as ``spread`` has them, summed in float64."""
    each, total = np.empty(out.size), np.zeros(out.size)
    for k in range(len(weights)):
        spread(factors[k], start, inner, each)
        row = rows[k]
        for i in range(out.size):
            total[i] += each[i] * np.float64(row[i])
    for i in range(out.size):
        out[i] = out.dtype.type(total[i])
