"""Which magnitudes are above, within and below bounds: the counting behind exact ranks, and the masks they lead to.

A magnitude is ranked by the 31 bits of its float32 value, which order as the values do.
"""

from typing import Any, NamedTuple

import numpy as np

from consilience.jit import kernel, reporting

#: Bits of the largest magnitude there can be (NaN's included), and elements that are looked at together.
LARGEST, TILE = (1 << 31) - 1, 1024
_MAGNITUDE = np.uint32(0x7FFFFFFF)


@kernel
def magnitudes(row: Any, out: Any) -> None:
    """Write the magnitude bits of ``row`` [n] to ``out`` [n] uint32."""
    for i in range(row.size):
        out[i] = np.float32(row[i]).view(np.uint32) & _MAGNITUDE


@reporting
def _count(row: Any, low: Any, high: Any) -> tuple[Any, Any, Any, Any]:
    """Count what is above and from ``high``, above and from ``low``: in float32, exact for a tile, for wide vectors."""
    one, zero = np.float32(1), np.float32(0)
    above = zero
    from_high = zero
    above_low = zero
    from_low = zero
    for i in range(row.size):
        bits = np.float32(row[i]).view(np.uint32) & _MAGNITUDE
        above += one if bits > high else zero
        from_high += one if bits >= high else zero
        above_low += one if bits > low else zero
        from_low += one if bits >= low else zero
    return above, from_high, above_low, from_low


@kernel
def _between(row: Any, low: Any, high: Any, out: Any, found: int) -> int:
    for i in range(row.size):
        bits = np.float32(row[i]).view(np.uint32) & _MAGNITUDE
        out[found] = bits
        found += low < bits < high
    return found


@kernel
def collect(row: Any, low: Any, high: Any, out: Any, counts: Any) -> int:
    """Write the magnitude bits between ``low`` and ``high``, both left out, to ``out`` [n + 1], in order.

    Adds to ``counts`` [3] how many are above ``high``, equal to it, and equal to ``low``: where many entries are equal,
    bounds taken from a sample are such values. Returns how many were written. Most tiles of few distinct values hold
    none, which counting without branches finds faster than looking at each.
    """
    found = 0
    for at in range(0, row.size, TILE):
        tile = row[at : at + TILE]
        above, from_high, above_low, from_low = _count(tile, low, high)
        counts[0] += int(above)
        counts[1] += int(from_high - above)
        counts[2] += int(from_low - above_low)
        if above_low > from_high:
            found = _between(tile, low, high, out, found)
    return found


@kernel
def trim(row: Any, threshold: Any, quota: int) -> int:
    """Zero the entries below ``threshold``, and those equal to it after the first ``quota``; return the quota left."""
    zero = row.dtype.type(0)
    if quota == 0:
        for i in range(row.size):
            row[i] = row[i] if abs(np.float32(row[i])) > threshold else zero
        return 0
    equal = 0
    for i in range(row.size):
        magnitude = abs(np.float32(row[i]))
        equal += magnitude == threshold
        row[i] = row[i] if magnitude >= threshold else zero
    if equal <= quota:
        return quota - equal
    for i in range(row.size):
        if abs(np.float32(row[i])) == threshold:
            if quota > 0:
                quota -= 1
            else:
                row[i] = zero
    return 0


@kernel
def shave(row: Any, threshold: Any, quota: int) -> int:
    """Zero the entries above ``threshold``, and the first ``quota`` equal to it; return the quota left."""
    zero = row.dtype.type(0)
    equal = 0
    if quota > 0:
        for i in range(row.size):
            equal += abs(np.float32(row[i])) == threshold
    if equal == 0:
        for i in range(row.size):
            row[i] = zero if abs(np.float32(row[i])) > threshold else row[i]
    elif equal <= quota:
        for i in range(row.size):
            row[i] = zero if abs(np.float32(row[i])) >= threshold else row[i]
    else:
        left = quota
        for i in range(row.size):
            magnitude = abs(np.float32(row[i]))
            first = magnitude == threshold and left > 0
            left -= first
            row[i] = zero if magnitude > threshold or first else row[i]
    return max(0, quota - equal)


class Kept(NamedTuple):
    """Ranks by magnitude: entries below ``last`` [K] go, and those above ``first`` [K]; of equal ones ``quota`` [2, K].

    ``last`` below 0 and ``first`` infinite keep a row as it is.
    """

    last: Any
    first: Any
    quota: Any


@kernel
def count_zeros(row: Any) -> int:
    """Return how many entries are 0."""
    zeros = 0
    for i in range(row.size):
        zeros += row[i] == 0
    return zeros


@kernel
def keep_scored(rows: Any, scores: Any, kept: Any) -> None:
    """Zero, in all rows, the elements whose score in ``scores`` [1, n], which is overwritten, is outside the ranks."""
    zero = rows.dtype.type(0)
    score = scores[0]
    kept.quota[0, 0] = trim(score, kept.last[0], kept.quota[0, 0])
    for k in range(rows.shape[0]):
        row = rows[k]
        for i in range(row.size):
            row[i] = row[i] if score[i] > 0 else zero


@kernel
def keep(rows: Any, kept: Any) -> None:
    """Zero what is outside the ranks, in place; the quota counts down."""
    for k in range(kept.last.size):
        if not kept.last[k] < 0:
            kept.quota[0, k] = trim(rows[k], kept.last[k], kept.quota[0, k])
        if kept.first[k] != np.inf or kept.quota[1, k] > 0:
            kept.quota[1, k] = shave(rows[k], kept.first[k], kept.quota[1, k])
