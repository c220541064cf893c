"""A sum of weighted terms over the calibration samples, ready to be differentiated.

L(theta) = sum_k beta_k * mean over the tokens of D_k of sum_i w_i term_i
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from consilience.errors import InputError
from consilience.methods.signature import Default, Each, PerExpert, Range
from consilience.objectives import registry
from consilience.objectives.alignment import Logits
from consilience.objectives.term import Compared, Term

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is minimised.

    Args:
        beta: weight of every expert's samples; (): 1.
        terms: what is summed.
        mean: over all of an expert's tokens ("tokens", so that long rows weigh more), or first within each sample
            ("samples", as the released code of Expert Merging has it).
        total: experts are summed (the paper), or averaged over samples (the released code).
    """

    beta: Annotated[PerExpert, Default(1.0), Range(0), "weight of an expert's loss"] = ()
    terms: Annotated[tuple[Term, ...], Each(registry.terms)] = (Logits(),)
    mean: Annotated[Literal["tokens", "samples"], "average an expert's loss over tokens, or within samples first"] = (
        "tokens"
    )
    total: Annotated[Literal["sum", "mean"], "sum the experts' losses, or average over samples"] = "sum"

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the terms that count."""
        return {term.name: term.weight for term in self.terms if term.weight}

    @property
    def reads_experts(self) -> bool:
        """Whether the experts' answers are needed."""
        return any(term.reads_experts for term in self.terms if term.weight)

    @property
    def reads_labels(self) -> bool:
        """Whether labels are needed."""
        return any(term.reads_labels for term in self.terms if term.weight)

    @property
    def layers(self) -> Sequence[int] | str:
        """Blocks whose outputs are compared; see ``Term.layers``."""
        return next((term.layers for term in self.terms if term.layers), ())

    def check(self) -> None:
        """Refuse a sum of nothing.

        Raises:
            InputError: every weight is zero.
        """
        if not self.weights:
            names = ", ".join(f"{term.name}_weight" for term in self.terms)
            raise InputError(f"{names}: all are 0; give one a weight")

    def losses(self, compared: Compared) -> "dict[str, Tensor]":
        """Return every term that counts, unweighted by its own weight, as a sum over positions."""
        active = [term for term in self.terms if term.weight]
        # Those of blocks come last: the order is part of what the sum rounds to.
        return {term.name: term.loss(compared) for term in sorted(active, key=lambda term: bool(term.layers))}
