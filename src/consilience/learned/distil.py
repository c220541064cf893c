"""Merge and distil: coefficients and a low-rank correction beside them, learned together by the same loss."""

import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from consilience.coefficients import Coefficients
from consilience.coefficients.coefficients import Alpha
from consilience.engine.plan import CORRECTION
from consilience.errors import InputError
from consilience.learned.compare import compared
from consilience.learned.correction import Correction, state_of
from consilience.learned.expert_merging_distil import CorrectionSettings
from consilience.learned.learning import minimise, optimizer_of, report
from consilience.learned.regression import start_by_regression
from consilience.learned.run import Run, open_workshop
from consilience.learned.settings import Learning
from consilience.optimizers.gradient import Loss, Optimizer, Terms, rate_at
from consilience.optimizers.settings import Schedule

#: Share of the steps over which the correction's step size rises: Adam's first steps are as long as any, whatever the
#: gradient, and would undo the regression that it starts from.
WARM = 0.1


class Distiller:
    """Moves coefficients by an optimizer of their own, and from the same backward pass a correction by AdamW."""

    def __init__(
        self, inner: Optimizer, correction: Correction, settings: CorrectionSettings, schedule: Schedule, steps: int
    ) -> None:
        self.inner, self.correction, self.settings = inner, correction, settings
        self._schedule: Schedule = schedule
        self._steps = steps
        self._best: dict[str, Any] = {}
        values = list(correction.parameters.values())
        self._adam = torch.optim.AdamW(
            values, lr=settings.correction_rate, weight_decay=settings.correction_decay, fused=True
        )

    @property
    def alpha(self) -> Alpha:
        """The coefficients now."""
        return self.inner.alpha

    def step(self, loss: Loss, number: int) -> Terms:
        """Do step ``number`` and return the terms of the loss before it."""
        warm = min(1.0, (number + 1) / max(1.0, WARM * self._steps))
        for group in self._adam.param_groups:
            group["lr"] = self.settings.correction_rate * warm * rate_at(self._schedule, number, self._steps)
        self._adam.zero_grad()
        terms = self.inner.step(loss, number)
        self._adam.step()
        return terms

    def keep(self) -> None:
        """Remember the correction as it is: early stopping comes back to it."""
        self._best = state_of(self.correction.parameters)

    def go_back(self) -> None:
        """Take the correction that was kept, if any was."""
        for name, value in self._best.items():
            self.correction.parameters[name].data.copy_(torch.as_tensor(value))

    def state(self) -> dict[str, Any]:
        """Return the state of the coefficients' optimizer, the correction, and Adam's averages."""
        held = {f"inner.{key}": value for key, value in self.inner.state().items()}
        held |= state_of(self.correction.parameters)
        held |= {f"best.{name}": value for name, value in self._best.items()}
        for name, value in self.correction.parameters.items():
            kept: dict[str, Any] = self._adam.state.get(value, {})
            if kept:
                held |= {f"{name}.{key}": kept[key].detach().cpu().numpy().copy() for key in ("exp_avg", "exp_avg_sq")}
        done = next(iter(self._adam.state.values()), {}).get("step", 0)
        return held | {"done": np.asarray(float(done))}

    def restore(self, state: dict[str, Any]) -> None:
        """Take a state back."""
        self.inner.restore(_under("inner.", state))
        self._best = _under("best.", state)
        done = torch.tensor(float(state["done"]))
        for name, value in self.correction.parameters.items():
            value.data.copy_(torch.as_tensor(state[name]))
            if f"{name}.exp_avg" in state:
                kept = {key: torch.as_tensor(state[f"{name}.{key}"]).to(value) for key in ("exp_avg", "exp_avg_sq")}
                self._adam.state[value] = {"step": done.clone(), **kept}


def _under(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def learn_distilled(run: Run, start: Coefficients, learning: Learning, correct: CorrectionSettings) -> Coefficients:
    """Learn coefficients and the correction; the latter is written to the run's folder as one more expert.

    Raises:
        InputError: the run has no folder, the optimizer takes no gradient, or an expert has the correction's name.
    """
    if run.folder is None:
        raise InputError(f"{run.where}: method {run.plan.method.name!r} writes an adapter; name the output to learn in")
    if CORRECTION in run.experts:
        raise InputError(f"{run.where}: an expert is named {CORRECTION!r}, as the learned correction is; rename it")
    if not learning.takes_gradient:
        raise InputError(
            f"{run.where}: optimizer {learning.optimizer!r} takes no gradient, which the correction needs; use adam"
        )
    begun = time.perf_counter()
    learning.objective.check()  # what is wrong with the settings is said before the models are read
    shop = open_workshop(
        run, start, learning.rows, layers=learning.objective.layers, precision=learning.compute.precision,
        checkpoint=learning.compute.checkpoint,
    )  # fmt: skip
    try:
        run.progress.phase("directions of the experts")
        correction = Correction(shop.student, correct.correction_rank, run.seed)
        if correct.correction_ridge:
            start_by_regression(shop, correction, start.alpha, correct.correction_ridge)
        inner = optimizer_of(run, start, learning)
        optimizer = Distiller(inner, correction, correct, learning.descent.schedule, learning.loop.steps)
        problem = shop.problem(learning.objective)
        learned = minimise(run, shop, problem, optimizer, learning, start, beside=correct, on_best=optimizer.keep)
        optimizer.go_back()
        facts = compared(shop, learned.alpha, correct=correction.turn)
    finally:
        shop.close()
    correction.write(run.folder / CORRECTION, str(run.plan.recipe.base_model))
    facts |= report(run, shop, learning, learned, time.perf_counter() - begun)
    found = start.with_alpha(learned.alpha, **facts, correction={"rank": correction.rank})
    whole = np.concatenate([found.alpha, np.ones((1, found.count))])
    return replace(found, experts=(*found.experts, CORRECTION), alpha=whole)
