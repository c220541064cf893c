"""From what an optimizer moves (w) to coefficients (alpha), and back.

    real       alpha = w
    sigmoid    alpha = 1 / (1 + e^-w)                       in (0, 1); the released code of Expert Merging
    softplus   alpha = log(1 + e^w)                         positive
    softmax    alpha_k = e^{w_k} / sum_j e^{w_j}            on the simplex over experts
    affine     alpha_k = w_k + (1 - sum_j w_j) / K          sums to 1 over experts, of any sign
    box        alpha = w, projected onto [0, 1] after each step

Coefficients that are not learned keep their value and bypass the map.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from consilience.coefficients.coefficients import Alpha
from consilience.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["real", "sigmoid", "softplus", "softmax", "affine", "box"]


@dataclass(frozen=True)
class Parameterisation:
    """The map of one kind, for coefficients [K, N] of which ``learned`` [N] move and the rest stay at ``start``."""

    kind: Kind
    start: "Tensor"
    learned: "Tensor"

    def alpha(self, w: "Tensor") -> "Tensor":
        """Return the coefficients of ``w`` [K, N]."""
        import torch

        mapped = {
            "real": lambda: w,
            "box": lambda: w,
            "sigmoid": lambda: torch.sigmoid(w),
            "softplus": lambda: torch.nn.functional.softplus(w),
            "softmax": lambda: torch.softmax(w, 0),
            "affine": lambda: w + (1 - w.sum(0, keepdim=True)) / w.shape[0],
        }[self.kind]()
        return torch.where(self.learned, mapped, self.start)

    def coefficients(self, w: "Tensor") -> Alpha:
        """Return the coefficients of ``w`` as an array of their own."""
        return np.array(self.alpha(w.detach()).numpy(), np.float64)

    def initial(self) -> "Tensor":
        """Return the ``w`` whose coefficients are ``start`` (on the simplex: ``start`` divided by its sum)."""
        import torch

        start = self.start
        if self.kind == "sigmoid":
            return torch.logit(torch.where(self.learned, start, torch.full_like(start, 0.5)))
        if self.kind == "softplus":
            return torch.where(self.learned, start + torch.log(-torch.expm1(-start)), torch.zeros_like(start))
        if self.kind == "softmax":
            return torch.where(self.learned, torch.log(start), torch.zeros_like(start))
        return start.clone()

    def project(self, w: "Tensor") -> None:
        """Bring ``w`` back into the set it is constrained to, in place."""
        if self.kind == "box":
            w.clamp_(0.0, 1.0)

    @property
    def plain(self) -> bool:
        """Whether w is alpha, so that the anchor's penalty has a proximal step in w."""
        return self.kind in ("real", "box")


#: Open interval that the start must lie in, and how errors say so.
_RANGES = {
    "sigmoid": (0.0, 1.0, "above 0 and below 1"),
    "softplus": (0.0, float("inf"), "above 0"),
    "softmax": (0.0, float("inf"), "above 0"),
}
_FINITE = (-float("inf"), float("inf"), "that is finite")


def parameterise(kind: Kind, alpha: Alpha, learned: object) -> Parameterisation:
    """Return the map whose start is ``alpha`` [K, N].

    Raises:
        InputError: the start does not lie where the map can reach.
    """
    import torch

    start, mask = torch.tensor(alpha, dtype=torch.float64), torch.as_tensor(learned)
    low, high, where = _RANGES.get(kind, _FINITE)
    free = start[:, mask]
    inside = (free > low) & (free < high)
    if kind == "box":
        inside, where = (free >= 0) & (free <= 1), "in [0, 1]"
    if not bool(inside.all()):
        wrong = float(free[~inside][0])
        raise InputError(f"alphabar: {kind} coefficients cannot start at {wrong:g}; choose a value {where}")
    if kind in ("softmax", "affine"):
        total = start.sum(0, keepdim=True)
        fixed = start / total if kind == "softmax" else start + (1 - total) / start.shape[0]
        start = torch.where(mask, fixed, start)
    return Parameterisation(kind, start, mask)
