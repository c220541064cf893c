"""How far a run went: H = sum_t eta_t and S = sum_t eta_t^2, from logged learning rates or from the schedule."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from consilience.doctor.evidence.logs.curve import Series
from consilience.doctor.evidence.logs.facts import fold

Array = npt.NDArray[np.float64]
How = Literal["given", "logged", "interpolated", "schedule", "peak"]

#: Schedules of more steps are summed at so many evenly spaced ones.
_SAMPLES = 1_000_000
#: Share of the peak by which logged rates may be off a schedule's.
_FITS = 0.01
#: A log must reach this share of the steps to stand for all of them.
COVERED = 0.9


@dataclass(frozen=True, slots=True)
class Length:
    """H = sum_t eta_t, S = sum_t eta_t^2 where it is known, and how they were found.

    ``logged``: every step's learning rate was logged; ``interpolated``: linearly between logged steps; ``schedule``:
    from the peak and the schedule; ``peak``: steps * peak, the most it can be; ``given``: by the user.
    """

    value: float
    squares: float | None
    how: How
    source: str


def logged_length(rates: Series, steps: int) -> Length:
    """Return the sums over steps 1 to ``steps`` of learning rates linear between logged steps and constant beyond.

    A log that starts at step 0 counts from 0.
    """
    s = rates.steps + (rates.steps[0] == 0)
    inside = s <= steps
    s, eta = s[inside], rates.values[inside]
    if len(s) == steps:
        return Length(float(eta.sum()), float((eta**2).sum()), "logged", rates.source)
    s, eta = np.concatenate([[0.0], s, [float(steps)]]), np.concatenate([eta[:1], eta, eta[-1:]])
    n, first, rise = np.diff(s), eta[:-1], np.diff(eta)
    # Over j = 1..n of first + rise j / n, and of its square.
    total = n * first + rise * (n + 1) / 2
    safe = np.where(n > 0, n, 1.0)
    squares = n * first**2 + first * rise * (n + 1) + rise**2 * (n + 1) * (2 * n + 1) / (6 * safe)
    return Length(float(total[n > 0].sum()), float(squares[n > 0].sum()), "interpolated", rates.source)


@dataclass(frozen=True, slots=True)
class Schedule:
    """A schedule of learning rates, as shares of its peak.

    Attributes:
        name: as in transformers' ``lr_scheduler_type``.
        planned: steps it is made for.
        warmup: steps of linear rise from 0; ``constant`` has none whatever is asked for, as in transformers.
        floor: the share of the peak it falls to, where the schedule has one.
        cycles: of a cosine; None: its own default.
        power: of a polynomial.
        timescale: of an inverse root; None: its warm-up.
    """

    name: str
    planned: int
    warmup: float = 0.0
    floor: float = 0.0
    cycles: float | None = None
    power: float = 1.0
    timescale: float | None = None

    @property
    def known(self) -> bool:
        """Whether its rates can be told beforehand, and how."""
        return fold(self.name) in SHAPES

    def shares(self, t: Array) -> Array:
        """Return the shares of the peak at steps ``t``, counted from 0."""
        name = fold(self.name)
        warmup = 0.0 if name == "constant" else self.warmup
        after = SHAPES[name](np.maximum(t - warmup, 0.0), max(1.0, self.planned - warmup), self)
        rise = t + 1 if name == _OWN else t
        return np.where(t < warmup, rise / max(1.0, warmup), np.clip(after, 0, None))


def scheduled_length(schedule: Schedule, peak: float, steps: int, source: str) -> Length | None:
    """Return the sums over the first ``steps`` of a schedule.

    Args:
        schedule: with the steps it was made for, which may be more.
        peak: the highest learning rate.
        steps: steps done.
        source: names the schedule's file.

    Returns:
        None for a schedule whose rates cannot be told beforehand, or whose name is not known.
    """
    if not schedule.known:
        return None
    samples = min(steps, _SAMPLES)
    t = np.arange(samples) if samples == steps else (np.arange(samples) + 0.5) * (steps / samples) - 0.5
    eta = peak * schedule.shares(np.asarray(t, np.float64))
    share = steps / samples if samples else 0.0
    return Length(float(eta.sum()) * share, float((eta**2).sum()) * share, "schedule", source)


def fitted_peak(schedule: Schedule, rates: Series) -> float | None:
    """Return the peak with which a schedule has the logged rates; None where it has not, whatever its peak.

    Frameworks log the rate that a step was done with, or the one that the next step will have.
    """
    if not schedule.known:
        return None
    s = rates.steps + (rates.steps[0] == 0)
    for late in (0, 1):
        shares = schedule.shares(s - 1 + late)
        power = float(shares @ shares)
        peak = float(shares @ rates.values) / power if power else 0.0
        if peak > 0 and float(np.abs(peak * shares - rates.values).max()) <= _FITS * peak:
            return peak
    return None


def peak_length(peak: float, steps: int, source: str) -> Length:
    """Return ``steps * peak``, the most H can be."""
    return Length(peak * steps, peak**2 * steps, "peak", source)


Shape = Callable[[Array, float, Schedule], Array]


def _constant(t: Array, falling: float, schedule: Schedule) -> Array:
    return np.ones_like(t)


def _linear(t: Array, falling: float, schedule: Schedule) -> Array:
    return np.maximum(1 - t / falling, 0)


def _polynomial(t: Array, falling: float, schedule: Schedule) -> Array:
    return schedule.floor + (1 - schedule.floor) * _linear(t, falling, schedule) ** schedule.power


def _cosine(t: Array, falling: float, schedule: Schedule) -> Array:
    cycles = 0.5 if schedule.cycles is None else schedule.cycles
    return (1 + np.cos(2 * math.pi * cycles * np.minimum(t / falling, 1))) / 2


def _floored_cosine(t: Array, falling: float, schedule: Schedule) -> Array:
    return schedule.floor + (1 - schedule.floor) * _cosine(t, falling, schedule)


def _restarts(t: Array, falling: float, schedule: Schedule) -> Array:
    cycles = 1.0 if schedule.cycles is None else schedule.cycles
    return np.where(t < falling, (1 + np.cos(math.pi * (cycles * t / falling % 1))) / 2, 0.0)


def _inverse_root(t: Array, falling: float, schedule: Schedule) -> Array:
    scale = schedule.timescale or schedule.warmup or 10_000
    return 1 / np.sqrt((t + scale) / scale)


#: The schedule of ``consilience.training``, whose rise starts one step up.
_OWN = "linear_warm_up_then_cosine_to_zero"
#: By name, the share of the peak t steps after the warm-up, of so many falling steps.
SHAPES: dict[str, Shape] = {
    "constant": _constant,
    "constant_with_warmup": _constant,
    "linear": _linear,
    "polynomial": _polynomial,
    "cosine": _floored_cosine,
    "cosine_with_min_lr": _floored_cosine,
    "cosine_with_restarts": _restarts,
    "inverse_sqrt": _inverse_root,
    _OWN: _cosine,
}
