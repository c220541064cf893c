"""Fingerprints of tensors, computed from blocks while they are in memory.

A fingerprint is a 128-bit sum over the tensor's 64-bit words of a strong mix of the word and its position (an additive,
incremental hash after Bellare & Micciancio 1997). Being a sum, it does not depend on block order or size. It detects
corruption and mistaken identity; it is not a defence against somebody who forges weights.
"""

from typing import Any

import numpy as np

from consilience.jit import kernel

MASK = (1 << 64) - 1


@kernel
def mix_words(words: Any, start: int) -> tuple[Any, Any]:
    """Return the two sums over 64-bit ``words`` whose first is word ``start`` of the tensor (uint64, wrapping)."""
    low = np.uint64(0)
    high = np.uint64(0)
    for i in range(words.size):
        z = words[i] + (np.uint64(start) + np.uint64(i) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
        low += z
        high += (z ^ (z >> np.uint64(29))) * np.uint64(0xD6E8FEB86659FD93)
    return low, high


def mix(raw: Any, start: int) -> tuple[int, int]:
    """Return the two sums over the bytes ``raw`` (uint8), which begin at byte ``start`` (a multiple of 8)."""
    whole = raw.size & ~7
    low, high = mix_words(raw[:whole].view(np.uint64), start >> 3)
    low, high = int(low), int(high)
    if whole != raw.size:
        last = np.zeros(8, np.uint8)
        last[: raw.size - whole] = raw[whole:]
        more = mix_words(last.view(np.uint64), (start + whole) >> 3)
        low, high = low + int(more[0]), high + int(more[1])
    return low & MASK, high & MASK


def digest(low: int, high: int, nbytes: int) -> str:
    """Return the fingerprint as 32 hexadecimal digits; the length keeps zero padding apart from zeros."""
    tail = np.array([nbytes], np.uint64)  # writable, as blocks are: the kernel is not compiled a second time
    a, b = mix_words(tail, 1 << 60)
    return f"{(low + int(a)) & MASK:016x}{(high + int(b)) & MASK:016x}"
