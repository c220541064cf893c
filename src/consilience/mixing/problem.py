"""The target's loss as a function of the coefficients: by evaluations alone, or with its gradient.

L(alpha) = loss(theta(alpha); B_t)                  B_t: the minibatch of step t
dL/dalpha_k = <theta_k, dL/dtheta>                  per group of parameters; one backward pass
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from consilience.coefficients.coefficients import Alpha
from consilience.errors import InputError
from consilience.mixing.bank import Blends, ExpertBank
from consilience.mixing.batchnorm import Policy, mode, recalibrate
from consilience.mixing.student import Student
from consilience.mixing.target import LossOf, RemoteScore, Subset, Target, Tensors, noise, passes, run, scalar
from consilience.optimizers.gradient import Terms

#: Rows of one forward pass where nothing is learned.
EVALUATION_ROWS = 256


@dataclass
class Counts:
    """Forward and backward passes of minibatches, and forward passes of validation (recalibration included)."""

    forwards: int = 0
    backwards: int = 0
    validation: int = 0


class TargetLoss:
    """The loss of any optimizer here (``consilience.optimizers.gradient.Loss``), with ``at`` for several points.

    Both points of a step see one minibatch, one state of every random generator and one normalisation mode, else their
    difference would be noise. All parameters' blends of a call to ``at`` come from one product over the bank,
    ``together`` of them at a time, which is also how many models' worth of memory they take.

    A ``RemoteScore`` sees blended running statistics, whatever the policy, and is delivered what it saw.

    Known limit: under the policies that blend running statistics, the gradient leaves their dependence on alpha out,
    which two evaluations see.
    """

    def __init__(
        self,
        bank: ExpertBank,
        module: nn.Module,
        target: Target,
        *,
        seed: int = 0,
        bn: Policy = "blend",
        training: bool = False,
        together: int = 2,
        recalibration: int = 20,
    ) -> None:
        """Make the student; see ``consilience.mixing.mix`` for the arguments.

        Raises:
            InputError: the measure needs rows and there are none.
        """
        if target.train is None and not isinstance(target.measure, RemoteScore):
            raise InputError("target: has no rows, and its measure needs some; give (inputs, labels)")
        self.bank, self.target, self.seed = bank, target, seed
        self.bn: Policy = bn
        self.training, self.recalibration = training, recalibration
        self.student = Student(module, bank)
        self.room: Blends = bank.room(max(1, together))
        self.counts = Counts()
        self._finite = False

    def _advice(self) -> str:
        """Say what to do about a loss that is not finite."""
        rows = self.target.train
        rows = rows.rows if isinstance(rows, Subset) else rows
        if isinstance(rows, Tensors) and rows.inputs.is_floating_point():
            bad = int((~rows.inputs.isfinite().flatten(1).all(1)).sum())
            if bad:
                return f"{bad} of its {len(rows)} rows hold NaN or Inf; repair or remove them"
        if not self._finite:
            return "it was never finite, so no step can mend it; look at the rows, the measure and the experts"
        return "lower learning_rate or mu, or keep space='simplex'"

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.bank.matrix.device

    def __call__(self, alpha: Alpha, step: int, *, gradient: bool) -> tuple[Terms, Alpha | None]:
        """Return the terms on the minibatch of ``step`` and, if asked for, dL/dalpha [K, N].

        Raises:
            InputError: the loss is not finite, or a gradient is asked of a score.
        """
        if not gradient:
            return self.at([alpha], step)[0], None
        measure = self.target.measure
        if not isinstance(measure, LossOf):
            raise InputError("optimizer: a score has no gradient; use optimizer='spsa' or 'cma'")
        inputs, labels = self.target.batch(self.seed, step, self.device)
        module = self.student.show(self.bank.blends([alpha], self.room))
        with mode(module, self.bn, training=self.training), noise(self.seed, step, self.device):
            loss = scalar(measure.loss(run(module, inputs), labels), "loss")
            self.counts.forwards += 1
            slope = self.bank.slopes(self.student.gradient(loss))
            self.counts.backwards += 1
        return self._terms(float(loss.detach()), alpha), slope

    def at(self, points: Sequence[Alpha], step: int) -> list[Terms]:
        """Return the terms of several points on the minibatch of ``step``, with common random numbers.

        Raises:
            InputError: a loss is not finite.
        """
        measure = self.target.measure
        if isinstance(measure, RemoteScore):
            return [self._terms(self._remote(measure, point), point) for point in points]
        inputs, labels = self.target.batch(self.seed, step, self.device)
        found: list[Terms] = []
        module, drawn = self.student.module, noise(self.seed, step, self.device)
        with mode(module, self.bn, training=self.training), torch.no_grad(), drawn as again:
            for start in range(0, len(points), self.room.room):
                some = points[start : start + self.room.room]
                blends = self.bank.blends(some, self.room)
                for row, point in enumerate(some):
                    again()
                    value = self._value(self.student.show(blends, row), inputs, labels)
                    self.counts.forwards += 1
                    found.append(self._terms(value, point))
        return found

    def _value(self, module: nn.Module, inputs: object, labels: Tensor) -> float:
        """Return a loss, or a score with its sign turned."""
        measure = self.target.measure
        if isinstance(measure, LossOf):
            return float(scalar(measure.loss(run(module, inputs), labels), "loss"))
        assert not isinstance(measure, RemoteScore)
        return -float(scalar(measure.score(module, inputs, labels), "score"))

    def _remote(self, measure: RemoteScore, point: Alpha) -> float:
        self.counts.forwards += 1
        return -float(scalar(measure.score(self.bank.state(point)), "score"))

    def _terms(self, value: float, point: Alpha) -> Terms:
        if not np.isfinite(value):
            raise InputError(
                f"target: the loss is {value:g} at coefficients up to {np.abs(point).max():.3g}; {self._advice()}"
            )
        self._finite = True
        return {"target": value}

    def validate(self, alpha: Alpha) -> float:
        """Return the loss on the held-out rows, of the model as it would be delivered; the mean over rows in float64.

        Raises:
            ValueError: no rows are held out.
        """
        measure = self.target.measure
        if isinstance(measure, RemoteScore):
            self.counts.validation += 1
            return -float(scalar(measure.score(self.bank.state(alpha)), "score"))
        if self.target.validation is None:
            raise ValueError("no rows are held out")
        module = self.delivered(alpha)
        total = 0.0
        with mode(module, "blend"), torch.no_grad():
            for inputs, labels in passes(self.target.validation, EVALUATION_ROWS, self.device):
                total += len(labels) * self._value(module, inputs, labels)
                self.counts.validation += 1
        return total / len(self.target.validation)

    def delivered(self, alpha: Alpha) -> nn.Module:
        """Show a blend with the buffers that the policy delivers, and return the module."""
        module = self.student.show(self.bank.blends([alpha], self.room))
        if self.bn != "blend":
            recalibrate(module, self._calibration(), run)
        return module

    def _calibration(self) -> Generator[object]:
        for step in range(self.recalibration):
            yield self.target.batch(self.seed, step, self.device)[0]
            self.counts.validation += 1

    def state(self, alpha: Alpha) -> dict[str, Tensor]:
        """Return the state dict that the policy delivers: a blend, its running statistics re-estimated or blended."""
        found = self.bank.state(alpha)
        if self.bn != "blend" and not isinstance(self.target.measure, RemoteScore):
            module = self.delivered(alpha)
            values = dict(module.named_buffers(remove_duplicate=False))
            for slot in self.bank.layout.buffers:
                value = values[slot.name].detach().to(self.bank.dtypes[slot.name], copy=True)
                found |= dict.fromkeys(slot.names, value)
        return found
