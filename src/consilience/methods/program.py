"""What a method asks of the engine for one tensor.

*Element-wise* methods see blocks of a stack [K, n]: row k is expert k's task vector (``space="task_vectors"``) or its
weights (``space="weights"``), in float32 (float64 where an input or the output needs it). The engine walks a tensor in
cache-sized blocks: it decodes, keeps the ranks a method asks for, lets ``step`` change the rows and ``merge`` make one
of them, multiplies by ``scale``, adds the base (task vectors only), rounds and writes. What has to be known of the
whole tensor first (ranks, sums) takes extra passes over the data, never the data in memory.

*Matrix* methods see a whole tensor at a time, as its ``Stack``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[Any]
#: A stretch of a block, [low, high) counted from its beginning, and the multiplier of every row there.
Cut = tuple[int, int, tuple[float, ...]]


class Place(NamedTuple):
    """Where a block is, and what else may be known of it.

    ``start`` is the index of its first element in the flattened tensor; ``base`` [n] the base's values (empty where
    weights are averaged without one); ``keys`` [K] key each row's stream of counter-based random numbers.
    """

    start: int
    base: Floats
    keys: tuple[int, ...]


class Step(Protocol):
    """Changes the rows of a block in place."""

    def __call__(self, rows: Floats, place: Place) -> None:
        """Change ``rows`` [K, n]."""
        ...


class Merge(Protocol):
    """Makes one row of a block's rows."""

    @property
    def weights(self) -> tuple[float, ...]:
        """The multiplier of every row by itself, for reports; a piecewise merge's first."""
        ...

    def cut(self, start: int, stop: int) -> list[Cut]:
        """Return the stretches of the block ``start ... stop`` and the rows' multipliers there."""
        ...

    def __call__(self, rows: Floats, place: Place, out: Floats) -> None:
        """Fill ``out`` [n] from ``rows`` [K, n], which may be overwritten."""
        ...


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """A merge by a function of a block: ``function(rows, base, start, weights, *args, out)``.

    ``rows`` [K, n] are the block's, ``base`` [n] and ``start`` as ``Place`` has them, ``weights`` K floats, ``out`` [n]
    is filled. Compiled by ``consilience.jit.kernel``, it runs in parallel, and K is a constant; plain numpy works too.
    """

    function: Callable[..., None]
    weights: tuple[float, ...]
    args: tuple[Any, ...] = ()

    def cut(self, start: int, stop: int) -> list[Cut]:
        """Return the whole block."""
        return [(0, stop - start, self.weights)]

    def __call__(self, rows: Floats, place: Place, out: Floats) -> None:
        """Fill ``out``."""
        self.function(rows, place.base, place.start, self.weights, *self.args, out)


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

    ``gram`` [K, K] are the inner products of the raw rows; ``l1`` [K] and ``l1_stepped`` [K] the sums of magnitudes
    before and after the program's step. Only what ``Elementwise.needs`` names is filled.
    """

    gram: npt.NDArray[np.float64] | None = None
    l1: npt.NDArray[np.float64] | None = None
    l1_stepped: npt.NDArray[np.float64] | None = None


@dataclass(frozen=True, slots=True)
class Elementwise:
    """The treatment of one tensor by an element-wise method.

    ``needs`` names sums over the whole tensor; ``finish`` then turns this program into the one to run.
    """

    space: Literal["task_vectors", "weights"]
    merge: Merge
    keep: Ranks | None = None
    step: Step | None = None
    scale: float = 1.0
    needs: Literal["none", "gram", "l1"] = "none"
    finish: "Callable[[Sums], Elementwise] | None" = None

    @property
    def weights(self) -> tuple[float, ...]:
        """The multiplier of every row by itself."""
        return self.merge.weights

    @property
    def masks(self) -> bool:
        """Whether entries of the rows are left out."""
        return self.keep is not None or self.step is not None


class Update(NamedTuple):
    """A merged task vector as ``left @ right``: [m, r] and [r, n]."""

    left: Floats
    right: Floats


@dataclass(frozen=True, slots=True)
class Matrix:
    """The treatment of one tensor by a matrix method: ``function(stack, **parameters)`` returns the merged task vector.

    That is an array [m, n] or an ``Update``; the engine multiplies it by ``scale`` and adds the base. ``copies`` is how
    many times the stack, [K, m, n] in the compute type, the function holds at its peak.
    """

    function: Callable[..., Floats | Update]
    parameters: Mapping[str, Any]
    weights: tuple[float, ...]
    copies: float
    scale: float = 1.0
    space: ClassVar[Literal["task_vectors"]] = "task_vectors"
    masks: ClassVar[bool] = False
    keep: ClassVar[None] = None
    needs: ClassVar[Literal["none"]] = "none"


Program = Elementwise | Matrix
