"""Everything that happens to a block on its way in: fingerprint, decoding, the check for NaN and Inf, subtraction.

A pass over memory costs more than the arithmetic on it, and handing the GIL back and forth more than a cache-sized
kernel on two busy cores; so blocks are large, and a compiled call takes a tile at a time through all there is to do.
"""

from typing import Any, NamedTuple

import numpy as np

from consilience.checkpoints.dtypes import DType
from consilience.checkpoints.values import count_nonfinite, decode, exponent_bits, from_bf16, has_special, widen
from consilience.jit import inlined, kernel
from consilience.kernels.fingerprint import MASK, mix, mix_words

#: Elements of a tile: what a first-level cache holds of a few rows.
TILE = 4096


class Taken(NamedTuple):
    """A block of K rows, on a base where there is one, as it was read.

    Either ``stored`` [S, n] holds all sources in one type that decodes here, the base first (``subtract``: rows become
    task vectors); or it has no columns, and ``rows`` [K, n] and ``base`` [n] are numbers already. ``words`` are the
    stored bytes, ``word`` the first one's place in the tensor, ``marks`` [S, 2] (or none) the fingerprint sums,
    ``bad`` [S] whether a value is NaN or Inf (looked for if ``exponents``, see ``has_special``).
    """

    stored: Any
    half: bool
    subtract: bool
    rows: Any
    base: Any
    words: Any
    exponents: Any
    units: Any
    word: int
    marks: Any
    bad: Any


@inlined
def _widened(bits: Any) -> Any:
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@kernel
def _less_bf16(bits: Any, base: Any, out: Any) -> None:
    for i in range(out.size):
        out[i] = _widened(bits[i]) - base[i]


@kernel
def _less(floats: Any, base: Any, out: Any) -> None:
    for i in range(out.size):
        out[i] = floats[i] - base[i]


@kernel
def _look(taken: Any, first: int, last: int) -> None:
    """Look at the words of a tile of every source: fingerprints, NaN and Inf."""
    for s in range(taken.words.shape[0]):
        if taken.exponents and has_special(taken.words[s, first:last], taken.exponents, taken.units):
            taken.bad[s] = True
        if taken.marks.size:
            low, high = mix_words(taken.words[s, first:last], taken.word + first)
            taken.marks[s, 0] += low
            taken.marks[s, 1] += high


@kernel
def take(taken: Any, at: int, end: int, rows: Any, base: Any, to: int) -> None:
    """Bring elements ``at ... end`` of a block to place ``to`` of ``rows`` [K, m] and ``base`` [m] (or none)."""
    over = to + end - at
    if taken.stored.shape[1] == 0:
        if taken.base.size:
            widen(taken.base[at:end], base[to:over])
        for k in range(rows.shape[0]):
            widen(taken.rows[k, at:end], rows[k, to:over])
        return
    first = 0
    if taken.subtract:
        first = 1
        if taken.half:
            from_bf16(taken.stored[0, at:end], base[to:over])
        else:
            widen(taken.stored[0, at:end], base[to:over])
    for k in range(rows.shape[0]):
        values, target = taken.stored[k + first, at:end], rows[k, to:over]
        if taken.half and taken.subtract:
            _less_bf16(values, base[to:over], target)
        elif taken.half:
            from_bf16(values, target)
        elif taken.subtract:
            _less(values, base[to:over], target)
        else:
            widen(values, target)
    per_word = 8 // taken.stored.itemsize
    _look(taken, at // per_word, (end + per_word - 1) // per_word)


@kernel
def take_all(taken: Any, rows: Any, base: Any) -> None:
    """Bring a whole block to ``rows`` [K, n] and ``base`` [n]."""
    for at in range(0, rows.shape[1], TILE):
        take(taken, at, min(rows.shape[1], at + TILE), rows, base, at)


def together(dtype: DType) -> bool:
    """Whether rows of a type can be taken in together."""
    return dtype.name in ("BF16", "F32", "F64")


def taken_stored(stored: Any, dtype: DType, real: Any, *, subtract: bool, start: int | None, check: bool) -> Taken:
    """Return a block of stored values of one type.

    Args:
        stored: [S, bytes] uint8, S = K, or K + 1 with the base; rows of whole 8-byte words, padded with zeros.
        dtype: what they encode.
        real: the type to compute in.
        subtract: the first source is the base, and rows become task vectors.
        start: byte of the tensor at which the block begins, for the fingerprint; None takes none.
        check: look for NaN and Inf (before the subtraction).
    """
    half = dtype.name == "BF16"
    typed = stored.view(np.uint16 if half else np.float32 if dtype.name == "F32" else np.float64)
    exponents, units = exponent_bits(dtype) if check else (np.uint64(0), np.uint64(0))
    marks = np.zeros((0 if start is None else len(stored), 2), np.uint64)
    nothing, bad = np.empty((0, 0), real), np.zeros(len(stored), np.bool_)
    words = stored.view(np.uint64)
    return Taken(typed, half, subtract, nothing, nothing[0:0].reshape(-1), words, exponents, units, (start or 0) >> 3,
                 marks, bad)  # fmt: skip


def taken_numbers(rows: Any, base: Any | None, marks: list[list[int]]) -> Taken:
    """Return a block of numbers [K, n] on a base [n], if there is one, whose fingerprint sums are known."""
    none, zero = np.empty((0, 0), np.uint16), np.uint64(0)
    on: Any = np.empty(0, rows.dtype) if base is None else base
    sums = np.array([[value & MASK for value in mark] for mark in marks], np.uint64)
    words, bad = np.empty((0, 0), np.uint64), np.empty(0, np.bool_)
    return Taken(none, True, on.size > 0, rows, on, words, zero, zero, 0, sums, bad)


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
