"""ACE-Merging as published: a regression on covariances of centred task vectors, with three steps on top."""

from typing import Annotated

import numpy as np

from consilience.experts.stack import Stack
from consilience.methods.closed_form import Floats
from consilience.methods.rounding import unrounded
from consilience.methods.signature import Default, Others, Range, matrix

#: Share of the rank that the last step lifts.
LIFTED = 0.3


@matrix(source="ACE-Merging 2026, CVPR, arXiv:2603.02945", copies=10)
def ace(
    stack: Stack,
    *,
    lambda_: Annotated[float, Default(1.0), "multiplier of the merged task vector"],
    ridge: Annotated[
        float, Default(1e-2), Range(0), "added to each covariance's diagonal: in units of squared weights"
    ],
    gate: Annotated[
        float, Default(0.3), Range(0), "above this spread of log norms covariances are normalised and refined"
    ],
    others: Others,
) -> Floats:
    """Merge by covariances of the task vectors' rows, a collective prior and, past a gate, a spectral refinement.

    n_k = ||tau_k||_F^2;   open if Var_k(log n_k) / (mean_k log n_k)^2 > gate, Var over K - 1
    c_k = tau_k - 1 m_k^T, m_k the mean row;   S_k = c_k^T c_k, e_k = ridge (open: both over tr S_k);  R_k = S_k + e_k I
    a = column means of sum_k S_k  (open: over mean_k n_k)
    W = (sum_k c_k R_k) (sum_k R_k + 1 a^T)^(-1)
    open: D = sum_k tau_k (S_k - mean_j R_j) + W, D = U S V^T, k = floor(0.3 rank): W += mean(S_1..S_k) U_k V_k^T
    theta = theta_0 + lambda W

    Known disagreements, with itself: the gate divides by the squared log of a squared norm, so that the *unit* of the
    weights opens it: the same task vectors times a number may be merged by another formula. The ridge has a unit, too.
    Centring loses what a task vector adds to all outputs alike. docs/methods/ace.md shows it; ACTMat has none of it.
    """
    del lambda_, others  # the engine's
    vectors = np.stack(unrounded(stack))
    sizes = np.square(vectors).sum((1, 2))
    opened = spread(sizes) > gate
    centred = vectors - vectors.mean(1, keepdims=True)
    size = vectors.shape[2]
    covariances: list[Floats] = []
    ridges: list[float] = []
    for one in centred:
        found = one.T @ one
        scale = float(np.trace(found)) if opened else 1.0
        covariances.append(found / scale if scale else found)
        ridges.append(ridge / scale if scale else ridge)
    total = np.sum(covariances, 0)
    prior = total.mean(0) / (sizes.mean() if opened else 1.0)
    load = np.sum([c @ s + e * c for c, s, e in zip(centred, covariances, ridges, strict=True)], 0)
    merged = _over(load, total + sum(ridges) * np.eye(size) + prior)
    return merged + _lift(vectors, covariances, sum(ridges), merged) if opened else merged


def spread(sizes: Floats) -> float:
    """Return the gate's statistic of squared norms [K]; 0 for one expert, whose variance is undefined."""
    if len(sizes) < 2:
        return 0.0
    logs = np.log(sizes + 1e-12)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.nan_to_num(logs.var(ddof=1) / logs.mean() ** 2, nan=0.0, posinf=np.inf))


def _over(load: Floats, total: Floats) -> Floats:
    """Return ``load @ inv(total)``, by the pseudo-inverse where there is none."""
    try:
        return np.linalg.solve(total.T, load.T).T
    except np.linalg.LinAlgError:
        return load @ np.linalg.pinv(total)


def _lift(vectors: Floats, covariances: list[Floats], ridges: float, merged: Floats) -> Floats:
    """Return what the spectral refinement adds."""
    mean = (np.sum(covariances, 0) + ridges * np.eye(vectors.shape[2])) / len(vectors)
    rest = merged + np.sum([v @ (s - mean) for v, s in zip(vectors, covariances, strict=True)], 0)
    u, s, v = np.linalg.svd(rest, full_matrices=False)
    held = int((s > s[:1].sum() * max(rest.shape) * np.finfo(np.float32).eps).sum())  # others' vectors are arbitrary
    count = min(int(LIFTED * len(s)), held)
    return s[:count].mean() * u[:, :count] @ v[:count] if count else np.zeros_like(merged)
