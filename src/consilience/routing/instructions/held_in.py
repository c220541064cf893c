"""The adaptive scale's examples: queries that experts were trained for, with their expert and without."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from consilience.routing.instructions.adaptive import Adaptive, fit_adaptive
from consilience.routing.instructions.describe import Describer
from consilience.routing.instructions.embed import Embedder
from consilience.routing.instructions.told import Told
from consilience.routing.unit import unit

#: At most so many experts are left out in turn.
_LEFT_OUT = 32


@dataclass(frozen=True, eq=False)
class HeldIn:
    """Examples of an expert as the queries they could be: the queries' texts."""

    texts: tuple[str, ...]

    @classmethod
    def of(cls, told: Told, describer: Describer, most: int) -> "HeldIn":
        """Choose and describe ``most``: not those that the expert's own text was written from, if there are others."""
        examples = told.source.examples
        if describer.settings.writes and told.source.text is None:
            examples = examples[describer.settings.examples :] or examples
        examples = examples[:most]
        return cls(tuple(describer.queries(examples)))

    def inside(self, told: Told, fitted: Embedder) -> Tensor:
        """Return cosines of the examples with their expert, [n]; an example is not compared with itself."""
        if not self.texts or (not told.text and len(told.source.examples) < 2):
            return torch.zeros(0)
        queries = fitted(self.texts)
        if told.text:
            return queries @ told.vector(fitted)
        own = fitted(told.source.examples)
        return (queries * unit(own.sum(0) - queries)).sum(-1)

    def outside(self, others: Sequence[Told], fitted: Embedder) -> Tensor:
        """Return the examples' largest cosines with other experts, [n]."""
        if not self.texts:
            return torch.zeros(0)
        return (fitted(self.texts) @ torch.stack([one.vector(fitted) for one in others]).t()).amax(-1)


def leave_experts_out(
    embedder: Embedder, fitted: Embedder, told: Sequence[Told], held_in: Sequence[HeldIn]
) -> Adaptive | None:
    """Fit the adaptive scale; None where fewer than two experts have examples.

    Where an expert is left out, the embedder is fitted without it, as if it had never been there.

    Args:
        embedder: not fitted.
        fitted: the same, fitted to all experts.
        told: the experts.
        held_in: their examples.
    """
    inside = [held.inside(one, fitted) for one, held in zip(told, held_in, strict=True)]
    chosen = [k for k, values in enumerate(inside) if len(values)]
    if len(chosen) < 2:
        return None
    chosen = chosen[:: -(-len(chosen) // _LEFT_OUT)]
    outside: list[Tensor] = []
    for k in chosen:
        others = [one for j, one in enumerate(told) if j != k]
        outside.append(held_in[k].outside(others, embedder.fitted([one.texts for one in others])))
    return fit_adaptive(torch.cat([inside[k] for k in chosen]), torch.cat(outside))
