"""Weighted sums of rows: one weight for every row, or one for every stretch of a row."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from consilience.jit import kernel
from consilience.methods.program import Arithmetic, Elementwise, Table


@kernel
def weighted_sum(rows: Any, base: Any, start: int, weights: Any, out: Any) -> None:
    """``out = sum_k weights[k] * rows[k]``, summed in row order."""
    for i in range(out.size):
        total = rows.dtype.type(0)
        for k in range(len(weights)):
            total += rows.dtype.type(weights[k]) * rows[k, i]
        out[i] = total


@kernel
def weighted_sum_wide(rows: Any, base: Any, start: int, weights: Any, out: Any) -> None:
    """``weighted_sum`` in float64, for weights so large that what they multiply nearly cancels."""
    for i in range(out.size):
        total = 0.0
        for k in range(len(weights)):
            total += weights[k] * np.float64(rows[k, i])
        out[i] = rows.dtype.type(total)


def weighted(weights: tuple[float, ...]) -> Arithmetic:
    """Return the merge ``sum_k weights[k] * row_k``."""
    return Arithmetic(weighted_sum, weights)


def low_rank_weights(program: object) -> tuple[float, ...] | None:
    """Return the rows' multipliers if a program is their weighted sum and no more: factors then stay factors."""
    if not isinstance(program, Elementwise) or program.masks or program.needs != "none":
        return None
    plain = isinstance(program.merge, Arithmetic) and program.merge.function in (weighted_sum, weighted_sum_wide)
    return tuple(weight * program.scale for weight in program.weights) if plain else None


@kernel
def _piecewise(rows: Any, base: Any, start: int, weights: Any, out: Any, starts: Any, table: Any) -> None:
    stop = start + out.size
    piece = np.searchsorted(starts, start, side="right") - 1
    low = start
    while low < stop:
        high = min(starts[piece + 1], stop) if piece + 1 < starts.size else stop
        target = out[low - start : high - start]
        for i in range(target.size):
            target[i] = 0
        for k in range(rows.shape[0]):
            weight, row = rows.dtype.type(table[piece, k]), rows[k, low - start : high - start]
            for i in range(target.size):
                target[i] += weight * row[i]
        low, piece = high, piece + 1


@dataclass(frozen=True, slots=True)
class PiecewiseSum:
    """``sum_k weights[p][k] * row_k`` on the elements from ``starts[p]`` to ``starts[p + 1]`` (or the end)."""

    starts: tuple[int, ...]
    pieces: tuple[tuple[float, ...], ...]

    @property
    def function(self) -> Callable[..., None]:
        """The kernel."""
        return _piecewise

    @property
    def weights(self) -> tuple[float, ...]:
        """The first piece's."""
        return self.pieces[0]

    @property
    def args(self) -> tuple[Any, ...]:
        """Where pieces start, and their weights [P, K]."""
        return np.array(self.starts, np.int64), np.array(self.pieces, np.float64)

    @property
    def table(self) -> Table:
        """The pieces."""
        return Table(self.starts, self.pieces)
