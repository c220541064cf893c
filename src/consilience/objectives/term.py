"""One objective: what a model's outputs at compared positions lose, as a function that can be differentiated.

A term is one file: a frozen dataclass whose fields are its parameters (they appear in recipes, ``consilience methods``
and errors, see ``methods.signature``), one of which is its weight, ``NAME_weight``. ``registry`` lists it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from consilience.student.outputs import Outputs


@dataclass(frozen=True, eq=False)
class Compared:
    """What a term may know of N compared positions.

    Args:
        student: the student's outputs, with gradients.
        expert: the expert's on the same positions; None where no term reads them.
        targets: [N] labels, -1 where there is none.
        weights: [N] what a position counts in the mean.
        variances: the expert's variance per channel of every aligned block.
        vocabulary: V.
    """

    student: "Outputs"
    expert: "Outputs | None"
    targets: "Tensor"
    weights: "Tensor"
    variances: "dict[int, Tensor]"
    vocabulary: int

    def over_logits(self, loss: "Callable[[Tensor, slice], Tensor]") -> "Tensor":
        """Return ``sum_n weights[n] loss(logits[n])`` without keeping the logits of more than one block of positions.

        ``loss`` gets logits [n, V] and where its positions lie, and returns [n]. Logits are recomputed in the backward
        pass instead of kept.
        """
        import torch
        from torch.utils.checkpoint import checkpoint

        from consilience.student.outputs import token_blocks

        def block(states: Any, at: slice) -> Any:
            logits = self.student.head(states)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            return (loss(logits, at) * self.weights[at].to(logits.dtype)).sum()

        total: Any = self.weights.new_zeros((), dtype=torch.float32)
        parts = list(token_blocks(len(self.weights), self.vocabulary))
        again = torch.is_grad_enabled() and len(parts) > 1  # a single block is no more than is held at a time anyway
        for at in parts:
            states = self.student.states[at]
            total = total + (checkpoint(block, states, at, use_reentrant=False) if again else block(states, at))
        return total


@dataclass(frozen=True)
class Term(ABC):
    """One objective with its parameters, and what it needs: the experts' outputs, labels, outputs of blocks."""

    name: ClassVar[str]
    reads_experts: ClassVar[bool] = False
    reads_labels: ClassVar[bool] = False

    @property
    def weight(self) -> float:
        """What it counts in the sum, its field ``NAME_weight``; 0: it is not computed."""
        return getattr(self, f"{self.name}_weight")

    @property
    def layers(self) -> Sequence[int] | str:
        """Blocks whose outputs it compares, counted from 1; "middle" is the middle one."""
        return ()

    @abstractmethod
    def loss(self, compared: Compared) -> "Tensor":
        """Return ``sum_n weights[n] loss[n]`` over the positions, without its own weight."""
