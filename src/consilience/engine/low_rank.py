"""The best low-rank approximation of a matrix, of a product of factors, and nearly the best of a large matrix.

    X ~ B A,    B = U_r S_r^(1/2),    A = S_r^(1/2) V_r^T,    energy kept = sum_{i <= r} s_i^2,    of ||X||_F^2

numpy's LAPACK in float64: merges do without torch.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
#: A large matrix is factorised through a random projection (Halko et al. 2011) of this many extra columns, refined by
#: this many power iterations.
OVERSAMPLE, POWER = 16, 2


@dataclass(frozen=True, eq=False)
class LowRank:
    """Factors ``b`` [rows, r] and ``a`` [r, columns] of a matrix, the energy they keep and the matrix's own."""

    b: Array
    a: Array
    kept: float
    total: float

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0]


def truncate(left: Array, right: Array, rank: int) -> LowRank:
    """Return the best rank-``rank`` factors of ``left`` [rows, R] @ ``right`` [R, columns], through its R x R core."""
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right.T)
    u, s, vt = np.linalg.svd(r_left @ r_right.T)
    keep = min(rank, len(s))
    root = np.sqrt(s[:keep])
    energy = s**2
    return LowRank(
        q_left @ (u[:, :keep] * root),
        (root[:, None] * vt[:keep]) @ q_right.T,
        float(energy[:keep].sum()),
        float(energy.sum()),
    )


def factorise(matrix: Array, rank: int | None = None, energy: float | None = None) -> LowRank:
    """Return the best factors of a matrix: of rank ``rank`` at most, keeping the share ``energy`` if that takes less.

    The right singular vectors are eigenvectors of X^T X (X being the taller of the matrix and its transpose), and B A
    is X projected on them, so that no more than the square root of float64's precision is lost and at full rank
    nothing: four times as fast as a singular value decomposition.

    Args:
        matrix: [rows, columns], float64.
        rank: the largest rank; None: as ``energy`` asks.
        energy: the share of ||X||_F^2 to keep, in (0, 1]; None: ``rank`` decides alone.
    """
    tall = matrix.shape[0] >= matrix.shape[1]
    x = matrix if tall else matrix.T
    values, vectors = np.linalg.eigh(x.T @ x)
    keep = _rank(np.maximum(values[::-1], 0.0), rank, energy)
    v = vectors[:, ::-1][:, :keep]
    left = x @ v
    squares = np.square(left).sum(0)
    root = squares**0.25
    left, right = left / np.where(root > 0, root, 1.0), v * root
    b, a = (left, right.T) if tall else (right, left.T)
    total = float(np.square(x).sum())
    return LowRank(np.ascontiguousarray(b), np.ascontiguousarray(a), min(float(squares.sum()), total), total)


def _rank(squares: Array, rank: int | None, energy: float | None) -> int:
    """Return how many singular values to keep, given their squares from the largest on: one at least."""
    most = len(squares) if rank is None else min(rank, len(squares))
    if energy is None:
        return most
    running = np.cumsum(squares)
    return max(1, min(most, int(np.searchsorted(running, energy * running[-1])) + 1))


def sketch(matrix: Array, rank: int) -> LowRank:
    """Return nearly the best rank-``rank`` factors of a matrix, by a random projection where it is much larger."""
    if min(matrix.shape) <= 4 * (rank + OVERSAMPLE):
        return factorise(matrix, rank)
    probe = np.random.default_rng(0).standard_normal((matrix.shape[1], rank + OVERSAMPLE))
    basis = np.linalg.qr(matrix @ probe)[0]
    for _ in range(POWER):
        basis = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ basis)[0])[0]
    found = truncate(basis, basis.T @ matrix, rank)
    return LowRank(found.b, found.a, found.kept, float(np.square(matrix).sum()))
