"""The numbers of a stored tensor, any range of them: the one place that decodes (``raw`` gives the bytes)."""

from functools import cache
from typing import Any

import numpy as np

from consilience.checkpoints.checkpoint import Storage, TensorInfo, raw
from consilience.checkpoints.dtypes import DType
from consilience.jit import kernel


@kernel
def from_bf16(bits: Any, out: Any) -> None:
    """Decode bfloat16 ``bits`` [n] uint16 into ``out`` [n] float32 or float64."""
    for i in range(bits.size):
        out[i] = np.uint32(np.uint32(bits[i]) << np.uint32(16)).view(np.float32)


@kernel
def widen(floats: Any, out: Any) -> None:
    """Copy ``floats`` [n] into ``out`` [n] of the same or a wider type."""
    for i in range(floats.size):
        out[i] = floats[i]


@kernel
def count_nonfinite(values: Any, largest: Any) -> int:
    """Return how many entries are NaN or Inf (``largest``: the type's largest finite value, as that type)."""
    bad = 0
    for i in range(values.size):
        bad += not (abs(values[i]) <= largest)
    return bad


@kernel
def has_special(words: Any, exponents: Any, units: Any) -> Any:
    """Whether numbers hold NaN or Inf, all bits of their exponent set: looked at by ``words`` [n] of 64 bits.

    ``exponents`` has the exponents' bits set in a word, ``units`` the lowest of each: adding it carries into the sign.
    """
    carried = np.uint64(0)
    for i in range(words.size):
        carried |= (words[i] & exponents) + units
    return (carried & ((exponents << np.uint64(1)) & ~exponents)) != 0


@cache
def exponent_bits(dtype: DType) -> tuple[Any, Any]:
    """Return what ``has_special`` wants to know of a float type: its exponents' bits in a word, and the lowest ones."""
    significand, bits = dtype.significand, dtype.bits
    top = (1 << (bits - 1)) - (1 << significand)
    spread = sum(1 << at for at in range(0, 64, bits))
    return np.uint64(top * spread), np.uint64((1 << significand) * spread)


def decode(encoded: Any, dtype: DType, out: Any) -> None:
    """Decode the bytes ``encoded`` (uint8) of ``dtype`` into ``out`` (float32, or float64)."""
    if dtype.name == "BF16":
        from_bf16(encoded.view(np.uint16), out)
    elif dtype.name == "F16":
        np.copyto(out, encoded.view(np.float16))
    else:
        widen(encoded.view(np.float32 if dtype.name == "F32" else np.float64), out)


def values(storage: Storage, tensor: TensorInfo, start: int, stop: int, out: Any) -> Any:
    """Return elements ``start ... stop`` in ``out`` [stop - start], float32 or float64.

    Raises:
        InputError: the file ends early.
    """
    decode(raw(storage, tensor, start, stop), tensor.plain, out)
    return out
