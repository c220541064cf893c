"""Slices of ``scale * left @ right`` without ever forming the product.

``(sum A)(sum B)`` never stands in for ``sum A B``: every expert's factors are multiplied on their own.
"""

from typing import Any

from consilience.jit import kernel


@kernel
def add_product(row: Any, start: int, left: Any, right: Any, scale: Any, scratch: Any) -> None:
    """Add entries ``start ... start + len(row)`` of the flattened ``scale * left @ right`` to ``row``.

    ``left`` is [rows, r], ``right`` [r, columns]; ``scratch`` is as long as ``row``. Products are summed over the
    rank in order, so the result does not depend on how a tensor is cut into blocks.
    """
    columns = right.shape[1]
    position = 0
    while position < row.size:
        i = (start + position) // columns
        j = (start + position) % columns
        width = min(columns - j, row.size - position)
        part = scratch[:width]
        part[:] = 0
        for q in range(right.shape[0]):
            factor = left[i, q]
            line = right[q, j : j + width]
            for n in range(width):
                part[n] += factor * line[n]
        for n in range(width):
            row[position + n] += scale * part[n]
        position += width
