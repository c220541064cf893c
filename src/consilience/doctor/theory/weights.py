"""Merge weights that a quadratic model calls best, and what it predicts of the merge's losses; derived here.

    q_k(p) = f_k + <g_k, d_k> + c_k ||d_k||^2 / 2,        d_k = sum_j p_j tau_j - tau_k
    J(p)   = sum_k w_k [<g_k, d_k> + c_k ||d_k||^2 / 2] + 1/2 sum_k r_k p_k^2
    (cbar G + diag(r)) p = G (w o c) - S^T w,             cbar = sum_k w_k c_k

f_k is expert k's loss on its own task, g_k its gradient there (S[k, j] = <g_k, tau_j>; 0 where the expert is
stationary), c_k the curvature of f_k along d_k, and G[j, k] = <tau_j, tau_k>. r_k is the price of instability: with
r_k = w_k L eps_k^2, the last sum is the quadratic part of Lemma 2 (``bound.stability_part``; the part that is linear in
|p_k| is left out). With r = 0, S = 0 and equal curvatures, p = w. With r > 0 the merge moves less far from the base
unless other task vectors can take an unstable one's place: sum p < 1 for orthogonal ones, not always.

One curvature stands for a whole Hessian, and losses far from an expert are not quadratic: the values rank merges, they
do not promise losses. All functions take stacks, such as one matrix a layer: the model is a sum over layers.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from consilience.doctor.theory.bound import distances
from consilience.errors import InputError

Array = npt.NDArray[np.float64]

#: Eigenvalues of the scaled system below this share of the largest are rounding: the task vectors are dependent.
_NULL = 1e-10
#: Rounds over the weights in a search within bounds, and the change at which it ends.
_SWEEPS, _STILL = 20_000, 1e-12
#: A Gram matrix of float32 sums may have eigenvalues so far below 0, as a share of the largest.
_ROUNDING = 1e-5


def optimal_weights(
    gram: npt.ArrayLike,
    *,
    w: npt.ArrayLike | None = None,
    curvatures: npt.ArrayLike | None = None,
    penalties: npt.ArrayLike | None = None,
    slopes: npt.ArrayLike | None = None,
) -> Array:
    """Return the merge weights [..., K] that minimise J; they need neither be positive nor sum to 1.

    Where task vectors are dependent (duplicates, one that is 0), minimisers are many: of those it is the one nearest to
    w, in units of each weight's own curvature. So equal experts get weights as their tasks have.

    Args:
        gram: G [..., K, K], in u^2.
        w: task weights [K], >= 0, sum 1; None for 1/K.
        curvatures: c [K] or [..., K], in nats / u^2; None for 1. Single ones may be negative, their weighted sum not.
        penalties: r [K] or [..., K], >= 0, in nats; infinite for an expert that must stay out; None for 0.
        slopes: S [..., K, K], in nats; None for experts that are stationary.

    Raises:
        InputError: shapes do not fit, a value is out of its range, or G is no Gram matrix.
    """
    g = _gram(gram)
    weights, c, r = _settings(g, w, curvatures, penalties)
    mean = (weights * c).sum(-1)
    if not (mean > 0).all():
        raise InputError(
            f"curvatures: their weighted sum is {float(mean.min()):g}; give curvatures whose sum is above 0"
        )
    out = np.isinf(r)
    system = mean[..., None, None] * g + np.where(out, 0.0, r)[..., None] * np.eye(g.shape[-1])
    right = np.einsum("...ij,...j->...i", g, weights * c)
    if slopes is not None:
        right = right - np.einsum("...kj,...k->...j", _like("slopes", slopes, g), weights)
    start = np.where(out, 0.0, np.broadcast_to(weights, right.shape))
    return start + _least_change(system, right - np.einsum("...ij,...j->...i", system, start), ~out)


def bounded_weights(
    gram: npt.ArrayLike,
    *,
    low: float = 0.0,
    high: float = 1.0,
    w: npt.ArrayLike | None = None,
    curvatures: npt.ArrayLike | None = None,
    penalties: npt.ArrayLike | None = None,
    slopes: npt.ArrayLike | None = None,
) -> Array:
    """Return the weights [K] that minimise J within ``low <= p_k <= high``.

    Far from the experts the model is not to be trusted: without bounds its best weights may be far outside what was
    ever measured. Other arguments and errors are those of ``optimal_weights``, for one matrix.
    """
    known: dict[str, Any] = {"w": w, "curvatures": curvatures, "penalties": penalties, "slopes": slopes}
    free = np.asarray(optimal_weights(gram, **known), np.float64)
    if ((free >= low) & (free <= high)).all():
        return free
    g = _gram(gram)
    weights, c, r = _settings(g, w, curvatures, penalties)
    out = np.isinf(r)
    system = float((weights * c).sum()) * g + np.diag(np.where(out, 0.0, r))
    right = g @ (weights * c) - (0.0 if slopes is None else np.asarray(slopes, np.float64).T @ weights)
    found = np.clip(free, low, high) * ~out
    curved = [k for k in range(len(found)) if not out[k] and system[k, k] > 0]
    for _ in range(_SWEEPS):  # J is convex: going down one weight at a time ends at its least value
        before = found.copy()
        for k in curved:
            rest = right[k] - system[k] @ found + system[k, k] * found[k]
            found[k] = min(max(rest / system[k, k], low), high)
        if np.abs(found - before).max(initial=0.0) <= _STILL:
            break
    return found


def objective(
    p: npt.ArrayLike,
    gram: npt.ArrayLike,
    *,
    w: npt.ArrayLike | None = None,
    curvatures: npt.ArrayLike | None = None,
    penalties: npt.ArrayLike | None = None,
    slopes: npt.ArrayLike | None = None,
) -> Array:
    """Return J [...] of merge weights p [..., K], in nats; the other arguments are ``optimal_weights``'s.

    Raises:
        InputError: shapes do not fit, a value is out of its range, or G is no Gram matrix.
    """
    g = _gram(gram)
    weights, c, r = _settings(g, w, curvatures, penalties)
    given = _vector("p", p, g)
    held = given != 0
    instability = (np.where(held, r, 0.0) * given**2).sum(-1) / 2
    slope = np.zeros_like(g) if slopes is None else slopes
    return (weights * predicted_increase(given, g, slope, c)).sum(-1) + instability


def predicted_increase(
    p: npt.ArrayLike, gram: npt.ArrayLike, slopes: npt.ArrayLike, curvatures: npt.ArrayLike
) -> Array:
    """Return ``q_k - f_k`` [..., K]: by how much merging is predicted to raise every task's loss, in nats.

    Args:
        p: merge weights [K] or [..., K], of any sum.
        gram: G [..., K, K], in u^2.
        slopes: S[k, j] = <grad f_k(x_k), tau_j>, [..., K, K], in nats.
        curvatures: c [K] or [..., K], in nats / u^2.

    Raises:
        InputError: shapes do not fit.
    """
    g = _gram(gram)
    given, c = _vector("p", p, g), _vector("curvatures", curvatures, g)
    s = _like("slopes", slopes, g)
    along = np.einsum("...kj,...j->...k", s, given) - np.einsum("...kk->...k", s)
    return along + c * distances(g, given) / 2


def predicted_losses(
    p: npt.ArrayLike, losses: npt.ArrayLike, gram: npt.ArrayLike, slopes: npt.ArrayLike, curvatures: npt.ArrayLike
) -> Array:
    """Return ``q_k``, [K]: every task's loss after merging, to second order about its own expert, in nats.

    Exact for quadratic losses with Hessian c_k times the identity. A stack of matrices, one a layer, is summed over.

    Args:
        p: merge weights [K] or [N, K].
        losses: f_k, the experts' losses on their own tasks, [K].
        gram: G [K, K] or [N, K, K].
        slopes: S, of G's shape.
        curvatures: c [K] or [N, K].

    Raises:
        InputError: shapes do not fit.
    """
    increase = predicted_increase(p, gram, slopes, curvatures)
    first = np.asarray(losses, np.float64)
    if first.shape != increase.shape[-1:]:
        raise InputError(f"losses: have shape {list(first.shape)}; give one for each of {increase.shape[-1]} experts")
    return first + increase.reshape(-1, increase.shape[-1]).sum(0)


def stability_penalties(w: npt.ArrayLike, smoothness: float, eps_squared: npt.ArrayLike) -> Array:
    """Return ``r_k = w_k L eps_k^2`` [K], in nats: with them J's last sum is the quadratic part of Lemma 2."""
    return np.asarray(w, np.float64) * smoothness * np.asarray(eps_squared, np.float64)


def _least_change(system: Array, residual: Array, free: npt.NDArray[np.bool_]) -> Array:
    """Return the x nearest to 0 with ``system x = residual``, scaled by the diagonal; 0 where not ``free``."""
    diagonal = np.einsum("...kk->...k", system)
    moves = free & (diagonal > 0)
    scale = np.where(moves, 1 / np.sqrt(np.where(moves, diagonal, 1.0)), 0.0)
    values, vectors = np.linalg.eigh(system * scale[..., :, None] * scale[..., None, :])
    kept = values > _NULL * np.maximum(values[..., -1:], 1.0)
    inverse = np.where(kept, 1 / np.where(kept, values, 1.0), 0.0)
    within = np.einsum("...ji,...j->...i", vectors, scale * residual)
    return scale * np.einsum("...ij,...j->...i", vectors, inverse * within)


def _settings(
    gram: Array, w: npt.ArrayLike | None, curvatures: npt.ArrayLike | None, penalties: npt.ArrayLike | None
) -> tuple[Array, Array, Array]:
    count = gram.shape[-1]
    weights = np.full(count, 1 / count) if w is None else np.asarray(w, np.float64)
    if weights.shape != (count,) or not (weights >= 0).all() or abs(weights.sum() - 1) > 1e-6:
        raise InputError(f"w: give {count} task weights of at least 0 that sum to 1")
    c = _vector("curvatures", np.ones(count) if curvatures is None else curvatures, gram)
    r = np.zeros(count) if penalties is None else np.asarray(penalties, np.float64)
    if not (r >= 0).all():
        raise InputError("penalties: give numbers of at least 0")
    return weights, c, _vector("penalties", r, gram, finite=False)


def _gram(gram: npt.ArrayLike) -> Array:
    found = np.asarray(gram, np.float64)
    if found.ndim < 2 or found.shape[-1] != found.shape[-2] or not found.shape[-1] or not np.isfinite(found).all():
        raise InputError(f"gram: has shape {list(found.shape)}; give finite inner products [..., K, K]")
    found = (found + np.swapaxes(found, -1, -2)) / 2
    values = np.linalg.eigvalsh(found)
    if (values[..., 0] < -_ROUNDING * np.abs(values).max(-1)).any():
        raise InputError(
            "gram: has a negative eigenvalue; give inner products of task vectors, all of the same tensors"
        )
    return found


def _vector(name: str, value: npt.ArrayLike, gram: Array, *, finite: bool = True) -> Array:
    found = np.asarray(value, np.float64)
    if found.shape != gram.shape[-1:] and found.shape != gram.shape[:-1]:
        raise InputError(
            f"{name}: has shape {list(found.shape)}; give {list(gram.shape[-1:])} or {list(gram.shape[:-1])}"
        )
    if np.isnan(found).any() or (finite and not np.isfinite(found).all()):
        raise InputError(f"{name}: holds NaN or Inf; give finite numbers")
    return np.broadcast_to(found, gram.shape[:-1])


def _like(name: str, value: npt.ArrayLike, gram: Array) -> Array:
    found = np.asarray(value, np.float64)
    if found.shape != gram.shape or not np.isfinite(found).all():
        raise InputError(f"{name}: has shape {list(found.shape)}; give finite numbers of the shape {list(gram.shape)}")
    return found
