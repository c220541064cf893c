"""What inner products of task vectors say: lengths, angles, displacement, and how much of the experts is common.

    G = tau^T tau,    V(p) = sum_k p_k ||tau_k||^2 - ||sum_k p_k tau_k||^2          (sum_k p_k = 1)
    D_k^2 = ||sum_j p_j tau_j - tau_k||^2,    sum_k p_k D_k^2 = V

V is how far, in the mean of squares, merging moves the experts from where they were trained. Everything here is exact
up to rounding, and additive over tensors: that of a model is the sum of its tensors'.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from consilience.coefficients.spectrum import largest_singular_value
from consilience.doctor.theory.bound import distances, spread_of_lengths

Vector = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Geometry:
    """Inner products ``gram`` [K, K] of K task vectors, those ``with_base`` [K] with theta_0, and ||theta_0||^2."""

    gram: Matrix
    with_base: Vector
    base: float

    def __add__(self, other: "Geometry") -> "Geometry":
        """Return the geometry of both sets of tensors together."""
        return Geometry(self.gram + other.gram, self.with_base + other.with_base, self.base + other.base)

    @property
    def count(self) -> int:
        """K."""
        return len(self.gram)

    @property
    def norms(self) -> Vector:
        """||tau_k||, [K]."""
        return np.sqrt(np.clip(np.diag(self.gram), 0, None))

    @property
    def base_norm(self) -> float:
        """||theta_0||."""
        return float(np.sqrt(max(0.0, self.base)))

    @property
    def cosines(self) -> Matrix:
        """cos(tau_j, tau_k), [K, K]; 0 where a task vector is 0."""
        return cosines(self.gram)

    @property
    def base_cosines(self) -> Vector:
        """cos(theta_k, theta_0), [K]; 1 for an expert that is the base, near 0 for one of another origin."""
        inner = self.base + self.with_base
        lengths = np.sqrt(np.clip(self.base + 2 * self.with_base + np.diag(self.gram), 0, None)) * self.base_norm
        return np.where(lengths > 0, inner / np.where(lengths > 0, lengths, 1.0), 1.0)

    def moves(self, p: Vector) -> Vector:
        """Return D_k^2 of weights p [K], of any sum: the squared distance of the merge from each expert, [K]."""
        return distances(self.gram, p)

    def displacement(self, p: Vector) -> float:
        """Return V of weights p [K] that sum to 1."""
        return max(0.0, float(spread_of_lengths(self.gram, p)))

    @property
    def centred(self) -> Matrix:
        """The inner products of the task vectors less their mean, [K, K]."""
        away = np.eye(self.count) - 1.0 / self.count
        return away @ self.gram @ away

    @property
    def sigma_max(self) -> float:
        """The largest singular value of the matrix of task vectors."""
        return largest_singular_value(self.gram)

    @property
    def sigma_max_centred(self) -> float:
        """The same of the task vectors less their mean."""
        return largest_singular_value(self.centred)

    @property
    def common(self) -> float:
        """Share of the task vectors' energy in their mean, K ||mean||^2 / sum_k ||tau_k||^2: 1/K where orthogonal."""
        total = float(np.trace(self.gram))
        return float(self.gram.sum()) / self.count / total if total > 0 else 0.0


def cosines(gram: Matrix) -> Matrix:
    """Return a Gram matrix [K, K] divided by the lengths; 0 where a length is 0."""
    lengths = np.sqrt(np.clip(np.diag(gram), 0, None))
    scale = lengths[:, None] * lengths[None]
    return np.clip(np.where(scale > 0, gram / np.where(scale > 0, scale, 1.0), 0.0), -1, 1)
