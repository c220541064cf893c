"""Everything that happens to a block on its way out: adding the base, rounding, fingerprint, what rounding cost."""

from typing import Any, NamedTuple

import numpy as np

from consilience.checkpoints.dtypes import DType
from consilience.checkpoints.values import count_nonfinite, exponent_bits, from_bf16, has_special, widen
from consilience.jit import kernel
from consilience.kernels.encode import narrow, rounding_cost, to_bf16
from consilience.kernels.fingerprint import mix_words
from consilience.kernels.ingest import TILE


@kernel
def scale_add(values: Any, scale: Any, base: Any) -> None:
    """``values = base + scale * values`` in place; an empty ``base`` adds nothing."""
    if base.size:
        for i in range(values.size):
            values[i] = base[i] + scale * values[i]
    elif scale != 1:
        for i in range(values.size):
            values[i] *= scale


class Settled(NamedTuple):
    """Where a block goes: values of a type that is encoded here, and what is known of them.

    ``out`` [n] are values of the output's type (``half``: bits of bfloat16) and ``words`` their bytes, ``word`` the
    first one's place in the tensor; ``totals`` [3] add up the squared rounding error, the squared change, and how many
    values are NaN or Inf; ``marks`` [2] the fingerprint sums. Without ``encode`` values stay numbers, in ``exact`` [n].
    """

    encode: bool
    exact: Any
    out: Any
    half: bool
    words: Any
    exponents: Any
    units: Any
    word: int
    totals: Any
    marks: Any


@kernel
def _audit(rounded: Any, exact: Any, base: Any, first: int, last: int, settled: Any) -> None:
    error, change = rounding_cost(exact, rounded, base)
    settled.totals[0] += error
    settled.totals[1] += change
    words = settled.words[first:last]
    if has_special(words, settled.exponents, settled.units):
        settled.totals[2] += count_nonfinite(rounded, rounded.dtype.type(np.finfo(rounded.dtype).max))
    low, high = mix_words(words, settled.word + first)
    settled.marks[0] += low
    settled.marks[1] += high


@kernel
def settle_tile(values: Any, exact: Any, base: Any, at: int, rounded: Any, settled: Any) -> None:
    """Round the tile ``values``, which stand for ``exact``, into place ``at``; ``rounded`` is room for a tile."""
    end = at + values.size
    out, back = settled.out[at:end], rounded[: values.size]
    if settled.half:
        to_bf16(values, out)
        from_bf16(out, back)
    else:
        narrow(values, out)
        widen(out, back)
    per_word = 8 // settled.out.itemsize
    _audit(back, exact, base, at // per_word, (end + per_word - 1) // per_word, settled)


@kernel
def _settle_all(values: Any, exact: Any, base: Any, settled: Any) -> None:
    rounded = np.empty(TILE, exact.dtype)
    for at in range(0, exact.size, TILE):
        end = min(exact.size, at + TILE)
        settle_tile(values[at:end], exact[at:end], base[at:end] if base.size else base, at, rounded, settled)


def encodes(dtype: DType, real: Any) -> bool:
    """Whether a type is encoded here, from the type ``real``."""
    return dtype.name in ("F32", "F64") or (dtype.name == "BF16" and real is np.float32)


def settled(exact: Any, dtype: DType, out: Any, start: int, *, encode: bool) -> Settled:
    """Return where a block goes.

    Args:
        exact: [n], room for numbers; what is encoded at once needs none.
        dtype: of the output.
        out: [n * itemsize, padded to whole 8-byte words] uint8, the padding zero.
        start: byte of the tensor at which the block begins.
        encode: see ``Settled``.
    """
    half = dtype.name == "BF16"
    typed = out.view(np.uint16 if half else np.float64 if dtype.name == "F64" else np.float32)
    exponents, units = exponent_bits(dtype)
    marks = np.zeros(2, np.uint64)
    return Settled(encode, exact, typed, half, out.view(np.uint64), exponents, units, start >> 3, np.zeros(3), marks)


def settle(values: Any, exact: Any, base: Any, dtype: DType, out: Any, start: int) -> Settled:
    """Round a whole block, ``values`` [n] that stand for ``exact`` [n], on ``base`` [n] or none; see ``settled``."""
    found = settled(exact, dtype, out, start, encode=True)
    with np.errstate(over="ignore"):
        if dtype.name == "F16":
            stored = out.view(np.float16)[: exact.size]
            np.copyto(stored, values, casting="same_kind")
            _audit(stored.astype(exact.dtype), exact, base, 0, len(found.words), found)
        else:
            values = values.astype(np.float32) if found.half and values.dtype != np.float32 else values
            _settle_all(values, exact, base, found)
    return found
