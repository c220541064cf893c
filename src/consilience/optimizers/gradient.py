"""Gradient descent on the coefficients: the Adam family or SGD, schedules, clipping, and the anchor's proximal step.

After Adam's step the anchor is applied as the proximal map in Adam's own metric: coordinate i is thresholded by
``lr * slope / (sqrt(v_i) + eps)``. So a coefficient leaves the anchor exactly where the loss's gradient exceeds the
anchor's slope, as in the problem that is written down.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from consilience.coefficients.coefficients import Alpha
from consilience.optimizers.anchor import Anchor
from consilience.optimizers.parameterisation import Parameterisation

if TYPE_CHECKING:
    from torch import Tensor

Terms = dict[str, float]
Rule = Literal["adam", "adamw", "sgd"]
Schedule = Literal["constant", "linear", "cosine", "restarts"]


class Loss(Protocol):
    """The objective without the anchor, on the samples of one step."""

    def __call__(self, alpha: Alpha, step: int, *, gradient: bool) -> tuple[Terms, Alpha | None]:
        """Return the weighted terms (their sum is the loss) and dL/dalpha [K, N] if asked for."""
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
    share = step / max(1, steps - 1) if steps > 1 else 0.0
    return 1 - 0.9 * share if schedule == "linear" else 0.1 + 0.45 * (1 + math.cos(math.pi * share))


@dataclass(frozen=True)
class Descent:
    """Settings of gradient descent: ``rate`` in the units of w, ``clip`` bounds the gradient's norm (0: no bound)."""

    rule: Rule = "adam"
    rate: float = 0.02
    steps: int = 50
    schedule: Schedule = "cosine"
    clip: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


class Gradient:
    """Descends a loss by its gradient, as ``estimate`` gives it (by default the loss's own)."""

    def __init__(
        self,
        settings: Descent,
        parameterisation: Parameterisation,
        anchor: Anchor,
        estimate: "Callable[[Loss, Gradient, int], tuple[Terms, Alpha]] | None" = None,
    ) -> None:
        import torch

        self.settings, self.map, self.anchor = settings, parameterisation, anchor
        self.estimate = estimate
        self.w = torch.nn.Parameter(parameterisation.initial())
        self.rule = self._rule()

    def _rule(self) -> Any:
        import torch

        s = self.settings
        if s.rule == "sgd":
            return torch.optim.SGD([self.w], lr=s.rate, weight_decay=s.weight_decay)
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[s.rule]
        return kind([self.w], lr=s.rate, betas=s.betas, eps=s.eps, weight_decay=s.weight_decay)

    @property
    def alpha(self) -> Alpha:
        """The coefficients now."""
        return np.asarray(self.map.alpha(self.w.detach()).numpy(), np.float64)

    def step(self, loss: Loss, number: int) -> Terms:
        """Do one step; see ``Optimizer.step``. The anchor's term is ``anchor``."""
        import torch

        if self.estimate is None:
            terms, slope = loss(self.alpha, number, gradient=True)
            assert slope is not None
        else:
            terms, slope = self.estimate(loss, self, number)
        terms = terms | {"anchor": float(self.anchor.penalty(self.map.alpha(self.w.detach())))}
        scale = self._set_gradient(torch.from_numpy(slope))
        for group in self.rule.param_groups:
            group["lr"] = self.settings.rate * rate_at(self.settings.schedule, number, self.settings.steps)
        self.rule.step()
        with torch.no_grad():
            if self.map.plain and self.anchor.gamma:
                self.anchor.shrink(self.w, scale * self._metric())
            self.map.project(self.w)
            self.w.copy_(torch.where(self.map.learned, self.w, self.map.initial()))
        return terms

    def _set_gradient(self, slope: "Tensor") -> float:
        """Put dL/dw into place, clipped; return the factor that clipping multiplied it by."""
        import torch

        self.w.grad = None
        alpha = self.map.alpha(self.w)
        total = (alpha * slope).sum()
        if not self.map.plain:
            total = total + self.anchor.penalty(alpha)
        torch.autograd.backward(total)
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
        """Return w and the rule's moments."""
        held = self.rule.state.get(self.w, {})
        found = {f"rule.{key}": np.asarray(value.detach().numpy()) for key, value in held.items() if value is not None}
        return {"w": self.w.detach().numpy().copy(), **{key: value.copy() for key, value in found.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        """Take a state back."""
        import torch

        with torch.no_grad():
            self.w.copy_(torch.from_numpy(state["w"]))
        held = {key.removeprefix("rule."): torch.from_numpy(v) for key, v in state.items() if key.startswith("rule.")}
        if held:
            self.rule.state[self.w] = held
