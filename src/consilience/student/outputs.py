"""What a model says at the compared positions: head inputs, block outputs, and logits a few tokens at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from consilience.errors import InputError
from consilience.student.calibration import Batch
from consilience.student.prefix_tree import packed_inputs, packs
from consilience.student.student import Student, watching
from consilience.tasks.readout import Readout, caught, readout, transforms_logits

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
        with torch.no_grad(), student.compute():
            extra = bool(probe.samples[0].extra)
            one = probe.samples[0].encoded
            self.readout: Readout = _seen(student.model, probe) if extra else readout(student.model, one)
        self.packs: bool = packs(student, self.readout, probe)

    @property
    def head(self) -> Head:
        """The head as it is now."""
        module = self.readout.head
        return Head(None) if module is None else Head(module.weight, getattr(module, "bias", None))

    def run(self, batch: Batch) -> tuple[Outputs, Any]:
        """Run the model on a batch; gradients flow if they are enabled. Also returns the targets [N] (-1: none)."""
        inputs, where, targets = self.inputs(batch)
        with self.student.compute(), watching(self.student.model, self.layers) as seen:
            states = self.readout.states(inputs, where)
        blocks = {layer: values[where] for layer, values in seen.items()}
        return Outputs(states, blocks, self.head), targets

    def inputs(self, batch: Batch) -> tuple[dict[str, Any], tuple[Any, Any], Any]:
        """Return a batch's inputs, packed where that is the same and pays, its compared positions and their targets."""
        inputs, where, targets = batch.inputs(self.student.model)
        packed = packed_inputs(batch, self.student.model) if self.packs else None
        return (inputs, where, targets) if packed is None else (*packed, targets)


def _seen(model: Any, probe: Batch) -> Readout:
    """Find out how the logits of an image row come about: through the head, at the positions of the ids?"""
    import torch

    inputs = probe.inputs(model)[0]
    head = model.get_output_embeddings()
    direct = head is not None and not transforms_logits(model.config)
    states, logits = caught(model, head, inputs, short=False) if direct else (None, model(**inputs).logits)
    if logits.shape[:2] != inputs["input_ids"].shape:
        raise InputError(
            f"{probe.samples[0].where}: {type(model).__name__} puts images between the ids, so positions cannot be "
            "compared; use rows without images"
        )
    plain = Readout(model, None, logits.shape[-1])
    if head is None or states is None or states.shape[:2] != logits.shape[:2]:
        return plain
    again = head(states)
    same = again.shape == logits.shape and torch.allclose(again.float(), logits.float(), rtol=1e-4, atol=1e-6)
    return Readout(model, head, logits.shape[-1]) if same else plain


def token_blocks(count: int, vocabulary: int, limit: int = LOGITS_BYTES) -> Iterator[slice]:
    """Yield slices of ``count`` positions whose float32 logits stay under ``limit`` bytes."""
    step = max(1, limit // (4 * vocabulary))
    for start in range(0, count, step):
        yield slice(start, min(count, start + step))
