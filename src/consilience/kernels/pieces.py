"""What learning coefficients does to a block: the blend of a range, and inner products with a gradient."""

from typing import Any

import numpy as np

from consilience.jit import inlined, kernel, reporting

#: Elements whose products are summed in the block's own type before they enter the float64 total.
TILE = 1024


@kernel
def blend(stack: Any, weights: Any, base: Any, low: int, high: int, out: Any) -> None:
    """``out[i] = base[i] + sum_k weights[k] * stack[k, i]`` for ``low <= i < high``, summed in row order."""
    total = np.empty(TILE, stack.dtype)
    for at in range(low, high, TILE):
        end = min(high, at + TILE)
        # Slices from 0: an index that might be negative costs a branch per element and the vector units.
        start, target = base[at:end], out[at:end]
        for i in range(target.size):
            total[i] = stack.dtype.type(0)
        for k in range(len(weights)):
            weight, row = weights[k], stack[k, at:end]
            for i in range(target.size):
                total[i] += weight * row[i]
        for i in range(target.size):
            target[i] = start[i] + total[i]


@inlined
def _tile(row: Any, gradient: Any) -> Any:
    total = row.dtype.type(0)
    for i in range(row.size):
        total += row[i] * gradient[i]
    return total


@reporting
def products(stack: Any, gradient: Any, low: int, high: int, out: Any) -> None:
    """``out[k] += sum_{low <= i < high} stack[k, i] * gradient[i]``, in float64 over tiles."""
    for k in range(stack.shape[0]):
        for at in range(low, high, TILE):
            end = min(high, at + TILE)
            out[k] += np.float64(_tile(stack[k, at:end], gradient[at:end]))


@inlined
def widened(bits: Any) -> Any:
    """The float32 that the bits of a bfloat16 stand for."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@kernel
def blend_bf16(bits: Any, weights: Any, low: int, high: int, out: Any) -> None:
    """``blend`` from stored bfloat16: ``bits`` is 1 + K arrays of uint16, the base first; decoded as it is summed."""
    base = np.empty(TILE, np.float32)
    total = np.empty(TILE, np.float32)
    for at in range(low, high, TILE):
        end = min(high, at + TILE)
        stored, target = bits[0][at:end], out[at:end]
        for i in range(target.size):
            base[i] = widened(stored[i])
            total[i] = np.float32(0)
        for k in range(len(weights)):
            weight, row = weights[k], bits[k + 1][at:end]
            for i in range(target.size):
                total[i] += weight * (widened(row[i]) - base[i])
        for i in range(target.size):
            target[i] = base[i] + total[i]


@inlined
def _bf16_tile(bits: Any, base: Any, gradient: Any) -> Any:
    total = np.float32(0)
    for i in range(gradient.size):
        total += (widened(bits[i]) - base[i]) * gradient[i]
    return total


@reporting
def products_bf16(bits: Any, gradient: Any, low: int, high: int, out: Any) -> None:
    """``products`` from stored bfloat16, as ``blend_bf16`` has it."""
    base = np.empty(TILE, np.float32)
    for at in range(low, high, TILE):
        end = min(high, at + TILE)
        stored = bits[0][at:end]
        for i in range(stored.size):
            base[i] = widened(stored[i])
        for k in range(len(bits) - 1):
            out[k] += np.float64(_bf16_tile(bits[k + 1][at:end], base[: end - at], gradient[at:end]))
