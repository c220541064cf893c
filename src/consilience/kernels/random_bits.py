"""Counter-based random bits: any element's bits from a key and its index, in any order, on any thread.

SplitMix64 (Steele, Lea & Flood 2014) has the state key + index * gamma, so its stream is random-access.
"""

import hashlib
from typing import Any

import numpy as np

from consilience.jit import inlined


@inlined
def splitmix64(key: Any, index: Any) -> Any:
    """Return 64 random bits for element ``index`` of the stream ``key``."""
    z = np.uint64(key) + (np.uint64(index) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def stream_key(*parts: str | int) -> int:
    """Return the 64-bit key of the stream named by ``parts`` (seed, tensor, expert, purpose)."""
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
