"""Weighted sums of a block's rows: one weight for every row, or one for every stretch of a row."""

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from consilience.jit import kernel
from consilience.methods.program import Arithmetic, Cut, Elementwise, Floats, Place


@kernel
def weighted_sum(rows: Any, base: Any, start: int, weights: Any, out: Any) -> None:
    """``out = sum_k weights[k] * rows[k]``, summed in row order."""
    for i in range(out.size):
        total = rows.dtype.type(0)
        for k in range(len(weights)):
            total += rows.dtype.type(weights[k]) * rows[k, i]
        out[i] = total


def weighted(weights: tuple[float, ...]) -> Arithmetic:
    """Return the merge ``sum_k weights[k] * row_k``."""
    return Arithmetic(weighted_sum, weights)


def low_rank_weights(program: object) -> tuple[float, ...] | None:
    """Return the rows' multipliers if a program is their weighted sum and no more: factors then stay factors."""
    if not isinstance(program, Elementwise) or program.masks or program.needs != "none":
        return None
    plain = isinstance(program.merge, Arithmetic) and program.merge.function is weighted_sum
    return tuple(weight * program.scale for weight in program.weights) if plain else None


@dataclass(frozen=True, slots=True)
class PiecewiseSum:
    """``sum_k weights[p][k] * row_k`` on the elements from ``starts[p]`` to ``starts[p + 1]`` (or the end)."""

    starts: tuple[int, ...]
    pieces: tuple[tuple[float, ...], ...]

    @property
    def weights(self) -> tuple[float, ...]:
        """The first piece's."""
        return self.pieces[0]

    def cut(self, start: int, stop: int) -> list[Cut]:
        """Return the pieces that meet the block."""
        first = bisect_right(self.starts, start) - 1
        found: list[Cut] = []
        for number in range(first, len(self.starts)):
            low = max(self.starts[number], start)
            if low >= stop:
                break
            high = min(self.starts[number + 1], stop) if number + 1 < len(self.starts) else stop
            found.append((low - start, high - start, self.pieces[number]))
        return found

    def __call__(self, rows: Floats, place: Place, out: Floats) -> None:
        """Fill ``out``."""
        for low, high, weights in self.cut(place.start, place.start + out.size):
            weighted_sum(rows[:, low:high], place.base, place.start, weights, out[low:high])
