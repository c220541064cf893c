"""Sums over logits that are neither kept nor made twice: the slope at the head's input is taken at once.

    sum_n w_n f(z_n),   z_n = W s_n + b;      its slope at s_n: w_n W^T f'(z_n)

One product makes a block of logits [n, V]; f and its slope are taken on parts of it that fit a processor's cache; and
W^T brings the slope back. Where the head itself is learned its own slope is wanted too, which takes the logits again:
they are then recomputed in the backward pass.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from consilience.student.outputs import token_blocks

if TYPE_CHECKING:
    from consilience.objectives.term import Compared
    from consilience.student.outputs import Outputs

#: f: logits [n, V], where their positions lie among all, and the other model's logits if there is one -> [n].
Loss = Callable[[Any, slice, Any], Any]
#: Bytes of the float32 logits that f is given at a time on a CPU.
PART_BYTES = 2 << 20


def over_logits(compared: "Compared", loss: Loss, beside: "Outputs | None" = None) -> Any:
    """Return ``sum_n weights[n] loss(logits[n])`` without keeping the logits of more than one block of positions.

    Args:
        compared: the student's outputs, weights and the vocabulary's size.
        loss: in float32, or float64 where the logits are.
        beside: another model's outputs at the same positions, whose logits ``loss`` is given too.
    """
    from torch.utils.checkpoint import checkpoint

    states, head = compared.student.states, compared.student.head
    if not (torch.is_grad_enabled() and states.requires_grad):
        return _sum(compared, loss, beside, states, None)
    fixed = not any(side is not None and side.requires_grad for side in (head.weight, head.bias))
    if head.weight is not None and fixed:
        return _Sum.apply(states, lambda own, slope: _sum(compared, loss, beside, own, slope))

    def block(own: Any, at: slice) -> Any:
        others = None if beside is None else _wide(beside.head(beside.states[at]))
        logits = _wide(head(own))
        return (loss(logits, at, others) * compared.weights[at].to(logits.dtype)).sum()

    total: Any = compared.weights.new_zeros((), dtype=torch.float32)
    parts = list(token_blocks(len(compared.weights), compared.vocabulary))
    for at in parts:  # a single block is no more than is held at a time anyway
        own = states[at]
        total = total + (checkpoint(block, own, at, use_reentrant=False) if len(parts) > 1 else block(own, at))
    return total


class _Sum(torch.autograd.Function):
    """A scalar of the states whose slope is found beside it: ``run(states, slope)`` fills ``slope``."""

    @staticmethod
    def forward(ctx: Any, states: Any, run: Callable[[Any, Any], Any]) -> Any:
        slope = torch.empty_like(states)
        total = run(states, slope)
        ctx.save_for_backward(slope)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (slope,) = ctx.saved_tensors
        return slope * gradients[0].to(slope.dtype), None


def _sum(compared: "Compared", loss: Loss, beside: "Outputs | None", states: Any, slope: Any) -> Any:
    """Return the sum and, where ``slope`` [N, H] is not None, fill in its slope at the states."""
    head, weights = compared.student.head, compared.weights
    total: Any = weights.new_zeros((), dtype=torch.float32)
    for at in token_blocks(len(weights), compared.vocabulary):
        logits = head(states[at])
        others = None if beside is None else beside.head(beside.states[at])
        back = None if slope is None else torch.empty_like(logits)
        for part in _parts(logits):
            place = slice(at.start + part.start, at.start + part.stop)
            z = _wide(logits[part]).detach().requires_grad_(slope is not None)
            with torch.set_grad_enabled(slope is not None):
                value: Any = loss(z, place, None if others is None else _wide(others[part]))
                value = (value * weights[place].to(z.dtype)).sum()
            total = total + value.detach()
            if back is not None:
                back[part] = torch.autograd.grad(value, z)[0]
        if slope is not None and back is not None and head.weight is not None:
            slope[at] = back @ head.weight
    return total


def _parts(logits: Any) -> Iterator[slice]:
    """Yield slices of a block's positions that are looked at together."""
    if logits.device.type != "cpu":
        yield slice(0, len(logits))
        return
    yield from token_blocks(len(logits), logits.shape[-1], PART_BYTES)


def _wide(logits: Any) -> Any:
    return logits if logits.dtype == torch.float64 else logits.float()
