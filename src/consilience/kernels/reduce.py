"""Sums over whole tensors that do not depend on blocks or threads: fixed leaves, fixed trees, exact top.

Each leaf of ``LEAF`` elements is summed by halving in float64; the leaves are summed exactly (``math.fsum``).
"""

from typing import Any

import numpy as np

from consilience.jit import kernel

LEAF = 4096


@kernel
def halve(buffer: Any) -> float:
    """Return the sum of ``buffer``, whose size is a power of two; it is overwritten."""
    width = buffer.size // 2
    while width:
        for i in range(width):
            buffer[i] += buffer[i + width]
        width //= 2
    return buffer[0]


@kernel
def sum_squares(row: Any, buffer: Any) -> float:
    """Return ``sum row^2`` of at most ``LEAF`` entries; ``buffer`` is [LEAF] float64."""
    for i in range(row.size):
        buffer[i] = np.float64(row[i]) * np.float64(row[i])
    buffer[row.size :] = 0.0
    return halve(buffer)


@kernel
def unit_magnitudes(row: Any, unit: int, buffer: Any, out: Any) -> None:
    """Write ``sum |row|`` of every ``unit`` entries to ``out`` [ceil(n / unit)]; leaves begin with each unit."""
    for u in range(out.size):
        end = min((u + 1) * unit, row.size)
        total = 0.0
        for begin in range(u * unit, end, buffer.size):
            part = row[begin : min(begin + buffer.size, end)]
            for i in range(part.size):
                buffer[i] = abs(np.float64(part[i]))
            buffer[part.size :] = 0.0
            total += halve(buffer)
        out[u] = total


@kernel
def leaf_magnitudes(a: Any, buffer: Any, out: Any) -> None:
    """Write ``sum |a|`` of each leaf to ``out`` [ceil(n / LEAF)]; ``buffer`` is [LEAF] float64."""
    for leaf in range(out.size):
        begin = leaf * buffer.size
        size = min(buffer.size, a.size - begin)
        for i in range(size):
            buffer[i] = abs(np.float64(a[begin + i]))
        buffer[size:] = 0.0
        out[leaf] = halve(buffer)
