"""From what an optimizer moves (w) to coefficients (alpha), and back.

    real       alpha = w
    sigmoid    alpha = 1 / (1 + e^-w)                       in (0, 1); the released code of Expert Merging
    softplus   alpha = log(1 + e^w)                         positive
    softmax    alpha_k = e^{w_k} / sum_j e^{w_j}            on the simplex over experts
    affine     alpha_k = w_k + (1 - sum_j w_j) / K          sums to 1 over experts, of any sign
    box        alpha = w, projected onto [0, 1] after each step

Coefficients that are not learned keep their value and bypass the map. Maps that know more of the experts than their
number are in ``spaces``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

import numpy as np

from consilience.coefficients.coefficients import Alpha
from consilience.coefficients.spectrum import Spectrum
from consilience.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["real", "sigmoid", "softplus", "softmax", "affine", "box"]


class Parameterisation(Protocol):
    """A map from w [R, N] to coefficients [K, N], of which ``learned`` [N] move."""

    @property
    def kind(self) -> str:
        """The map's name."""
        ...

    @property
    def start(self) -> "Tensor":
        """First values [R, N]: coefficients, or coordinates where w is no table of experts."""
        ...

    @property
    def learned(self) -> "Tensor":
        """Which columns [N] move."""
        ...

    @property
    def plain(self) -> bool:
        """Whether w is alpha, so that the anchor's penalty has a proximal step in w."""
        ...

    def alpha(self, w: "Tensor") -> "Tensor":
        """Return the coefficients of ``w`` [R, N], differentiably."""
        ...

    def coefficients(self, w: "Tensor") -> Alpha:
        """Return the coefficients of ``w`` as an array of their own."""
        ...

    def invert(self, alpha: "Tensor") -> "Tensor":
        """Return a w [R, N] whose coefficients are ``alpha`` [K, N], or the map's nearest."""
        ...

    def initial(self) -> "Tensor":
        """Return the w of the start."""
        ...

    def project(self, w: "Tensor") -> None:
        """Bring ``w`` back into the set it is constrained to, in place."""
        ...


@dataclass(frozen=True)
class OfKind:
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
        return as_array(self.alpha(w.detach()))

    def invert(self, alpha: "Tensor") -> "Tensor":
        """Return the ``w`` whose coefficients are ``alpha`` (on the simplex: ``alpha`` divided by its sum)."""
        import torch

        if self.kind == "sigmoid":
            return torch.logit(torch.where(self.learned, alpha, torch.full_like(alpha, 0.5)))
        if self.kind == "softplus":
            return torch.where(self.learned, alpha + torch.log(-torch.expm1(-alpha)), torch.zeros_like(alpha))
        if self.kind == "softmax":
            return torch.where(self.learned, torch.log(alpha), torch.zeros_like(alpha))
        return alpha.clone()

    def initial(self) -> "Tensor":
        """Return the ``w`` whose coefficients are ``start``."""
        return self.invert(self.start)

    def project(self, w: "Tensor") -> None:
        """Bring ``w`` back into the set it is constrained to, in place."""
        if self.kind == "box":
            w.clamp_(0.0, 1.0)

    @property
    def plain(self) -> bool:
        """Whether w is alpha, so that the anchor's penalty has a proximal step in w."""
        return self.kind in ("real", "box")


@dataclass(frozen=True)
class Around:
    """A map made of another: what it hands on as it is, and what follows from ``alpha``."""

    inner: Parameterisation

    @property
    def kind(self) -> str:
        """The inner map's name."""
        return self.inner.kind

    @property
    def start(self) -> "Tensor":
        """The inner map's start."""
        return self.inner.start

    @property
    def learned(self) -> "Tensor":
        """Which columns [N] move."""
        return self.inner.learned

    def alpha(self, w: "Tensor") -> "Tensor":
        """Return the coefficients [K, N] of ``w``, differentiably."""
        return self.inner.alpha(w)

    def coefficients(self, w: "Tensor") -> Alpha:
        """Return the coefficients of ``w`` as an array of their own."""
        return as_array(self.alpha(w.detach()))

    def initial(self) -> "Tensor":
        """Return the w of the start."""
        return self.inner.initial()


def as_array(alpha: "Tensor") -> Alpha:
    """Return a copy in float64."""
    return np.array(alpha.numpy(), np.float64)


#: Open interval that the start must lie in, and how errors say so.
_RANGES = {
    "sigmoid": (0.0, 1.0, "above 0 and below 1"),
    "softplus": (0.0, float("inf"), "above 0"),
    "softmax": (0.0, float("inf"), "above 0"),
}
_FINITE = (-float("inf"), float("inf"), "that is finite")


def parameterise(kind: Kind, alpha: Alpha, learned: object) -> OfKind:
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
    return OfKind(kind, start, mask)


@dataclass(frozen=True, kw_only=True)
class SpaceSettings:
    """Where coefficients may lie, whatever the experts are."""

    coefficients: Annotated[Kind, "set that coefficients are from; softmax and affine sum to 1 over experts"] = "real"

    def map(self, alpha: Alpha, learned: object, spectrum: Callable[[], Spectrum]) -> Parameterisation:
        """Return the map whose start is ``alpha`` [K, N]; see ``parameterise``."""
        del spectrum
        return parameterise(self.coefficients, alpha, learned)
