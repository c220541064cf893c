"""Learning coefficients, from a start to what is found and the facts of it: any objective, optimizer and space."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from consilience.coefficients import Coefficients
from consilience.coefficients.coefficients import Alpha
from consilience.errors import InputError
from consilience.learned.compare import compared
from consilience.learned.facts import facts_of
from consilience.learned.loop import Learned, Stopping, descend, schedule
from consilience.learned.problem import Problem
from consilience.learned.ranking import Ranking, make_ranking
from consilience.learned.run import Run, Workshop, groups_of, open_workshop
from consilience.learned.settings import Learning, Start
from consilience.learned.spectrum import spectrum
from consilience.objectives.objective import Objective
from consilience.optimizers.anchor import Anchor
from consilience.optimizers.gradient import Optimizer, Terms
from consilience.optimizers.kept import Kept, screen
from consilience.optimizers.make import make_optimizer
from consilience.optimizers.parameterisation import Parameterisation


def start_of(run: Run, start: Start) -> Coefficients:
    """Return the coefficients at the start; see ``groups_of``."""
    return groups_of(run, start.grouping, start.exclude, start.alphabar)


def learn_coefficients(
    run: Run, start: Coefficients, learning: Learning, *, anchor: Alpha | None = None, compare: bool = True
) -> Coefficients:
    """Learn coefficients from ``start`` and return them with the facts of the run.

    Args:
        run: the run.
        start: groups and first values; what is not ``learned`` stays.
        learning: what is minimised and how.
        anchor: [K, N] where the L1 anchor pulls to; ``start`` by default.
        compare: measure the result beside the base and Task Arithmetic.
    """
    begun = time.perf_counter()
    learning.objective.check()  # what is wrong with the settings is said before the models are read
    optimizer = None if learning.keep else optimizer_of(run, start, learning, anchor)
    chosen: tuple[int, ...] = ()
    shop = open_workshop(
        run, start, learning.rows, layers=learning.objective.layers, precision=learning.compute.precision,
        checkpoint=learning.compute.checkpoint, trimmed=start.trimmed, teachers=learning.objective.reads_experts,
    )  # fmt: skip
    try:
        problem = _problem(shop, learning)
        if optimizer is None:
            chosen = screen(_alone(run, shop, problem, start), learning.keep)
            optimizer = optimizer_of(run, start, learning, anchor, chosen)
        learned = minimise(run, shop, problem, optimizer, learning, start)
        facts = compared(shop, learned.alpha, score=learning.score) if compare else {}
    finally:
        shop.close()
    facts |= report(run, shop, learning, learned, time.perf_counter() - begun)
    facts |= {"kept": [run.experts[k] for k in chosen]} if chosen else {}
    return start.with_alpha(learned.alpha, **facts, **_diagnosis(optimizer))


def _alone(run: Run, shop: Workshop, problem: Problem | Ranking, start: Coefficients) -> list[float]:
    """Return what every expert loses alone [K], on the rows that are held out, or where there are none on all."""
    rows = shop.hold or shop.learn
    run.progress.phase("every expert alone", len(run.experts))
    found: list[float] = []
    for row in np.eye(len(run.experts)):
        alpha = np.where(start.learned, row[:, None], start.alpha)
        try:
            found.append(sum(problem.evaluate(alpha, rows, gradient=False)[0].values()))
        except InputError:  # its loss is not finite, so that it is the worst
            found.append(math.inf)
        run.progress.advance(1)
    return found


def _diagnosis(optimizer: Optimizer) -> dict[str, Any]:
    """Return what the run's own measurements say of it, where it made any."""
    from consilience.optimizers.diagnosis import FEWEST, diagnose
    from consilience.optimizers.spsa import record_of

    record = record_of(optimizer)
    if record is None or len(record.steps) < FEWEST:
        return {}
    found = diagnose(record)
    return {"diagnosis": {"verdict": found.verdict, "advice": found.advice, "evidence": dict(found.evidence)}}


def optimizer_of(
    run: Run, start: Coefficients, learning: Learning, anchor: Alpha | None = None, chosen: tuple[int, ...] = ()
) -> Optimizer:
    """Return the optimizer at ``start``; ``chosen``: the experts that it moves, the others have 0 (default: all)."""
    import torch

    if chosen:
        inner = learning.space.map(
            _without_others(start.alpha, chosen), start.learned, lambda: spectrum(run, start.groups).of(chosen)
        )
        mapped: Parameterisation = Kept(inner, chosen, len(run.experts))
    else:
        mapped = learning.space.map(start.alpha, start.learned, lambda: spectrum(run, start.groups))
    # A map and its inverse may miss the start by a rounding error, which would turn the penalty's slope there from 0
    # into its full size.
    at = mapped.alpha(mapped.initial()) if anchor is None else torch.tensor(anchor, dtype=torch.float64)
    pull = Anchor(at, mapped.learned, learning.anchor.gamma, learning.anchor.reg_norm)
    descent = replace(learning.descent, steps=learning.loop.steps)
    return make_optimizer(learning.optimizer, descent, mapped, pull, run.seed)


def _without_others(alpha: Alpha, chosen: tuple[int, ...]) -> Alpha:
    """Return the chosen experts' rows with the sum of all: by their own shares, or by equal ones if they have none."""
    own = alpha[list(chosen)]
    own = np.where(own.sum(0) > 0, own, 1.0)
    return own * (alpha.sum(0) / own.sum(0))


def minimise(
    run: Run,
    shop: Workshop,
    problem: Problem | Ranking,
    optimizer: Optimizer,
    learning: Learning,
    start: Coefficients,
    *,
    beside: Any = None,
    on_best: Callable[[], None] | None = None,
) -> Learned:
    """Run the loop, with early stopping where rows are held out.

    Args:
        run: the run.
        shop: its workshop.
        problem: the loss.
        optimizer: what moves the coefficients.
        learning: what is minimised and how.
        start: groups and first values.
        beside: settings of what is learned beside the coefficients: a state is of one value of them.
        on_best: called when the held-out loss is the least so far.
    """
    experts = [shop.samples[i].expert for i in shop.learn]

    def loss(alpha: Alpha, step: int, *, gradient: bool) -> tuple[Terms, Alpha | None]:
        chosen = [shop.learn[i] for i in schedule(experts, learning.loop.batch, run.seed, step)]
        return problem.evaluate(alpha, chosen, gradient=gradient)

    def held(alpha: Alpha) -> float:
        return sum(problem.evaluate(alpha, shop.hold, gradient=False)[0].values())

    stopping = Stopping(held, patience=learning.loop.stopping.patience, on_best=on_best) if shop.hold else None
    identity = [
        [model.identity() for model in run.plan.models],
        [run.plan.scales(k) for k in range(len(run.experts))],
        run.experts,
        repr(learning),
        run.seed,
        [s.digest for s in shop.samples],
        [(s.row.choices, s.row.gold) for s in shop.samples],  # what is ranked is encoded anew every time
        start.alpha.tolist(),
        [(g.name, g.tensors, g.chunks, g.learned) for g in start.groups],
        repr(start.trimmed),
        repr(beside),
    ]
    run.progress.phase("learning", learning.loop.steps)
    stage = run.folder.name if run.folder is not None else "learning"
    with run.scalars(stage) as scalars:
        return descend(
            optimizer, loss, learning.loop.steps, stopping=stopping, folder=run.folder, identity=identity,
            progress=run.progress, scalars=scalars,
        )  # fmt: skip


def _problem(shop: Workshop, learning: Learning) -> Problem | Ranking:
    if learning.score == "accuracy":
        return make_ranking(shop, learning.data.samples)
    _check_labels(shop, learning.objective)
    return shop.problem(learning.objective)


def _check_labels(shop: Workshop, objective: Objective) -> None:
    if objective.reads_labels and not any(t >= 0 for s in shop.samples for t in s.encoded.targets):
        if shop.run.plan.method.reads_target:
            raise InputError("target: no row has a response; add the response that each prompt should get")
        raise InputError("target_weight: no calibration row has a response; add responses, or set target_weight=0")


def report(run: Run, shop: Workshop, learning: Learning, learned: Learned, seconds: float) -> dict[str, Any]:
    """Return the facts that are written beside the coefficients."""
    lines = learned.history.lines()
    return facts_of(run, shop, run.plan.learning, learning.rows, seconds) | {
        "layers": list(shop.reader.layers),
        "steps": len(lines),
        "step": learned.step,
        "history": lines,
    }
