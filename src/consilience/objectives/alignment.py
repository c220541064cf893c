"""Agreement with an expert: Expert Merging's losses on logits and hidden states.

    L_logit = T^2 mean_t KL( softmax(z_k/T) || softmax(z/T) )          the expert's distribution first
    L_hidden = mean_t d( h_l, h_l^(k) ),  averaged over the chosen blocks l

Source: Expert Merging, arXiv:2509.25712. Known disagreements: the paper sums squared differences over channels
(``l2``); the released code takes their mean (``mse``), is without hidden alignment unless asked, and replaces KL by
the soft-target cross-entropy, which has the same gradient and differs by the expert's entropy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from consilience.errors import InputError
from consilience.methods.signature import Range
from consilience.objectives.term import Compared, Term

if TYPE_CHECKING:
    from torch import Tensor

Distance = Literal["variance", "l2", "mse"]
Divergence = Literal["kl", "cross_entropy"]
#: Added to a channel's variance: a channel that is constant for the expert would weigh without bound.
_FLOOR = 1e-6


def logit_divergence(logits: "Tensor", expert: "Tensor", temperature: float = 1.0) -> "Tensor":
    """``T^2 KL(softmax(expert/T) || softmax(logits/T))`` in nats, per position: [n, V], [n, V] -> [n]."""
    import torch

    ours, theirs = (torch.log_softmax(_cooled(one, temperature), -1) for one in (logits, expert))
    return temperature**2 * (theirs.exp() * (theirs - ours)).sum(-1)


def soft_cross_entropy(logits: "Tensor", expert: "Tensor", temperature: float = 1.0) -> "Tensor":
    """``-T^2 sum_v softmax(expert/T)_v log softmax(logits/T)_v`` per position: [n, V], [n, V] -> [n].

    The divergence plus ``T^2`` times the expert's entropy: another value, the same gradient.
    """
    import torch

    ours = torch.log_softmax(_cooled(logits, temperature), -1)
    return -(temperature**2) * (torch.softmax(_cooled(expert, temperature), -1) * ours).sum(-1)


def _cooled(logits: "Tensor", temperature: float) -> "Tensor":
    return logits if temperature == 1 else logits / temperature


def hidden_distance(ours: "Tensor", expert: "Tensor", distance: Distance, variance: "Tensor | None" = None) -> "Tensor":
    """Squared difference of hidden states per position: [n, H], [n, H] -> [n], in float32 or wider.

    ``l2``: sum over channels; ``mse``: mean over channels; ``variance``: mean over channels of the squared difference
    over the expert's ``variance`` [H] of that channel, so that 1 means "as far as the expert's own states are apart"
    whatever the model's scale.
    """
    kind = ours.double().dtype if ours.dtype == expert.double().dtype else ours.float().dtype
    square = (ours.to(kind) - expert.to(kind)).square()
    if distance == "l2":
        return square.sum(-1)
    if distance == "mse":
        return square.mean(-1)
    if variance is None:
        raise ValueError("distance 'variance' needs the expert's variance per channel")
    floor = _FLOOR * variance.mean() + 1e-30
    return (square / (variance + floor)).mean(-1)


def logit_loss(kind: Divergence) -> "Callable[[Tensor, Tensor, float], Tensor]":
    """Return the function of a kind of logit loss."""
    return {"kl": logit_divergence, "cross_entropy": soft_cross_entropy}[kind]


@dataclass(frozen=True)
class Logits(Term):
    """Agreement of the next token's distribution with the expert's."""

    logit_weight: Annotated[float, Range(0), "weight of the logits' divergence from the expert"] = 1.0
    temperature: Annotated[float, Range(1e-3), "temperature of the logits' divergence"] = 1.0
    divergence: Annotated[Divergence, "the logits' loss; same gradient"] = "kl"

    name: ClassVar[str] = "logit"
    reads_experts: ClassVar[bool] = True

    def loss(self, compared: Compared) -> "Tensor":
        """See ``Term``."""
        from consilience.objectives.over_logits import over_logits

        loss = logit_loss(self.divergence)
        return over_logits(
            compared, lambda z, at, others: loss(z, others.to(z.dtype), self.temperature), compared.expert
        )


@dataclass(frozen=True)
class Hidden(Term):
    """Distance of the chosen blocks' outputs from the expert's, averaged over blocks."""

    hidden_weight: Annotated[float, Range(0), "weight of the hidden states' distance from the expert"] = 0.0
    hidden_layers: Annotated[tuple[str, ...], "blocks to align, counted from 1; or middle"] = ("middle",)
    hidden_distance: Annotated[
        Distance, "squared difference: over the expert's variance, summed or averaged over channels"
    ] = "variance"

    name: ClassVar[str] = "hidden"
    reads_experts: ClassVar[bool] = True

    @property
    def layers(self) -> Sequence[int] | str:
        """Blocks to align; none without a weight.

        Raises:
            InputError: they are neither numbers nor ``middle``.
        """
        if not self.hidden_weight:
            return ()
        if self.hidden_layers == ("middle",):
            return "middle"
        try:
            return tuple(int(part) for text in self.hidden_layers for part in text.split(","))
        except ValueError:
            raise InputError(
                f"hidden_layers: {', '.join(self.hidden_layers)!r} is neither middle nor block numbers; write 7,15"
            ) from None

    def loss(self, compared: Compared) -> "Tensor":
        """See ``Term``."""
        expert, weights = compared.expert, compared.weights
        assert expert is not None
        each = [
            hidden_distance(states, expert.blocks[layer], self.hidden_distance, compared.variances.get(layer))
            for layer, states in compared.student.blocks.items()
        ]
        return sum(((d * weights.to(d.dtype)).sum() for d in each), weights.new_zeros(())) / len(each)
