"""What a step costs, part by part, and when function values beat the gradient.

    T_full = (1 + gamma) F + C_mix + D_alpha            T_spsa(m) = 2 m (F + C_mix)
    m* = T_full / T_spsa(1)

F is a forward pass of a minibatch, gamma the backward pass in units of it, C_mix one blend and D_alpha the inner
products of every expert with the gradient. Two points cost less than m = 1 only where m* > 1; with gamma = 2 and cheap
blends m* = 1.5, so what lasts is memory (no activations, no gradient) and losses without a gradient.

Source: GLUE (arXiv:2512.22467), section on cost; the dependence on m is ours.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from consilience.errors import InputError
from consilience.mixing.batchnorm import mode
from consilience.mixing.problem import TargetLoss
from consilience.mixing.target import LossOf, run


@dataclass(frozen=True)
class Cost:
    """Median seconds: ``forward`` F, ``backward`` gamma F, ``blend`` C_mix, ``slopes`` D_alpha.

    ``blend`` is half of what a pair of blends takes, for they share a pass over the bank. ``full`` and ``pair`` are the
    whole steps as measured, minibatch included.
    """

    forward: float
    backward: float
    blend: float
    slopes: float
    full: float
    pair: float

    @property
    def gamma(self) -> float:
        """Return the backward pass in units of the forward pass."""
        return self.backward / self.forward

    @property
    def full_step(self) -> float:
        """Return the predicted time of a step by the gradient."""
        return self.forward + self.backward + self.blend + self.slopes

    def spsa_step(self, directions: int = 1) -> float:
        """Return the predicted time of a step by 2 m evaluations."""
        return 2 * directions * (self.forward + self.blend)

    @property
    def break_even(self) -> float:
        """Return the predicted m*: below so many directions, evaluations cost less than the gradient."""
        return self.full_step / self.spsa_step()

    @property
    def measured_break_even(self) -> float:
        """Return m* by the whole steps: a step's time is proportional to its directions."""
        return self.full / self.pair


def measure_cost(loss: TargetLoss, *, repeat: int = 7) -> Cost:
    """Time the parts of a step, interleaved, and return their medians; the first round is not counted.

    Raises:
        InputError: the measure has no gradient.
    """
    measure = loss.target.measure
    if not isinstance(measure, LossOf):
        raise InputError("cost: a score has no gradient to compare with; measure the cost of a loss")
    bank = loss.bank
    alpha = bank.table(np.full(len(bank.names), 1.0 / len(bank.names)))
    pair = bank.room(2)
    inputs, labels = loss.target.batch(loss.seed, 0, loss.device)
    module = loss.student.show(bank.blends([alpha, alpha], pair))
    flat = torch.zeros_like(pair.parameters[0])

    def forward() -> None:
        with torch.no_grad():
            measure.loss(run(module, inputs), labels)

    def blends() -> None:
        bank.blends([alpha, alpha], pair)

    seconds: dict[str, list[float]] = {}
    for _ in range(repeat + 1):
        with mode(module, loss.bn, training=loss.training):
            _timed(seconds, "forward", forward)
            value = measure.loss(run(module, inputs), labels)
            _timed(seconds, "backward", lambda value=value: loss.student.gradient(value))
        _timed(seconds, "blends", blends)
        _timed(seconds, "slopes", lambda: bank.slopes(flat))
        _timed(seconds, "full", lambda: loss(alpha, 0, gradient=True))
        _timed(seconds, "pair", lambda: loss.at([alpha, alpha], 0))
        module = loss.student.show(pair)
    found = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    return Cost(found["forward"], found["backward"], found["blends"] / 2, found["slopes"], found["full"], found["pair"])


def _timed(seconds: dict[str, list[float]], name: str, work: Callable[[], Any]) -> None:
    begun = time.perf_counter()
    work()
    seconds.setdefault(name, []).append(time.perf_counter() - begun)
