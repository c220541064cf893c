"""What a method asks of the engine for one tensor.

*Element-wise* methods see tiles of a stack [K, n]: row k is expert k's task vector (``space="task_vectors"``) or its
weights (``space="weights"``), in float32 (float64 where an input or the output needs it). One compiled pass takes a
cache-sized tile after the other: it decodes, keeps the ranks a method asks for, lets ``step`` change the rows and
``merge`` make one of them, multiplies by ``scale``, adds the base (task vectors only) and rounds. What has to be known
of the whole tensor first (ranks, sums) takes extra passes over the data, never the data in memory.

*Matrix* methods see a whole tensor at a time, as its ``Stack``.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from consilience.kernels.reduce import LEAF

Floats = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Over:
    """The vectors whose inner products a method asks for, and how a tensor's elements lie in them.

    ``tensor``: the whole tensor is one. ``last``: those along its last dimension; ``rows``: those of the matrix of its
    first dimension; ``first``: those along its first dimension. A tensor of one dimension is one vector.
    """

    name: Literal["tensor", "last", "rows", "first"] = "tensor"

    @property
    def across(self) -> bool:
        """Whether a vector's elements lie apart; else they lie side by side."""
        return self.name == "first"

    def length(self, shape: tuple[int, ...]) -> int:
        """Return a vector's number of elements."""
        numel = math.prod(shape)
        if self.name == "tensor" or len(shape) < 2 or not numel:
            return numel
        return numel // shape[0] if self.name == "rows" else shape[-1] if self.name == "last" else shape[0]

    def inner(self, shape: tuple[int, ...]) -> int:
        """Return how many neighbours are of the same vector: element i is of vector i // inner, modulo their number."""
        return 1 if self.across and len(shape) > 1 else self.length(shape)


class Table(NamedTuple):
    """The rows' multipliers over a tensor, for reports.

    On stretches that begin at elements ``starts`` [P] they are ``weights`` [P, K]; or, where ``inner`` > 0, element i
    has those of number (i // inner) % G in ``factors`` [K, G].
    """

    starts: Any
    weights: Any
    inner: int = 0
    factors: Any = ()


@dataclass(frozen=True, slots=True)
class Step:
    """Changes the rows of a tile in place: ``function(rows, start, keys, *args)``, a kernel.

    ``rows`` [K, n] are the tile's, ``start`` the index of its first element in the flattened tensor, ``keys`` [K]
    uint64 seeds of each row's counter-based random numbers.
    """

    function: Callable[..., None]
    args: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class RowStep:
    """Changes whole rows of a matrix in place: ``function(rows, start, columns, keys, *args)``, a kernel.

    ``rows`` [K, R * columns] are R whole rows of each task vector seen as a matrix of ``columns`` columns, ``start`` is
    the index of their first element in the flattened tensor, ``keys`` as for ``Step``. It comes before ranks and steps.
    A worker holds as many rows as make 4096 elements and whole 8-byte words, at least one and at most eight.
    """

    function: Callable[..., None]
    columns: int
    args: tuple[Any, ...] = ()

    @property
    def unit(self) -> int:
        """Elements that stay together."""
        step = 8 // math.gcd(8, self.columns)
        return self.columns * step * -(-LEAF // (self.columns * step))


@dataclass(frozen=True, slots=True)
class Score:
    """Gives every element numbers to rank it by: ``function(rows, base, start, out, *args)``, a kernel.

    ``rows``, ``base`` and ``start`` are as for ``Merge``; ``out`` [count, n] float32 is to be filled, and nothing in it
    below 0.
    """

    function: Callable[..., None]
    args: tuple[Any, ...] = ()
    count: int = 1


@dataclass(frozen=True, slots=True)
class Top:
    """Keep, in all rows, the elements of the ``floor(density * n)`` largest scores; n have a score other than 0.

    The score's ``count`` is 1. Of equal scores that of lower index is kept. The others are zero in every row.
    """

    score: Score
    density: float


@dataclass(frozen=True, slots=True)
class Quantiles:
    """The ``counts[q]``-th largest of the tensor's scores ``rows[q]``, for every q; 1 is the largest."""

    score: Score
    counts: tuple[int, ...]
    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tally:
    """Sums over the tensor: ``function(rows, base, start, out, *args)``, a kernel, sums a tile of up to 4096 elements.

    ``rows``, ``base`` and ``start`` are as for ``Merge``, and ``out`` [count] float64 is to be filled; what tiles give
    is added exactly.
    """

    function: Callable[..., None]
    count: int
    args: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class RowTally:
    """A number for every row of the matrix: ``function(rows, base, columns, out, *args)``, a kernel.

    ``rows`` [K, R * columns] and ``base`` [R * columns] are R whole rows, ``out`` [R] float64 is to be filled.
    """

    function: Callable[..., None]
    columns: int
    args: tuple[Any, ...] = ()


class Merge(Protocol):
    """Makes one row of a tile's rows: ``function(rows, base, start, weights, out, *args)``, a kernel.

    ``rows`` [K, n] may be overwritten; ``base`` [n] are the base's values (empty where weights are averaged without
    one), ``start`` is the index of the first element in the flattened tensor, ``weights`` are K floats, and ``out`` [n]
    is to be filled. K is a constant when it is compiled.
    """

    @property
    def function(self) -> Callable[..., None]:
        """The kernel (``consilience.methods.kernel``)."""
        ...

    @property
    def args(self) -> tuple[Any, ...]:
        """What it takes besides: numbers, flags, arrays."""
        ...

    @property
    def weights(self) -> tuple[float, ...]:
        """The multiplier of every row by itself, for the function and for reports; a piecewise merge's first."""
        ...

    @property
    def table(self) -> Table:
        """The rows' multipliers all over the tensor, for reports."""
        ...


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """A merge whose multipliers are the same all over the tensor."""

    function: Callable[..., None]
    weights: tuple[float, ...]
    args: tuple[Any, ...] = ()

    @property
    def table(self) -> Table:
        """One stretch."""
        return Table((0,), (self.weights,))


@dataclass(frozen=True, slots=True)
class Ranks:
    """Zero all entries of row k but those of rank ``first[k] ... last[k] - 1`` by magnitude, the largest's being 0.

    Of equal magnitudes the one of lower index has the lower rank. ``first`` empty stands for zeros. ``scope`` says over
    what is ranked: this tensor, or all merged tensors of the model together (then ``density[k]`` of them is kept, and
    ``last`` is ignored). Magnitudes are ranked in float32.
    """

    last: tuple[int, ...]
    density: tuple[float, ...]
    first: tuple[int, ...] = ()
    scope: Literal["tensor", "model"] = "tensor"


@dataclass(frozen=True, slots=True)
class Sums:
    """Whole-tensor sums that ``Elementwise.finish`` receives, in float64, equal for any block size and thread count.

    ``gram`` [K, K] are the inner products of the raw rows, or [K, K, G] those of the G vectors that the program is
    ``over`` (not of a single one, which is the tensor), with row k times 2^-exponents[k]: all 0, unless float64 could
    not hold them. ``l1`` [K] and ``l1_stepped`` [K] are the sums of magnitudes before and after all that the program
    does to rows (ranks and steps); ``tally`` [count], ``quantiles`` [Q] and ``by_row`` [rows of the matrix] are what
    the program's fields of these names ask for. Only what ``Elementwise.needs`` names is filled.
    """

    gram: npt.NDArray[np.float64] | None = None
    exponents: tuple[int, ...] = ()
    l1: npt.NDArray[np.float64] | None = None
    l1_stepped: npt.NDArray[np.float64] | None = None
    tally: npt.NDArray[np.float64] | None = None
    quantiles: npt.NDArray[np.float64] | None = None
    by_row: npt.NDArray[np.float64] | None = None


@dataclass(frozen=True, slots=True)
class Elementwise:
    """The treatment of one tensor by an element-wise method.

    ``needs`` names what has to be known of the whole tensor, ``gram`` inner products of the vectors ``over``;
    ``finish`` then turns this program into the next, which may need something again: ``stages`` says how many do.
    ``keep`` is chosen before all that, once.
    """

    space: Literal["task_vectors", "weights"]
    merge: Merge
    keep: Ranks | Top | None = None
    step: Step | None = None
    scale: float = 1.0
    needs: Literal["none", "gram", "l1", "tally", "quantiles", "by_row"] = "none"
    finish: "Callable[[Sums], Elementwise] | None" = None
    row_step: RowStep | None = None
    tally: Tally | None = None
    quantiles: Quantiles | None = None
    by_row: RowTally | None = None
    stages: int = 1
    over: Over = Over()

    @property
    def weights(self) -> tuple[float, ...]:
        """The multiplier of every row by itself."""
        return self.merge.weights

    @property
    def table(self) -> Table:
        """The rows' multipliers all over the tensor."""
        return self.merge.table

    @property
    def masks(self) -> bool:
        """Whether entries of the rows are left out."""
        return self.keep is not None or self.step is not None or self.row_step is not None


class Update(NamedTuple):
    """A merged task vector as ``left @ right``: [m, r] and [r, n]."""

    left: Floats
    right: Floats


class Measured(NamedTuple):
    """A merged task vector [m, n], and numbers of each expert [K, q], of whose sums over all tensors notes are made."""

    update: Floats | Update
    values: Floats


Merged = Floats | Update | Measured


@dataclass(frozen=True, slots=True)
class Matrix:
    """The treatment of one tensor by a matrix method: ``function(stack, **parameters)`` returns the merged task vector.

    That is an array [m, n], an ``Update``, or with measures a ``Measured``; the engine multiplies it by ``scale`` and
    adds the base. ``copies`` is how many times the stack, [K, m, n] in the compute type, the function holds at most.
    """

    function: Callable[..., Merged]
    parameters: Mapping[str, Any]
    weights: tuple[float, ...]
    copies: float
    scale: float = 1.0
    space: ClassVar[Literal["task_vectors"]] = "task_vectors"
    masks: ClassVar[bool] = False
    keep: ClassVar[None] = None
    needs: ClassVar[Literal["none"]] = "none"

    @property
    def table(self) -> Table:
        """One stretch."""
        return Table((0,), (self.weights,))


Program = Elementwise | Matrix
