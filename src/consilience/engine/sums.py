"""Whole-tensor sums for the methods that need them, equal for any block size and thread count."""

import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from consilience.experts.block import Loader, Marks
from consilience.kernels.reduce import LEAF, leaf_magnitudes
from consilience.methods.program import Sums


def exact_sum(values: Any) -> float:
    """Return the sum, correctly rounded; NaN where there is none."""
    try:
        return math.fsum(values)
    except (ValueError, OverflowError):  # infinities of both signs, or a sum beyond float64
        return math.nan


class Summation:
    """Accumulates one tensor's sums of magnitudes, leaf by leaf, from any thread."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
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

        ``step(rows, start)`` is the program's, in place; ``marks`` collects the fingerprint sums.
        """
        found: dict[tuple[int, int], list[Any]] = {}
        buffer = loader.scratch.array("leaf", (LEAF,), np.float64)

        def record(key: tuple[int, int], run: Callable[..., None], *rows: Any) -> None:
            out = np.empty(-(-rows[0].size // LEAF), np.float64)
            run(*rows, buffer, out)
            found.setdefault(key, []).append(out)

        for at in range(start, stop, loader.size):
            stack, _ = loader.load(at, min(stop, at + loader.size), marks)
            for k in range(self.rows):
                record((k, 0), leaf_magnitudes, stack[k])
            step(stack, at)
            for k in range(self.rows):
                record((k, 1), leaf_magnitudes, stack[k])
        with self._lock:
            for key, parts in found.items():
                self._leaves.setdefault(key, []).extend(parts)

    def result(self) -> Sums:
        """Return the sums: the leaves' exact total, whatever their order."""
        exact = {key: exact_sum(np.concatenate(parts)) for key, parts in self._leaves.items()}
        both = np.array([[exact.get((k, part), 0.0) for k in range(self.rows)] for part in (0, 1)])
        return Sums(l1=both[0], l1_stepped=both[1])
