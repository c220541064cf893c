"""The codec of 8-bit floats with a scale for every block of a matrix.

    w[i, j] = float32(q[i, j]) * scale[i // rows, j // columns]

One block is the whole matrix where a scale is a tensor's, and one row where it is an output channel's. The last blocks
of a row or column may be cut short: blocks count from the first element, whatever the matrix' shape.
"""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from consilience.checkpoints.checkpoint import Storage, TensorInfo, raw
from consilience.checkpoints.values import values
from consilience.jit import kernel

_KINDS = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
#: The value of every byte, by type.
_TABLES = {name: np.arange(256, dtype=np.uint8).view(kind).astype(np.float32) for name, kind in _KINDS.items()}


@dataclass(frozen=True, slots=True)
class ScaledFloats:
    """How one matrix is stored: ``numbers`` [m, n], ``scale`` of each block, and the ``block`` (rows, columns)."""

    numbers: TensorInfo
    scale: TensorInfo
    block: tuple[int, int]

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """The tensors that hold the matrix."""
        return self.numbers, self.scale

    def decode(self, storage: Storage, start: int, stop: int, out: Any) -> None:
        """Fill ``out`` [stop - start] with float32 values of the flattened matrix."""
        if start == stop:
            return
        columns = self.numbers.shape[1]
        across = -(-columns // self.block[1])
        first, last = start // columns // self.block[0], (stop - 1) // columns // self.block[0] + 1
        scales = np.empty((last - first) * across, np.float32)
        values(storage, self.scale, first * across, last * across, scales)
        begin = start - first * self.block[0] * columns  # as counted from the first block that is read
        numbers = raw(storage, self.numbers, start, stop)
        _multiply(numbers, begin, columns, *self.block, scales, _TABLES[self.numbers.dtype.name], out)


@kernel
def _multiply(
    numbers: Any, begin: int, columns: int, height: int, width: int, scales: Any, table: Any, out: Any
) -> None:
    across = (columns + width - 1) // width
    at = 0
    while at < out.size:
        row, column = (begin + at) // columns, (begin + at) % columns
        end = min(columns, (column // width + 1) * width)  # of this block's part of the row
        count = min(end - column, out.size - at)
        scale = scales[row // height * across + column // width]
        for i in range(at, at + count):
            out[i] = table[numbers[i]] * scale
        at += count
