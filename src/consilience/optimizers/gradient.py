"""Gradient descent on the coefficients: the Adam family or SGD, schedules, clipping, and the anchor's proximal step.

What moves is ``w``; the coefficients are a map of it (see ``parameterisation``), and where the gradient in w comes from
is an ``Estimator``'s business: the chain rule here, function values in ``spsa``.

After Adam's step the anchor is applied as the proximal map in Adam's own metric: coordinate i is thresholded by
``lr * slope / (sqrt(v_i) + eps)``. So a coefficient leaves the anchor exactly where the loss's gradient exceeds the
anchor's slope, as in the problem that is written down. Other maps than alpha = w have no such step: there the
penalty is differentiated with the loss, so that Adam ends within about its learning rate of the anchor, not on it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from consilience.coefficients.coefficients import Alpha
from consilience.optimizers.anchor import Anchor
from consilience.optimizers.parameterisation import Parameterisation
from consilience.optimizers.settings import Descent, Schedule

if TYPE_CHECKING:
    from torch import Tensor

Terms = dict[str, float]


class Loss(Protocol):
    """The objective without the anchor, on the samples of one step."""

    def __call__(self, alpha: Alpha, step: int, *, gradient: bool) -> tuple[Terms, Alpha | None]:
        """Return the weighted terms (their sum is the loss) and dL/dalpha [K, N] if asked for."""
        ...


@runtime_checkable
class ManyPoints(Protocol):
    """A loss that evaluates several tables of coefficients at once, so that all blends are one product."""

    def at(self, points: Sequence[Alpha], step: int) -> list[Terms]:
        """Return the weighted terms at every point [K, N], on the same samples and with the same random numbers."""
        ...


class Estimator(Protocol):
    """Where the gradient in w comes from."""

    def __call__(self, loss: Loss, w: "Tensor", step: int) -> tuple[Terms, "Tensor"]:
        """Return the terms of the loss at ``w`` [K, N] on the samples of ``step``, and the gradient in w [K, N].

        The anchor is none of the terms; it is part of the gradient where the map leaves it no proximal step.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Return what the next estimate depends on, as numpy arrays."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Take a state back."""
        ...


class Optimizer(Protocol):
    """Moves coefficients, one step at a time; its state is arrays, so that a run can stop and go on."""

    def step(self, loss: Loss, number: int) -> Terms:
        """Do step ``number`` (from 0) and return the terms of the loss before it."""
        ...

    @property
    def alpha(self) -> Alpha:
        """The coefficients now, [K, N]."""
        ...

    def state(self) -> dict[str, Any]:
        """Return everything the next step depends on, as numpy arrays."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Take a state back."""
        ...


def rate_at(schedule: Schedule, step: int, steps: int) -> float:
    """Return the multiplier of the learning rate at ``step`` (from 0) of ``steps``.

    linear and cosine fall to 0.1; restarts is a cosine to 0.1 over 50, 100, 200, ... steps (the released code's
    schedule: T_0=50, T_mult=2, eta_min=0.1 lr).
    """
    if schedule == "constant":
        return 1.0
    if schedule == "restarts":
        length, at = 50, step
        while at >= length:
            at, length = at - length, 2 * length
        return 0.1 + 0.45 * (1 + math.cos(math.pi * at / length))
    if schedule == "spall":
        settled = 0.1 * steps + 1
        return (settled / (settled + step)) ** 0.602
    share = step / max(1, steps - 1) if steps > 1 else 0.0
    return 1 - 0.9 * share if schedule == "linear" else 0.1 + 0.45 * (1 + math.cos(math.pi * share))


@dataclass(frozen=True)
class Backward:
    """The loss's own gradient, brought to w by the chain rule."""

    map: Parameterisation
    anchor: Anchor

    def __call__(self, loss: Loss, w: "Tensor", step: int) -> tuple[Terms, "Tensor"]:
        """Return terms and gradient; see ``Estimator``."""
        import torch

        held = w.detach().clone().requires_grad_()
        alpha = self.map.alpha(held)
        terms, slope = loss(self.map.coefficients(w), step, gradient=True)
        assert slope is not None
        total = (alpha * torch.from_numpy(slope)).sum()
        if not self.map.plain:
            total = total + self.anchor.penalty(alpha)
        return terms, torch.autograd.grad(total, held)[0]

    def state(self) -> dict[str, Any]:
        """Return nothing: a gradient has no memory."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Do nothing."""


class Gradient:
    """Descends a loss by its gradient, as the estimator gives it (by default the loss's own)."""

    def __init__(
        self,
        settings: Descent,
        parameterisation: Parameterisation,
        anchor: Anchor,
        estimator: Estimator | None = None,
    ) -> None:
        import torch

        self.settings, self.map, self.anchor = settings, parameterisation, anchor
        self.estimator = estimator or Backward(parameterisation, anchor)
        self.w = torch.nn.Parameter(parameterisation.initial())
        self.rule = self._rule()

    def _rule(self) -> Any:
        import torch

        s = self.settings
        if s.rule == "sgd":
            return torch.optim.SGD([self.w], lr=s.learning_rate, weight_decay=s.weight_decay)
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[s.rule]
        return kind([self.w], lr=s.learning_rate, betas=s.betas, eps=s.eps, weight_decay=s.weight_decay)

    @property
    def alpha(self) -> Alpha:
        """The coefficients now."""
        return self.map.coefficients(self.w)

    def step(self, loss: Loss, number: int) -> Terms:
        """Do one step; see ``Optimizer.step``. The anchor's term is ``anchor``."""
        import torch

        terms, gradient = self.estimator(loss, self.w.detach(), number)
        terms = terms | {"anchor": float(self.anchor.penalty(self.map.alpha(self.w.detach())))}
        self.w.grad = gradient
        scale = self._clip()
        for group in self.rule.param_groups:
            group["lr"] = self.settings.learning_rate * rate_at(self.settings.schedule, number, self.settings.steps)
        self.rule.step()
        with torch.no_grad():
            if self.map.plain and self.anchor.gamma:
                self.anchor.shrink(self.w, scale * self._metric())
            self.map.project(self.w)
            self.w.copy_(torch.where(self.map.learned, self.w, self.map.initial()))
        return terms

    def _clip(self) -> float:
        """Clip the gradient and return the factor that it was multiplied by."""
        import torch

        if not self.settings.clip:
            return 1.0
        norm = float(torch.nn.utils.clip_grad_norm_([self.w], self.settings.clip))
        return min(1.0, self.settings.clip / (norm + 1e-6))

    def _metric(self) -> "Tensor | float":
        """Return by how much a unit of gradient moves each coordinate in this step."""
        rate = self.rule.param_groups[0]["lr"]
        if self.settings.rule == "sgd":
            return rate
        held = self.rule.state[self.w]
        corrected = held["exp_avg_sq"] / (1 - self.settings.betas[1] ** float(held["step"]))
        return rate / (corrected.sqrt() + self.settings.eps)

    def state(self) -> dict[str, Any]:
        """Return w, the rule's moments and the estimator's memory."""
        held = self.rule.state.get(self.w, {})
        moments = {f"rule.{key}": value for key, value in held.items() if value is not None}
        arrays = {key: value.detach().numpy().copy() for key, value in ({"w": self.w} | moments).items()}
        return arrays | {f"estimator.{key}": value for key, value in self.estimator.state().items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take a state back."""
        import torch

        with torch.no_grad():
            self.w.copy_(torch.tensor(state["w"]))
        self.rule.state.clear()  # a rule creates its moments at the first step
        held = {key.removeprefix("rule."): torch.tensor(v) for key, v in state.items() if key.startswith("rule.")}
        if held:
            self.rule.state[self.w] = held
        own = "estimator."
        self.estimator.restore({key.removeprefix(own): v for key, v in state.items() if key.startswith(own)})
