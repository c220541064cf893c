"""How unsure a model is: AdaMerging's objective."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from consilience.methods.signature import Range
from consilience.objectives.term import Compared, Term

if TYPE_CHECKING:
    from torch import Tensor


def prediction_entropy(logits: "Tensor") -> "Tensor":
    """``H(softmax(z)) = -sum_v p_v log p_v`` in nats, per position: [n, V] -> [n].

    Source: AdaMerging, arXiv:2310.02575, where z are a classifier's logits; for a language model every compared
    position is a prediction. It rewards confidence, whoever is right.
    """
    import torch

    logs = torch.log_softmax(logits, -1)
    return -(logs.exp() * logs).sum(-1)


@dataclass(frozen=True)
class Entropy(Term):
    """How unsure the student is, whoever is right."""

    entropy_weight: Annotated[float, Range(0), "weight of the prediction entropy (AdaMerging's)"] = 0.0

    name: ClassVar[str] = "entropy"

    def loss(self, compared: Compared) -> "Tensor":
        """See ``Term``."""
        from consilience.objectives.over_logits import over_logits

        return over_logits(compared, lambda z, at, others: prediction_entropy(z))
