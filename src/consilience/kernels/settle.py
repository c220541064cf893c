"""Everything that happens to a block on its way out: adding the base, rounding, fingerprint, what rounding cost."""

from typing import Any

import numpy as np

from consilience.checkpoints.dtypes import DType
from consilience.checkpoints.values import count_nonfinite, from_bf16, widen
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


@kernel
def _audit(rounded: Any, exact: Any, base: Any, words: Any, start: int, totals: Any, marks: Any) -> None:
    """Add a tile's squared rounding error and change, and how many values are NaN or Inf, to ``totals`` [3]."""
    error, change = rounding_cost(exact, rounded, base)
    totals[0] += error
    totals[1] += change
    totals[2] += count_nonfinite(rounded, rounded.dtype.type(np.finfo(rounded.dtype).max))
    low, high = mix_words(words, start)
    marks[0] += low
    marks[1] += high


@kernel
def _tiles(
    values: Any, exact: Any, scale: Any, base: Any, add: bool, half: bool, out: Any, words: Any, start: int,
    totals: Any, marks: Any,
) -> None:  # fmt: skip
    rounded = np.empty(TILE, exact.dtype)
    nothing = base[:0]
    per_word = 8 // out.itemsize
    for at in range(0, exact.size, TILE):
        end = min(exact.size, at + TILE)
        less = base[at:end] if base.size else nothing
        if add:
            scale_add(values[at:end], scale, less)
        if half:
            to_bf16(values[at:end], out[at:end])
            from_bf16(out[at:end], rounded[: end - at])
        else:
            narrow(values[at:end], out[at:end])
            widen(out[at:end], rounded[: end - at])
        first = at // per_word
        tile = words[first : (end + per_word - 1) // per_word]
        _audit(rounded[: end - at], exact[at:end], less, tile, start + first, totals, marks)


def settle(
    values: Any, exact: Any, scale: float, base: Any, dtype: DType, out: Any, start: int, *, add: bool
) -> tuple[int, int, int, float, float]:
    """Round a block to the bytes of ``dtype`` and look at them.

    Args:
        values: [n] float32 or float64, what is rounded (nearest, ties to even).
        exact: [n], what they stand for: ``values`` itself unless noise was added to them.
        scale: with ``add``, ``values`` first become base + scale * values, in place.
        base: [n], or empty for zeros.
        dtype: of the output.
        out: [n * itemsize, padded to whole 8-byte words] uint8, overwritten.
        start: byte of the tensor at which the block begins.
        add: see ``scale``.

    Returns:
        The two fingerprint sums, how many values are NaN or Inf, sum (rounded - exact)^2 and sum (exact - base)^2.
    """
    real, totals, marks = exact.dtype.type, np.zeros(3), np.zeros(2, np.uint64)
    out[exact.size * dtype.itemsize :] = 0
    words, first = out.view(np.uint64), start >> 3
    half = dtype.name == "BF16"
    if (half and values.dtype != np.float32) or dtype.name == "F16":
        if add:
            scale_add(values, real(scale), base)
        with np.errstate(over="ignore"):
            if half:
                values = values.astype(np.float32)
            else:
                stored = out.view(np.float16)[: exact.size]
                np.copyto(stored, values, casting="same_kind")
                _audit(stored.astype(real), exact, base, words, first, totals, marks)
        add = False
    if dtype.name != "F16":
        typed = out.view(np.uint16 if half else np.float32 if dtype.name == "F32" else np.float64)
        _tiles(values, exact, real(scale), base, add, half, typed, words, first, totals, marks)
    return int(marks[0]), int(marks[1]), int(totals[2]), float(totals[0]), float(totals[1])
