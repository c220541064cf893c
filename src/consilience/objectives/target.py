"""The supervised loss on labelled rows."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def target_loss(logits: "Tensor", targets: "Tensor") -> "Tensor":
    """``-log softmax(z)[target]`` in nats, per position: [n, V], [n] -> [n]; 0 where the target is -1 (unlabelled)."""
    import torch

    picked = logits.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    return torch.where(targets >= 0, torch.logsumexp(logits, -1) - picked, torch.zeros_like(picked))
