"""Inner products of a stack's rows, a tile at a time from stored values: of whole rows, or of vectors within them.

Sums do not depend on blocks or threads. Each *leaf* of at most ``TILE`` elements is summed by halving in float64; what
adds leaves up has them in a fixed order, or adds exactly. The pair of rows (i, j), j <= i, is number i (i + 1) / 2 + j.
"""

from typing import Any

import numpy as np

from consilience.jit import kernel
from consilience.kernels.ingest import TILE, take

#: A full leaf's products are added up in so many lanes before they are halved: eight at once, in the halving's order.
_LANES = TILE // 8


@kernel
def _halve(lanes: Any, width: int) -> float:
    while width:
        for i in range(width):
            lanes[i] += lanes[i + width]
        width //= 2
    return lanes[0]


@kernel
def _full(a: Any, b: Any, lanes: Any) -> float:
    """``sum a * b`` of a full leaf."""
    a0, a1, a2, a3 = a[:_LANES], a[_LANES : 2 * _LANES], a[2 * _LANES : 3 * _LANES], a[3 * _LANES : 4 * _LANES]
    a4, a5, a6, a7 = a[4 * _LANES : 5 * _LANES], a[5 * _LANES : 6 * _LANES], a[6 * _LANES : 7 * _LANES], a[7 * _LANES :]
    b0, b1, b2, b3 = b[:_LANES], b[_LANES : 2 * _LANES], b[2 * _LANES : 3 * _LANES], b[3 * _LANES : 4 * _LANES]
    b4, b5, b6, b7 = b[4 * _LANES : 5 * _LANES], b[5 * _LANES : 6 * _LANES], b[6 * _LANES : 7 * _LANES], b[7 * _LANES :]
    real = np.float64
    for i in range(_LANES):
        even = (real(a0[i]) * real(b0[i]) + real(a4[i]) * real(b4[i])) + (
            real(a2[i]) * real(b2[i]) + real(a6[i]) * real(b6[i])
        )
        odd = (real(a1[i]) * real(b1[i]) + real(a5[i]) * real(b5[i])) + (
            real(a3[i]) * real(b3[i]) + real(a7[i]) * real(b7[i])
        )
        lanes[i] = even + odd
    return _halve(lanes, _LANES // 2)


@kernel
def _partial(a: Any, b: Any, lanes: Any) -> float:
    """``sum a * b`` of a leaf of any size up to ``TILE``."""
    half = 1
    while 2 * half < a.size:
        half *= 2
    rest = max(0, a.size - half)
    for i in range(min(half, a.size)):
        lanes[i] = np.float64(a[i]) * np.float64(b[i])
    upper_a, upper_b = a[half:], b[half:]
    for i in range(rest):
        lanes[i] += np.float64(upper_a[i]) * np.float64(upper_b[i])
    return _halve(lanes, half // 2)


@kernel
def _bring(taken: Any, at: int, end: int, rows: Any, base: Any, units: Any) -> None:
    """Bring elements ``at ... end`` to the front of ``rows``, row k times ``units[k]`` (none: as they are)."""
    take(taken, at, end, rows, base, 0)
    for k in range(units.size):
        for i in range(end - at):
            rows[k, i] *= units[k]


@kernel
def gram_whole(taken: Any, size: int, like: Any, units: Any, out: Any) -> None:
    """Write the pairs' inner products on every leaf of a block of ``size`` elements to ``out`` [pairs, leaves].

    ``like`` [K] has the rows' type; ``units`` [K] multiply them (none: nothing does).
    """
    rows, base = np.empty((like.size, TILE), like.dtype), np.empty(TILE, like.dtype)
    lanes = np.empty(TILE)
    for leaf in range(out.shape[1]):
        at, end = leaf * TILE, min(size, leaf * TILE + TILE)
        _bring(taken, at, end, rows, base, units)
        rows[:, end - at :] = 0
        pair = 0
        for i in range(like.size):
            for j in range(i + 1):
                out[pair, leaf] = _full(rows[i], rows[j], lanes)
                pair += 1


@kernel
def gram_stretches(taken: Any, size: int, like: Any, units: Any, start: int, length: int, out: Any) -> None:
    """``gram_whole`` with leaves that also end where a vector of ``length`` consecutive elements does.

    ``start`` is the block's first element in the tensor, a multiple of ``TILE``; ``out`` [pairs, leaves] gets the
    block's leaves in order.
    """
    rows, base = np.empty((like.size, TILE), like.dtype), np.empty(TILE, like.dtype)
    lanes = np.empty(TILE)
    leaf = 0
    for at in range(0, size, TILE):
        end = min(size, at + TILE)
        _bring(taken, at, end, rows, base, units)
        low, until = 0, length - (start + at) % length
        while low < end - at:
            high = min(until, end - at)
            pair = 0
            for i in range(like.size):
                for j in range(i + 1):
                    out[pair, leaf] = _partial(rows[i, low:high], rows[j, low:high], lanes)
                    pair += 1
            low, until = high, high + length
            leaf += 1


@kernel
def gram_columns(taken: Any, size: int, like: Any, units: Any, first: int, columns: int, out: Any) -> None:
    """Add the pairs' products to ``out`` [pairs, width], each to its element's column.

    Element i of the block is of column (first + i) % ``columns``, which is less than the width.
    """
    rows, base = np.empty((like.size, TILE), like.dtype), np.empty(TILE, like.dtype)
    for at in range(0, size, TILE):
        end = min(size, at + TILE)
        _bring(taken, at, end, rows, base, units)
        low = 0
        while low < end - at:
            column = (first + at + low) % columns
            high = min(low + columns - column, end - at)
            pair = 0
            for i in range(like.size):
                for j in range(i + 1):
                    a, b, total = rows[i, low:high], rows[j, low:high], out[pair, column : column + high - low]
                    for e in range(total.size):
                        total[e] += np.float64(a[e]) * np.float64(b[e])
                    pair += 1
            low = high


@kernel
def peaks(taken: Any, size: int, like: Any, out: Any) -> None:
    """Raise ``out`` [K] to the largest magnitude of each row."""
    rows, base = np.empty((like.size, TILE), like.dtype), np.empty(TILE, like.dtype)
    for at in range(0, size, TILE):
        end = min(size, at + TILE)
        take(taken, at, end, rows, base, 0)
        for k in range(like.size):
            for i in range(end - at):
                out[k] = max(out[k], abs(np.float64(rows[k, i])))
