"""How far apart experts are: Gram matrices, the constant of GLUE's Proposition 1, and distances between blends.

    G = Theta^T Theta,   G_c = Theta_c^T Theta_c,   Theta_c = Theta (I - 11^T / K),   sigma_max = sqrt(lambda_max(G))

Proposition 1 bounds the error of the two-point estimate by a multiple of sigma_max(Theta)^2 ||dL/dtheta||^2. Nearly
collinear experts (the usual case) make sigma_max(Theta) about sqrt(K) ||theta||, all of it common to the experts. The
softmax's Jacobian and zero-sum directions leave the common part out: there sigma_max(Theta_c), often far smaller, holds
in its place.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from consilience.coefficients.coefficients import Alpha

Matrices = npt.NDArray[np.float64]


def largest_singular_value(gram: Matrices) -> float:
    """Return ``sigma_max(Theta) = sqrt(lambda_max(G))`` from ``G = Theta^T Theta``.

    An eigenvalue that rounding has made negative counts as 0.

    Args:
        gram: G [K, K], in the square of the columns' unit.
    """
    return float(np.sqrt(max(0.0, float(np.linalg.eigvalsh(gram)[-1]))))


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Per group of parameters: ``gram`` [N, K, K] of the experts, ``centred`` [N, M, M] of all rows less their mean.

    The mean is the experts'; with a base M = K + 1, and its row is the last. Centred values are of centred weights: of
    ``gram``, they would be differences of nearly equal numbers.
    """

    gram: Matrices
    centred: Matrices

    @classmethod
    def of_task_vectors(cls, gram: Matrices) -> "Spectrum":
        """Return the spectrum from the inner products [N, 1 + K, 1 + K] of theta_0, tau_1 ... tau_K of every group."""
        count = gram.shape[1] - 1
        experts = np.hstack([np.ones((count, 1)), np.eye(count)])
        apart = np.hstack([np.zeros((count + 1, 1)), np.eye(count + 1, count) - 1.0 / count])
        return cls(experts @ gram @ experts.T, apart @ gram @ apart.T)

    def of(self, chosen: Sequence[int]) -> "Spectrum":
        """Return the spectrum of some of the experts: centred values are of weights less *their* mean."""
        rows = [*chosen, *range(self.experts, self.centred.shape[1])]
        # Differences of rows do not depend on whose mean was taken away.
        apart = np.eye(self.centred.shape[1])[rows] - np.eye(self.centred.shape[1])[list(chosen)].mean(0)
        pick = np.ix_(range(len(self.gram)), chosen, chosen)
        return Spectrum(self.gram[pick], apart @ self.centred @ apart.T)

    @property
    def experts(self) -> int:
        """K."""
        return self.gram.shape[1]

    @property
    def sigma_max(self) -> float:
        """The largest singular value of Theta; with groups, of the matrix whose columns the K N coefficients multiply.

        That matrix is block-diagonal, so it is the largest of the groups'.
        """
        return max(map(largest_singular_value, self.gram))

    @property
    def sigma_max_centred(self) -> float:
        """The same of Theta_c."""
        return max(map(largest_singular_value, self.centred[:, : self.experts, : self.experts]))

    @property
    def spread(self) -> float:
        """The root mean square distance of the experts from their mean; 1 if they are all equal."""
        total = float(np.trace(self.centred[:, : self.experts, : self.experts].sum(0)))
        return float(np.sqrt(total / self.experts)) if total > 0 else 1.0

    @property
    def metric(self) -> Matrices:
        """What changes of the coefficients are measured by, [N, K, K]: of the task vectors, where there is a base.

        Without one, coefficients sum to 1 and any common origin will do: it is the experts' mean.
        """
        if self.centred.shape[1] == self.experts:
            return self.centred
        own, last = self.centred[:, :-1, :-1], self.centred[:, -1:, :-1]
        return own - last - last.transpose(0, 2, 1) + self.centred[:, -1:, -1:]

    def distance(self, alpha: Alpha) -> float:
        """Return ``||theta(alpha) - theta_bar||``."""
        away = (alpha - 1.0 / self.experts).T
        return float(np.sqrt(max(0.0, float(np.einsum("nk,nkj,nj->", away, self.metric, away)))))

    def facts(self, alpha: Alpha) -> dict[str, Any]:
        """Return what is reported of a mixture ``alpha`` [K, N].

        ``entropy``: see there; ``distance``: of the mixture from the experts' mean, as a share of their own root mean
        square distance; ``left_hull``: whether some coefficient is negative, or they sum to more than 1.
        """
        return {
            "entropy": entropy(alpha),
            "distance": self.distance(alpha) / self.spread,
            "left_hull": bool((alpha < 0).any() or (alpha.sum(0) > 1 + 1e-9).any()),
            "sigma_max": self.sigma_max,
            "sigma_max_centred": self.sigma_max_centred,
        }


def entropy(alpha: Alpha) -> float:
    """Return ``-sum_k alpha_k log alpha_k`` in nats, the mean over groups; NaN off the simplex."""
    if (alpha < 0).any() or not np.allclose(alpha.sum(0), 1):
        return math.nan
    logs = np.log(np.where(alpha > 0, alpha, 1.0))
    return float(-(alpha * logs).sum(0).mean())
