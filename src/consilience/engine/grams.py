"""Inner products of a tensor's rows, or of the vectors within them, equal for any block size and thread count."""

import math
import threading
from typing import Any

import numpy as np

from consilience.engine.sums import exact_sum
from consilience.experts.block import Loader, Marks
from consilience.kernels.gram import gram_columns, gram_stretches, gram_whole, peaks
from consilience.kernels.reduce import LEAF
from consilience.methods.program import Over, Sums

#: Elements of a tensor whose products are added up one after the other, where sums run across its rows.
STRIP = 1 << 22
#: Inner products outside of 2^-RANGE ... 2^RANGE are taken again, of rows times powers of two.
RANGE = 900


def _pairs(rows: int) -> list[tuple[int, int]]:
    """Return the pairs of rows (i, j), j <= i, in the order of ``kernels.gram``."""
    return [(i, j) for i in range(rows) for j in range(i + 1)]


class Grams:
    """Inner products of the rows, or of the vectors within them that ``over`` names.

    ``exponents``: row k is multiplied by 2^-exponents[k] first, which costs nothing where they are empty.
    """

    def __init__(self, rows: int, shape: tuple[int, ...], over: Over, exponents: tuple[int, ...] = ()) -> None:
        self.rows, self.over, self.exponents = rows, over, exponents
        self.numel = math.prod(shape)
        self.length = over.length(shape)
        self.units = np.array([math.ldexp(1.0, -e) for e in exponents], np.float64)
        self.count = rows * (rows + 1) // 2
        self._leaves: list[Any] = []
        self._strips: dict[int, Any] = {}
        self._lock = threading.Lock()
        if over.across:
            self.columns = self.numel // max(1, self.length)
        elif self._whole:
            self.columns = 1
        else:
            self._stretches = np.zeros((self.count, self._leaf(self.numel)), np.float64)

    @property
    def _whole(self) -> bool:
        return self.length >= self.numel

    def _leaf(self, element: int) -> int:
        """Return the number of the leaf that begins at an element: they end at a vector's end and every ``LEAF``."""
        both = math.lcm(self.length, LEAF)
        return -(-element // self.length) + -(-element // LEAF) - -(-element // both)

    def add(self, loader: Loader, start: int, stop: int, marks: Marks | None = None) -> None:
        """Sum one segment; where sums run across rows, the segments of a strip come one after the other."""
        leaves: list[Any] = []
        strip, like = start // STRIP, loader.like
        units = self.units.astype(like.dtype)
        for at in range(start, stop, loader.size):
            size = min(stop, at + loader.size) - at
            taken = loader.take(at, at + size, marked=marks is not None)
            if self._whole:
                leaves.append(np.empty((self.count, -(-size // LEAF)), np.float64))
                gram_whole(taken, size, like, units, leaves[-1])
            elif self.over.across:
                if strip not in self._strips:
                    self._strips[strip] = np.zeros((self.count, min(self.columns, STRIP)), np.float64)
                first = at - strip * STRIP
                gram_columns(taken, size, like, units, first, self.columns, self._strips[strip])
            else:
                out = self._stretches[:, self._leaf(at) : self._leaf(at + size)]
                gram_stretches(taken, size, like, units, at, self.length, out)
            loader.finish(taken, marks)
        with self._lock:
            self._leaves += leaves

    def result(self) -> Sums:
        """Return the inner products: the leaves' exact totals, or those of vectors in the order of elements."""
        if self._whole:
            parts = np.concatenate(self._leaves, 1) if self._leaves else np.zeros((self.count, 0))
            totals: Any = np.array([exact_sum(leaves) for leaves in parts])
        elif self.over.across:
            totals = self._across()
        else:
            starts = [self._leaf(at) for at in range(0, self.numel, self.length)]
            totals = np.add.reduceat(self._stretches, starts, axis=1)
        gram = np.zeros((self.rows, self.rows, *totals.shape[1:]))
        for (i, j), total in zip(_pairs(self.rows), totals, strict=True):
            gram[i, j] = gram[j, i] = total
        return Sums(gram=gram, exponents=self.exponents or (0,) * self.rows)

    def _across(self) -> Any:
        totals = np.zeros((self.count, self.columns), np.float64)
        for strip, part in sorted(self._strips.items()):
            first = strip * STRIP % self.columns
            ahead = min(part.shape[1], self.columns - first)
            totals[:, first : first + ahead] += part[:, :ahead]
            totals[:, : part.shape[1] - ahead] += part[:, ahead:]
        return totals


class Peaks:
    """The largest magnitude of each row."""

    def __init__(self, rows: int) -> None:
        self.found = np.zeros(rows, np.float64)
        self._lock = threading.Lock()

    def add(self, loader: Loader, start: int, stop: int) -> None:
        """Look at one segment."""
        found = np.zeros(len(self.found), np.float64)
        for at in range(start, stop, loader.size):
            end = min(stop, at + loader.size)
            peaks(loader.take(at, end, marked=False), end - at, loader.like, found)
        with self._lock:
            np.fmax(self.found, found, out=self.found)

    @property
    def exponents(self) -> tuple[int, ...]:
        """What brings each row's largest magnitude near 1; 0 for rows of zeros, or with NaN or Inf."""
        return tuple(max(-1000, math.frexp(p)[1]) if 0 < p < math.inf else 0 for p in self.found.tolist())


def out_of_range(sums: Sums) -> bool:
    """Whether inner products of float64 rows may have overflowed, or their squares have become zero."""
    assert sums.gram is not None
    squares = np.einsum("kk...->k...", sums.gram).reshape(len(sums.gram), -1).max(1, initial=0.0)
    inside = (squares > 2.0**-RANGE) & (squares < 2.0**RANGE)
    return not (inside.all() and np.isfinite(sums.gram).all())
