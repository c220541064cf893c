"""Sums over whole tensors that do not depend on blocks or threads: fixed leaves, fixed trees, exact top.

Each leaf of ``LEAF`` elements is summed by halving in float64; the leaves are summed exactly (``math.fsum``).
"""

from typing import Any

import numpy as np

from consilience.jit import kernel

LEAF = 4096


@kernel
def _halve(buffer: Any) -> float:
    width = buffer.size // 2
    while width:
        for i in range(width):
            buffer[i] += buffer[i + width]
        width //= 2
    return buffer[0]


@kernel
def leaf_magnitudes(a: Any, buffer: Any, out: Any) -> None:
    """Write ``sum |a|`` of each leaf to ``out`` [ceil(n / LEAF)]; ``buffer`` is [LEAF] float64."""
    for leaf in range(out.size):
        begin = leaf * buffer.size
        size = min(buffer.size, a.size - begin)
        for i in range(size):
            buffer[i] = abs(np.float64(a[begin + i]))
        buffer[size:] = 0.0
        out[leaf] = _halve(buffer)
