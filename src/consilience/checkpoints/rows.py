"""A matrix put together from rows of others, read slice by slice like any stored tensor.

Vocabularies grow, and some rows of an embedding may be trained alone: what then counts is a matrix that no file holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from consilience.checkpoints.checkpoint import Bytes, Storage, TensorInfo, raw
from consilience.checkpoints.dtypes import DTYPES, DType
from consilience.checkpoints.files import Stamp

Matrix = tuple[Storage, TensorInfo]


def widest(dtypes: Sequence[DType]) -> DType:
    """Return the smallest type that holds all values of the given floating-point types."""
    if len({dtype.name for dtype in dtypes}) == 1:
        return dtypes[0]
    return DTYPES["F64" if any(dtype.bits > 32 for dtype in dtypes) else "F32"]


@dataclass(frozen=True)
class Rows:
    """Rows ``rows`` of a matrix, ascending, are the mean of rows ``at`` of each of ``sources``."""

    rows: npt.NDArray[np.int64]
    at: npt.NDArray[np.int64]
    sources: tuple[Matrix, ...]


class RowStorage:
    """One tensor: the first rows of ``base``, with ``rows`` in their places (below them, too).

    A vector's rows are its elements. Values are exact: the tensor has the widest type of its parts.
    """

    def __init__(self, base: Matrix, shape: tuple[int, ...], rows: Rows) -> None:
        self.base, self.rows = base, rows
        dtype = widest([base[1].plain, *(info.plain for _, info in rows.sources)])
        self.info = TensorInfo(f"{base[1].name}[rows]", dtype, shape)
        self._columns = self.info.numel // max(shape[0], 1)

    def read(self, tensor: TensorInfo, start: int, out: Bytes) -> None:
        """Fill ``out`` with the tensor's bytes from byte ``start`` on."""
        size = tensor.dtype.itemsize
        first, last = start // size, -(-(start + out.size) // size)
        values = self._values(first, last)
        out[:] = values.view(np.uint8)[start - first * size : start - first * size + out.size]

    def _values(self, first: int, last: int) -> npt.NDArray[Any]:
        """Return elements ``first`` to ``last`` (exclusive)."""
        kind = numpy_type(self.info.dtype)
        values = np.zeros(last - first, kind)
        own = min(last, self.base[1].numel)
        if first < own:
            values[: own - first] = _decoded(self.base, first, own).astype(kind)
        columns = self._columns
        low, high = np.searchsorted(self.rows.rows, [first // columns, -(-last // columns)])
        for row, at in zip(self.rows.rows[low:high].tolist(), self.rows.at[low:high].tolist(), strict=True):
            begin, end = max(first, row * columns), min(last, (row + 1) * columns)
            shift = (at - row) * columns
            values[begin - first : end - first] = self._mean(begin + shift, end + shift)
        return values

    def _mean(self, first: int, last: int) -> npt.NDArray[Any]:
        parts = [_decoded(source, first, last).astype(np.float64) for source in self.rows.sources]
        return sum(parts[1:], parts[0]) / len(parts)

    def view(self, tensor: TensorInfo) -> Bytes:
        """Return all of the tensor's bytes."""
        out = np.empty(tensor.nbytes, np.uint8)
        self.read(tensor, 0, out)
        return out

    def stamps(self) -> list[Stamp]:
        """Return the stamp of the file that holds the first rows."""
        stamps = self.base[0].stamps()
        return stamps[self.base[1].file : self.base[1].file + 1]

    def shared(self) -> dict[str, str]:
        """Return nothing: there is one tensor."""
        return {}

    def close(self) -> None:
        """Nothing of its own to release."""


def numpy_type(dtype: DType) -> Any:
    """Return numpy's type of a floating-point dtype."""
    if dtype.name == "BF16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype.name])


def _decoded(matrix: Matrix, first: int, last: int) -> npt.NDArray[Any]:
    storage, info = matrix
    return cast(npt.NDArray[Any], raw(storage, info, first, last).view(numpy_type(info.plain)))
