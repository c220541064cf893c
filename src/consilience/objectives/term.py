"""One objective: what a model's outputs at compared positions lose, as a function that can be differentiated.

A term is one file: a frozen dataclass whose fields are its parameters (they appear in recipes, ``consilience methods``
and errors, see ``methods.signature``), one of which is its weight, ``NAME_weight``. ``registry`` lists it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

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
