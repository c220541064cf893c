"""One step of an optimizer, and its learning rate."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from consilience.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


def descend(loss: "Tensor", parameters: Sequence["Tensor"], optimizer: Any, rate: float, clip: float, at: str) -> None:
    """Take one step down a loss at a learning rate, with the gradient's norm at most ``clip``; ``at`` names the step.

    Raises:
        InputError: the loss or its gradient is not finite; no parameter was changed.
    """
    import torch

    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
        peak = optimizer.defaults["lr"]
        raise InputError(
            f"learning_rate = {peak:g}: at {at} the loss is {loss.item():g} and its gradient's norm {norm.item():g}; "
            "lower it, or check the base's weights"
        )
    optimizer.step()


def cosine(step: int, steps: int, rising: int = 0, peak: float = 1.0) -> float:
    """Return the learning rate at ``step`` (from 0) of ``steps``: a linear rise, then half a cosine to 0.

    With W = ``rising`` steps of the rise: peak * (step + 1) / W below W, then
    peak * (1 + cos(pi * (step - W) / (steps - W))) / 2.
    """
    if step < rising:
        return peak * (step + 1) / rising
    falling = max(1, steps - rising)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(step - rising, falling) / falling))
