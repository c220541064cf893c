"""What batch normalisation does while weights are blended, and afterwards.

policy          while searching                                   in the result
blend           running statistics blended as the weights are     those
batch           the batch's own statistics, buffers frozen        re-estimated on target batches
recalibrate     as blend                                          re-estimated on target batches

A blend's activations have other moments than the blend of the experts' moments: re-estimating repairs that (Jordan et
al., REPAIR, arXiv:2211.08403). How GLUE's authors treat these buffers is not known. Integer buffers are copied.
"""

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from consilience.mixing.layout import BATCH_NORMS

Policy = Literal["blend", "batch", "recalibrate"]


def batch_norms(module: nn.Module) -> list[Any]:
    """Return the batch normalisations that keep running statistics."""
    return [
        part
        for part in module.modules()
        if isinstance(part, BATCH_NORMS) and part.running_mean is not None and part.running_var is not None
    ]


@contextmanager
def mode(module: nn.Module, policy: Policy, *, training: bool = False) -> Generator[None]:
    """Put a module into training or evaluation mode, its batch normalisations into that of the policy.

    No buffer changes within, whatever the policy.
    """
    norms = batch_norms(module)
    own = set(map(id, norms))
    # Few are in the wrong mode, and setting an attribute of a module takes longer than reading it.
    wrong = [part for part in module.modules() if part.training != (policy == "batch" if id(part) in own else training)]
    for part in wrong:
        part.training = not part.training
    for part in norms if policy == "batch" else ():
        # Without running statistics a normalisation in training mode uses the batch's and updates nothing.
        part.track_running_stats = False
    try:
        yield
    finally:
        for part in wrong:
            part.training = not part.training
        for part in norms if policy == "batch" else ():
            part.track_running_stats = True


def recalibrate(
    module: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None = None
) -> None:
    """Forget the running statistics and estimate them anew: the means over batches of the batches' own moments.

    Weights and integer buffers stay as they are; so do the modes. Without batch normalisation no batch is drawn.

    Args:
        module: whose buffers are re-estimated in place.
        batches: inputs, 10 to 50 batches of them.
        forward: how the module is run on inputs; None: called with them.
    """
    norms = batch_norms(module)
    if not norms:
        return
    before = [(part, part.momentum, part.num_batches_tracked.clone()) for part in norms]
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    for part in norms:
        part.reset_running_stats()
        part.momentum, part.training = None, True  # no momentum: a cumulative mean
    try:
        with torch.no_grad():
            for inputs in batches:
                (forward or _call)(module, inputs)
    finally:
        for part, momentum, tracked in before:
            part.momentum = momentum
            part.num_batches_tracked.copy_(tracked)
        for part, was in modes:
            part.training = was


def _call(module: nn.Module, inputs: Any) -> Any:
    return module(inputs)
