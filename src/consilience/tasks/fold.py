"""Fold an adapter that PEFT does not open (kohya's, diffusers', MLX') into a loaded model's weights."""

from pathlib import Path
from typing import Any

import torch

from consilience.checkpoints.adapter import LoraPair, open_adapter
from consilience.checkpoints.checkpoint import Checkpoint, MemoryStorage, Storage, TensorInfo
from consilience.checkpoints.dtypes import DTYPES
from consilience.checkpoints.mapped import mapped
from consilience.errors import InputError
from consilience.experts.absent import why_untargeted
from consilience.experts.conv1d import orient
from consilience.experts.flattened import unflatten
from consilience.experts.model import Model
from consilience.experts.names import follow_base


def fold_adapter(model: Any, path: Path) -> None:
    """Add every update of an adapter to a model's parameters, in place.

    Raises:
        InputError: the adapter is malformed, or adapts what the model does not have, or shares with another layer.
    """
    parameters: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    shapes = {name: TensorInfo(name, DTYPES["F32"], tuple(value.shape)) for name, value in parameters.items()}
    base = Checkpoint("the model", shapes, MemoryStorage({}), config=model.config.to_dict())
    donor, expert = Model("base", "the model", base), Model("adapter", str(path), None, open_adapter(path))
    assert expert.adapter is not None
    expert = follow_base(Model("adapter", str(path), None, unflatten(expert.adapter, shapes)), base)
    assert expert.adapter is not None
    adapter = orient(expert.adapter, base)
    storage = adapter.checkpoint.storage
    if adapter.tokens:
        raise InputError(f"{path}: holds rows trained alone; give it as PEFT's folder, with its own file names")
    with torch.no_grad():
        for name in [*adapter.whole, *adapter.pairs]:
            _check(expert, name, parameters, donor)
        for name, info in adapter.whole.items():
            parameters[name].copy_(mapped(storage, info))
        for name, pair in adapter.pairs.items():
            parameters[name].add_(_update(pair, storage).view_as(parameters[name]))
    storage.close()


def _check(expert: Model, name: str, parameters: dict[str, torch.Tensor], donor: Model) -> None:
    adapter = expert.adapter
    assert adapter is not None
    if name not in parameters:
        why = why_untargeted(expert, name, donor)
        raise InputError(f"{expert.reference}: it adapts {name!r}, which the model does not have{why}")
    value = parameters[name]
    shape = tuple(value.shape)
    if (name in adapter.pairs and not adapter.pairs[name].fits(shape)) or (
        name in adapter.whole and adapter.whole[name].shape != shape
    ):
        raise InputError(f"{expert.reference}: its update of {name!r} does not fit {list(shape)}; give its own base")
    if sum(other is value for other in parameters.values()) > 1:
        raise InputError(
            f"{expert.reference}: it adapts {name!r}, which the model ties to another layer; merge it first"
        )


def _update(pair: LoraPair, storage: Storage) -> torch.Tensor:
    a, b = (mapped(storage, side).float() for side in (pair.a, pair.b))
    update = pair.scale * (b.reshape(-1, pair.rank) @ a.reshape(pair.rank, -1))
    return update.T if pair.transposed else update
