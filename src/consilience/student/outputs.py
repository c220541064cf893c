"""What a model says at the compared positions: head inputs, block outputs, and logits a few tokens at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from consilience.student.calibration import Batch
from consilience.student.student import Student, watching
from consilience.tasks.readout import Readout, readout

#: Bound on one block of float32 logits [tokens, vocabulary], in bytes.
LOGITS_BYTES = 32 << 20


@dataclass(frozen=True)
class Head:
    """The output layer: ``weight`` [V, H] and ``bias``; None when states *are* logits (a model that caps them)."""

    weight: Any | None
    bias: Any | None = None

    def __call__(self, states: Any) -> Any:
        """Return logits [n, V] of states [n, H], in the head's own precision."""
        import torch

        if self.weight is None:
            return states
        return torch.nn.functional.linear(states.to(self.weight.dtype), self.weight, self.bias)


@dataclass(frozen=True)
class Outputs:
    """A model's outputs at the N compared positions of a batch.

    ``states`` [N, H] are what the head gets (or logits [N, V]), ``blocks`` maps block numbers to [N, H], ``head`` turns
    states into logits.
    """

    states: Any
    blocks: dict[int, Any]
    head: Head


class Reader:
    """Runs a student (whoever's weights it holds) and reads its outputs at compared positions."""

    def __init__(self, student: Student, probe: Batch, layers: Sequence[int]) -> None:
        import torch

        self.student, self.layers = student, tuple(layers)
        with torch.no_grad():
            self.readout: Readout = (
                readout(student.model, probe.samples[0].encoded) if not _extra(probe) else (_plain(student.model))
            )

    @property
    def head(self) -> Head:
        """The head as it is now."""
        module = self.readout.head
        return Head(None) if module is None else Head(module.weight, getattr(module, "bias", None))

    def run(self, batch: Batch) -> tuple[Outputs, Any]:
        """Run the model on a batch; gradients flow if they are enabled. Also returns the targets [N] (-1: none)."""
        inputs, where, targets = batch.inputs(self.student.model)
        with self.student.compute(), watching(self.student.model, self.layers) as seen:
            states = self.readout.states(inputs, where)
        blocks = {layer: values[where] for layer, values in seen.items()}
        return Outputs(states, blocks, self.head), targets


def _extra(batch: Batch) -> bool:
    return bool(batch.samples[0].extra)


def _plain(model: Any) -> Readout:
    """An image-text model is read whole: its forward pass may prune positions before the head."""
    text = model.config.get_text_config()
    return Readout(model, None, int(text.vocab_size))


def token_blocks(count: int, vocabulary: int, limit: int = LOGITS_BYTES) -> Iterator[slice]:
    """Yield slices of ``count`` positions whose float32 logits stay under ``limit`` bytes."""
    step = max(1, limit // (4 * vocabulary))
    for start in range(0, count, step):
        yield slice(start, min(count, start + step))
