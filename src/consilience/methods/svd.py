"""Singular values for spectral methods: what is no more than rounding is left out, and factors stay factors.

Of float32 matrices they are eigenvalues of the smaller Gram matrix in float64, several times faster than by LAPACK's
decomposition in float32: squaring costs half of float64's digits, and float32 has no more than the other half.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from consilience.experts.stack import Stack
from consilience.methods.program import Update

#: A Gram matrix whose eigenvalues differ more loses the weaker ones' directions, to float32's digits.
LEAST = 1e-8

Triples = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]


def leading(left: npt.NDArray[Any], right: npt.NDArray[Any] | None, count: int) -> Triples:
    """Return at most ``count`` singular triples (u [m, c], s [c], v [c, n]) of ``left`` or ``left @ right``.

    Triples of no more than rounding's size are not among them: their vectors are arbitrary. Factors stay factors: two
    QR decompositions and an SVD of [r, r].
    """
    if right is None and left.dtype == np.float32:
        return _by_gram(left, count)
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


def _by_gram(matrix: npt.NDArray[Any], count: int) -> Triples:
    """Return the leading triples of a float32 matrix from the eigenvectors of its smaller Gram matrix."""
    wide = matrix.shape[0] < matrix.shape[1]
    tall = (matrix.T if wide else matrix).astype(np.float64)
    values, vectors = np.linalg.eigh(tall.T @ tall)
    s = np.sqrt(np.maximum(values[::-1], 0))
    floor = s[0] * max(matrix.shape) * np.finfo(np.float32).eps if s.size else 0.0
    kept = min(count, int((s > floor).sum()))
    s, right = s[:kept], vectors[:, ::-1][:, :kept]
    left = tall @ (right / s)
    u, v = (right, left.T) if wide else (left, right.T)
    return u.astype(np.float32), s.astype(np.float32), v.astype(np.float32)


def polar(columns: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the nearest matrix with orthonormal columns: U V^T of an SVD, or A (A^T A)^(-1/2) where that is exact."""
    if columns.dtype == np.float32 and columns.shape[1]:
        wide = columns.astype(np.float64)
        values, vectors = np.linalg.eigh(wide.T @ wide)
        if values[0] > LEAST * values[-1]:
            return (wide @ ((vectors / np.sqrt(values)) @ vectors.T)).astype(np.float32)
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
