"""The K-dimensional least-squares problem of one group of coefficients, from Gram matrices.

sum_k beta_k / n_k || X_k (sum_j alpha_j tau_j - tau_k)^T ||_F^2  =  alpha^T A alpha - 2 b^T alpha + c
A = sum_k beta_k gram[k],    b_i = sum_k beta_k gram[k, i, k],    c = sum_k beta_k gram[k, k, k]
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]
#: Eigenvalues below this share of the largest are what float32 products leave of 0: experts that do the same.
_NOTHING = 1e-10


@dataclass(frozen=True, eq=False)
class Quadratic:
    """``alpha^T A alpha - 2 b^T alpha + c``: ``a`` [K, K] positive semidefinite, ``b`` [K], ``c``."""

    a: Matrix
    b: Matrix
    c: float

    @classmethod
    def of(cls, grams: Sequence[Matrix], beta: Sequence[float]) -> "Quadratic":
        """Sum the problems of a group's matrices, each given as ``gram`` [K, K, K]; see the module's docstring."""
        total = np.zeros((len(beta),) * 3)
        for gram in grams:
            total += gram
        weights = np.asarray(beta, np.float64)
        a = np.einsum("k,kij->ij", weights, total)
        own = np.einsum("kik->ik", total)
        return cls((a + a.T) / 2, own @ weights, float(np.diag(own) @ weights))

    def value(self, alpha: Matrix) -> float:
        """Return the sum of squares at ``alpha`` [K]."""
        return float(alpha @ self.a @ alpha - 2 * self.b @ alpha + self.c)

    def minimum(self, anchor: Matrix, ridge: float) -> Matrix:
        """Return the alpha [K] that minimises the sum of squares plus ``ridge * sum_j A_jj (alpha_j - anchor_j)^2``.

            (A + ridge diag A) (alpha - anchor) = b - A anchor

        Where the data cannot tell experts apart (or say nothing of one), the solution nearest to the anchor is taken.
        Coordinates are scaled by sqrt(A_jj), so that scaling a task vector only scales its coefficient.
        """
        size = np.sqrt(np.diag(self.a))
        scale = np.divide(1.0, size, out=np.zeros_like(size), where=size > 0)
        values, vectors = np.linalg.eigh(self.a * np.outer(scale, scale))
        kept = values > _NOTHING * max(float(values[-1]), 0.0)
        slope = vectors[:, kept].T @ (scale * (self.b - self.a @ anchor))
        return anchor + scale * (vectors[:, kept] @ (slope / (values[kept] + ridge)))
