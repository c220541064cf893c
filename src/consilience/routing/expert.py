"""One expert of a routed model: its low-rank factors by module, and what it is recognised by."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from consilience.checkpoints.adapter import Adapter, open_adapter
from consilience.checkpoints.checkpoint import Checkpoint, TensorInfo
from consilience.checkpoints.dtypes import TORCH_NAMES
from consilience.errors import InputError
from consilience.routing.layer import Factors


@dataclass(frozen=True, eq=False)
class Instruction:
    """What an expert does, in words, and the embedding of these words or of its examples, [E], of length 1."""

    text: str
    embedding: Tensor


@dataclass(frozen=True, eq=False)
class Expert:
    """Factors by module name; ``vectors`` has, by kind of local router, a vector [in] for each module."""

    name: str
    factors: Mapping[str, Factors]
    vectors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict[str, dict[str, Tensor]])
    instruction: Instruction | None = None


def read_tensor(checkpoint: Checkpoint, tensor: TensorInfo) -> Tensor:
    """Return a floating-point tensor of a checkpoint, in the dtype it is stored in."""
    kind = getattr(torch, TORCH_NAMES[tensor.dtype.name])
    return torch.from_numpy(checkpoint.read(tensor.name)).view(kind).reshape(tensor.shape)


def read_factors(path: Path) -> dict[str, Factors]:
    """Read a PEFT LoRA adapter's factors by the names of the modules it adapts.

    Raises:
        InputError: the adapter is malformed, or changes something that cannot be routed token by token.
    """
    adapter = open_adapter(path)
    if adapter.whole:
        raise InputError(
            f"{path}: holds the whole tensor {next(iter(adapter.whole))!r} beside its factors, which cannot be routed; "
            "train the adapter without modules_to_save and without biases"
        )
    try:
        return {target.removesuffix(".weight"): _factors(adapter, target, path) for target in adapter.pairs}
    finally:
        adapter.checkpoint.storage.close()


def _factors(adapter: Adapter, target: str, path: Path) -> Factors:
    pair = adapter.pairs[target]
    if len(pair.a.shape) != 2 or len(pair.b.shape) != 2:
        raise InputError(f"{path}: {target}: adapts a convolution; only linear layers are routed")
    a = read_tensor(adapter.checkpoint, pair.a).float()
    b = read_tensor(adapter.checkpoint, pair.b).float() * pair.scale
    if not (bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all())):
        raise InputError(f"{path}: {target}: holds NaN or Inf; train or download the adapter again")
    return Factors(a, b)
