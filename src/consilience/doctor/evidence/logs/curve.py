"""Values by step: losses, learning rates, gradient norms and noise scales, as a log has them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from consilience.doctor.evidence.logs.facts import fold, number

Array = npt.NDArray[np.float64]
#: What is kept of a log, and how frameworks call it.
COLUMNS = ("loss", "learning_rate", "grad_norm", "noise_scale")
_COLUMN_OF = {
    "loss": "loss", "train_loss": "loss", "training_loss": "loss", "train_loss_step": "loss", "loss_step": "loss",
    "learning_rate": "learning_rate", "lr": "learning_rate", "train_lr": "learning_rate",
    "train_learning_rate": "learning_rate", "grad_norm": "grad_norm", "gradient_norm": "grad_norm",
    "gnorm": "grad_norm", "train_grad_norm": "grad_norm", "train_gradient_norm": "grad_norm",
    "total_norm": "grad_norm", "noise_scale": "noise_scale", "gradient_noise_scale": "noise_scale",
    "gns": "noise_scale", "train_noise_scale": "noise_scale",
}  # fmt: skip
_STEPS = ("step", "steps", "global_step", "trainer_global_step", "current_steps", "iteration", "iter", "it")
#: Rows with this key are transformers' summary of a run: their ``train_loss`` is the mean over all steps.
_SUMMARY = "train_runtime"
#: No run has more steps.
_LAST_STEP = 10**10
#: No run has a larger learning rate.
_LARGEST_RATE = 1e3


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """Steps [n >= 1], rising, their values [n], and where they were read from; steps count from 1, or all from 0."""

    steps: Array
    values: Array
    source: str

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def last_step(self) -> int:
        """The last step, counted from 1."""
        return int(self.steps[-1]) + int(self.steps[0] == 0)


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """Series by column; ``skipped`` counts values of known columns that no log can have, the first in words."""

    series: Mapping[str, Series] = field(default_factory=dict[str, Series])
    skipped: int = 0
    first_skipped: str = ""


def column(key: str) -> str | None:
    """Return the column that a key names, as ``train/loss`` and ``lr-AdamW`` do; None for those of evaluations."""
    folded = fold(key)
    if folded.startswith("lr_") and not folded.startswith("lr_sch"):
        return "learning_rate"
    return _COLUMN_OF.get(folded)


def step_key(keys: Iterable[str]) -> str | None:
    """Return the key that holds the step, if one does."""
    by_name = {fold(key): key for key in reversed(list(keys))}
    return next((by_name[name] for name in _STEPS if name in by_name), None)


def collect(rows: Iterable[tuple[Any, Mapping[str, Any]]], source: str) -> Curve:
    """Return the curve of rows of (step, values by any key), in the order they were logged.

    Where a step is smaller than the one before, the run was restarted there: what was logged from that step on is
    replaced. Rows without a usable step are skipped, and so are values that no log can have (no finite numbers, rates
    below 0 or above 1000), and summaries.
    """
    found: dict[str, list[tuple[int, float]]] = {}
    skipped: list[str] = []
    before = 0
    for given, values in rows:
        if _SUMMARY in values:
            continue
        step = number(given)
        if step is None or not 0 <= step <= _LAST_STEP:
            skipped.append(f"{source}: step {given!r}")
            continue
        now = int(step)
        if now < before:
            found = {name: [point for point in points if point[0] < now] for name, points in found.items()}
        before = now
        skipped += [f"{source}: step {now}: {said}" for said in _keep(found, now, values)]
    series = {name: _series(points, source) for name, points in found.items() if points}
    return Curve(series, len(skipped), skipped[0] if skipped else "")


def _keep(found: dict[str, list[tuple[int, float]]], step: int, values: Mapping[str, Any]) -> list[str]:
    """Append a row's values, of a column that is named twice in a step the last; return those that were skipped."""
    skipped: list[str] = []
    for key, given in values.items():
        name = column(str(key))
        if name is None or given is None or given == "":
            continue
        value = number(given)
        absurd = value is not None and name == "learning_rate" and value > _LARGEST_RATE
        if value is None or (value < 0 and name != "loss") or absurd:
            skipped.append(f"{key} {given!r}")
            continue
        points = found.setdefault(name, [])
        if points and points[-1][0] == step:
            points.pop()
        points.append((step, value))
    return skipped


def _series(points: Sequence[tuple[int, float]], source: str) -> Series:
    steps, values = zip(*points, strict=True)
    return Series(np.array(steps, np.float64), np.array(values, np.float64), source)


def join(curves: Sequence[Curve]) -> Curve:
    """Return of every column the series that goes furthest; of equals, the one that comes first."""
    best: dict[str, Series] = {}
    for curve in curves:
        for name, series in curve.series.items():
            if name not in best or series.last_step > best[name].last_step:
                best[name] = series
    first = next((curve.first_skipped for curve in curves if curve.skipped), "")
    return Curve(best, sum(curve.skipped for curve in curves), first)
