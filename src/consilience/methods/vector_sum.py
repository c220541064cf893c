"""Weighted sums whose weights were found from inner products: of whole tensors, or of every vector within one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from consilience.kernels.vectors import vector_sum
from consilience.methods.program import Arithmetic, Floats, Merge, Over, Sums, Table
from consilience.methods.weighted_sum import weighted, weighted_sum_wide

#: Weights beyond this cancel so much that a sum in float32 would lose what is left.
_LARGE = 16.0


@dataclass(frozen=True, eq=False)
class VectorSum:
    """``sum_k factors[k, g] * row_k`` on vector g: element i is of vector i // ``inner``, modulo their number."""

    inner: int
    factors: Floats

    @property
    def function(self) -> Callable[..., None]:
        """The kernel."""
        return vector_sum

    @property
    def weights(self) -> tuple[float, ...]:
        """The first vector's."""
        return tuple(map(float, self.factors[:, 0]))

    @property
    def args(self) -> tuple[Any, ...]:
        """How vectors lie, and their multipliers [K, G]."""
        return self.inner, self.factors

    @property
    def table(self) -> Table:
        """The multipliers by vector."""
        return Table((), (), self.inner, self.factors)


def summed(factors: Floats, over: Over, shape: tuple[int, ...]) -> Merge:
    """Return the merge that multiplies row k by ``factors[k]``, [K], or on vector g by ``factors[k, g]``, [K, G]."""
    if factors.ndim == 1:
        weights = tuple(map(float, factors))
        large = max(map(abs, weights), default=0.0) > _LARGE
        return Arithmetic(weighted_sum_wide, weights) if large else weighted(weights)
    return VectorSum(over.inner(shape), np.ascontiguousarray(factors, np.float64))


def lengths(sums: Sums) -> Floats:
    """Return the rows' norms [K] over the largest one: 0 for a row of zeros."""
    assert sums.gram is not None
    squares = np.einsum("kk->k", sums.gram)
    highest = max(sums.exponents, default=0)
    found = np.ldexp(np.sqrt(squares), np.array(sums.exponents) - highest)
    largest = found.max(initial=0.0)
    return found / largest if 0 < largest < np.inf else found


def cosines(sums: Sums) -> Floats:
    """Return the cosines between rows, [K, K] or [K, K, G]: 0 where one is of zeros, also with itself."""
    assert sums.gram is not None
    norms = np.sqrt(np.einsum("kk...->k...", sums.gram))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = sums.gram / (norms[:, None] * norms[None])
    found[(norms == 0)[:, None] | (norms == 0)[None]] = 0.0  # NaN, which --allow-nonfinite lets through, stays
    return np.clip(found, -1.0, 1.0)
