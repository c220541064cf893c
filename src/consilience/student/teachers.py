"""What the experts answer on the calibration samples: computed once, cached, never all in memory with the student.

Every expert in turn takes over the student's weights and reads its own samples. Kept are the head's inputs at the
compared positions and the outputs of the chosen blocks; logits are recomputed from them through the expert's own head,
a few tokens at a time. With a folder they are files, so that an interrupted run does not compute them again.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from consilience.student.calibration import Batch, Sample, batches, each_expert
from consilience.student.outputs import Head, Outputs, Reader
from consilience.student.student import Student
from consilience.workdir import write_file


class Teachers:
    """The experts' cached outputs, by sample."""

    def __init__(self, student: Student, reader: Reader, samples: Sequence[Sample], folder: Path | None) -> None:
        self.student, self.reader, self.samples, self.folder = student, reader, samples, folder
        self._kept: dict[int, dict[str, Any]] = {}
        self._heads: dict[int, Head] = {}
        self.variances: dict[int, dict[int, Any]] = {}

    def prepare(self, tokens: int, advance: Callable[[int], None] | None = None) -> None:
        """Compute (or read back) every expert's answers on its own samples."""
        import torch

        for expert, chosen in each_expert(self.samples):
            path = None if self.folder is None else self.folder / f"{self._key(expert, chosen, tokens)}.safetensors"
            if path is None or not self._load(path, chosen):
                self.student.become(expert)
                with torch.no_grad():
                    for batch in batches(self.samples, chosen, tokens):
                        self._keep(batch, self.reader.run(batch)[0])
                        if advance is not None:
                            advance(len(batch.samples))
                if path is not None:
                    self._save(path, chosen)
            self.variances[expert] = self._variance(chosen)

    def _keep(self, batch: Batch, outputs: Outputs) -> None:
        start = 0
        for index, sample in zip(batch.indices, batch.samples, strict=True):
            stop = start + len(sample.encoded.positions)
            held = {"states": outputs.states[start:stop]}
            held |= {f"block.{layer}": values[start:stop] for layer, values in outputs.blocks.items()}
            # Contiguous copies: a slice would keep the whole batch alive.
            self._kept[index] = {key: _widened(value).contiguous().clone().cpu() for key, value in held.items()}
            start = stop

    def _key(self, expert: int, chosen: Sequence[int], tokens: int) -> str:
        base = self.student.plan.base
        facts = [
            self.student.plan.experts[expert].identity(),
            self.student.plan.scales(expert),
            base.identity() if base is not None else None,
            self.student.settings.precision,
            self.student.settings.device,
            tokens,
            self.reader.layers,
            self.reader.readout.head is None,
            [self.samples[i].digest for i in chosen],
        ]
        digest = hashlib.blake2b(json.dumps(facts).encode(), digest_size=12).hexdigest()
        return f"expert-{expert}-{digest}"

    def _save(self, path: Path, chosen: Sequence[int]) -> None:
        from safetensors.torch import save

        path.parent.mkdir(parents=True, exist_ok=True)
        # By place among the expert's own rows: other experts' rows may come and go between runs.
        flat = {f"{at}.{key}": value for at, i in enumerate(chosen) for key, value in self._kept[i].items()}
        write_file(path, save(flat))

    def _load(self, path: Path, chosen: Sequence[int]) -> bool:
        """Read an expert's answers back; False if they are not there, or not whole."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not path.is_file():
            return False
        try:
            stored = load_file(path)
        except SafetensorError:
            return False
        keys = ["states", *(f"block.{layer}" for layer in self.reader.layers)]
        if stored.keys() != {f"{at}.{key}" for at in range(len(chosen)) for key in keys}:
            return False
        self._kept |= {i: {key: stored[f"{at}.{key}"] for key in keys} for at, i in enumerate(chosen)}
        return True

    def _variance(self, chosen: Sequence[int]) -> dict[int, Any]:
        """Each chosen block's variance per channel over the expert's calibration tokens, [H].

        A single position (or copies of one) has none: there the states' mean square says how large a difference is.
        """
        import torch

        found: dict[int, Any] = {}
        for layer in self.reader.layers:
            every = torch.cat([self._kept[i][f"block.{layer}"] for i in chosen])
            size, spread = every.double().square().mean(), every.double().var(0, unbiased=False)
            if float(spread.mean()) <= 1e-12 * float(size):
                spread = size.expand(spread.shape)
            found[layer] = spread.to(every.dtype)
        return found

    def head(self, expert: int) -> Head:
        """Return the expert's own head: the student's where neither the expert nor learning changes it."""
        own = self.reader.head
        if own.weight is None:
            return own
        if expert in self._heads:
            return self._heads[expert]
        sides = {"weight": own.weight.detach(), "bias": None if own.bias is None else own.bias.detach()}
        plans = {t.name: t for t in self.student.plan.tensors}
        stale = {
            side: name
            for side, name in self._head_names(own).items()
            if name in self.student.bank.tensors or (plans[name].rows and not plans[name].rows[expert].untouched)
        }
        for side, name in stale.items():
            untouched = plans[name].rows[expert].untouched
            sides[side] = self._stored(name, None if untouched else expert, sides[side])
        head = Head(sides["weight"], sides["bias"])
        if stale:
            self._heads = {expert: head}  # one at a time: a head is a large part of a small model
        return head

    @property
    def one_head(self) -> bool:
        """Whether all experts read their states through the head that the student has now and keeps."""
        own = self.reader.head
        if own.weight is None:
            return True
        plans = {tensor.name: tensor for tensor in self.student.plan.tensors}
        names = list(self._head_names(own).values())
        return not any(
            name in self.student.bank.tensors or any(not row.untouched for row in plans[name].rows) for name in names
        )

    def _head_names(self, own: Head) -> dict[str, str]:
        """Stored names of the head's weight and bias."""
        found: dict[str, str] = {}
        for tensor in self.student.plan.tensors:
            parameter = self.student.parameters.get(tensor.name)
            for side, value in (("weight", own.weight), ("bias", own.bias)):
                if parameter is not None and parameter is value and tensor.name == tensor.stream:
                    found[side] = tensor.name
        return found

    def _stored(self, name: str, expert: int | None, like: Any) -> Any:
        import torch

        out = torch.empty_like(like).view(-1)
        self.student.bank.write(name, expert, out)
        return out.view_as(like)

    def outputs(self, batch: Batch) -> Outputs:
        """Return an expert's answers on a batch of its samples."""
        import torch

        device = self.student.settings.device
        kept = [self._kept[i] for i in batch.indices]
        joined = {key: torch.cat([one[key] for one in kept]).to(device) for key in kept[0]}
        blocks = {layer: joined[f"block.{layer}"] for layer in self.reader.layers}
        return Outputs(joined["states"], blocks, self.head(batch.expert))


def _widened(value: Any) -> Any:
    """Return float64 values as they are and all others as float32."""
    return value if value.element_size() == 8 else value.float()
