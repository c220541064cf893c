"""The target's labelled data: minibatches that depend on (seed, step) alone, and what is measured on them."""

import random
from collections.abc import Callable, Generator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from consilience.errors import InputError, nearest

#: Keeps these random numbers apart from others that are drawn from the same seed.
_ORDER, _NOISE, _SPLIT = 0xDA7A, 0x2015E, 0x5B117


class Rows(Protocol):
    """A sized data set of (input, label)."""

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """Return one row: (input, label)."""
        ...


@dataclass(frozen=True, eq=False)
class Tensors:
    """Rows that lie in two tensors of one length."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int, /) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.labels[index]


@dataclass(frozen=True, eq=False)
class Subset:
    """Some rows of others."""

    rows: Rows
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int, /) -> Any:
        return self.rows[self.indices[index]]


def as_rows(data: Any, where: str = "target") -> Rows:
    """Return (inputs, labels) tensors, or any sized data set of (input, label), as rows.

    Raises:
        InputError: it is neither, has no rows, or the tensors differ in length.
    """
    if isinstance(data, tuple) and len(cast(Sized, data)) == 2 and isinstance(data[0], Tensor):
        inputs, labels = cast(tuple[Tensor, Tensor], data)
        if len(inputs) != len(labels):
            raise InputError(f"{where}: {len(inputs)} inputs and {len(labels)} labels; give one label an input")
        data = Tensors(inputs, labels)
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise InputError(
            f"{where}: is a {type(data).__name__}; give (inputs, labels) tensors or a sized data set of (input, label)"
        )
    if not len(data):
        raise InputError(f"{where}: has no rows; give at least one labelled row")
    return data


def take(rows: Rows, indices: Sequence[int]) -> tuple[Any, Tensor]:
    """Return the chosen rows as a batch: inputs as torch's default collation makes them, and labels."""
    if isinstance(rows, Subset):
        return take(rows.rows, [rows.indices[i] for i in indices])
    if isinstance(rows, Tensors):
        chosen = torch.as_tensor(indices)
        return rows.inputs[chosen], rows.labels[chosen]
    inputs, labels = default_collate([rows[i] for i in indices])
    return inputs, labels


def split(rows: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    """Return (learn, hold out): the rows in two at random, ``share`` of them held out, at least one on either side.

    Raises:
        InputError: the share is not inside (0, 1), or there is only one row.
    """
    if not 0 < share < 1 or len(rows) < 2:
        raise InputError(
            f"holdout: cannot hold {share:g} of {len(rows)} rows out; give validation rows of their own, or holdout=0"
        )
    order = np.random.default_rng([_SPLIT, seed]).permutation(len(rows)).tolist()
    held = min(max(1, round(share * len(rows))), len(rows) - 1)
    return Subset(rows, order[held:]), Subset(rows, order[:held])


def draw(count: int, size: int, seed: int, step: int) -> list[int]:
    """Return the rows of one step, a function of (seed, step): every pass is over all rows in a fresh order.

    ``size`` rows follow one another through the passes, so that a batch may end one and begin the next; 0, or as many
    as there are, is every row in its own order.
    """
    if size <= 0 or size >= count:
        return list(range(count))
    first, out = step * size, list[int]()
    while len(out) < size:
        turn, place = divmod(first + len(out), count)
        order = np.random.default_rng([_ORDER, seed, turn]).permutation(count)
        out += order[place : place + size - len(out)].tolist()
    return out


@contextmanager
def noise(seed: int, step: int, device: torch.device | None = None) -> Generator[Callable[[], None]]:
    """Seed torch's, numpy's and Python's generators by (seed, step), and put them back afterwards.

    Whatever draws from them (dropout, augmentation, a data set's transforms) draws the same for both points of a step:
    what is yielded, when called, seeds them again.
    """
    value = int(np.random.SeedSequence([_NOISE, seed, step]).generate_state(1, np.uint32)[0])
    # Not torch.manual_seed, which also keeps a note, with a stack trace, for every kind of device it has not met yet.
    generators = [torch.default_generator]
    if device is not None and device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])

    def again() -> None:
        for generator in generators:
            generator.manual_seed(value)
        random.seed(value)
        np.random.seed(value)

    before = [generator.get_state() for generator in generators]
    state, legacy = random.getstate(), np.random.get_state()
    again()
    try:
        yield again
    finally:
        for generator, was in zip(generators, before, strict=True):
            generator.set_state(was)
        random.setstate(state)
        np.random.set_state(legacy)


def run(module: nn.Module, inputs: Any) -> Tensor:
    """Run a module on a batch's inputs (a mapping as keywords, a sequence as arguments) and return its logits."""
    if isinstance(inputs, Mapping):
        found = module(**cast(Mapping[str, Any], inputs))
    elif isinstance(inputs, list | tuple):
        found = module(*cast(Sequence[Any], inputs))
    else:
        found = module(inputs)
    return found if isinstance(found, Tensor) else found.logits


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """``-log softmax(z)[y]`` in nats, the mean over rows summed in float64: [n, C], [n] -> scalar."""
    try:
        each = nn.functional.cross_entropy(logits, labels, reduction="none")
    except RuntimeError as error:
        if "target dtype" not in str(error) and "scalar type" not in str(error):
            raise
        raise InputError(
            f"target: labels of {labels.dtype} are no classes; give whole numbers, or a measure of your own"
        ) from None
    except IndexError:
        raise InputError(
            f"target: a label is out of range: the labels go from {int(labels.min())} to {int(labels.max())}, and the "
            f"module has {logits.shape[1]} outputs, counted from 0"
        ) from None
    return each.double().sum() / each.numel()


def scalar(value: Any, what: str) -> Any:
    """Return what a loss or score came to, one number.

    Raises:
        InputError: it is something else; ``what`` says what returned it.
    """
    if isinstance(value, Tensor) and value.numel() != 1:
        raise InputError(
            f"measure: the {what} returned a tensor of shape {list(value.shape)}; return one number, such as its mean"
        )
    if not isinstance(value, Tensor | int | float | np.number | np.ndarray) or isinstance(value, bool):
        raise InputError(f"measure: the {what} returned {value!r}; return one number")
    return value


def accuracy(module: nn.Module, inputs: Any, labels: Tensor) -> float:
    """Return the share of rows whose largest logit is the label's."""
    return float((run(module, inputs).argmax(-1) == labels).double().mean())


@dataclass(frozen=True)
class LossOf:
    """A differentiable loss ``loss(logits, labels) -> scalar``, a mean over rows; lower is better."""

    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy


@dataclass(frozen=True)
class ScoreOf:
    """Any ``score(module, inputs, labels) -> float``, a mean over rows; higher is better. It has no gradient."""

    score: Callable[[nn.Module, Any, Tensor], float] = accuracy


@dataclass(frozen=True)
class RemoteScore:
    """Any ``score(state dict) -> float`` of a blend, such as a served model's; higher is better. It needs no rows."""

    score: Callable[[dict[str, Tensor]], float]


Measure = LossOf | ScoreOf | RemoteScore
_NAMED: dict[str, Measure] = {"cross_entropy": LossOf(), "accuracy": ScoreOf()}


def measure_of(measure: str | Measure) -> Measure:
    """Return a measure by its name, or as it is.

    Raises:
        InputError: no such name.
    """
    if not isinstance(measure, str):
        return measure
    if measure not in _NAMED:
        raise InputError(
            f"measure {measure!r} is unknown; use {', '.join(_NAMED)}, LossOf, ScoreOf or RemoteScore"
            f"{nearest(measure, list(_NAMED))}"
        )
    return _NAMED[measure]


@dataclass(frozen=True, eq=False)
class Target:
    """What a mixture is for: labelled rows to learn from, rows held out, and what is measured.

    Attributes:
        train: rows the minibatches are drawn from; None for a measure that needs none.
        validation: rows for early stopping; None: none.
        measure: what is minimised (a loss) or maximised (a score).
        batch_size: rows of a minibatch; 0: all.
        augment: applied to a training batch's inputs, with the step's own random numbers.
    """

    train: Rows | None
    validation: Rows | None = None
    measure: Measure = LossOf()
    batch_size: int = 64
    augment: Callable[[Any], Any] | None = None

    def batch(self, seed: int, step: int, device: torch.device | None = None) -> tuple[Any, Tensor]:
        """Return the minibatch of a step: (inputs, labels), on ``device``."""
        assert self.train is not None
        chosen = draw(len(self.train), self.batch_size, seed, step)
        if isinstance(self.train, Tensors) and self.augment is None:
            inputs, labels = take(self.train, chosen)  # nothing is drawn, so nothing needs to be seeded
            return place(inputs, device), labels.to(device)
        with noise(seed, step, device):
            inputs, labels = take(self.train, chosen)
            inputs = self.augment(inputs) if self.augment is not None else inputs
        return place(inputs, device), labels.to(device)


def place(inputs: Any, device: torch.device | None) -> Any:
    """Return a batch's inputs on a device."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {name: place(value, device) for name, value in cast(Mapping[str, Any], inputs).items()}
    if isinstance(inputs, list | tuple):
        return [place(value, device) for value in cast(Sequence[Any], inputs)]
    return inputs


def passes(rows: Rows, size: int, device: torch.device | None = None) -> Generator[tuple[Any, Tensor]]:
    """Yield all rows in their own order, ``size`` at a time."""
    for start in range(0, len(rows), size):
        inputs, labels = take(rows, range(start, min(start + size, len(rows))))
        yield place(inputs, device), labels.to(device)
