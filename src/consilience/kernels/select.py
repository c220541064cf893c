"""Which magnitudes are above, within and below bounds: the counting behind exact ranks, and the masks they lead to.

A magnitude is ranked by the 31 bits of its float32 value, which order as the values do.
"""

from typing import Any

import numpy as np

from consilience.jit import kernel

#: Bits of the largest magnitude there can be (NaN's included), and elements that are looked at together.
LARGEST, GROUP = (1 << 31) - 1, 64
_MAGNITUDE = np.uint32(0x7FFFFFFF)


@kernel
def magnitudes(row: Any, out: Any) -> None:
    """Write the magnitude bits of ``row`` [n] to ``out`` [n] uint32."""
    for i in range(row.size):
        out[i] = np.float32(row[i]).view(np.uint32) & _MAGNITUDE


@kernel
def collect(row: Any, low: Any, high: Any, out: Any) -> tuple[int, int]:
    """Write the magnitude bits from ``low`` to ``high`` to ``out`` [n + 1], in order; return how many, and those above.

    Most groups hold none, which counting without branches finds faster than looking at each.
    """
    found = 0
    above = 0
    for at in range(0, row.size, GROUP):
        group = row[at : at + GROUP]
        over = np.float32(0)
        from_low = np.float32(0)
        for i in range(group.size):
            bits = np.float32(group[i]).view(np.uint32) & _MAGNITUDE
            over += np.float32(1) if bits > high else np.float32(0)
            from_low += np.float32(1) if bits >= low else np.float32(0)
        above += int(over)
        if from_low > over:
            for i in range(group.size):
                bits = np.float32(group[i]).view(np.uint32) & _MAGNITUDE
                out[found] = bits
                found += low <= bits <= high
    return found, above


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
    for i in range(row.size):
        magnitude = abs(np.float32(row[i]))
        equal = magnitude == threshold and quota > 0
        quota -= equal
        row[i] = zero if magnitude > threshold or equal else row[i]
    return quota
