"""A sum of weighted terms over the calibration samples, ready to be differentiated.

    L(theta) = sum_k beta_k * mean over the tokens of D_k of [ w_logit * logit + w_hidden * hidden
                                                               + w_entropy * entropy + w_target * target ]

Every term is computed a few tokens at a time; a block's logits are recomputed in the backward pass instead of kept.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from consilience.objectives.alignment import Distance, Divergence, hidden_distance, logit_loss
from consilience.objectives.entropy import prediction_entropy
from consilience.objectives.target import target_loss
from consilience.student.outputs import Outputs, token_blocks

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """What is minimised.

    Args:
        logit: weight of the logits' divergence from the expert's.
        hidden: weight of the hidden states' distance from the expert's, averaged over ``layers``.
        entropy: weight of the prediction entropy.
        target: weight of the supervised loss on labelled positions.
        layers: blocks whose outputs are aligned, counted from 1.
        temperature: of the logits' divergence.
        divergence: "kl", or "cross_entropy" as the released code of Expert Merging has it.
        distance: how hidden states are compared, see ``hidden_distance``.
        beta: weight of every expert's samples.
        mean: over all of an expert's tokens ("tokens", so that long rows weigh more), or first within each sample
            ("samples", as the released code has it).
        total: experts are summed (the paper), or averaged over samples (the released code).
    """

    logit: float = 1.0
    hidden: float = 0.0
    entropy: float = 0.0
    target: float = 0.0
    layers: tuple[int, ...] = ()
    temperature: float = 1.0
    divergence: Divergence = "kl"
    distance: Distance = "variance"
    beta: tuple[float, ...] = ()
    mean: Literal["tokens", "samples"] = "tokens"
    total: Literal["sum", "mean"] = "sum"

    @property
    def needs_experts(self) -> bool:
        """Whether the experts' answers are needed."""
        return bool(self.logit or self.hidden)

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the terms that count."""
        named = {"logit": self.logit, "hidden": self.hidden, "entropy": self.entropy, "target": self.target}
        return {name: weight for name, weight in named.items() if weight}

    def terms(
        self,
        ours: Outputs,
        expert: Outputs | None,
        targets: "Tensor",
        weights: "Tensor",
        variances: "dict[int, Tensor]",
        vocabulary: int,
    ) -> "dict[str, Tensor]":
        """Return every term, unweighted by its own weight, as ``sum_n weights[n] * term[n]`` over the N positions.

        Args:
            ours: the student's outputs, with gradients.
            expert: the expert's on the same positions.
            targets: [N] labels, -1 where there is none.
            weights: [N] what a position counts in the mean.
            variances: the expert's variance per channel of every aligned block.
            vocabulary: V.
        """
        found: dict[str, Tensor] = {}
        if self.logit:
            assert expert is not None
            loss = logit_loss(self.divergence)
            temperature = self.temperature
            found["logit"] = _by_blocks(
                lambda z, at: loss(z, expert.head(expert.states[at]).to(z.dtype), temperature),
                ours,
                weights,
                vocabulary,
            )
        if self.entropy:
            found["entropy"] = _by_blocks(lambda z, at: prediction_entropy(z), ours, weights, vocabulary)
        if self.target:
            found["target"] = _by_blocks(lambda z, at: target_loss(z, targets[at]), ours, weights, vocabulary)
        if self.hidden:
            assert expert is not None
            each = [
                hidden_distance(ours.blocks[l], expert.blocks[l], self.distance, variances.get(l)) for l in self.layers
            ]
            found["hidden"] = sum(((d * weights.to(d.dtype)).sum() for d in each), weights.new_zeros(())) / len(each)
        return found


def _by_blocks(
    term: "Callable[[Tensor, slice], Tensor]", ours: Outputs, weights: "Tensor", vocabulary: int
) -> "Tensor":
    """Return ``sum_n weights[n] term(logits[n])`` without keeping the logits of more than one block."""
    import torch
    from torch.utils.checkpoint import checkpoint

    def block(states: Any, at: slice) -> Any:
        logits = ours.head(states)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return (term(logits, at) * weights[at].to(logits.dtype)).sum()

    total: Any = weights.new_zeros((), dtype=torch.float32)
    parts = list(token_blocks(len(weights), vocabulary))
    again = torch.is_grad_enabled() and len(parts) > 1  # a single block is no more than what is held at a time anyway
    for at in parts:
        states = ours.states[at]
        total = total + (checkpoint(block, states, at, use_reentrant=False) if again else block(states, at))
    return total
