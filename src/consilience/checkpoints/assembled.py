"""Tensors put together from parts of others, read slice by slice like any stored tensor.

Experts of a mixture lie in files one by one or as one tensor, and a LoRA on all of them at once packs its factors in an
order of its own: one form is a view of the other.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from consilience.checkpoints.checkpoint import Bytes, Storage, TensorInfo
from consilience.checkpoints.files import Stamp

#: Unpacked factors that are kept, since the experts of a layer are read one after another.
_KEPT = 4


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes ``start ... start + size`` of a stored tensor."""

    tensor: TensorInfo
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Column:
    """Rows ``start ... stop`` of expert ``expert``'s B in a packed B [out, r * experts]."""

    tensor: TensorInfo
    experts: int
    expert: int
    start: int
    stop: int


class AssembledStorage:
    """Another storage's tensors, and by their names those that are assembled of parts of its tensors."""

    def __init__(self, inner: Storage, parts: Mapping[str, tuple[Piece, ...] | Column]) -> None:
        self.inner, self.parts = inner, parts
        self._unpacked: OrderedDict[str, npt.NDArray[Any]] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, tensor: TensorInfo, start: int, out: Bytes) -> None:
        """Fill ``out`` with the tensor's bytes from byte ``start`` on."""
        part = self.parts.get(tensor.name)
        if part is None:
            self.inner.read(tensor, start, out)
        elif isinstance(part, Column):
            out[:] = self._column(part)[start : start + out.size]
        else:
            self._join(part, start, out)

    def _join(self, pieces: tuple[Piece, ...], start: int, out: Bytes) -> None:
        at = 0
        for piece in pieces:
            first, last = max(start, at), min(start + out.size, at + piece.size)
            if first < last:
                self.inner.read(piece.tensor, piece.start + first - at, out[first - start : last - start])
            at += piece.size

    def _column(self, part: Column) -> Bytes:
        """Return the bytes of a part of a packed B, which is unpacked as a whole."""
        with self._lock:
            unpacked = self._unpacked.get(part.tensor.name)
            if unpacked is None:
                unpacked = unpack_b(self.inner, part.tensor, part.experts)
                self._unpacked[part.tensor.name] = unpacked
            self._unpacked.move_to_end(part.tensor.name)
            while len(self._unpacked) > _KEPT:
                self._unpacked.popitem(last=False)
        return unpacked[part.expert, part.start : part.stop].reshape(-1).view(np.uint8)

    def view(self, tensor: TensorInfo) -> Bytes:
        """Return all of the tensor's bytes, a copy if it lies in several places."""
        part = self.parts.get(tensor.name)
        if part is None:
            return self.inner.view(tensor)
        if isinstance(part, tuple) and len(part) == 1:
            return self.inner.view(part[0].tensor)[part[0].start : part[0].start + part[0].size]
        out = np.empty(tensor.nbytes, np.uint8)
        self.read(tensor, 0, out)
        return out

    def stamps(self) -> list[Stamp]:
        """Return the stamps of the files."""
        return self.inner.stamps()

    def shared(self) -> dict[str, str]:
        """Return the ties that the stored tensors show."""
        return self.inner.shared()

    def close(self) -> None:
        """Release the files."""
        self.inner.close()
        with self._lock:
            self._unpacked.clear()


def unpack_b(storage: Storage, tensor: TensorInfo, experts: int) -> npt.NDArray[Any]:
    """Return a packed B [out, r * experts] as [experts, out, r], in numbers as wide as the stored ones."""
    width = tensor.dtype.itemsize
    stored = np.empty(tensor.nbytes, np.uint8)
    storage.read(tensor, 0, stored)
    packed = stored.view(np.dtype(f"u{width}")).reshape(tensor.shape[0], -1, experts)
    return np.ascontiguousarray(np.moveaxis(packed, 2, 0))


def rows_of(tensor: TensorInfo, start: int, stop: int) -> Piece:
    """Return rows ``start ... stop`` of a tensor's first dimension."""
    row = tensor.nbytes // max(1, tensor.shape[0])
    return Piece(tensor, start * row, (stop - start) * row)


def named(tensor: TensorInfo, name: str, shape: tuple[int, ...]) -> TensorInfo:
    """Return what describes an assembled tensor of a stored one's type."""
    return replace(tensor, name=name, shape=shape, offset=0)
