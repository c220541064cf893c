"""The experts' task vectors of one tensor: a value that merges, learning, the doctor and extraction read.

    tau_k = theta_k - theta_0

They stay as they are stored, two slices and a subtraction or low-rank factors, until somebody asks for numbers. NaN and
Inf are looked for by whoever reads first, and need not be again.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from consilience.errors import InputError
from consilience.experts.model import Source

if TYPE_CHECKING:
    from consilience.experts.block import Loader, Scratch

Floats = npt.NDArray[Any]


class Block(NamedTuple):
    """Elements ``start ... stop``: task vectors [K, n] and the base [n]. The next block overwrites them."""

    start: int
    stop: int
    vectors: Floats
    base: Floats


class Factors(NamedTuple):
    """Row ``row`` as ``scale * left @ right``: [m, r] and [r, n], for a tensor as a matrix of its first dimension."""

    row: int
    left: Floats
    right: Floats
    scale: float


@dataclass(frozen=True)
class Stack:
    """One tensor's rows, the experts', on its base.

    Attributes:
        name: of the tensor.
        shape: its shape.
        base: where its base comes from.
        rows: where each expert's value comes from.
        row_names: the experts' names.
        wide: numbers are float64, else float32.
    """

    name: str
    shape: tuple[int, ...]
    base: Source
    rows: tuple[Source, ...]
    row_names: tuple[str, ...]
    wide: bool = False

    @property
    def numel(self) -> int:
        """Number of elements of a row."""
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        """Row length of the tensor as a matrix of its first dimension; a vector is one row."""
        return self.numel // max(1, self.shape[0]) if len(self.shape) > 1 else self.numel

    @property
    def untouched(self) -> bool:
        """Whether no expert changes the tensor."""
        return all(row.untouched for row in self.rows)

    @property
    def low_rank(self) -> bool:
        """Whether every row that changes the tensor is low-rank; one with an update for each expert in it is not."""
        return all(row.dense is None and (row.pair is None or row.pair.experts == 1) for row in self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes that reading it once takes."""
        return self.base.nbytes + sum(row.nbytes for row in self.rows)

    def loader(self, scratch: "Scratch | None" = None, *, vectors: bool = True, check: bool = True) -> "Loader":
        """Return what reads blocks into buffers (``scratch``, a worker's own): see ``Loader``."""
        from consilience.experts.block import Loader, Scratch  # compiled code

        return Loader(Scratch() if scratch is None else scratch, self, vectors=vectors, check=check)

    def blocks(
        self,
        start: int = 0,
        stop: int | None = None,
        *,
        align: int = 1,
        scratch: "Scratch | None" = None,
        check: bool = True,
    ) -> Iterator[Block]:
        """Yield the elements from ``start`` to ``stop`` (the end), in blocks that fit a cache.

        Args:
            start: first element.
            stop: last + 1.
            align: blocks are multiples of so many elements, such as a matrix' columns.
            scratch: a worker's buffers.
            check: look for NaN and Inf; a second reader need not.

        Raises:
            InputError: a value is NaN or Inf.
        """
        from consilience.experts.block import finite_errors

        loader, stop = self.loader(scratch, check=check), self.numel if stop is None else stop
        step = max(1, loader.size // align) * align
        with finite_errors():
            for at in range(start, stop, step):
                end = min(stop, at + step)
                vectors, base = loader.load(at, end)
                yield Block(at, end, vectors, base)

    def own(
        self, row: int | None, *, scratch: "Scratch | None" = None, check: bool = True
    ) -> Iterator[tuple[int, int, Floats]]:
        """Yield (start, stop, values [n]) of one expert's own tensor, or with None of the base's.

        Raises:
            InputError: a value is NaN or Inf.
        """
        from consilience.experts.block import finite_errors

        chosen = slice(0, 0) if row is None else slice(row, row + 1)
        alone = replace(self, rows=self.rows[chosen], row_names=self.row_names[chosen])
        loader = alone.loader(scratch, vectors=row is None, check=check)
        with finite_errors():
            for at in range(0, self.numel, loader.size):
                end = min(self.numel, at + loader.size)
                rows, base = loader.load(at, end)
                yield at, end, base if row is None else rows[0]

    def whole(self, *, check: bool = True) -> Floats:
        """Return all task vectors as matrices, [K, rows, columns].

        Raises:
            InputError: a value is NaN or Inf.
        """
        out = np.empty((len(self.rows), self.numel), np.float64 if self.wide else np.float32)
        for start, stop, vectors, _ in self.blocks(check=check):
            out[:, start:stop] = vectors
        return out.reshape(len(self.rows), -1, max(1, self.columns))

    def factors(self) -> list[Factors]:
        """Return the low-rank part of every row that has one: all there is of the task vectors if ``low_rank``.

        Raises:
            InputError: a factor holds NaN or Inf.
        """
        from consilience.experts.block import read_factors

        real = np.float64 if self.wide else np.float32
        pairs = [(k, row, row.pair) for k, row in enumerate(self.rows) if row.pair is not None]
        if any(pair.experts > 1 for _, _, pair in pairs):
            raise ValueError(f"{self.name!r} has an update for each of its experts, and no two factors")
        found = [Factors(k, *read_factors(row, real), pair.scale) for k, row, pair in pairs]
        for row, left, right, _ in found:
            if not (np.isfinite(left).all() and np.isfinite(right).all()):
                raise InputError(
                    f"{self.row_names[row]}: tensor {self.name!r}: its LoRA factors hold NaN or Inf; repair the model"
                )
        return found

    def gram(self, *, check: bool = True) -> npt.NDArray[np.float64]:
        """Return the inner products [K, K] of the task vectors: sums of a fixed tree, whatever the blocks.

        Raises:
            InputError: a value is NaN or Inf.
        """
        from consilience.experts.block import finite_errors
        from consilience.kernels.gram import gram_whole
        from consilience.kernels.ingest import TILE

        count, loader = len(self.rows), self.loader(check=check)
        leaves = np.empty((count * (count + 1) // 2, -(-self.numel // TILE)))
        with finite_errors():
            for at in range(0, self.numel, loader.size):
                size = min(self.numel - at, loader.size)
                taken = loader.take(at, at + size, marked=False)
                part = np.empty((len(leaves), -(-size // TILE)))
                gram_whole(taken, size, loader.like, loader.nothing, part)
                loader.finish(taken, None)
                leaves[:, at // TILE : at // TILE + part.shape[1]] = part
        gram = np.empty((count, count))
        pairs = [(i, j) for i in range(count) for j in range(i + 1)]
        for sums, (i, j) in zip(leaves, pairs, strict=True):
            gram[i, j] = gram[j, i] = math.fsum(sums)
        return gram
