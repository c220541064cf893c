"""One expert of a routed model: its low-rank factors by module, and what it is recognised by."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from consilience.checkpoints.adapter import Adapter, LoraPair, open_adapter
from consilience.checkpoints.checkpoint import Checkpoint, TensorInfo
from consilience.checkpoints.dtypes import TORCH_NAMES
from consilience.errors import InputError
from consilience.routing.layer import LowRank


@dataclass(frozen=True, eq=False)
class Instruction:
    """What an expert does, in words, and the embedding of these words or of its examples, [E], of length 1."""

    text: str
    embedding: Tensor


@dataclass(frozen=True, eq=False)
class Expert:
    """Factors by module name; ``vectors`` has, by kind of local router, a vector [in] for each module."""

    name: str
    factors: Mapping[str, LowRank]
    vectors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict[str, dict[str, Tensor]])
    instruction: Instruction | None = None


@dataclass(frozen=True, eq=False)
class StoredFactors:
    """Factors that stay in their adapter's file and are read, in float32, whenever they are asked for.

    So that a routed model is loaded in little more memory than it takes. Reading raises ``InputError`` if a factor
    holds NaN or Inf, or the file has become shorter.
    """

    adapter: Adapter
    pair: LoraPair

    @property
    def a(self) -> Tensor:
        """A."""
        return self._read(self.pair.a, 1.0)

    @property
    def b(self) -> Tensor:
        """B, scaled."""
        return self._read(self.pair.b, self.pair.scale)

    @property
    def rank(self) -> int:
        """r."""
        return self.pair.rank

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.pair.b.shape[0], self.pair.a.shape[1]

    def has_weight(self, weight: Tensor) -> bool:
        """Whether the layer's own weight, where the adapter's file holds it too, is this one."""
        saved = self.adapter.whole.get(self.pair.target)
        return saved is None or torch.equal(read_tensor(self.adapter.checkpoint, saved).to(weight), weight)

    def check(self) -> None:
        """Read both factors once.

        Raises:
            InputError: one holds NaN or Inf.
        """
        self._read(self.pair.a, 1.0)
        self._read(self.pair.b, self.pair.scale)

    def _read(self, tensor: TensorInfo, scale: float) -> Tensor:
        found = read_tensor(self.adapter.checkpoint, tensor).float().mul_(scale)
        if not bool(torch.isfinite(found).all()):
            raise InputError(
                f"{self.adapter.path}: {module_of(self.pair)}: holds NaN or Inf; train or download the adapter again"
            )
        return found


def read_tensor(checkpoint: Checkpoint, tensor: TensorInfo) -> Tensor:
    """Return a floating-point tensor of a checkpoint, in the dtype it is stored in."""
    kind = getattr(torch, TORCH_NAMES[tensor.dtype.name])
    return torch.from_numpy(checkpoint.read(tensor.name)).view(kind).reshape(tensor.shape)


def read_factors(path: Path) -> dict[str, StoredFactors]:
    """Return a PEFT LoRA adapter's factors by the names of the modules it adapts; all are read once, to be checked.

    Raises:
        InputError: the adapter is malformed, or changes something that cannot be routed token by token.
    """
    adapter = open_adapter(path)
    trained = [name for name in adapter.whole if name not in adapter.pairs]  # PEFT saves an adapted head's own weight
    if trained:
        raise InputError(
            f"{path}: holds the whole tensor {trained[0]!r} beside its factors, which cannot be routed; train the "
            "adapter without modules_to_save and without biases"
        )
    if adapter.tokens:
        raise InputError(
            f"{path}: trains rows of {next(iter(adapter.tokens))!r} beside its factors, which cannot be routed; train "
            "the adapter without trainable_token_indices"
        )
    if adapter.parameters:
        raise InputError(
            f"{path}: adapts all experts of {adapter.parameters[0].module} at once (target_parameters); only linear "
            "layers are routed: merge it, or train the adapter on those alone"
        )
    found = {module_of(pair): StoredFactors(adapter, pair) for pair in adapter.pairs.values()}
    for module, one in found.items():
        if len(one.pair.a.shape) != 2 or len(one.pair.b.shape) != 2:
            raise InputError(f"{path}: {module}: adapts a convolution; only linear layers are routed")
        if one.pair.embedding:
            raise InputError(f"{path}: {module}: adapts an embedding; only linear layers are routed")
        one.check()
    return found


def module_of(pair: LoraPair) -> str:
    """Return the name of the module that a pair adapts."""
    return pair.target.removesuffix(".weight")
