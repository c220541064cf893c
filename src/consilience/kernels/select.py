"""The k-th largest magnitude, exactly, by counting: two passes of histograms, no sorting, no copy.

Magnitudes are ranked by the 31 bits of their float32 value: the upper 16 are counted in the first pass; the second
counts the lower 15 among the entries that share the k-th one's upper bits.
"""

from typing import Any

import numpy as np

from consilience.jit import kernel

HIGH, LOW = 1 << 16, 1 << 15


@kernel
def count_high(row: Any, histogram: Any) -> None:
    """Add the upper 16 magnitude bits of each entry to ``histogram`` [2^16] (int64)."""
    for i in range(row.size):
        bits = np.float32(row[i]).view(np.uint32)
        histogram[(bits >> np.uint32(15)) & np.uint32(0xFFFF)] += 1


@kernel
def count_low(row: Any, high: Any, histogram: Any) -> None:
    """Add the lower 15 magnitude bits of the entries whose upper bits equal ``high`` to ``histogram`` [2^15 + 8].

    Other entries are counted in the 8 spare bins in turn: a branch would be mispredicted, and one spare bin would make
    every increment wait for the one before.
    """
    for i in range(row.size):
        bits = np.float32(row[i]).view(np.uint32) & np.uint32(0x7FFFFFFF)
        spare = np.uint32(0x8000) + np.uint32(i & 7)
        histogram[(bits & np.uint32(0x7FFF)) if (bits >> np.uint32(15)) == high else spare] += 1


@kernel
def count_equal(row: Any, threshold: Any) -> int:
    """Return how many magnitudes equal ``threshold`` (float32)."""
    count = 0
    for i in range(row.size):
        count += abs(np.float32(row[i])) == threshold
    return count


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


def pick_bin(histogram: Any, k: int) -> tuple[int, int]:
    """Return the bin that holds the k-th largest (k >= 1), and how many lie in the bins above it."""
    above = np.cumsum(histogram[::-1])
    position = int(np.searchsorted(above, k))
    return len(histogram) - 1 - position, int(above[position - 1]) if position else 0
