"""Bytes of a checkpoint to float32 or float64, and the check that they are finite."""

from typing import Any

import numpy as np

from consilience.checkpoints.dtypes import DType
from consilience.engine.kernels.jit import kernel


@kernel
def from_bf16(raw: Any, out: Any) -> None:
    """Decode bfloat16 bits ``raw`` [n] uint16 into ``out`` [n] float32 or float64."""
    for i in range(raw.size):
        out[i] = np.uint32(np.uint32(raw[i]) << np.uint32(16)).view(np.float32)


@kernel
def widen(raw: Any, out: Any) -> None:
    """Copy floats ``raw`` [n] into ``out`` [n] of the same or a wider type."""
    for i in range(raw.size):
        out[i] = raw[i]


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


def decode(raw: Any, dtype: DType, out: Any) -> None:
    """Decode the bytes ``raw`` (uint8) of ``dtype`` into ``out`` (float32, or float64)."""
    if dtype.name == "BF16":
        from_bf16(raw.view(np.uint16), out)
    elif dtype.name == "F16":
        np.copyto(out, raw.view(np.float16))
    else:
        widen(raw.view(np.float32 if dtype.name == "F32" else np.float64), out)
