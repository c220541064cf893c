"""What a method asks of the engine for one tensor: transforms of the stack, one combination, statistics first.

The *stack* is [K, n]: row k is expert k's task vector (``space="task_vectors"``) or its weights (``space="weights"``),
in float32 (float64 where an input or the output needs it). The engine walks a tensor in cache-sized blocks: it decodes,
runs ``stages`` in place, combines the rows into one, multiplies by ``scale``, adds the base (task vectors only), rounds
and writes. A stage that needs to know the whole tensor first (``Trim``) or a program with ``statistics`` gets extra
passes over the data, never the data in memory.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Trim:
    """Zero all but the ``keep[k]`` entries of largest magnitude of row k; ties go to the lowest index.

    ``scope`` says over what the magnitudes are ranked: this tensor, or all merged tensors of the model together
    (then ``density[k]`` of them is kept and ``keep`` is ignored). Magnitudes are ranked in float32.
    """

    keep: tuple[int, ...]
    density: tuple[float, ...]
    scope: Literal["tensor", "model"] = "tensor"


@dataclass(frozen=True, slots=True)
class Drop:
    """Keep each entry of row k with probability ``density[k]`` and multiply the kept ones by ``scale[k]``.

    The random numbers are counter-based: SplitMix64 keyed by seed, tensor and expert, indexed by element.
    """

    density: tuple[float, ...]
    scale: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class WeightedSum:
    """``sum_k weights[k] * row_k``."""

    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class PiecewiseSum:
    """``sum_k weights[p][k] * row_k`` on the elements from ``starts[p]`` to ``starts[p + 1]`` (or the end)."""

    starts: tuple[int, ...]
    pieces: tuple[tuple[float, ...], ...]

    @property
    def weights(self) -> tuple[float, ...]:
        """The first piece's: what stands for a program's weights where one per row is wanted."""
        return self.pieces[0]

    def cut(self, start: int, stop: int) -> list[tuple[int, int, tuple[float, ...]]]:
        """Return (first, last + 1, weights) of the pieces that meet the block ``start ... stop``, counted from it."""
        first = bisect_right(self.starts, start) - 1
        found: list[tuple[int, int, tuple[float, ...]]] = []
        for number in range(first, len(self.starts)):
            low = max(self.starts[number], start)
            if low >= stop:
                break
            high = min(self.starts[number + 1], stop) if number + 1 < len(self.starts) else stop
            found.append((low - start, high - start, self.pieces[number]))
        return found


@dataclass(frozen=True, slots=True)
class SignedSum:
    """TIES' merge: per element keep the rows whose weighted sign is that of the weighted sum (0 counts as +).

    ``sum of the kept w*x``, divided by the sum of their weights when ``mean``. A divisor below 1e-8, what rounding
    leaves of weights that cancel, counts as 1.
    """

    weights: tuple[float, ...]
    mean: bool


@dataclass(frozen=True, slots=True)
class Custom:
    """A third party's combination: ``function(stack [K, n], start, args, out [n])`` fills ``out``.

    ``start`` is the index of the block's first element in the flattened tensor. A numba-compiled function that releases
    the GIL runs in parallel; a plain numpy one works too.
    """

    function: Callable[..., None]
    args: tuple[Any, ...] = ()
    weights: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Elect:
    """Zero the entries of every row whose sign is not that of the sum of the rows (0 counts as +): TIES' election."""


Stage = Trim | Drop | Elect
Combine = WeightedSum | PiecewiseSum | SignedSum | Custom


@dataclass(frozen=True, slots=True)
class Sums:
    """Whole-tensor sums that ``Program.finish`` receives, in float64, equal for any block size and thread count.

    ``gram`` [K, K] are the inner products of the raw rows; ``l1`` [K] and ``l1_staged`` [K] the sums of magnitudes
    before and after the program's stages. Only what ``Program.statistics`` names is filled.
    """

    gram: npt.NDArray[np.float64] | None = None
    l1: npt.NDArray[np.float64] | None = None
    l1_staged: npt.NDArray[np.float64] | None = None


@dataclass(frozen=True, slots=True)
class Program:
    """The whole treatment of one tensor.

    ``statistics`` names the sums needed; ``finish`` then turns this program into the one to run.
    """

    space: Literal["task_vectors", "weights"]
    combine: Combine
    stages: tuple[Stage, ...] = ()
    scale: float = 1.0
    statistics: Literal["none", "gram", "l1"] = "none"
    finish: Callable[[Sums], "Program"] | None = None

    @property
    def trim(self) -> Trim | None:
        """The stage that ranks magnitudes, if there is one."""
        return next((stage for stage in self.stages if isinstance(stage, Trim)), None)
