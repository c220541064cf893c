"""The supervised loss on labelled rows."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from consilience.methods.signature import Range
from consilience.objectives.term import Compared, Term

if TYPE_CHECKING:
    from torch import Tensor


def target_loss(logits: "Tensor", targets: "Tensor") -> "Tensor":
    """``-log softmax(z)[target]`` in nats, per position: [n, V], [n] -> [n]; 0 where the target is -1 (unlabelled)."""
    import torch

    picked = logits.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    return torch.where(targets >= 0, torch.logsumexp(logits, -1) - picked, torch.zeros_like(picked))


@dataclass(frozen=True)
class Target(Term):
    """The supervised loss on labelled positions."""

    target_weight: Annotated[float, Range(0), "weight of the supervised loss on given responses"] = 0.0

    name: ClassVar[str] = "target"
    reads_labels: ClassVar[bool] = True

    def loss(self, compared: Compared) -> "Tensor":
        """See ``Term``."""
        from consilience.objectives.over_logits import over_logits

        return over_logits(compared, lambda z, at, others: target_loss(z, compared.targets[at]))
