"""Whole-tensor sums for the methods that need them, equal for any block size and thread count."""

import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from consilience.experts.block import Loader, Marks
from consilience.kernels.fused import Scored, no_score, tallied
from consilience.kernels.reduce import LEAF, leaf_magnitudes, unit_magnitudes
from consilience.kernels.select import Kept
from consilience.methods.program import Elementwise, Sums, Top


def exact_sum(values: Any) -> float:
    """Return the sum, correctly rounded; NaN where there is none."""
    try:
        return math.fsum(values)
    except (ValueError, OverflowError):  # infinities of both signs, or a sum beyond float64
        return math.nan


def block_length(loader: Loader, unit: int) -> int:
    """Return how many elements are read at a time where ``unit`` elements stay together."""
    return max(1, loader.size // unit) * unit


class Summation:
    """Accumulates one tensor's sums of magnitudes, leaf by leaf, from any thread.

    ``unit``: elements that blocks do not cut, or 1.
    """

    def __init__(self, rows: int, unit: int = 1) -> None:
        self.rows, self.unit = rows, unit
        self._leaves: dict[tuple[int, int], list[Any]] = {}
        self._lock = threading.Lock()

    def add(
        self,
        loader: Loader,
        start: int,
        stop: int,
        step: Callable[[Any, int], None],
        marks: Marks | None = None,
    ) -> None:
        """Sum one segment.

        ``step(rows, start)`` is all that the program does to rows, in place; ``marks`` collects the fingerprint sums.
        """
        found: dict[tuple[int, int], list[Any]] = {}
        buffer = loader.scratch.array("leaf", (LEAF,), np.float64)

        def record(key: tuple[int, int], run: Callable[..., None], *rows: Any) -> None:
            out = np.empty(-(-rows[0].size // LEAF), np.float64)
            run(*rows, buffer, out)
            found.setdefault(key, []).append(out)

        def magnitudes(key: tuple[int, int], row: Any) -> None:
            if self.unit == 1:
                record(key, leaf_magnitudes, row)
                return
            out = np.empty(-(-row.size // self.unit), np.float64)
            unit_magnitudes(row, self.unit, buffer, out)
            found.setdefault(key, []).append(out)

        size = block_length(loader, self.unit)
        for at in range(start, stop, size):
            stack, _ = loader.load(at, min(stop, at + size), marks)
            for k in range(self.rows):
                magnitudes((k, 0), stack[k])
            step(stack, at)
            for k in range(self.rows):
                magnitudes((k, 1), stack[k])
        with self._lock:
            for key, parts in found.items():
                self._leaves.setdefault(key, []).extend(parts)

    def result(self) -> Sums:
        """Return the sums: the leaves' exact total, whatever their order."""
        exact = {key: exact_sum(np.concatenate(parts)) for key, parts in self._leaves.items()}
        both = np.array([[exact.get((k, part), 0.0) for k in range(self.rows)] for part in (0, 1)])
        return Sums(l1=both[0], l1_stepped=both[1])


class Tallies:
    """Accumulates what a program's tally says of the tiles of one tensor, from any thread."""

    def __init__(self, program: Elementwise) -> None:
        assert program.tally is not None
        self.tally, self.scored, score = program.tally, Scored(0, ()), no_score
        if isinstance(program.keep, Top):
            self.scored, score = Scored(1, program.keep.score.args), program.keep.score.function
        self._run = tallied(self.tally.function, score)
        self._parts: list[Any] = []

    def add(self, loader: Loader, start: int, stop: int, kept: Kept, marks: Marks | None = None) -> None:
        """Tally one segment; ``kept`` and ``marks`` as for a merge's."""
        for at in range(start, stop, loader.size):
            end = min(stop, at + loader.size)
            taken = loader.take(at, end, marked=marks is not None)
            out = np.zeros((-(-(end - at) // LEAF), self.tally.count))
            self._run(taken, kept, self.scored, self.tally.args, end - at, at, loader.like, out)
            loader.finish(taken, marks)
            self._parts.append(out)

    def result(self) -> Sums:
        """Return the exact totals of the tiles' numbers, whatever their order."""
        return Sums(tally=np.array([exact_sum(column) for column in np.concatenate(self._parts).T]))


class RowTallies:
    """What a program's ``by_row`` says of every row of one tensor, from any thread: 8 bytes a row are held."""

    def __init__(self, program: Elementwise, numel: int) -> None:
        assert program.by_row is not None
        self.tally, self.numel = program.by_row, numel
        self.out = np.zeros(numel // self.tally.columns)

    def pieces(self, size: int) -> list[tuple[int, int]]:
        """Return the first and last-plus-one elements of pieces of whole rows, of about ``size`` elements."""
        step = max(1, size // self.tally.columns) * self.tally.columns
        return [(at, min(self.numel, at + step)) for at in range(0, self.numel, step)]

    def add(self, loader: Loader, start: int, stop: int) -> None:
        """Look at the rows of a piece."""
        columns = self.tally.columns
        size = block_length(loader, columns)
        for at in range(start, stop, size):
            end = min(stop, at + size)
            stack, base = loader.load(at, end)
            on = loader.nothing if base is None else base
            self.tally.function(stack, on, columns, self.out[at // columns : end // columns], *self.tally.args)

    def result(self) -> Sums:
        """Return the numbers."""
        return Sums(by_row=self.out)
