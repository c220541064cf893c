"""A checkpoint: named tensors on disk (or in memory), known from headers alone, read slice by slice.

Architecture-free: names come from the files. Count in = count out; nothing is dropped silently.
"""

import mmap
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from consilience.checkpoints.dtypes import DTYPES, DType
from consilience.checkpoints.files import Descriptor, Descriptors, Stamp, stamp
from consilience.checkpoints.safetensors_file import Entry
from consilience.errors import InputError

Bytes = npt.NDArray[np.uint8]


class Codec(Protocol):
    """How a tensor's numbers are stored, where they are not simply one after another in their own type."""

    @property
    def parts(self) -> "tuple[TensorInfo, ...]":
        """The stored tensors that hold the numbers."""
        ...

    def decode(self, storage: "Storage", start: int, stop: int, out: npt.NDArray[np.float32]) -> None:
        """Fill ``out`` with the float32 values of elements ``start ... stop``."""
        ...


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: ``file`` indexes the storage's files, ``offset`` is its first byte there.

    ``dtype`` is its type in the model; a ``codec`` says how it is stored if that is another.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: int = 0
    offset: int = 0
    codec: Codec | None = None

    @property
    def numel(self) -> int:
        """Number of elements (1 for a scalar)."""
        return prod(self.shape)

    @property
    def plain(self) -> DType:
        """The type whose bytes ``raw`` gives: its own, or that of decoded values."""
        return self.dtype if self.codec is None else DTYPES["F32"]

    @property
    def nbytes(self) -> int:
        """Size in bytes, as ``raw`` gives it."""
        return self.numel * self.plain.itemsize

    @property
    def stored_nbytes(self) -> int:
        """Bytes that it takes on disk."""
        return self.nbytes if self.codec is None else sum(part.nbytes for part in self.codec.parts)


class Storage(Protocol):
    """Where a checkpoint's bytes are. ``read`` is called from several threads at once."""

    def read(self, tensor: TensorInfo, start: int, out: Bytes) -> None:
        """Fill ``out`` with the tensor's bytes from byte ``start`` on."""
        ...

    def view(self, tensor: TensorInfo) -> Bytes:
        """Return all of the tensor's bytes without a copy, not to be written to: for passes that come back to them."""
        ...

    def stamps(self) -> list[Stamp]:
        """Return the stamp of every file at the time it was opened: what a resumed run compares."""
        ...

    def shared(self) -> dict[str, str]:
        """Return alias -> first name for tensors that are the same memory: ties as the data shows them."""
        ...

    def close(self) -> None:
        """Release files."""
        ...


class FileStorage:
    """Safetensors files read with positioned reads into the caller's buffers.

    Not ``mmap`` for what is read once: a file truncated while it is read must be an error, not a bus error, and a read
    into a reused buffer that stays in cache costs less than the page faults of a mapping. Whoever reads the same bytes
    at every step takes a ``view``: pages are mapped once, and nothing is copied.
    """

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self._stamps = [stamp(path) for path in files]
        self._descriptors = Descriptors(files, os.O_RDONLY)
        self._views: dict[int, Bytes] = {}
        self._lock = threading.Lock()

    def _take(self, index: int) -> Descriptor:
        try:
            return self._descriptors.take(index)
        except OSError as error:
            raise InputError(f"{self.files[index]}: cannot be read ({error.strerror})") from None

    def read(self, tensor: TensorInfo, start: int, out: Bytes) -> None:
        """Fill ``out``; an ``InputError`` says so when the file ends early."""
        position, view = tensor.offset + start, memoryview(cast(Any, out))
        file = self._take(tensor.file)
        try:
            while view.nbytes:
                count = os.preadv(file.number, [view], position)
                if count <= 0:
                    raise self._ended(tensor)
                position, view = position + count, view[count:]
        finally:
            self._descriptors.release(file)

    def _ended(self, tensor: TensorInfo) -> InputError:
        where = f"{self.files[tensor.file]}: tensor {tensor.name!r}"
        return InputError(f"{where}: file ended while it was read; download it again")

    def view(self, tensor: TensorInfo) -> Bytes:
        """Return the tensor's bytes as mapped pages; an ``InputError`` says so when the file has become shorter."""
        file = self._take(tensor.file)
        try:
            if os.fstat(file.number).st_size < tensor.offset + tensor.nbytes:
                raise self._ended(tensor)
            with self._lock:
                if tensor.file not in self._views:
                    # Private pages, for torch takes no read-only arrays; as nobody writes they stay the page cache's.
                    pages = mmap.mmap(file.number, 0, access=mmap.ACCESS_COPY)
                    self._views[tensor.file] = np.frombuffer(pages, np.uint8)
                whole = self._views[tensor.file]
        finally:
            self._descriptors.release(file)
        if whole.size < tensor.offset + tensor.nbytes:  # it has grown since it was mapped
            raise self._ended(tensor)
        return whole[tensor.offset : tensor.offset + tensor.nbytes]

    def stamps(self) -> list[Stamp]:
        """Return every file's stamp at the time it was opened."""
        return self._stamps

    def shared(self) -> dict[str, str]:
        """Return nothing: in a safetensors file no two tensors are the same bytes."""
        return {}

    def close(self) -> None:
        """Close every file that was opened."""
        self._descriptors.close()
        with self._lock:
            self._views.clear()

    def __del__(self) -> None:
        """Close what is still open."""
        if hasattr(self, "_lock"):
            self.close()


class MemoryStorage:
    """Tensors held as flat byte views of the caller's arrays (state dicts, ``torch.load``-ed files)."""

    def __init__(self, arrays: Mapping[str, Bytes], files: list[Stamp] | None = None) -> None:
        self.arrays = arrays
        self._files = files or []

    def read(self, tensor: TensorInfo, start: int, out: Bytes) -> None:
        """Copy the bytes."""
        out[:] = self.arrays[tensor.name][start : start + out.size]

    def view(self, tensor: TensorInfo) -> Bytes:
        """Return the array itself."""
        return self.arrays[tensor.name].view()

    def stamps(self) -> list[Stamp]:
        """Return the stamps of the files these arrays were read from, if any."""
        return self._files

    def close(self) -> None:
        """Nothing to release."""

    def shared(self) -> dict[str, str]:
        """Return alias -> first name for tensors that are the same memory: ties as the data shows them."""
        first: dict[tuple[int, int], str] = {}
        aliases: dict[str, str] = {}
        for name, array in self.arrays.items():
            name_of = first.setdefault((array.ctypes.data, array.size), name)
            if array.size and name_of != name:
                aliases[name] = name_of
        return aliases


@dataclass(frozen=True)
class Checkpoint:
    """A model's named tensors.

    ``path`` is what the user named (a folder or a file; None in memory), ``folder`` the folder whose other files
    (config, tokenizer, ...) belong to the model, ``config`` its ``config.json``, ``modules`` the subfolders that hold
    weights of further modules (see ``modules.py``), ``notes`` what is to be said of how it is read.
    """

    label: str
    tensors: dict[str, TensorInfo]
    storage: Storage
    path: Path | None = None
    folder: Path | None = None
    config: dict[str, Any] | None = None
    metadata: dict[str, str] = field(default_factory=dict[str, str])
    modules: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def numel(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.numel for tensor in self.tensors.values())

    def read(self, name: str) -> Bytes:
        """Return one whole tensor's bytes (for small tensors; the engine reads slices)."""
        return raw(self.storage, self.tensors[name], 0, self.tensors[name].numel)


def from_entries(entries: Mapping[str, Entry], file: int) -> dict[str, TensorInfo]:
    """Turn a safetensors file's header entries into tensors of storage file number ``file``."""
    return {e.name: TensorInfo(e.name, e.dtype, e.shape, file, e.offset) for e in entries.values()}


def raw(storage: Storage, tensor: TensorInfo, start: int, stop: int, out: Bytes | None = None) -> Bytes:
    """Return elements ``start ... stop`` as bytes of their plain type, in ``out`` if it is given (of their size).

    Raises:
        InputError: the file ends early.
    """
    width = tensor.plain.itemsize
    out = np.empty((stop - start) * width, np.uint8) if out is None else out
    if tensor.codec is None:
        storage.read(tensor, start * width, out)
    else:
        tensor.codec.decode(storage, start, stop, out.view(np.float32))
    return out


def same_bytes(one: tuple[Storage, TensorInfo], other: tuple[Storage, TensorInfo]) -> bool:
    """Whether two tensors are equal bit by bit; they are read no further than where they differ."""
    (storage, a), (other_storage, b) = one, other
    if (a.shape, a.plain) != (b.shape, b.plain):
        return False
    if storage is other_storage and a == b:
        return True
    start, step = 0, 1 << 19
    while start < a.numel:
        stop = min(a.numel, start + step)
        if not np.array_equal(raw(storage, a, start, stop), raw(other_storage, b, start, stop)):
            return False
        start, step = stop, min(4 * step, 1 << 23)
    return True
