"""Closed forms: the merged task vector that disturbs every expert least, on the directions that this expert uses.

    argmin_tau sum_k w_k || (tau - T_k) A_k^T ||_F^2 = F + sum_k w_k (T_k - F) A_k^T A_k C^+,    C = sum_k w_k A_k^T A_k

T_k [m, n] is what is wanted of expert k, the rows of A_k [p_k, n] are the directions that it uses, and F is what stays
where no expert uses a direction: of all minimisers the nearest to F, of least norm for F = 0. C is [n, n]; where the
rows of all A_k together, A [p, n], are fewer than n, the same is had from A A^T [p, p]:  X A^T A (A^T A)^+ =
X A^T (A A^T)^+ A. Adapters never leave the space of their rows, [R_1; ...; R_K] = (.)Q with Q [sum r_k, n].

All in float64: C squares the condition of A.
"""

from collections.abc import Callable, Sequence

import numpy as np

from consilience.experts.stack import Stack
from consilience.methods.program import Floats, Update
from consilience.methods.rounding import unrounded

#: A matrix of this condition or less is solved by elimination: float64 leaves five digits of its weakest direction.
CONDITION = 1e11
#: Random right-hand sides by whose growth the condition is estimated, and products for the largest eigenvalue.
PROBES, POWERS = 8, 6


def task_matrices(stack: Stack) -> tuple[list[Floats], Floats | None]:
    """Return (task vectors X_k [m, q], Q [q, n]): tau_k = X_k Q, or tau_k itself where Q is None.

    The rows of Q are orthonormal, so that inner products of rows are those of the task vectors' rows.
    """
    if not stack.low_rank:
        return unrounded(stack), None
    factors = stack.factors()
    q, across = np.linalg.qr(np.concatenate([one.right for one in factors]).T.astype(np.float64))
    found = [np.zeros((stack.shape[0], q.shape[1])) for _ in stack.rows]
    at = 0
    for one in factors:
        stop = at + len(one.right)
        found[one.row] = (one.left.astype(np.float64) * one.scale) @ across[:, at:stop].T
        at = stop
    return found, q.T


def back(merged: Floats, q: Floats | None) -> Floats | Update:
    """Return a merged task vector that was found in the space of Q's rows."""
    return merged if q is None else Update(merged, q)


def inverse_norms(vectors: Sequence[Floats], power: int) -> list[float]:
    """Return each matrix' 1 / ||.||_F^power; 0 for one that is 0."""
    norms = [float(np.linalg.norm(vector)) for vector in vectors]
    return [norm**-power if norm else 0.0 for norm in norms]


def nearest(
    wanted: Sequence[Floats],
    used: Sequence[Floats],
    weights: Sequence[float],
    *,
    rest: Floats | None = None,
    keep: Callable[[Floats], int] | None = None,
) -> Floats:
    """Return the minimiser [m, n] of ``sum_k w_k || (tau - wanted_k) used_k^T ||_F^2`` that is nearest to ``rest``.

    Args:
        wanted: T_k [m, n].
        used: A_k [p_k, n].
        weights: w_k.
        rest: F [m, n]; 0 by default.
        keep: how many of C's eigenvalues (ascending, those above rounding) are inverted: the largest. Where the others'
            directions lead, the result is ``rest``. All by default.
    """
    size, parts = used[0].shape[1], list(zip(wanted, used, weights, strict=True))
    if sum(map(len, used)) < size:
        rows = np.concatenate([w**0.5 * a for _, a, w in parts])
        load = np.concatenate([w**0.5 * (t @ a.T) for t, a, w in parts], 1)
        found = divided(load if rest is None else load - rest @ rows.T, rows @ rows.T, keep) @ rows
    else:
        gram, load = np.zeros((size, size)), np.zeros_like(wanted[0])
        for t, a, w in parts:
            own = a.T @ a
            own *= w
            gram += own
            load += w * _pulled(t, a)
        found = divided(load if rest is None else load - rest @ gram, gram, keep)
    return found if rest is None else rest + found


def _pulled(wanted: Floats, used: Floats) -> Floats:
    """Return T A^T A by the cheaper order of the two products."""
    if len(used) < used.shape[1]:
        return (wanted @ used.T) @ used
    return wanted @ (used.T @ used)


def divided(load: Floats, gram: Floats, keep: Callable[[Floats], int] | None = None) -> Floats:
    """Return ``load @ pinv(gram)`` for a symmetric, positive semi-definite matrix [n, n]; see ``nearest``."""
    if not gram.any():
        return np.zeros_like(load)
    found = _eliminated(load, gram) if keep is None else None
    if found is not None:
        return found
    values, vectors = spectrum(gram)
    first = 0 if keep is None else max(0, len(values) - keep(values))
    vectors = vectors[:, first:]
    return ((load @ vectors) / values[first:]) @ vectors.T


def spectrum(gram: Floats) -> tuple[Floats, Floats]:
    """Return the eigenvalues above rounding (ascending, [r]) and their vectors [n, r] of a Gram matrix [n, n]."""
    values, vectors = np.linalg.eigh(gram)
    held = values > max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
    return values[held], vectors[:, held]


def _eliminated(load: Floats, gram: Floats) -> Floats | None:
    """Return ``load @ inv(gram)``; None where the matrix may be too ill-conditioned for it.

    A random vector z has a part of about |z| / sqrt(n) along the weakest eigenvector, which elimination lets grow by
    the inverse of its eigenvalue: the largest growth of a few tells it, without a decomposition.
    """
    size = len(gram)
    probes = np.random.default_rng(0).standard_normal((PROBES, size))
    try:
        found = np.linalg.solve(gram, np.concatenate([load, probes]).T).T
    except np.linalg.LinAlgError:
        return None
    growth = np.linalg.norm(found[-PROBES:], axis=1) / np.linalg.norm(probes, axis=1)
    for _ in range(POWERS):
        probes = probes / np.linalg.norm(probes, axis=1, keepdims=True) @ gram
    condition = float(growth.max()) * size**0.5 * float(np.linalg.norm(probes, axis=1).max())
    return found[:-PROBES] if condition <= CONDITION else None


def participation(values: Floats) -> int:
    """Return ceil((sum_i s_i)^2 / sum_i s_i^2) of s_i^2 = ``values``: how many singular values take part."""
    roots = np.sqrt(values)
    return int(np.ceil(roots.sum() ** 2 / values.sum())) if len(values) else 0
