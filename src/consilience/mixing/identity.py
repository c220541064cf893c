"""What a state on disk must share with a search to be continued by it."""

import hashlib
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from consilience.mixing.bank import ExpertBank
from consilience.mixing.problem import TargetLoss
from consilience.mixing.target import Rows, noise, take
from consilience.optimizers.parameterisation import Parameterisation

if TYPE_CHECKING:
    from consilience.mixing.mix import Search

#: Rows of a data set that stand for it.
_ROWS = 16


def digest(bank: ExpertBank, loss: TargetLoss, search: "Search", mapped: Parameterisation) -> dict[str, Any]:
    """Return JSON-able facts of a search: its settings, the experts' weights, the target's size and first labels."""
    settings = asdict(search)
    target = loss.target
    return {
        "map": [mapped.kind, mapped.start.tolist(), mapped.learned.tolist(), image_of(mapped)],
        "search": settings | {"settings": {name: repr(value) for name, value in search.settings.items()}},
        "experts": list(bank.names),
        "groups": [group.name for group in bank.layout.groups],
        "weights": _hash(bank.matrix, bank.buffers),
        "train": _rows(target.train),
        "validation": _rows(target.validation),
        "measure": [type(target.measure).__name__, _called(target.measure)],
        "augment": _called(target.augment),
        "batch_size": target.batch_size,
        "bn": loss.bn,
        "training": loss.training,
        "recalibration": loss.recalibration,
    }


def image_of(mapped: Parameterisation) -> str:
    """Return a hash of where a map takes some points: it tells apart radii, bases and clusters."""
    generator = torch.Generator().manual_seed(0)
    start = mapped.initial().detach()
    found: list[torch.Tensor] = []
    for size in (0.1, 10.0):
        w = start + size * torch.randn(start.shape, generator=generator, dtype=start.dtype)
        inside = w.clone()
        mapped.project(inside)
        found += [mapped.alpha(w).detach(), inside]
    return _hash(*found)


def _rows(rows: Rows | None) -> list[Any] | None:
    if rows is None:
        return None
    with noise(0, 0):
        _, labels = take(rows, range(min(_ROWS, len(rows))))
    return [len(rows), labels.tolist()]


def _called(thing: Any) -> str:
    """Return a function's name, a measure's function's name, or a type's; not an address, which changes."""
    inner = getattr(thing, "loss", None) or getattr(thing, "score", None) or thing
    return str(getattr(inner, "__qualname__", type(inner).__qualname__))


def _hash(*tensors: torch.Tensor) -> str:
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        # Typed as Any: arrays are buffers, which their type does not say before Python 3.12.
        values: Any = tensor.detach().cpu().contiguous().numpy()
        found.update(values)
    return found.hexdigest()
