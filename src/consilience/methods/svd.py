"""Singular values for spectral methods: what is no more than rounding is left out, and factors stay factors."""

from typing import Any

import numpy as np
import numpy.typing as npt

from consilience.experts.stack import Stack
from consilience.methods.program import Update

Triples = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]


def leading(left: npt.NDArray[Any], right: npt.NDArray[Any] | None, count: int) -> Triples:
    """Return at most ``count`` singular triples (u [m, c], s [c], v [c, n]) of ``left`` or ``left @ right``.

    Triples of no more than rounding's size are not among them: their vectors are arbitrary. Factors stay factors: two
    QR decompositions and an SVD of [r, r].
    """
    if right is None:
        u, s, v = np.linalg.svd(left, full_matrices=False)
        size = max(left.shape)
    else:
        (q, r), (p, t) = np.linalg.qr(left), np.linalg.qr(right.T)
        u, s, v = np.linalg.svd(r @ t.T, full_matrices=False)
        u, v, size = q @ u, v @ p.T, max(len(left), right.shape[1])
    rank = int((s > s[0] * size * np.finfo(s.dtype).eps).sum()) if s.size and s[0] > 0 else 0
    kept = min(count, rank)
    return u[:, :kept], s[:kept], v[:kept]


def polar(columns: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the nearest matrix with orthonormal columns: U V^T of an SVD."""
    u, _, v = np.linalg.svd(columns, full_matrices=False)
    return u @ v


def summed(stack: Stack) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
    """Return the sum of the task vectors: a matrix, or for adapters (left, right), whose product it is."""
    if not stack.low_rank:
        return stack.whole().sum(0), None
    factors = stack.factors()
    left = [one.left * one.scale for one in factors]
    return np.concatenate(left, 1), np.concatenate([one.right for one in factors], 0)


def nothing(shape: tuple[int, ...], like: npt.NDArray[Any]) -> Update:
    """Return the update of a tensor that no expert changes."""
    return Update(np.zeros((shape[0], 1), like.dtype), np.zeros((1, shape[1]), like.dtype))
