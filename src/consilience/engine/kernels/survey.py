"""One pass over a block of whole rows for the merge doctor: inner products, signs, magnitudes, sketches."""

from typing import Any

import numpy as np

from consilience.engine.kernels.jit import reporting

#: Elements whose products are summed in float32 before they are added up in float64.
TILE = 512


@reporting
def add_products(stack: Any, columns: int, gram: Any, diagonal: Any) -> None:
    """Add the inner products of a stack's rows [K, R * columns] to ``gram`` [K, K], the lower triangle.

    ``diagonal`` [K, K] gets the sum over the matrices' R rows of the squared products of one row with its like.
    """
    for row in range(stack.shape[1] // columns):
        begin = row * columns
        for j in range(stack.shape[0]):
            for k in range(j + 1):
                total = 0.0
                for tile in range(begin, begin + columns, TILE):
                    part = np.float32(0)
                    for i in range(tile, min(tile + TILE, begin + columns)):
                        part += stack[j, i] * stack[k, i]
                    total += np.float64(part)
                gram[j, k] += total
                diagonal[j, k] += total * total


@reporting
def add_signs(stack: Any, opposite: Any, both: Any, changed: Any) -> None:
    """Count, of a stack [K, n]: entries of opposite sign and entries that both change, by pair; entries changed [K]."""
    for j in range(stack.shape[0]):
        for k in range(j):
            against = 0
            shared = 0
            for i in range(stack.shape[1]):
                x, y = stack[j, i], stack[k, i]
                nonzero = (x != 0) & (y != 0)
                shared += nonzero
                against += nonzero & ((x < 0) != (y < 0))
            opposite[j, k] += against
            both[j, k] += shared
        count = 0
        for i in range(stack.shape[1]):
            count += stack[j, i] != 0
        changed[j] += count


@reporting
def add_magnitudes(stack: Any, magnitudes: Any) -> float:
    """Add sum |x| of each row of a stack [K, n] to ``magnitudes`` [K]; return sum |sum_k x_k|, what a sum keeps."""
    kept = 0.0
    for start in range(0, stack.shape[1], TILE):
        stop = min(start + TILE, stack.shape[1])
        for k in range(stack.shape[0]):
            part = np.float32(0)
            for i in range(start, stop):
                part += abs(stack[k, i])
            magnitudes[k] += np.float64(part)
        part = np.float32(0)
        for i in range(start, stop):
            total = np.float32(0)
            for k in range(stack.shape[0]):
                total += stack[k, i]
            part += abs(total)
        kept += np.float64(part)
    return kept


@reporting
def add_sketch(stack: Any, columns: int, buckets: Any, signs: Any, sketch: Any) -> None:
    """Add every matrix row of a stack [K, R * columns], times its sign, to its bucket of ``sketch`` [K, S, columns]."""
    for row in range(stack.shape[1] // columns):
        begin, bucket, sign = row * columns, buckets[row], signs[row]
        for k in range(stack.shape[0]):
            for i in range(columns):
                sketch[k, bucket, i] += sign * stack[k, begin + i]
