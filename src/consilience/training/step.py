"""One step of an optimizer."""

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
