"""Everything that happens to one row of one block on its way in, in one call.

Handing the GIL back and forth costs more than a cache-sized kernel on two busy cores, so the fingerprint, the decoding,
the check for NaN and Inf and the subtraction of the base are one compiled call per row.
"""

from typing import Any

import numpy as np

from consilience.checkpoints.dtypes import DType
from consilience.checkpoints.values import count_nonfinite, from_bf16, widen
from consilience.jit import kernel
from consilience.kernels.fingerprint import mix, mix_words

#: Elements of a tile.
TILE = 4096


@kernel
def _subtract(values: Any, base: Any) -> None:
    """``values -= base`` in place."""
    for i in range(values.size):
        values[i] -= base[i]


@kernel
def _after(out: Any, base: Any, words: Any, start: int, largest: Any, check: bool) -> Any:
    low, high = mix_words(words, start)
    bad = count_nonfinite(out, largest) if check else 0
    if base.size:
        _subtract(out, base)
    return low, high, bad


@kernel
def _tiles(raw: Any, bits: bool, out: Any, base: Any, words: Any, start: int, largest: Any, check: bool) -> Any:
    """Do everything to one first-level-cache-sized tile before the next."""
    low = np.uint64(0)
    high = np.uint64(0)
    bad = 0
    per_word = 8 // raw.itemsize
    for at in range(0, out.size, TILE):
        end = min(out.size, at + TILE)
        part = out[at:end]
        if bits:
            from_bf16(raw[at:end], part)
        else:
            widen(raw[at:end], part)
        less = base[at:end] if base.size else base
        first = at // per_word
        a, b, c = _after(part, less, words[first : end // per_word], start + first, largest, check)
        low += a
        high += b
        bad += c
    return low, high, bad


def ingest(
    raw: Any, dtype: DType, out: Any, base: Any, start: int | None, largest: Any, check: bool
) -> tuple[int, int, int]:
    """Decode the bytes ``raw`` into ``out`` and subtract ``base`` (an empty array: nothing).

    Args:
        raw: [n * itemsize] uint8.
        dtype: what they encode.
        out: [n] float32 or float64, overwritten.
        base: [n] of the same type, or empty.
        start: byte of the tensor at which ``raw`` begins, for the fingerprint; None takes none.
        largest: the compute type's largest finite value.
        check: count NaN and Inf (before the subtraction).

    Returns:
        The two fingerprint sums, and how many values are NaN or Inf.
    """
    whole = raw.size & ~7 if start is not None else 0
    words, first = raw[:whole].view(np.uint64), (start or 0) >> 3
    if dtype.name == "BF16":
        found = _tiles(raw.view(np.uint16), True, out, base, words, first, largest, check)
    elif dtype.name == "F16":
        np.copyto(out, raw.view(np.float16))
        found = _after(out, base, words, first, largest, check)
    else:
        typed = raw.view(np.float32 if dtype.name == "F32" else np.float64)
        found = _tiles(typed, False, out, base, words, first, largest, check)
    low, high, bad = map(int, found)
    if start is not None and whole != raw.size:
        more = mix(raw[whole:], start + whole)
        low, high = low + more[0], high + more[1]
    return low, high, bad
