"""One pass over whole rows of matrices for the merge doctor: inner products, signs, magnitudes, sketches.

A tile of all rows of the stack stays in the first-level cache while everything is taken from it. Loops run over slices,
whose indices need no check for negative values: only so are they vectorised.
"""

from typing import Any

import numpy as np

from consilience.jit import reporting

#: Elements whose products are summed in float32 before they are added up in float64.
TILE = 1024


@reporting
def _pair(a: Any, b: Any) -> Any:
    """Return ``sum a b``, and how many products are below and other than 0."""
    total = np.float32(0)
    below = np.int32(0)
    nonzero = np.int32(0)
    for i in range(a.size):
        product = a[i] * b[i]
        total += product
        below += np.int32(product < 0)
        nonzero += np.int32(product != 0)
    return total, below, nonzero


@reporting
def _square(a: Any) -> Any:
    """Return ``sum a^2``, ``sum |a|``, and how many entries are other than 0."""
    total = np.float32(0)
    magnitude = np.float32(0)
    nonzero = np.int32(0)
    for i in range(a.size):
        total += a[i] * a[i]
        magnitude += abs(a[i])
        nonzero += np.int32(a[i] != 0)
    return total, magnitude, nonzero


@reporting
def _product(a: Any, b: Any) -> Any:
    total = np.float32(0)
    for i in range(a.size):
        total += a[i] * b[i]
    return total


@reporting
def _add(a: Any, factor: Any, out: Any) -> None:
    for i in range(a.size):
        out[i] += factor * a[i]


@reporting
def _magnitude(a: Any) -> Any:
    total = np.float32(0)
    for i in range(a.size):
        total += abs(a[i])
    return total


@reporting
def add_rows(
    base: Any, stack: Any, columns: int, gram: Any, diagonal: Any, counts: Any, magnitudes: Any, together: Any
) -> None:
    """Add what the rows of K matrices say, given as a stack [K, R * columns] beside the base's [R * columns].

    Of pairs only the lower triangle is written. A product of two entries that is too small for float32 counts as 0.

    Args:
        base: theta_0.
        stack: task vectors.
        columns: entries of a row.
        gram: [K + 1, K + 1], inner products of theta_0, tau_1 ... tau_K.
        diagonal: [K, K], the sum over rows of the squared inner product of tau_j's row with tau_k's.
        counts: [2, K, K], entries of opposite sign, and entries that both change (on the diagonal: that one changes).
        magnitudes: [K + 1], sum |tau_k|, then sum |sum_k tau_k|.
        together: [TILE], room.
    """
    count = stack.shape[0]
    inner = np.zeros((count, count))
    for row in range(base.size // columns):
        inner[:] = 0.0
        for start in range(row * columns, (row + 1) * columns, TILE):
            stop = min(start + TILE, (row + 1) * columns)
            origin = base[start:stop]
            total = together[: stop - start]
            total[:] = 0
            gram[0, 0] += np.float64(_square(origin)[0])
            for j in range(count):
                a = stack[j, start:stop]
                square, magnitude, nonzero = _square(a)
                inner[j, j] += np.float64(square)
                magnitudes[j] += np.float64(magnitude)
                counts[1, j, j] += nonzero
                gram[j + 1, 0] += np.float64(_product(a, origin))
                _add(a, np.float32(1), total)
                for k in range(j):
                    product, below, both = _pair(a, stack[k, start:stop])
                    inner[j, k] += np.float64(product)
                    counts[0, j, k] += below
                    counts[1, j, k] += both
            magnitudes[count] += np.float64(_magnitude(total))
        for j in range(count):
            for k in range(j + 1):
                gram[j + 1, k + 1] += inner[j, k]
                diagonal[j, k] += inner[j, k] * inner[j, k]


@reporting
def add_sketch(stack: Any, columns: int, buckets: Any, signs: Any, sketch: Any) -> None:
    """Add every matrix row of a stack [K, R * columns], times its sign, to its bucket of ``sketch`` [K, S, columns]."""
    for row in range(stack.shape[1] // columns):
        for k in range(stack.shape[0]):
            _add(stack[k, row * columns : (row + 1) * columns], signs[row], sketch[k, buckets[row]])
