"""Mixing some of the experts: those that alone do best on the target, the others with coefficient 0."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from consilience.errors import InputError
from consilience.optimizers.parameterisation import Around

if TYPE_CHECKING:
    from torch import Tensor


def screen(losses: Sequence[float], keep: int) -> tuple[int, ...]:
    """Return the ``keep`` experts whose own target losses are lowest, in their order.

    Losses that are not finite are the worst; among equals the first are kept.

    Args:
        losses: [K] the target loss of every expert alone.
        keep: how many to keep.

    Raises:
        InputError: ``keep`` is not among 1 to K, or fewer losses than that are finite.
    """
    finite = int(np.isfinite(losses).sum())
    if not 1 <= keep <= finite:
        raise InputError(
            f"keep: {keep} experts of {len(losses)} cannot be kept, {finite} have a finite loss; choose 1 to {finite}"
        )
    ranked = np.argsort(np.where(np.isfinite(losses), losses, np.inf), kind="stable")
    return tuple(sorted(int(k) for k in ranked[:keep]))


@dataclass(frozen=True)
class Kept(Around):
    """A map of the ``chosen`` experts alone, as coefficients of all ``experts``: those left out have 0.

    alpha_k = inner.alpha(w)_j  where k is the j-th of the chosen, else 0;  ``start`` has the chosen experts' rows
    """

    chosen: tuple[int, ...]
    experts: int

    @property
    def plain(self) -> bool:
        """Whether w is alpha: it holds the chosen experts' rows alone."""
        return False

    def alpha(self, w: "Tensor") -> "Tensor":
        """Return the coefficients [K, N] of ``w``, differentiably."""
        import torch

        own = self.inner.alpha(w)
        return own.new_zeros(self.experts, own.shape[1]).index_copy(0, torch.tensor(self.chosen), own)

    def invert(self, alpha: "Tensor") -> "Tensor":
        """Return a w whose coefficients are those of the chosen experts in ``alpha`` [K, N], or the map's nearest."""
        return self.inner.invert(alpha[list(self.chosen)])

    def project(self, w: "Tensor") -> None:
        """Bring ``w`` back into the set it is constrained to, in place."""
        self.inner.project(w)
