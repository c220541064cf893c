"""Fine-tuning a module from a state dict on labelled rows, and what it scores: where a mixture is a starting point."""

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from consilience.errors import InputError
from consilience.mixing.batchnorm import mode
from consilience.mixing.problem import EVALUATION_ROWS
from consilience.mixing.target import Rows, as_rows, cross_entropy, noise, passes, place, run, take
from consilience.progress import ProgressOption, open_progress
from consilience.training.step import cosine

#: Keeps these random numbers apart from others that are drawn from the same seed.
_STREAM = 0xF17E


@dataclass(frozen=True)
class Evaluation:
    """What a model scores on labelled rows: ``accuracy`` in [0, 1], ``loss`` in nats, means over ``rows`` rows."""

    accuracy: float
    loss: float
    rows: int


@dataclass(frozen=True, eq=False)
class FineTuned:
    """A fine-tuned model: its ``state``, and by epoch (the first: before any) its ``test`` evaluations.

    ``train_loss`` is the mean over an epoch's rows as they were learned from, in nats.
    """

    state: dict[str, Tensor]
    test: list[Evaluation]
    train_loss: list[float]
    seconds: float

    @property
    def accuracy(self) -> list[float]:
        """Test accuracy before fine-tuning and after every epoch."""
        return [found.accuracy for found in self.test]


def evaluate(
    module: nn.Module, data: Any, state: Mapping[str, Tensor] | None = None, *, batch_size: int = EVALUATION_ROWS
) -> Evaluation:
    """Return accuracy and cross-entropy of a classifier on labelled rows, in evaluation mode; the module is unchanged.

    Args:
        module: maps inputs to logits [n, C].
        data: (inputs, labels) tensors or a sized data set of (input, label).
        state: a state dict to evaluate in the module's place.
        batch_size: rows of a forward pass.

    Raises:
        InputError: there are no rows, or the state dict does not fit.
    """
    if state is not None:
        module = loaded(module, state)
    rows, device = as_rows(data, "data"), _device(module)
    right, loss = 0, 0.0
    with mode(module, "blend"), torch.no_grad():
        for inputs, labels in passes(rows, batch_size, device):
            logits = run(module, inputs)
            right += int((logits.argmax(-1) == labels).sum())
            loss += float(cross_entropy(logits, labels)) * len(labels)
    return Evaluation(right / len(rows), loss / len(rows), len(rows))


def loaded(module: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a module with a state dict's values.

    Raises:
        InputError: the state dict does not fit.
    """
    module = copy.deepcopy(module)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"state dict: does not fit the module: {str(error).splitlines()[-1].strip()}") from None
    return module


def fine_tune(
    module: nn.Module,
    state: Mapping[str, Tensor],
    train: Any,
    test: Any = None,
    *,
    epochs: int = 5,
    learning_rate: float = 0.01,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    batch_size: int = 64,
    schedule: Literal["cosine", "constant"] = "cosine",
    warmup: float = 0.0,
    clip: float = 0.0,
    augment: Callable[[Any], Any] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
    seed: int = 0,
    progress: ProgressOption = False,
) -> FineTuned:
    """Fine-tune all weights from a state dict, and evaluate on the test rows before it and after every epoch.

    The recipe of GLUE's authors is not known; this is the ordinary one: cosine from ``learning_rate`` to 0 over all
    steps, and an epoch's batches are as equal as they can be, so that none is left with a single row. Orders of rows,
    augmentation and dropout depend on (seed, epoch) alone.

    Args:
        module: of the architecture; it is copied.
        state: where to start.
        train: (inputs, labels) tensors or a sized data set of (input, label).
        test: the same; None: nothing is evaluated.
        epochs: passes over the training rows.
        learning_rate: the peak.
        optimizer: sgd (with Nesterov's momentum, where there is any) or adamw.
        momentum: of sgd.
        weight_decay: coupled for sgd, decoupled for adamw.
        batch_size: rows of a step.
        schedule: cosine or constant.
        warmup: share of the steps over which the rate rises linearly.
        clip: greatest norm of the gradient; 0: no bound.
        augment: applied to a batch's inputs.
        loss: ``loss(logits, labels) -> scalar``, a mean over rows.
        seed: of everything random.
        progress: True for a bar (or lines) on standard error, a function called with (epochs done, epochs in all), or a
            ``Progress``.

    Raises:
        InputError: there are no rows, the state dict does not fit, or the loss is no longer finite.
    """
    begun = time.perf_counter()
    module, rows = loaded(module, state), as_rows(train, "train")
    held = None if test is None else as_rows(test, "test")
    rule = _rule(module, optimizer, learning_rate, momentum, weight_decay)
    steps = epochs * math.ceil(len(rows) / batch_size)
    planned: Any = torch.optim.lr_scheduler.LambdaLR(rule, lambda step: rate(schedule, warmup, step, steps))
    found = [] if held is None else [evaluate(module, held)]
    losses: list[float] = []
    with open_progress(progress) as shown:
        shown.phase("fine-tuning", epochs, "epochs")
        for epoch in range(epochs):
            losses.append(_epoch(module, rows, rule, planned, loss, batch_size, clip, augment, seed, epoch))
            if held is not None:
                found.append(evaluate(module, held))
            shown.advance(1, loss=losses[-1])
    values = {name: value.detach().clone() for name, value in module.state_dict().items()}
    return FineTuned(values, found, losses, time.perf_counter() - begun)


def rate(schedule: str, warmup: float, step: int, steps: int) -> float:
    """Return the multiplier of the learning rate at ``step`` (from 0) of ``steps``."""
    rising = int(warmup * steps)
    if schedule == "constant" and step >= rising:
        return 1.0
    return cosine(step, steps, rising)


def _rule(
    module: nn.Module, optimizer: str, learning_rate: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    parameters = [value for value in module.parameters() if value.requires_grad]
    if not parameters:
        raise InputError("module: every parameter is frozen; unfreeze what is to be fine-tuned")
    if optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=learning_rate, momentum=momentum, weight_decay=weight_decay, nesterov=momentum > 0
        )
    if optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    raise InputError(f"optimizer {optimizer!r} is unknown (known: sgd, adamw)")


def _epoch(
    module: nn.Module,
    rows: Rows,
    rule: torch.optim.Optimizer,
    planned: Any,
    loss: Callable[[Tensor, Tensor], Tensor],
    size: int,
    clip: float,
    augment: Callable[[Any], Any] | None,
    seed: int,
    epoch: int,
) -> float:
    order = np.random.default_rng([_STREAM, seed, epoch]).permutation(len(rows))
    device, total = _device(module), 0.0
    module.train()
    with noise(seed, epoch, device):
        for chosen in np.array_split(order, math.ceil(len(rows) / size)):
            inputs, labels = take(rows, chosen.tolist())
            inputs = place(inputs if augment is None else augment(inputs), device)
            value = loss(run(module, inputs), labels.to(device))
            rule.zero_grad()
            torch.autograd.backward(value)
            if clip:
                torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
            rule.step()
            planned.step()
            if not math.isfinite(value.item()):
                raise InputError(f"learning_rate: the loss is {value.item():g} in epoch {epoch + 1}; lower it")
            total += value.item() * len(labels)
    return total / len(rows)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
