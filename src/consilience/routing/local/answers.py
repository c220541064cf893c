"""The loss of responses, from models with and without an encoder."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from consilience.tasks.encoding import Encoded
from consilience.training.losses import collate, token_losses


@dataclass(frozen=True, eq=False)
class Answering:
    """An encoder-decoder model beside what it reads: called with the decoder's ids alone, as a causal model is.

    ``source`` [B, S] are the encoder's ids, ``mask`` [B, S] is 1 where there are any.
    """

    model: Any
    source: Tensor
    mask: Tensor

    def get_output_embeddings(self) -> Any:
        """Return the output layer."""
        return self.model.get_output_embeddings()

    def __call__(self, input_ids: Tensor, use_cache: bool) -> Any:
        """Run the model on the decoder's ids [B, T]."""
        return self.model(
            input_ids=self.source, attention_mask=self.mask, decoder_input_ids=input_ids, use_cache=use_cache
        )


def answer_losses(model: Any, sequences: Sequence[Encoded], tasks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return nats of every response token [N] in float32, and the task of each [N].

    Args:
        model: a language model of transformers, causal or encoder-decoder.
        sequences: labelled rows, encoded for this model.
        tasks: the number of the task that each row is of.
    """
    batch = collate(sequences, tasks, model.device)
    return token_losses(_reader(model, [one.source for one in sequences]), batch), batch.tasks


def _reader(model: Any, sources: Sequence[tuple[int, ...]]) -> Any:
    """Return what maps the decoder's ids to logits: the model, or the model beside its sources, padded."""
    width = max(len(source) for source in sources)
    if width == 0:
        return model
    source = torch.zeros(len(sources), width, dtype=torch.long)
    mask = torch.zeros_like(source)
    for row, ids in enumerate(sources):
        source[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        mask[row, : len(ids)] = 1
    return Answering(model, source.to(model.device), mask.to(model.device))
