"""TACT: ACTMat with covariances of the task vectors' larger half."""

from typing import Annotated

import numpy as np

from consilience.experts.stack import Stack
from consilience.methods.closed_form import Floats, nearest
from consilience.methods.signature import Default, Others, Range, matrix
from consilience.methods.ties import kept


@matrix(source="ACTMat 2026, arXiv:2604.01329", copies=10)
def tact(
    stack: Stack,
    *,
    lambda_: Annotated[float, Default(1.0), "multiplier of the merged task vector"],
    density: Annotated[float, Default(0.5), Range(0, 1), "share of entries, by magnitude, that covariances are of"],
    others: Others,
) -> Floats:
    """Merge as ACTMat does, with the covariances of trimmed task vectors.

    tau = (sum_k tau_k C_k) (sum_k C_k)^+,   C_k = t_k^T t_k,   theta = theta_0 + lambda tau

    t_k is tau_k with all but the largest ``density`` m n magnitudes at 0 (ties by position). A trimmed adapter is of
    full rank: adapters are multiplied out. At density 1 it is ACTMat.
    """
    del lambda_, others  # the engine's
    vectors = list(stack.whole().astype(np.float64))
    trimmed = [_trimmed(vector, kept(vector.size, density)) for vector in vectors]
    return nearest(vectors, trimmed, [1.0] * len(vectors))


def _trimmed(vector: Floats, count: int) -> Floats:
    """Return a matrix with all but its ``count`` largest magnitudes at 0."""
    order = np.argsort(-np.abs(vector), axis=None, kind="stable")
    out = np.zeros_like(vector)
    out.flat[order[:count]] = vector.flat[order[:count]]
    return out
