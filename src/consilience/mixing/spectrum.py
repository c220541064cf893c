"""How far apart experts are: Gram matrices, the constant of GLUE's Proposition 1, and distances between blends.

    G = Theta^T Theta,   G_c = Theta_c^T Theta_c,   Theta_c = Theta (I - 11^T / K),   sigma_max = sqrt(lambda_max(G))

Proposition 1 bounds the error of the two-point estimate by a multiple of sigma_max(Theta)^2 ||dL/dtheta||^2. Nearly
collinear experts (the usual case) make sigma_max(Theta) about sqrt(K) ||theta||, all of it common to the experts. The
softmax's Jacobian and zero-sum directions leave the common part out: there sigma_max(Theta_c), often far smaller, holds
in its place.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from consilience.coefficients.coefficients import Alpha
from consilience.coefficients.gram import largest_singular_value
from consilience.mixing.bank import ExpertBank

Matrices = npt.NDArray[np.float64]

#: Columns of the bank that are in float64 at a time.
_COLUMNS = 1 << 16


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Per group of parameters: ``gram`` [N, K, K] of the experts, ``centred`` [N, M, M] of all rows less their mean.

    The mean is the experts'; with a base M = K + 1, and its row is the last. Centred values are summed from centred
    columns: of ``gram``, they would be differences of nearly equal numbers.
    """

    gram: Matrices
    centred: Matrices

    @classmethod
    def of(cls, bank: ExpertBank) -> "Spectrum":
        """Return the spectrum of a bank, in float64, in one pass over it."""
        experts, rows = len(bank.names), bank.matrix.shape[0]
        gram = np.zeros((bank.count, experts, experts))
        centred = np.zeros((bank.count, rows, rows))
        for span in bank.layout.spans:
            for start in range(span.start, span.stop, _COLUMNS):
                block = bank.matrix[:, start : min(start + _COLUMNS, span.stop)].to(torch.float64, copy=True)
                gram[span.index] += (block[:experts] @ block[:experts].T).cpu().numpy()
                block -= block[:experts].mean(0)
                centred[span.index] += (block @ block.T).cpu().numpy()
        return cls(gram, centred)

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
