"""How unsure a model is: AdaMerging's objective."""

from typing import TYPE_CHECKING

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
