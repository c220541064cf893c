"""Float32 or float64 results to the bytes of the output's dtype: rounding, overflow, and what rounding cost."""

from typing import Any

import numpy as np

from consilience.checkpoints.dtypes import DType
from consilience.checkpoints.values import has_special
from consilience.jit import kernel, reporting
from consilience.kernels.random_bits import splitmix64


@kernel
def _round_bf16(bits: Any, out: Any) -> None:
    for i in range(out.size):
        b = bits[i]  # round to nearest, ties to even
        out[i] = np.uint16((b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@kernel
def _round_bf16_special(bits: Any, out: Any) -> None:
    _round_bf16(bits, out)
    for i in range(out.size):
        if (bits[i] & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):  # NaN keeps a significand bit
            out[i] = np.uint16((bits[i] >> np.uint32(16)) | np.uint32(64))


@kernel
def to_bf16(values: Any, out: Any) -> None:
    """Round float32 ``values`` to bfloat16 bits ``out`` (uint16)."""
    bits = values.view(np.uint32)
    odd = bits.size % 2 != 0
    if odd or has_special(bits.view(np.uint64), np.uint64(0x7F8000007F800000), np.uint64(0x0080000000800000)):
        _round_bf16_special(bits, out)
    else:
        _round_bf16(bits, out)


@kernel
def narrow(values: Any, out: Any) -> None:
    """Round ``values`` to ``out``'s type, the same or a narrower one."""
    for i in range(out.size):
        out[i] = values[i]


@kernel
def _stochastic32(values: Any, drop: int, tiny: Any, quantum: Any, key: Any, start: int) -> None:
    mask = np.uint32((1 << drop) - 1)
    for i in range(values.size):
        noise = np.uint32(splitmix64(key, start + i) >> np.uint64(32))
        x = values[i]
        if abs(x) >= tiny:
            bits = np.float32(x).view(np.uint32)
            values[i] = np.uint32((bits + (noise & mask)) & ~mask).view(np.float32)
        else:
            steps = np.floor(abs(np.float64(x)) / quantum + np.float64(noise) * 2.0**-32)
            values[i] = np.copysign(np.float32(steps * quantum), x)


@kernel
def _stochastic64(values: Any, drop: int, tiny: Any, quantum: Any, key: Any, start: int) -> None:
    mask = np.uint64((np.uint64(1) << np.uint64(drop)) - np.uint64(1))
    for i in range(values.size):
        noise = splitmix64(key, start + i)
        x = values[i]
        if abs(x) >= tiny:
            bits = np.float64(x).view(np.uint64)
            values[i] = np.uint64((bits + (noise & mask)) & ~mask).view(np.float64)
        else:
            steps = np.floor(abs(x) / quantum + np.float64(noise >> np.uint64(11)) * 2.0**-53)
            values[i] = np.copysign(steps * quantum, x)


def round_stochastically(values: Any, dtype: DType, key: int, start: int) -> None:
    """Move each value to one of its two neighbours in ``dtype``, the nearer the likelier, so that E[result] = value.

    Random bits are indexed by element (``start`` + position), so blocks do not matter.
    """
    significand = 23 if values.dtype == np.float32 else 52
    drop = significand - dtype.significand
    if drop <= 0:
        return
    run = _stochastic32 if values.dtype == np.float32 else _stochastic64
    kind = values.dtype.type
    run(values, drop, kind(dtype.tiny), np.float64(dtype.tiny * 2.0**-dtype.significand), np.uint64(key), start)


def encode(values: Any, dtype: DType, out: Any) -> None:
    """Round ``values`` to ``dtype`` (nearest, ties to even) into the bytes ``out`` (uint8)."""
    if dtype.name == "BF16":
        with np.errstate(over="ignore"):
            single = values if values.dtype == np.float32 else values.astype(np.float32)
        to_bf16(single, out.view(np.uint16))
    elif dtype.name == "F16":
        with np.errstate(over="ignore"):
            np.copyto(out.view(np.float16), values, casting="same_kind")
    else:
        narrow(values, out.view(np.float32 if dtype.name == "F32" else np.float64))


@reporting
def rounding_cost(exact: Any, rounded: Any, base: Any) -> tuple[float, float]:
    """Return (sum (rounded - exact)^2, sum (exact - base)^2) of a tile; an empty ``base`` counts as zeros.

    Summed in the values' own type: a tile is short.
    """
    error = exact.dtype.type(0)
    change = exact.dtype.type(0)
    for i in range(exact.size):
        e = rounded[i] - exact[i]
        error += e * e
    if base.size:
        for i in range(exact.size):
            c = exact[i] - base[i]
            change += c * c
    else:
        for i in range(exact.size):
            change += exact[i] * exact[i]
    return error, change


@reporting
def below_unit(row: Any, weight: Any, base: Any, per_unit: Any, out: Any) -> None:
    """Measure how much of ``weight * row`` is below one unit in the last place of ``base``.

    Adds to ``out`` [4]: entries that differ from zero, those of them below one unit, the L1 norm, and the part of it
    below one unit. ``per_unit`` is 2^-(significand bits) of the output's type. The row is a tile's, and summed in its
    own type.
    """
    one, zero = row.dtype.type(1), row.dtype.type(0)
    changed = zero
    below = zero
    mass = zero
    mass_below = zero
    for i in range(row.size):
        x = abs(row[i] * weight)
        unit = np.uint32(np.float32(base[i]).view(np.uint32) & np.uint32(0x7F800000)).view(np.float32) * per_unit
        changed += one if x > 0 else zero
        below += one if x < unit and x > 0 else zero
        mass += x
        mass_below += x if x < unit else zero
    out[0] += changed
    out[1] += below
    out[2] += mass
    out[3] += mass_below
