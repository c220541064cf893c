"""Bytes of a checkpoint to float32 or float64, and the check that they are finite."""

from typing import Any

import numpy as np

from consilience.checkpoints.dtypes import DType
from consilience.engine.kernels.jit import kernel


@kernel
def _from_bf16(raw: Any, out: Any) -> None:
    bits = out.view(np.uint32)
    for i in range(raw.size):
        bits[i] = np.uint32(raw[i]) << np.uint32(16)


@kernel
def _widen(raw: Any, out: Any) -> None:
    for i in range(raw.size):
        out[i] = raw[i]


@kernel
def _from_bf16_wide(raw: Any, narrow: Any, out: Any) -> None:
    bits = narrow.view(np.uint32)
    for i in range(raw.size):
        bits[i] = np.uint32(raw[i]) << np.uint32(16)
    for i in range(raw.size):
        out[i] = narrow[i]


@kernel
def count_nonfinite(values: Any, largest: Any) -> int:
    """Return how many entries are NaN or Inf (``largest``: the type's largest finite value, as that type)."""
    bad = 0
    for i in range(values.size):
        bad += not (abs(values[i]) <= largest)
    return bad


@kernel
def subtract(values: Any, base: Any) -> None:
    """``values -= base`` in place."""
    for i in range(values.size):
        values[i] -= base[i]


@kernel
def add(values: Any, base: Any) -> None:
    """``values += base`` in place."""
    for i in range(values.size):
        values[i] += base[i]


def decode(raw: Any, dtype: DType, out: Any) -> None:
    """Decode the bytes ``raw`` (uint8) of ``dtype`` into ``out`` (float32, or float64)."""
    if dtype.name == "BF16":
        if out.dtype == np.float32:
            _from_bf16(raw.view(np.uint16), out)
        else:
            _from_bf16_wide(raw.view(np.uint16), np.empty(out.size, np.float32), out)
    elif dtype.name == "F16":
        np.copyto(out, raw.view(np.float16))
    else:
        _widen(raw.view(np.float32 if dtype.name == "F32" else np.float64), out)
