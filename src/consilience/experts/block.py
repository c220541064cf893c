"""One worker's buffers, and how a block of a stack gets into them.

Buffers are allocated once per worker: first touch of fresh memory costs more than the arithmetic.
"""

import contextlib
from collections.abc import Generator
from math import prod
from typing import Any

import numpy as np

from consilience.checkpoints.checkpoint import Storage, TensorInfo, raw
from consilience.checkpoints.dtypes import DType
from consilience.checkpoints.values import count_nonfinite, values
from consilience.errors import ConsilienceError, InputError
from consilience.experts.model import Source
from consilience.experts.stack import Stack
from consilience.kernels.ingest import Taken, ingest, take_all, taken_numbers, taken_stored, together
from consilience.kernels.lowrank import add_product
from consilience.kernels.reduce import LEAF

#: Bytes a block's stack may take. Measured: smaller blocks fit a second-level cache but hand the GIL over more often,
#: which costs more; kernels work tile by tile inside a block.
CACHE = 4 << 20
LARGEST_BLOCK, SMALLEST_BLOCK = 1 << 18, 1 << 13


def block_size(rows: int, wide: bool) -> int:
    """Return the number of elements per block for a stack of ``rows`` rows: a multiple of the reduction leaf."""
    fit = CACHE // ((rows + 2) * (8 if wide else 4))
    return max(SMALLEST_BLOCK, min(LARGEST_BLOCK, fit // LEAF * LEAF))


class NonFinite(ConsilienceError):
    """A block holds NaN or Inf; carries where, so that the whole tensor can be counted."""

    def __init__(self, who: str, name: str, source: Source) -> None:
        super().__init__(f"{who}: {name}: NaN or Inf")
        self.who, self.name, self.source = who, name, source


class Scratch:
    """The buffers of one worker; grown when a tensor needs more, never shrunk."""

    def __init__(self) -> None:
        self._arrays: dict[tuple[str, Any], Any] = {}
        self._factors: tuple[Any, Any, Any] | None = None

    def array(self, purpose: str, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return an array of ``shape`` for ``purpose``, reusing the memory of earlier calls."""
        size = prod(shape)
        held = self._arrays.get((purpose, dtype))
        if held is None or held.size < size:
            held = self._arrays[(purpose, dtype)] = np.empty(size, dtype)
        return held[:size].reshape(shape)

    def factors(self, source: Source, real: Any) -> tuple[Any, Any]:
        """Return (left [rows, r], right [r, columns]) of a source's LoRA pair, in the compute type."""
        assert source.pair is not None
        key = (id(source.pair_storage), source.pair.target, real)
        if self._factors is None or self._factors[0] != key:
            self._factors = (key, *read_factors(source, real))
        return self._factors[1], self._factors[2]


def read_factors(source: Source, real: Any) -> tuple[Any, Any]:
    """Return (left [rows, r], right [r, columns]) of a source's LoRA pair, in the type ``real``.

    Of a pair for several experts at once, left is [experts, rows, r] and right [experts, r, columns].
    """
    pair, storage = source.pair, source.pair_storage
    assert pair is not None
    assert storage is not None
    b, a = (values(storage, side, 0, side.numel, np.empty(side.numel, real)) for side in (pair.b, pair.a))
    if pair.experts > 1:
        b = np.moveaxis(b.reshape(pair.b.shape[0], pair.rank, pair.experts), 2, 0)
        a = a.reshape(pair.experts, pair.rank, -1)
        left, right = (a.swapaxes(1, 2), b.swapaxes(1, 2)) if pair.transposed else (b, a)
        return np.ascontiguousarray(left), np.ascontiguousarray(right)
    b, a = b.reshape(-1, pair.rank), a.reshape(pair.rank, -1)
    return (np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)) if pair.transposed else (b, a)


Marks = list[list[int]]


class Loader:
    """Reads blocks of a stack for one worker, as task vectors (``vectors``) or as the experts' own values.

    ``marks`` [sources][2] collects the fingerprint sums of every dense input (base first) when it is given. ``check``
    looks for NaN and Inf: the first pass over a tensor does, later ones need not.
    """

    def __init__(self, scratch: Scratch, stack: Stack, *, vectors: bool = True, check: bool = True) -> None:
        self.scratch, self.stack, self.vectors, self.check = scratch, stack, vectors, check
        self.reads_base = vectors or any(row.dense is None for row in stack.rows)
        self.real: Any = np.float64 if stack.wide else np.float32
        self.nothing = np.empty(0, self.real)
        self.like = np.empty(len(stack.rows), self.real)
        self.size = block_size(len(stack.rows), stack.wide)
        self.sources = [*([stack.base] if self.reads_base else []), *stack.rows]
        self.dtype = self._common()

    def _common(self) -> DType | None:
        """Return the type of all sources if they are dense and decode together; None: each is read by itself."""
        if any(source.pair is not None or source.dense is None for source in self.sources):
            return None
        if not self.stack.rows or (self.reads_base and not self.vectors):
            return None
        first, *more = {source.dense.plain.name: source.dense.plain for source in self.sources if source.dense}.values()
        return first if not more and together(first) and first.bits <= 8 * self.nothing.itemsize else None

    def take(self, start: int, stop: int, *, marked: bool) -> Taken:
        """Return elements ``start ... stop`` for a kernel to bring in; ``finish`` says what it saw.

        Sources of one type stay as they are stored; others are brought in here.
        """
        if self.dtype is None:
            marks: Marks = [[0, 0] for _ in range(len(self.stack.rows) + 1)]
            rows, base = self._each(start, stop, marks if marked else None)
            return taken_numbers(rows, base, marks)
        width = (stop - start) * self.dtype.itemsize
        stored = self.scratch.array("stored", (len(self.sources), -(-width // 8) * 8), np.uint8)
        if width % 8:
            stored[:, width:] = 0
        for row, source in zip(stored, self.sources, strict=True):
            assert source.storage is not None
            assert source.dense is not None
            raw(source.storage, source.dense, start, stop, row[:width])
        at = start * self.dtype.itemsize if marked else None
        return taken_stored(stored, self.dtype, self.real, subtract=self.reads_base, start=at, check=self.check)

    def finish(self, taken: Taken, marks: Marks | None) -> None:
        """Add a block's fingerprint sums to ``marks``, once a kernel has brought it in.

        Raises:
            NonFinite: a value is NaN or Inf.
        """
        first = 0 if self.dtype is None or self.reads_base else 1
        if marks is not None:
            for mark, (low, high) in zip(marks[first:], taken.marks.tolist(), strict=True):
                mark[0] += low
                mark[1] += high
        if self.check and taken.bad.any():
            number = int(taken.bad.argmax())
            raise NonFinite(("base", *self.stack.row_names)[number + first], self.stack.name, self.sources[number])

    def _dense(
        self, source: Source, who: str, start: int, stop: int, out: Any, base: Any, mark: list[int] | None
    ) -> None:
        """Read one source's values less ``base`` (empty: as they are) into ``out``."""
        info, storage = source.dense, source.storage
        assert info is not None
        assert storage is not None
        width = info.plain.itemsize
        stored = raw(storage, info, start, stop, self.scratch.array("raw", ((stop - start) * width,), np.uint8))
        at = None if mark is None else start * width
        low, high, bad = ingest(stored, info.plain, out, base, at, self.check)
        if mark is not None:
            mark[0] += low
            mark[1] += high
        if bad:
            raise NonFinite(who, self.stack.name, source)

    def _low_rank(self, source: Source, who: str, start: int, out: Any) -> None:
        left, right = self.scratch.factors(source, self.real)
        assert source.pair is not None
        part = self.scratch.array("part", (out.size,), self.real)
        scale = self.real(source.pair.scale)
        if left.ndim == 2:
            add_product(out, start, left, right, scale, part)
        else:
            size = left.shape[1] * right.shape[2]
            for expert in range(start // size, -(-(start + out.size) // size)):
                first, last = max(start, expert * size), min(start + out.size, (expert + 1) * size)
                own = out[first - start : last - start]
                add_product(own, first - expert * size, left[expert], right[expert], scale, part[: own.size])
        if self.check and count_nonfinite(out, self.real(np.finfo(self.real).max)):
            raise NonFinite(who, self.stack.name, source)

    def base(self, start: int, stop: int, marks: Marks | None) -> Any:
        """Return the base's values of a block."""
        out = self.scratch.array("base", (stop - start,), self.real)
        self._dense(self.stack.base, "base", start, stop, out, self.nothing, marks[0] if marks else None)
        if self.stack.base.pair is not None:
            self._low_rank(self.stack.base, "base", start, out)
        return out

    def load(self, start: int, stop: int, marks: Marks | None = None) -> tuple[Any, Any]:
        """Return (rows [K, n], base [n] or None) of elements ``start ... stop``."""
        if self.dtype is None:
            return self._each(start, stop, marks)
        taken = self.take(start, stop, marked=marks is not None)
        rows = self.scratch.array("stack", (len(self.stack.rows), stop - start), self.real)
        base = self.scratch.array("base", (stop - start,), self.real) if self.reads_base else self.nothing
        take_all(taken, rows, base)
        self.finish(taken, marks)
        return rows, base if self.reads_base else None

    def _each(self, start: int, stop: int, marks: Marks | None) -> tuple[Any, Any]:
        """``load`` from sources of several types, or low-rank ones, one after the other."""
        rows = self.scratch.array("stack", (len(self.stack.rows), stop - start), self.real)
        base = self.base(start, stop, marks) if self.reads_base else None
        for k, source in enumerate(self.stack.rows):
            row, who = rows[k], self.stack.row_names[k]
            if source.dense is not None:
                less = base if self.vectors else self.nothing
                self._dense(source, who, start, stop, row, less, marks[k + 1] if marks else None)
            else:
                row[:] = 0 if self.vectors else base
            if source.pair is not None:
                self._low_rank(source, who, start, row)
        return rows, base


@contextlib.contextmanager
def finite_errors() -> Generator[None]:
    """Raise, for a block within that held NaN or Inf, the error that counts them in the whole tensor."""
    try:
        yield
    except NonFinite as error:
        raise count_tensor(error) from None


def count_tensor(error: NonFinite, mend: str = "repair the model") -> InputError:
    """Scan the whole tensor that held NaN or Inf and return the error that says how many, and how to ``mend`` it."""
    info, storage = error.source.dense, error.source.storage
    name, where = error.name, "its LoRA factors hold or produce"
    if info is not None and storage is not None:
        scales = info.codec.parts[1:] if info.codec is not None else ()
        for part in (*scales, info):  # a broken scale is the cause of broken values
            count = _nonfinite(storage, part)
            if count:
                name, where = part.name if part in scales else name, f"{count} of its {part.numel} values are"
                break
    return InputError(f"{error.who}: tensor {name!r}: {where} NaN or Inf; {mend}")


def _nonfinite(storage: Storage, tensor: TensorInfo) -> int:
    """Return how many of a stored tensor's values are NaN or Inf."""
    count, step = 0, LARGEST_BLOCK
    for start in range(0, tensor.numel, step):
        stop = min(tensor.numel, start + step)
        numbers = values(storage, tensor, start, stop, np.empty(stop - start, np.float64))
        count += int(count_nonfinite(numbers, np.finfo(np.float64).max))
    return count
