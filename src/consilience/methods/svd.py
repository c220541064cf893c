"""Singular values for spectral methods: what is no more than rounding is left out, and factors stay factors.

Of float32 matrices they are eigenvalues of the smaller Gram matrix in float64, several times faster than by LAPACK's
decomposition in float32: squaring costs half of float64's digits, and float32 has no more than the other half.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from consilience.experts.stack import Stack
from consilience.methods.program import Update

#: A Gram matrix of float32 columns whose eigenvalues differ more has directions that rounding alone may have made.
LEAST = 1e-8
#: Singular values may differ as much for products in float32 to be as exact as LAPACK's triples in float32.
WEAK = 0.1
#: An inverse root with larger entries magnifies rounding in float32 as much.
LARGE = 8.0

Triples = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]


def leading(left: npt.NDArray[Any], right: npt.NDArray[Any] | None, count: int, floor: float = 0.0) -> Triples:
    """Return at most ``count`` singular triples (u [m, c], s [c], v [c, n]) of ``left`` or ``left @ right``.

    Triples of no more than rounding's size (``floor``, or what is lost in computing them) are not among them: their
    vectors are arbitrary. Factors stay factors: two QR decompositions and an SVD of [r, r].
    """
    if right is None and left.dtype == np.float32:
        return _by_gram(left, count, floor)
    if right is None:
        u, s, v = np.linalg.svd(left, full_matrices=False)
        size = max(left.shape)
    else:
        (q, r), (p, t) = np.linalg.qr(left), np.linalg.qr(right.T)
        u, s, v = np.linalg.svd(r @ t.T, full_matrices=False)
        u, v, size = q @ u, v @ p.T, max(len(left), right.shape[1])
    rank = int((s > max(floor, s[0] * size * np.finfo(s.dtype).eps)).sum()) if s.size and s[0] > 0 else 0
    kept = min(count, rank)
    return u[:, :kept], s[:kept], v[:kept]


def _by_gram(matrix: npt.NDArray[Any], count: int, floor: float) -> Triples:
    """Return the leading triples of a float32 matrix from the eigenvectors of its smaller Gram matrix.

    The Gram matrix and its eigenvectors are float64. The other side's vectors are products in float32, as long as their
    rounding, which is of the largest singular value's size, is small for the weakest.
    """
    wide = matrix.shape[0] < matrix.shape[1]
    rows = matrix if wide else matrix.T
    exact = rows.astype(np.float64)
    values, vectors = np.linalg.eigh(exact @ exact.T)
    s = np.sqrt(np.maximum(values[::-1], 0))
    floor = max(floor, s[0] * max(matrix.shape) * np.finfo(np.float32).eps) if s.size else 0.0
    kept = min(count, int((s > floor).sum()))
    s, own = s[:kept], np.ascontiguousarray(vectors[:, ::-1][:, :kept])
    if kept and s[-1] > WEAK * s[0]:
        del exact
        other = (own / s).T.astype(np.float32) @ rows
    else:
        other = ((own / s).T @ exact).astype(np.float32)
    own = own.astype(np.float32)
    return (own, s.astype(np.float32), other) if wide else (other.T, s.astype(np.float32), own.T)


def inverse_root(columns: npt.NDArray[Any]) -> npt.NDArray[np.float64] | None:
    """Return (A^T A)^(-1/2) of columns A in float64; None where they nearly depend on each other."""
    if columns.dtype != np.float32 or not columns.shape[1]:
        return None
    exact = columns.astype(np.float64)
    values, vectors = np.linalg.eigh(exact.T @ exact)
    if values[0] <= LEAST * values[-1]:
        return None
    return (vectors / np.sqrt(values)) @ vectors.T


def polar(columns: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the nearest matrix with orthonormal columns: A (A^T A)^(-1/2), or U V^T of an SVD where that is not exact.

    The inverse root is float64, so that its error is that of a float32 matrix' own rounding. Where columns depend on
    each other (experts that share directions) it is the root on A's range: vectors of singular values below half of the
    digits are rounding's, and are left out (of float32, below 1e-4).
    """
    root = inverse_root(columns)
    if root is not None:
        return (columns @ root).astype(np.float32)
    u, s, v = np.linalg.svd(columns, full_matrices=False)
    kept = int((s > s[0] * (LEAST if s.dtype == np.float32 else np.finfo(s.dtype).eps) ** 0.5).sum()) if s.size else 0
    return u[:, :kept] @ v[:kept]


def orthogonal(u: npt.NDArray[Any], s: npt.NDArray[Any], v: npt.NDArray[Any]) -> Update:
    """Return ``polar(u) diag(s) polar(v^T)^T`` of columns u [m, c] and rows v [c, n].

    Where both have inverse roots, products are of [c, c] but for one: u ((u^T u)^(-1/2) diag(s) (v v^T)^(-1/2)) v. A
    root that is large meets its own vectors in float64, before anything is rounded.
    """
    left, right = inverse_root(u), inverse_root(v.T)
    if left is None or right is None:
        return Update(polar(u) * s, polar(v.T).T)
    left *= s
    if right.diagonal().max() < LARGE:
        return Update((u @ (left @ right)).astype(u.dtype), v)
    return Update((u @ left).astype(u.dtype), (right @ v).astype(v.dtype))


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
