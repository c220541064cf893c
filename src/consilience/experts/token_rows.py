"""A model's vocabulary matrix in the order of another vocabulary: a view that gathers rows as it is read.

    out[i] = M_p(i)[a(i)],   or the mean of such rows, or zero, or the mean of all the view's rows that are tokens

Nothing is held but the places of rows: a block of the view reads the rows it needs, neighbours in one read.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from consilience.checkpoints.checkpoint import Bytes, TensorInfo, raw
from consilience.checkpoints.dtypes import DTYPES, DType
from consilience.checkpoints.files import Stamp
from consilience.checkpoints.rows import numpy_type, widest
from consilience.checkpoints.values import decode
from consilience.experts.model import Source

#: Kinds of rows that are no model's: zeros, a mean of several, the mean of the view's own tokens.
ZERO, AVERAGED, MEAN = -1, -2, -3
Places = npt.NDArray[np.int64]
#: Elements that are read at a time for the mean of all rows.
_STEP = 1 << 18


@dataclass(frozen=True, eq=False)
class RowMap:
    """Where every row of a view comes from.

    Attributes:
        part: number of the matrix, or one of the kinds above, [rows].
        at: row of that matrix, [rows].
        tokens: whether the row is a token's, [rows].
        averaged: for rows that are means, their (matrix, row) pairs.
    """

    part: Places
    at: Places
    tokens: npt.NDArray[np.bool_]
    averaged: Mapping[int, tuple[tuple[int, int], ...]]

    def of(self, numbers: list[int]) -> "RowMap":
        """Return the map with matrix k called ``numbers[k]``."""
        table = np.array([*numbers, MEAN, AVERAGED, ZERO], np.int64)  # kinds are indices from the end
        averaged = {row: tuple((numbers[k], at) for k, at in pairs) for row, pairs in self.averaged.items()}
        return RowMap(table[self.part], self.at, self.tokens, averaged)

    def __eq__(self, other: object) -> bool:
        """Whether two maps give the same rows."""
        if not isinstance(other, RowMap):
            return NotImplemented
        same = np.array_equal(self.part, other.part) and np.array_equal(
            self.at[self.part >= 0], other.at[self.part >= 0]
        )
        return same and self.averaged == other.averaged

    def is_identity(self, number: int, rows: int) -> bool:
        """Whether it is matrix ``number``, of ``rows`` rows, as it is."""
        own = self.part.size == rows and bool((self.part == number).all())
        return own and np.array_equal(self.at, np.arange(rows))


class TokenRows:
    """One tensor whose rows come from several matrices, read slice by slice; a vector's rows are its elements."""

    def __init__(self, matrices: list[Source], rows: RowMap) -> None:
        self._matrices, self._rows = matrices, rows
        dense = [source.dense for source in matrices if source.dense is not None]
        shape = (rows.part.size, *dense[0].shape[1:])
        computed = bool(rows.averaged) or bool((rows.part == MEAN).any())
        self.info = TensorInfo(f"{dense[0].name}[tokens]", self._dtype(dense, computed=computed), shape)
        self._columns = self.info.numel // max(shape[0], 1)
        self._factors: dict[int, tuple[Any, Any]] = {}
        self._mean: npt.NDArray[np.float64] | None = None
        self._lock = threading.RLock()

    def _dtype(self, dense: list[TensorInfo], *, computed: bool) -> DType:
        """Return the type that holds all values: a product of factors is taken in float64."""
        found = widest([info.plain for info in dense])
        if any(source.pair is not None for source in self._matrices):
            return DTYPES["F64"]
        return found if not computed else widest([found, DTYPES["F32"]])

    def read(self, tensor: TensorInfo, start: int, out: Bytes) -> None:
        """Fill ``out`` with the tensor's bytes from byte ``start`` on."""
        size, columns = tensor.dtype.itemsize, self._columns
        first, last = start // size, -(-(start + out.size) // size)
        top, bottom = first // columns, -(-last // columns)
        values = self.rows(top, bottom).astype(numpy_type(self.info.dtype), copy=False).reshape(-1).view(np.uint8)
        skip = start - top * columns * size
        out[:] = values[skip : skip + out.size]

    def rows(self, top: int, bottom: int, *, means: bool = True) -> npt.NDArray[Any]:
        """Return rows ``top`` to ``bottom`` (exclusive), [rows, columns]; without ``means`` zeros for their mean."""
        kind = numpy_type(self.info.dtype)
        out = np.zeros((bottom - top, self._columns), kind)
        part, at = self._rows.part[top:bottom], self._rows.at[top:bottom]
        joined = (part[1:] == part[:-1]) & ((at[1:] == at[:-1] + 1) | (part[1:] < 0))
        edges = [0, *(np.flatnonzero(~joined) + 1).tolist(), part.size] if part.size else [0]
        for begin, end in pairwise(edges):
            number = int(part[begin])
            if number >= 0:
                out[begin:end] = self._values(number, int(at[begin]), int(at[begin]) + end - begin)
            elif number == AVERAGED:
                for row in range(begin, end):
                    out[row] = self._average(self._rows.averaged[top + row])
            elif number == MEAN and means:
                out[begin:end] = self._mean_row()
        return out

    def _values(self, number: int, top: int, bottom: int) -> npt.NDArray[Any]:
        """Return rows of one matrix: its own numbers, or with a low-rank update float64."""
        source, columns = self._matrices[number], self._columns
        assert source.dense is not None
        assert source.storage is not None
        stored = raw(source.storage, source.dense, top * columns, bottom * columns)
        if source.pair is None:
            return stored.view(numpy_type(source.dense.plain)).reshape(-1, columns)
        out = np.empty((bottom - top) * columns)
        decode(stored, source.dense.plain, out)
        left, right = self._pair(number, source)
        return out.reshape(-1, columns) + source.pair.scale * (left[top:bottom] @ right)

    def _pair(self, number: int, source: Source) -> tuple[Any, Any]:
        from consilience.experts.block import read_factors  # compiled code

        with self._lock:
            if number not in self._factors:
                self._factors[number] = read_factors(source, np.float64)
            return self._factors[number]

    def _average(self, pairs: tuple[tuple[int, int], ...]) -> npt.NDArray[np.float64]:
        total = np.zeros(self._columns)
        for number, at in pairs:
            total += self._values(number, at, at + 1)[0]
        return total / len(pairs)

    def _mean_row(self) -> npt.NDArray[np.float64]:
        """Return the mean of the rows that are tokens; one pass over them, once."""
        with self._lock:
            found = self._mean
            if found is None:
                total, step = np.zeros(self._columns), max(1, _STEP // self._columns)
                for top in range(0, self._rows.part.size, step):
                    chosen = self._rows.tokens[top : top + step]
                    if chosen.any():
                        values = self.rows(top, top + chosen.size, means=False)
                        total += values[chosen].astype(np.float64).sum(axis=0)
                self._mean = found = total / max(int(self._rows.tokens.sum()), 1)
            return found

    def view(self, tensor: TensorInfo) -> Bytes:
        """Return all of the tensor's bytes."""
        out = np.empty(tensor.nbytes, np.uint8)
        self.read(tensor, 0, out)
        return out

    def stamps(self) -> list[Stamp]:
        """Return the stamps of the files that the rows come from, one for each matrix."""
        found: list[Stamp] = []
        for source in self._matrices:
            assert source.dense is not None
            assert source.storage is not None
            stamps = source.storage.stamps()
            found += stamps[source.dense.file : source.dense.file + 1]
        return found

    def shared(self) -> dict[str, str]:
        """Return nothing: there is one tensor."""
        return {}

    def close(self) -> None:
        """Nothing of its own to release."""
