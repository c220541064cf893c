"""Everything that happens to a block on its way in: fingerprint, decoding, the check for NaN and Inf, subtraction.

Handing the GIL back and forth costs more than a cache-sized kernel on two busy cores, and a pass over memory costs more
than its arithmetic, so the rows of a block are one compiled call, tile by tile.
"""

from typing import Any

import numpy as np

from consilience.checkpoints.dtypes import DType
from consilience.checkpoints.values import count_nonfinite, decode, from_bf16, widen
from consilience.jit import inlined, kernel
from consilience.kernels.fingerprint import mix, mix_words

#: Elements of a tile: what a first-level cache holds of a few rows.
TILE = 4096


@inlined
def _widened(bits: Any) -> Any:
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@kernel
def _special_bf16(bits: Any) -> Any:
    """Whether one of bfloat16 ``bits`` [n] is NaN or Inf."""
    largest = np.uint16(0)
    for i in range(bits.size):
        magnitude = bits[i] & np.uint16(0x7FFF)
        largest = magnitude if magnitude > largest else largest
    return largest >= np.uint16(0x7F80)


@kernel
def _less_bf16(bits: Any, base: Any, out: Any) -> None:
    for i in range(out.size):
        out[i] = _widened(bits[i]) - base[i]


@kernel
def _less(floats: Any, base: Any, out: Any) -> None:
    for i in range(out.size):
        out[i] = floats[i] - base[i]


@kernel
def _mark(words: Any, at: int, end: int, per_word: int, start: int, mark: Any) -> None:
    first = at // per_word
    low, high = mix_words(words[first : (end + per_word - 1) // per_word], start + first)
    mark[0] += low
    mark[1] += high


@kernel
def _rows_bf16(
    bits: Any, words: Any, base: Any, rows: Any, subtract: int, start: int, marks: Any, check: bool, bad: Any
) -> None:
    for at in range(0, rows.shape[1], TILE):
        end = min(rows.shape[1], at + TILE)
        if subtract:
            from_bf16(bits[0, at:end], base[at:end])
        for k in range(rows.shape[0]):
            if subtract:
                _less_bf16(bits[k + 1, at:end], base[at:end], rows[k, at:end])
            else:
                from_bf16(bits[k, at:end], rows[k, at:end])
        for s in range(bits.shape[0]):
            if check and _special_bf16(bits[s, at:end]):
                bad[s] = True
            if marks.size:
                _mark(words[s], at, end, 4, start, marks[s])


@kernel
def _rows_plain(
    floats: Any, words: Any, base: Any, rows: Any, subtract: int, start: int, marks: Any, check: bool, bad: Any
) -> None:
    largest = floats.dtype.type(np.finfo(floats.dtype).max)
    for at in range(0, rows.shape[1], TILE):
        end = min(rows.shape[1], at + TILE)
        if subtract:
            widen(floats[0, at:end], base[at:end])
        for k in range(rows.shape[0]):
            if subtract:
                _less(floats[k + 1, at:end], base[at:end], rows[k, at:end])
            else:
                widen(floats[k, at:end], rows[k, at:end])
        for s in range(floats.shape[0]):
            if check and count_nonfinite(floats[s, at:end], largest) > 0:
                bad[s] = True
            if marks.size:
                _mark(words[s], at, end, 8 // floats.itemsize, start, marks[s])


def together(dtype: DType) -> bool:
    """Whether rows of a type can be taken in together."""
    return dtype.name in ("BF16", "F32", "F64")


def ingest_rows(
    stored: Any, dtype: DType, base: Any, rows: Any, subtract: bool, start: int | None, check: bool
) -> tuple[Any, Any]:
    """Decode a block of all sources, the base first if it is subtracted.

    Args:
        stored: [S, bytes] uint8, S = K, or K + 1 with the base; rows of whole 8-byte words, padded with zeros.
        dtype: what they encode.
        base: [n] float32 or float64, overwritten if it is subtracted.
        rows: [K, n] of the same type, overwritten.
        subtract: rows become task vectors.
        start: byte of the tensor at which the block begins, for the fingerprint; None takes none.
        check: look for NaN and Inf (before the subtraction).

    Returns:
        [S, 2] uint64 fingerprint sums, and [S] whether a value is NaN or Inf.
    """
    marks = np.zeros((0 if start is None else len(stored), 2), np.uint64)
    bad = np.zeros(len(stored), np.bool_)
    words, first = stored.view(np.uint64), (start or 0) >> 3
    if dtype.name == "BF16":
        _rows_bf16(stored.view(np.uint16), words, base, rows, int(subtract), first, marks, check, bad)
    else:
        kind = np.float32 if dtype.name == "F32" else np.float64
        _rows_plain(stored.view(kind), words, base, rows, int(subtract), first, marks, check, bad)
    return marks, bad


@kernel
def _subtract(values: Any, base: Any) -> None:
    for i in range(values.size):
        values[i] -= base[i]


def ingest(raw: Any, dtype: DType, out: Any, base: Any, start: int | None, check: bool) -> tuple[int, int, bool]:
    """Decode the bytes ``raw`` of one source into ``out`` and subtract ``base`` (an empty array: nothing).

    Args:
        raw: [n * itemsize] uint8.
        dtype: what they encode.
        out: [n] float32 or float64, overwritten.
        base: [n] of the same type, or empty.
        start: byte of the tensor at which ``raw`` begins, for the fingerprint; None takes none.
        check: look for NaN and Inf (before the subtraction).

    Returns:
        The two fingerprint sums, and whether a value is NaN or Inf.
    """
    low, high = (0, 0) if start is None else mix(raw, start)
    decode(raw, dtype, out)
    bad = check and count_nonfinite(out, out.dtype.type(np.finfo(out.dtype).max)) > 0
    if base.size:
        _subtract(out, base)
    return low, high, bool(bad)
