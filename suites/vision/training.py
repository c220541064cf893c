"""Training and measuring one small network."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consilience.errors import MachineError
from consilience.progress import NullProgress, Progress
from consilience.training.step import cosine

BATCH = 128


@dataclass(frozen=True)
class Schedule:
    """How a network is trained: passes over its images, the optimizer, and what it computes in.

    The learning rate rises linearly over the first tenth of the steps and falls to zero along half a cosine.
    """

    epochs: int
    learning_rate: float
    optimizer: Literal["sgd", "adamw"]
    weight_decay: float
    precision: Literal["bfloat16", "float32"]
    batch: int = BATCH


#: By kind of network: how the base is trained, and how the experts are. The base is stopped early and experts are
#: trained gently from it: a resnet's at 0.05 ended so far apart that their average was far below the base. bfloat16
#: halves a resnet's step on a CPU that has it; the transformer is slower in it.
SCHEDULES = {
    "resnet": (Schedule(2, 0.1, "sgd", 5e-4, "bfloat16"), Schedule(5, 0.01, "sgd", 5e-4, "bfloat16")),
    "mobilenet_v2": (Schedule(3, 0.1, "sgd", 5e-4, "bfloat16"), Schedule(5, 0.01, "sgd", 5e-4, "bfloat16")),
    "vit": (Schedule(5, 2e-3, "adamw", 0.05, "float32"), Schedule(10, 5e-4, "adamw", 0.05, "float32")),
}


def schedule_for(kind: str, *, base: bool, epochs: int | None = None) -> Schedule:
    """Return the schedule of the base or of an expert, with another number of epochs if one is given."""
    schedule = SCHEDULES[kind][0 if base else 1]
    return schedule if epochs is None else replace(schedule, epochs=epochs)


def rate(step: int, steps: int, peak: float) -> float:
    """Return the learning rate of a step, counted from 0: a linear rise over a tenth of them, then half a cosine."""
    return cosine(step, steps, max(1, round(0.1 * steps)), peak)


def batches(count: int, size: int, epochs: int, seed: Sequence[int]) -> list[Tensor]:
    """Return the rows of every step: each epoch a fresh shuffle, cut into equal batches of at most ``size``.

    They differ by one image at most: a tail of a few images would mislead a network's normalisation.
    """
    generator = np.random.default_rng(seed)
    parts = max(1, math.ceil(count / size))
    return [
        torch.from_numpy(part) for _ in range(epochs) for part in np.array_split(generator.permutation(count), parts)
    ]


def _optimizer(net: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    if schedule.optimizer == "adamw":
        return torch.optim.AdamW(net.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
    return torch.optim.SGD(
        net.parameters(), lr=schedule.learning_rate, momentum=0.9, nesterov=True, weight_decay=schedule.weight_decay
    )


def train(
    net: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    schedule: Schedule,
    *,
    seed: Sequence[int],
    progress: Progress | None = None,
    title: str = "training",
) -> list[float]:
    """Train ``net`` in place by cross-entropy, and return the loss of every step in nats.

    Args:
        net: maps inputs to logits [B, classes]; left in evaluation mode, its weights contiguous.
        inputs: float32 [n, ...].
        labels: int64 [n].
        schedule: how.
        seed: decides the order of the images.
        progress: told of every step.
        title: what it calls the training.

    Raises:
        MachineError: the loss is no number any more.
    """
    optimizer = _optimizer(net, schedule)
    order = batches(len(labels), schedule.batch, schedule.epochs, seed)
    losses: list[float] = []
    progress = progress or NullProgress()
    progress.phase(title, len(order))
    _lay_out(net, torch.channels_last)
    net.train()
    for step, rows in enumerate(order):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, len(order), schedule.learning_rate)
        loss = _loss(net, inputs[rows], labels[rows], schedule)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise MachineError(f"the loss is {losses[-1]} at step {step}; lower the learning rate")
        progress.advance(1, loss=losses[-1])
    _lay_out(net, torch.contiguous_format)
    net.eval()
    return losses


def _lay_out(net: nn.Module, layout: torch.memory_format) -> None:
    """Store convolutions' weights in this order; channels last is a quarter faster on a CPU."""
    for parameter in net.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=layout)


def _loss(net: nn.Module, inputs: Tensor, labels: Tensor, schedule: Schedule) -> Tensor:
    if inputs.ndim == 4:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=schedule.precision == "bfloat16"):
        logits = net(inputs)
    return F.cross_entropy(logits.float(), labels)


def accuracy(net: nn.Module, inputs: Tensor, labels: Tensor, batch: int = 100) -> float:
    """Return the share of inputs whose largest logit is their label's, in evaluation mode and float32.

    Images are handed over channels last, which convolutions on a CPU are a third faster with.
    """
    training = net.training
    net.eval()
    right = 0
    with torch.inference_mode():
        for part, own in zip(inputs.split(batch), labels.split(batch), strict=True):
            if part.ndim == 4:
                part = part.contiguous(memory_format=torch.channels_last)
            right += int((net(part).argmax(1) == own).sum())
    net.train(training)
    return right / len(labels)
