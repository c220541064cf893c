"""Counter-based random bits: any element's bits from a key and its index, in any order, on any thread.

SplitMix64 (Steele, Lea & Flood 2014) has the state key + index * gamma, so its stream is random-access.
"""

import hashlib
from typing import Any

import numpy as np

from consilience.jit import inlined, kernel


@inlined
def splitmix64(key: Any, index: Any) -> Any:
    """Return 64 random bits for element ``index`` of the stream ``key``."""
    z = np.uint64(key) + (np.uint64(index) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@kernel
def drop(row: Any, key: Any, start: int, limit: Any, scale: Any) -> None:
    """Keep entry i where its upper 32 random bits are below ``limit`` (density * 2^32), times ``scale``; else 0."""
    zero = row.dtype.type(0)
    for i in range(row.size):
        keep = (splitmix64(key, start + i) >> np.uint64(32)) < limit
        row[i] = row[i] * scale if keep else zero


def stream_key(*parts: str | int) -> int:
    """Return the 64-bit key of the stream named by ``parts`` (seed, tensor, expert, purpose)."""
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
