"""Methods that are more than fixed weights, tried: merged into a folder of their own, and measured on the probe rows.

What TIES, DARE and their like do to task vectors is not in the quadratic model of the probes, so nothing predicts it
here. A merge takes as much room on disk as the model, one at a time, below the folder for temporary files (TMPDIR).
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from consilience.doctor.candidates import worst_rise
from consilience.doctor.evidence.case import Case, open_case
from consilience.doctor.evidence.landscape import RecipeLandscape
from consilience.doctor.theory.geometry import Vector
from consilience.errors import InputError
from consilience.progress import NullProgress, Progress
from consilience.recipe.schema import Recipe
from consilience.workdir import scratch

if TYPE_CHECKING:
    from consilience.doctor.probing import ProbeSettings
    from consilience.engine.plan import Plan


@dataclass(frozen=True)
class Wanted:
    """A method and the parameters that are not its defaults; ``text`` is as it was asked for."""

    text: str
    method: str
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Tried:
    """A method's merge: losses on the probe rows, by task, in nats; the largest rise over a task's own expert."""

    name: str
    losses: tuple[float, ...]
    worst: float
    worst_task: str

    @property
    def mean(self) -> float:
        """The mean loss."""
        return sum(self.losses) / len(self.losses)


def wanted(text: str) -> Wanted:
    """Read ``METHOD`` or ``METHOD:KEY=VALUE,KEY=VALUE``.

    Raises:
        InputError: there is no such method, it has to learn first, or the parameters are not written so.
    """
    from consilience.methods.registry import load
    from consilience.recipe.yaml_file import parse_yaml

    name, _, rest = text.partition(":")
    if load(name).learn is not None or load(name).collect is not None:
        raise InputError(f"--try {text!r}: {name} learns; merge with it, then measure with 'consilience evaluate'")
    parameters: dict[str, Any] = {}
    for part in rest.split(",") if rest else []:
        key, equals, value = part.partition("=")
        if not (key and equals and value):
            raise InputError(f"--try {text!r}: write it as METHOD or METHOD:KEY=VALUE,KEY=VALUE")
        parameters[key] = parse_yaml(value, f"--try {text}: {key}")
    return Wanted(text, name, parameters)


def try_methods(
    case: Case, recipe: Recipe, own: Vector, settings: "ProbeSettings", threads: int | None, progress: Progress | None
) -> tuple[Tried, ...]:
    """Merge a case's experts with every method of ``settings``, and return what was measured, the best first.

    Args:
        case: the experts, and what the merges have in common with the recipe.
        recipe: gives the base, dtypes and seed.
        own: losses of each task's own expert, [K].
        settings: the methods, and how probes are run.
        threads: workers; None: all cores.
        progress: told of every merge and measurement.

    Raises:
        InputError: a method does not take these experts or parameters, or a loss is not finite.
        MachineError: the disk is full.
    """
    found = [_tried(one, case, recipe, own, settings, threads, progress) for one in settings.methods]
    return tuple(sorted(found, key=lambda one: one.mean))


def _tried(
    one: Wanted, case: Case, recipe: Recipe, own: Vector, settings: "ProbeSettings", threads: int | None,
    progress: Progress | None,
) -> Tried:  # fmt: skip
    with scratch("consilience-try-") as place:
        folder = place / "merged"
        _merge(one, case, recipe, folder, threads, progress)
        losses = _losses(one, case, recipe, folder, settings, threads, progress)
    return Tried(one.text, tuple(map(float, losses)), *worst_rise(case.names, losses - own))


def check_methods(methods: Sequence[Wanted], case: Case, recipe: Recipe) -> None:
    """Plan every merge from headers, before anything else takes time.

    Raises:
        InputError: a method does not take these experts or parameters.
    """
    for one in methods:
        _planned(one, case, recipe).close()


def _planned(one: Wanted, case: Case, recipe: Recipe) -> "Plan":
    from consilience.engine.plan import make_plan

    entries = [entry.model_copy(update={"parameters": {}}) for entry in case.entries]
    return make_plan(recipe.with_method(one.method, one.parameters, entries), where=f"--try {one.text}", root=case.root)


def _merge(
    one: Wanted, case: Case, recipe: Recipe, folder: Path, threads: int | None, progress: Progress | None
) -> None:
    from consilience.engine.merge import run_merge

    plan = _planned(one, case, recipe)
    with closing(plan):
        run_merge(plan, folder, threads=threads, progress=progress)


def _losses(
    one: Wanted, case: Case, recipe: Recipe, folder: Path, settings: "ProbeSettings", threads: int | None,
    progress: Progress | None,
) -> Vector:  # fmt: skip
    """Return a merge's losses: it stands in every expert's place, on that expert's rows."""
    entries = [entry.model_copy(update={"model": str(folder), "parameters": {}}) for entry in case.entries]
    with closing(
        open_case(recipe.with_method("task_arithmetic", {}, entries), f"--try {one.text}", case.root)
    ) as merged:
        landscape = RecipeLandscape(
            merged, rows=settings.rows, device=settings.device, threads=threads,
            trust_remote_code=settings.trust_remote_code,
        )  # fmt: skip
        count = len(case.names)
        progress = progress or NullProgress()
        progress.phase(f"measuring {one.text}", count, "losses")
        with closing(landscape):
            found = np.zeros(count)
            for k in range(count):
                found[k] = landscape.loss(k, np.eye(count)[k])
                progress.advance()
            return found
