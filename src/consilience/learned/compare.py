"""Is what was learned any better? A run compares itself with the base and with Task Arithmetic at its best strength.

The measure is the one that fits the rows: the target's loss (or share ranked wrongly) for a method that learns on a
target; else ``KL(expert || merge)``, or the loss where experts need not be run for the method and all rows have
responses. The rows are those held out, or one further answer of every expert to each of its prompts, or the experts'
``validation`` rows; else those that were learned from, which leans to what was learned, so that a merge that is no
better on them is no better at all. Task Arithmetic's strength is chosen on the very rows that it is compared on, so
that the comparison leans to its side.
"""

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from consilience.coefficients.coefficients import Alpha
from consilience.errors import InputError
from consilience.learned.answers import as_given
from consilience.learned.data import Data
from consilience.learned.problem import Problem
from consilience.learned.ranking import make_ranking
from consilience.learned.run import Workshop, base_folder, encode_rows
from consilience.objectives.objective import Objective
from consilience.objectives.target import Target
from consilience.student.bank import Bank
from consilience.student.calibration import Sample
from consilience.student.teachers import Teachers
from consilience.tasks.rows import Task, read_rows

Measure = Literal["kl", "loss", "error"]
#: Strengths of Task Arithmetic that are tried.
STRENGTHS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
#: Most rows of one expert, and of a target.
ROWS, TARGET_ROWS = 5, 20


@dataclass(frozen=True)
class _Judges:
    """Rows to compare on: ``chosen`` number them among ``samples``; ``own`` says whether these are the run's."""

    on: str
    samples: Sequence[Sample]
    chosen: list[int]
    own: bool = True


def compared(
    shop: Workshop,
    alpha: Alpha,
    *,
    score: Literal["loss", "accuracy"] = "loss",
    correct: Callable[[bool], None] | None = None,
) -> dict[str, Any]:
    """Return what the base, Task Arithmetic and the coefficients found come to, the mean over experts.

        KL = 1/K sum_k  mean over the tokens of expert k's rows of  KL( softmax(z_k) || softmax(z) )

    Args:
        shop: the student and its rows.
        alpha: [K, N], what was found.
        score: what a target's rows are scored by.
        correct: turns what was learned beside the coefficients off and on.

    Returns:
        {"compared": {"measure", "rows", "on", "base", "task_arithmetic", "strength", "learned", "better"}}, or
        {"compared": {"impossible": why}}.
    """
    try:
        rows = _judges(shop)
        measure, value = _measure(shop, rows, score)
        shop.run.progress.phase("comparing", len(STRENGTHS) + 2, "models")
        turn = correct or (lambda on: None)
        turn(False)
        with _whole_task_vectors(shop):
            base = value(np.zeros_like(alpha))
            tried = {strength: value(np.full_like(alpha, strength)) for strength in STRENGTHS}
        turn(True)
        learned = value(alpha)
    except InputError as error:  # the merge stands, whatever it cannot be compared with
        return {"compared": {"impossible": str(error)}}
    strength = min(tried, key=lambda key: tried[key])
    return {
        "compared": {
            "measure": measure,
            "on": rows.on,
            "rows": len(rows.chosen),
            "base": base,
            "task_arithmetic": tried[strength],
            "strength": strength,
            "learned": learned,
            "better": learned < min(base, tried[strength]),
        }
    }


def _judges(shop: Workshop) -> _Judges:
    """Return the rows to compare on, the first of every expert's or of the target's."""
    if shop.judge:
        return _Judges("rows held out" if shop.hold else "further answers", shop.samples, _first(shop, shop.judge))
    validation = _validation(shop)
    if validation:
        return _Judges("validation rows", validation, list(range(len(validation))), own=False)
    return _Judges("rows that were learned from", shop.samples, _first(shop, shop.learn))


def _first(shop: Workshop, indices: Sequence[int]) -> list[int]:
    most = TARGET_ROWS if shop.run.plan.method.reads_target else ROWS
    own: dict[int, list[int]] = {}
    for i in indices:
        own.setdefault(shop.samples[i].expert, []).append(i)
    return [i for held in own.values() for i in held[:most]]


def _validation(shop: Workshop) -> list[Sample]:
    """Return the first rows of the experts' ``validation`` files; none unless every expert has one."""
    run = shop.run
    if run.plan.method.reads_target:
        return []
    paths = [run.path_of(name, "validation") for name in run.experts]
    if any(path is None for path in paths):
        return []
    tasks = [
        as_given(Task(name, read_rows(path)[:ROWS], path))
        for name, path in zip(run.experts, paths, strict=True)
        if path is not None
    ]
    return encode_rows(run, shop.student, tasks, base_folder(run.plan), Data())


def _measure(
    shop: Workshop, rows: _Judges, score: Literal["loss", "accuracy"]
) -> tuple[Measure, Callable[[Alpha], float]]:
    """Return the measure that fits the rows, and its value at coefficients, the mean over experts."""
    target, samples = shop.run.plan.method.reads_target, rows.samples
    chosen, name = rows.chosen, "target"
    measure: Measure = "loss"
    if target and score == "accuracy":
        problem: Any = make_ranking(shop, 0)
        measure, name = "error", "error"
    elif target or (shop.teachers is None and all(_labels(samples[i]) for i in chosen)):
        samples, chosen = [_labelled(samples[i]) for i in chosen], list(range(len(chosen)))
        problem = Problem(shop.student, shop.reader, None, samples, Objective(terms=(Target(1.0),)), tokens=shop.tokens)
    else:
        teachers = shop.teachers if rows.own else None
        if teachers is None:
            samples, chosen = [samples[i] for i in chosen], list(range(len(chosen)))
            teachers = Teachers(shop.student, shop.reader, samples, shop.run.answers)
            shop.run.progress.phase("answers of the experts", len(samples), "samples")
            teachers.prepare(shop.tokens, shop.run.progress.advance)
        problem = Problem(shop.student, shop.reader, teachers, samples, Objective(), tokens=shop.tokens)
        measure, name = "kl", "logit"
    experts = len({sample.expert for sample in samples})

    def value(at: Alpha) -> float:
        terms, _ = problem.evaluate(at, chosen, gradient=False)
        shop.run.progress.advance(1)
        return terms[name] / experts

    return measure, value


def _labels(sample: Sample) -> bool:
    return any(target >= 0 for target in sample.encoded.targets)


def _labelled(sample: Sample) -> Sample:
    """Return a sample whose compared positions are those with a label.

    Raises:
        InputError: it has none.
    """
    one = sample.encoded
    pairs = [(at, to) for at, to in zip(one.positions, one.targets, strict=bool(one.targets)) if to >= 0]
    if not pairs:
        raise InputError(f"{sample.where}: has no response")
    return replace(
        sample, encoded=replace(one, positions=tuple(at for at, _ in pairs), targets=tuple(to for _, to in pairs))
    )


@contextlib.contextmanager
def _whole_task_vectors(shop: Workshop) -> Generator[None]:
    """Within the context the student's task vectors are whole, whatever was trimmed of them to learn."""
    trimmed = shop.student.bank
    if trimmed.trimmed is None:
        yield
        return
    plain = Bank(shop.run.plan, trimmed.groups, threads=trimmed.threads)
    shop.student.bank = plain
    try:
        yield
    finally:
        shop.student.bank = trimmed
        plain.close()
