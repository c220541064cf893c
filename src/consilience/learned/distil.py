"""Merge, then distil: coefficients first, then a low-rank correction by the same loss on the same answers."""

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from consilience.coefficients import Coefficients
from consilience.coefficients.coefficients import Alpha
from consilience.engine.plan import CORRECTION
from consilience.errors import InputError
from consilience.learned.align import AlignmentSettings, learn_alignment
from consilience.learned.compare import compared
from consilience.learned.correction import Correction, state_of
from consilience.learned.loop import Learned, descend, schedule
from consilience.learned.run import Run, Workshop, open_workshop
from consilience.optimizers.gradient import Loss, Terms, rate_at


@dataclass(frozen=True)
class DistilSettings:
    """The second stage: rank of every expert's directions, steps, samples a step, step size, weight decay."""

    rank: int
    steps: int
    batch: int
    rate: float
    decay: float


class Distiller:
    """Trains a correction by AdamW; an ``Optimizer`` whose coefficients stay as they are."""

    def __init__(self, correction: Correction, alpha: Alpha, settings: DistilSettings) -> None:
        self.correction, self._alpha, self.settings = correction, alpha, settings
        values = list(correction.parameters.values())
        self._adam = torch.optim.AdamW(values, lr=settings.rate, weight_decay=settings.decay)

    @property
    def alpha(self) -> Alpha:
        """The coefficients, which are the first stage's."""
        return self._alpha

    def step(self, loss: Loss, number: int) -> Terms:
        """Do step ``number`` and return the terms of the loss before it."""
        for group in self._adam.param_groups:
            group["lr"] = self.settings.rate * rate_at("cosine", number, self.settings.steps)
        self._adam.zero_grad()
        terms, _ = loss(self._alpha, number, gradient=True)
        self._adam.step()
        return terms

    def state(self) -> dict[str, Any]:
        """Return the correction and Adam's averages."""
        held = state_of(self.correction.parameters)
        for name, value in self.correction.parameters.items():
            kept: dict[str, Any] = self._adam.state.get(value, {})
            if kept:
                held |= {f"{name}.{key}": kept[key].detach().cpu().numpy().copy() for key in ("exp_avg", "exp_avg_sq")}
        done = next(iter(self._adam.state.values()), {}).get("step", 0)
        return held | {"done": np.asarray(float(done))}

    def restore(self, state: dict[str, Any]) -> None:
        """Take a state back."""
        done = torch.tensor(float(state["done"]))
        for name, value in self.correction.parameters.items():
            value.data.copy_(torch.as_tensor(state[name]))
            if f"{name}.exp_avg" in state:
                kept = {key: torch.as_tensor(state[f"{name}.{key}"]).to(value) for key in ("exp_avg", "exp_avg_sq")}
                self._adam.state[value] = {"step": done.clone(), **kept}


def learn_distilled(
    run: Run, settings: AlignmentSettings, distil: DistilSettings, parameters: dict[str, Any]
) -> Coefficients:
    """Learn coefficients, then the correction beside them; it is written to the run's folder as one more expert.

    Raises:
        InputError: the run has no folder, or an expert has the correction's name.
    """
    if run.folder is None:
        raise InputError(f"{run.where}: method {run.plan.method.name!r} writes an adapter; name the output to learn in")
    if CORRECTION in run.experts:
        raise InputError(f"{run.where}: an expert is named {CORRECTION!r}, as the learned correction is; rename it")
    start = settings.start(run)
    first = learn_alignment(run.inside("stage-1"), start, settings, compare=False)
    begun = time.perf_counter()
    shop = open_workshop(
        run.inside("stage-2"), start, settings.data, layers=settings.layers, precision=settings.precision,
        checkpoint=settings.checkpoint,
    )  # fmt: skip
    try:
        shop.run.progress.phase("directions of the experts")
        correction = Correction(shop.student, distil.rank, run.seed)
        learned = _train(shop, correction, first.alpha, settings, distil)
        facts = compared(shop, first.alpha, correct=correction.turn)
    finally:
        shop.close()
    correction.write(run.folder / CORRECTION, str(run.plan.recipe.base_model))
    kept = ("history", "steps", "step", "seconds")
    lines = learned.history.lines()
    seconds = round(first.facts["seconds"] + time.perf_counter() - begun, 2)
    found = first.with_alpha(
        first.alpha, **facts, stage_1={key: first.facts[key] for key in kept}, history=lines, steps=len(lines),
        step=learned.step, seconds=seconds, parameters=parameters, correction={"rank": correction.rank},
    )  # fmt: skip
    whole = np.concatenate([found.alpha, np.ones((1, found.count))])
    return replace(found, experts=(*found.experts, CORRECTION), alpha=whole)


def _train(
    shop: Workshop, correction: Correction, alpha: Alpha, settings: AlignmentSettings, distil: DistilSettings
) -> Learned:
    problem = shop.problem(settings.objective(shop.reader.layers))
    for name in shop.student.merged:
        shop.student.parameters[name].requires_grad_(False)
    experts = [shop.samples[i].expert for i in shop.learn]
    problem.hold(alpha)  # the weights stay as they are from here on

    def loss(alpha: Alpha, step: int, *, gradient: bool) -> tuple[Terms, Alpha | None]:
        return problem.accumulate([shop.learn[i] for i in schedule(experts, distil.batch, shop.run.seed, step)]), None

    identity = [
        [model.identity() for model in shop.run.plan.models], repr(settings), repr(distil), shop.run.seed,
        [s.digest for s in shop.samples], alpha.tolist(),
    ]  # fmt: skip
    shop.run.progress.phase("distilling", distil.steps)
    optimizer = Distiller(correction, alpha, distil)
    with shop.run.scalars("stage-2") as scalars:
        return descend(
            optimizer, loss, distil.steps, folder=shop.run.folder, identity=identity, progress=shop.run.progress,
            scalars=scalars,
        )  # fmt: skip
