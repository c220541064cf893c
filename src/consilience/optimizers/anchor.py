"""The L1 anchor: coefficients leave their starting point only where the loss insists.

    R(alpha) = 1 / (K N) sum_{k, s} |alpha_{k, s} - alphabar_k|         ("paper": N learned coefficients per expert)
    R_code(alpha) = K R(alpha)                                          ("code": as the released code normalises)

Source: Expert Merging, arXiv:2509.25712. In the released code every micro-batch holds one expert's loss and the whole
penalty, so against the paper's sum over experts its factor is K^2 in all; ``norm="code"`` with a total of "mean" is
that code.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from consilience.methods.signature import Range

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AnchorSettings:
    """How strongly coefficients are held at their start."""

    gamma: Annotated[float, Range(0), "weight of the L1 anchor"] = 0.0
    reg_norm: Annotated[Literal["paper", "code"], "the anchor's norm: mean over all, or that times experts"] = "paper"


@dataclass(frozen=True)
class Anchor:
    """The penalty ``gamma R(alpha)``: ``value`` [K, N] are the anchors, ``learned`` [N] says what counts."""

    value: "Tensor"
    learned: "Tensor"
    gamma: float
    norm: Literal["paper", "code"] = "paper"

    @property
    def slope(self) -> float:
        """``gamma`` over the number of coefficients that one |alpha - alphabar| is divided by."""
        experts, count = self.value.shape[0], int(self.learned.sum())
        return self.gamma / max(1, count if self.norm == "code" else experts * count)

    def penalty(self, alpha: "Tensor") -> "Tensor":
        """``gamma R(alpha)``; its derivative is a subgradient (0 at the anchor). Without gamma it is 0."""
        if not self.gamma:
            return alpha.new_zeros(())
        return self.slope * (alpha - self.value)[:, self.learned].abs().sum()

    def shrink(self, alpha: "Tensor", step: "Tensor | float") -> None:
        """Apply the proximal map of ``step * gamma R`` in place: go ``step * slope`` towards the anchor, or onto it.

        A subgradient would make Adam jitter by its learning rate around the anchor whatever gamma is.
        """
        difference = alpha - self.value
        moved = difference.sign() * (difference.abs() - step * self.slope).clamp(min=0)
        alpha.copy_(self.value + moved)
