"""Agreement with an expert: Expert Merging's losses on logits and hidden states.

    L_logit = T^2 mean_t KL( softmax(z_k/T) || softmax(z/T) )          the expert's distribution first
    L_hidden = mean_t d( h_l, h_l^(k) ),  averaged over the chosen blocks l

Source: Expert Merging, arXiv:2509.25712. Known disagreements: the paper sums squared differences over channels
(``l2``); the released code takes their mean (``mse``), is without hidden alignment unless asked, and replaces KL by
the soft-target cross-entropy, which has the same gradient and differs by the expert's entropy.
"""

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

Distance = Literal["variance", "l2", "mse"]
Divergence = Literal["kl", "cross_entropy"]
#: Added to a channel's variance: a channel that is constant for the expert would weigh without bound.
_FLOOR = 1e-6


def logit_divergence(logits: "Tensor", expert: "Tensor", temperature: float = 1.0) -> "Tensor":
    """``T^2 KL(softmax(expert/T) || softmax(logits/T))`` in nats, per position: [n, V], [n, V] -> [n]."""
    import torch

    ours = torch.log_softmax(logits / temperature, -1)
    theirs = torch.log_softmax(expert / temperature, -1)
    return temperature**2 * (theirs.exp() * (theirs - ours)).sum(-1)


def soft_cross_entropy(logits: "Tensor", expert: "Tensor", temperature: float = 1.0) -> "Tensor":
    """``-T^2 sum_v softmax(expert/T)_v log softmax(logits/T)_v`` per position: [n, V], [n, V] -> [n].

    The divergence plus ``T^2`` times the expert's entropy: another value, the same gradient.
    """
    import torch

    ours = torch.log_softmax(logits / temperature, -1)
    return -(temperature**2) * (torch.softmax(expert / temperature, -1) * ours).sum(-1)


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


def logit_loss(kind: Divergence) -> Any:
    """Return the function of a kind of logit loss."""
    return {"kl": logit_divergence, "cross_entropy": soft_cross_entropy}[kind]
