"""What learning coefficients does to a block: the blend of a range, and inner products with a gradient."""

from typing import Any

import numpy as np

from consilience.engine.kernels.jit import inlined, kernel, reporting

#: Elements whose products are summed in the block's own type before they enter the float64 total.
TILE = 1024


@kernel
def blend(stack: Any, weights: Any, base: Any, low: int, high: int, out: Any) -> None:
    """``out[i] = base[i] + sum_k weights[k] * stack[k, i]`` for ``low <= i < high``, summed in row order."""
    for i in range(low, high):
        total = stack.dtype.type(0)
        for k in range(len(weights)):
            total += weights[k] * stack[k, i]
        out[i] = base[i] + total


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
