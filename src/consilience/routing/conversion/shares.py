"""How a routed model shares its tokens out: every expert's mean weight at every module.

alpha_k[module] = 1/N sum over N tokens of w_k(token, module)
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from consilience.routing.layer import RoutedLinear
from consilience.tasks.encoding import Encoded
from consilience.tasks.readout import caught, padded

#: Most tokens of one forward pass.
BATCH_TOKENS = 8192


@dataclass(eq=False)
class Shares:
    """By module, the sum over its ``tokens`` of the experts' weights, [K] in float64; ``watch`` watches a router."""

    sums: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    tokens: dict[str, int] = field(default_factory=dict[str, int])

    def watch(self, module: str, weights: Tensor) -> None:
        """Add the weights [sequences, tokens, K] of one pass."""
        flat = weights.detach().reshape(-1, weights.shape[-1])
        if not len(flat):
            return  # a layer of a mixture may get no token of a batch
        added = flat.sum(0, dtype=torch.float64).cpu()
        self.sums[module] = self.sums[module] + added if module in self.sums else added
        self.tokens[module] = self.tokens.get(module, 0) + len(flat)

    def mean(self, module: str) -> Tensor:
        """Return the experts' mean weights at a module, [K]."""
        return self.sums[module] / self.tokens[module]

    def overall(self) -> Tensor:
        """Return the mean over modules, [K]."""
        return torch.stack([self.mean(module) for module in self.sums]).mean(0)


def read(model: Any, sequences: Sequence[Encoded], batch_size: int, advance: Callable[[int], None]) -> None:
    """Run a routed model over sequences, for those who watch it.

    Sequences of one length share a batch: nothing is padded, so every weight that is seen is a token's.

    Args:
        model: a routed model.
        sequences: what it reads.
        batch_size: sequences of a forward pass.
        advance: called with the number of sequences after every batch.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    # The output layer need not see all tokens, unless it is routed itself.
    plain = head is None or isinstance(head, RoutedLinear)
    with torch.no_grad():
        for batch in _batches(sequences, batch_size):
            inputs = padded(batch, model)[0]
            if plain:
                model(**inputs, use_cache=False)
            else:
                caught(model, head, inputs)
            advance(len(batch))


def _batches(sequences: Sequence[Encoded], batch_size: int) -> Iterator[list[Encoded]]:
    def size(one: Encoded) -> tuple[int, int]:
        return len(one.source), len(one.inputs)

    for lengths, group in groupby(sorted(sequences, key=size), size):
        alike = list(group)
        count = max(1, min(batch_size, BATCH_TOKENS // sum(lengths)))
        yield from (alike[start : start + count] for start in range(0, len(alike), count))
