"""Random directions for estimates of a gradient from function values, and what each law does to the estimate.

    ghat = 1/m sum_j d_j u_j,      d_j = (L(x + mu u_j) - L(x - mu u_j)) / (2 mu)  ->  <g, u_j> as mu -> 0

With n coordinates, E and error of ghat for a linear loss, about g, in units of |g|^2 (mu adds O(mu^2) where the third
derivative is not 0):

| law | u | E[ghat] | E abs(ghat - g)^2 / abs(g)^2 |
|---|---|---|---|
| rademacher | +-1 | g | (n - 1) / m |
| gaussian | N(0, I) | g | (n + 1) / m |
| sphere | uniform, abs(u) = 1 | g / n | ((n - 1) / n)^2 + (n - 1) / (m n^2) |
| coordinate | sqrt(n) e_i, i without replacement | g | n / m - 1, 0 at m = n |
| orthogonal | sqrt(n) q_j, orthonormal rows of a random rotation | g | n / m - 1, 0 at m = n |

The last two are drawn in blocks of n where m is larger: with r = m mod n left over, the error is r (n - r) / m^2.
Norms are sqrt(n), and 1 for the sphere, whose ``mu`` is the distance itself and whose steps are n times shorter.

Zero-sum directions (each column sums to 0 over experts) estimate the projection of g onto that plane, in which
n = (K - 1) N: coordinates in which the loss cannot change, as on the simplex, then add no noise.

Known disagreement: GLUE (arXiv:2512.22467, Proposition 1) bounds the error by (K - 1) / (m K). Exactly that is the
error of unit directions at m = 1, where it is mostly bias towards 0 that no m averages out; it does not hold for unit
directions at m > 1, nor for unbiased ones at any m, whose error is K times larger. The paper does not say which law it
draws from.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Law = Literal["rademacher", "gaussian", "sphere", "coordinate", "orthogonal"]
Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

#: Keeps these random numbers apart from others that are drawn from the same seed.
STREAM = 0x5B5A


@dataclass(frozen=True)
class Moments:
    """What a law does to the estimate of a gradient g: E[ghat] = ``mean`` g, in units of |g|^2 the rest."""

    mean: float
    error: float
    variance: float


def draw(
    law: Law, seed: int, step: int, count: int, experts: int, learned: Mask, *, zero_sum: bool = False, stream: int = 0
) -> Array:
    """Return the directions of a step [count, K, N] in float64, from the seed and the step alone.

    Args:
        law: see the module's docstring.
        seed: of the run.
        step: number of the step.
        count: how many directions.
        experts: K; rows of a direction.
        learned: [N] which columns move; the others are 0.
        zero_sum: whether every column sums to 0 over the rows.
        stream: keeps draws for other ends apart.
    """
    generator = np.random.default_rng([STREAM + stream, seed, step])
    shape = (count, experts, len(learned))
    if law == "rademacher":
        found = _plane(2.0 * generator.integers(0, 2, shape).astype(np.float64) - 1.0, zero_sum)
    elif law == "gaussian":
        found = _plane(generator.standard_normal(shape), zero_sum)
    elif law == "sphere":
        found = _unit(_plane(generator.standard_normal(shape) * learned, zero_sum))
    elif law == "coordinate":
        found = _coordinates(generator, count, experts, learned, zero_sum)
    else:
        found = _rotations(generator, count, experts, learned, zero_sum)
    return found * learned


def moments(law: Law, count: int, experts: int, columns: int = 1, *, zero_sum: bool = False) -> Moments:
    """Return mean, error and variance of the estimate from ``count`` directions for K experts and N learned columns.

    With ``zero_sum`` g is the gradient's projection onto the plane. Projected signs have n - 1 + 2/K for n - 1.
    """
    whole, m = experts * columns, count
    n = whole - columns if zero_sum else whole
    if not n:
        return Moments(1.0, 0.0, 0.0)
    if law == "sphere":
        spread = (n - 1) / (m * n * n)
        return Moments(1 / n, ((n - 1) / n) ** 2 + spread, spread)
    if law == "rademacher":
        error = (n - 1 + (2 / experts if zero_sum else 0.0)) / m
    elif law == "gaussian":
        error = (n + 1) / m
    elif law == "coordinate":
        left = m % whole
        error = left * (whole - left) * (n - 1) / (m * m * max(1, whole - 1))
    else:
        left = m % n
        error = left * (n - left) / (m * m)
    return Moments(1.0, error, error)


def _plane(u: Array, zero_sum: bool) -> Array:
    return u - u.mean(1, keepdims=True) if zero_sum else u


def _unit(u: Array) -> Array:
    norm = np.sqrt((u * u).sum((1, 2), keepdims=True))
    return np.divide(u, norm, out=np.zeros_like(u), where=norm > 0)


def _blocks(count: int, size: int) -> list[int]:
    """Return ``count`` as blocks of at most ``size``, none of nothing."""
    return [min(size, count - first) for first in range(0, count, size)] if size else []


def _coordinates(generator: np.random.Generator, count: int, experts: int, learned: Mask, zero_sum: bool) -> Array:
    shape = (count, experts, len(learned))
    found = np.zeros((count, experts * len(learned)))
    places = np.flatnonzero(np.broadcast_to(learned, shape[1:]))
    chosen = [generator.permutation(places)[:block] for block in _blocks(count, len(places))]
    if chosen:
        found[np.arange(count), np.concatenate(chosen)] = np.sqrt(len(places))
    return _plane(found.reshape(shape), zero_sum)


def _rotations(generator: np.random.Generator, count: int, experts: int, learned: Mask, zero_sum: bool) -> Array:
    shape = (count, experts, len(learned))
    size = (experts - zero_sum) * int(learned.sum())
    found = [_rotation(generator, block, shape[1:], learned, zero_sum) for block in _blocks(count, size)]
    return np.sqrt(size) * np.concatenate(found).reshape(shape) if found else np.zeros(shape)


def _rotation(
    generator: np.random.Generator, count: int, shape: tuple[int, int], learned: Mask, zero_sum: bool
) -> Array:
    """Return ``count`` orthonormal rows [count, K * N] of a uniformly random rotation of what moves."""
    normal = _plane(generator.standard_normal((count, *shape)) * learned, zero_sum).reshape(count, -1)
    q, r = np.linalg.qr(normal.T)
    # LAPACK's signs are not uniform; with R's diagonal positive Q is (Mezzadri, Notices of the AMS 54(5), 2007).
    return (q * np.where(np.diag(r) < 0, -1.0, 1.0)).T
