"""How far a run went: H = sum_t eta_t and S = sum_t eta_t^2, from logged learning rates or from the schedule."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from consilience.stability.logs.curve import Series
from consilience.stability.logs.facts import fold

Array = npt.NDArray[np.float64]
How = Literal["given", "logged", "interpolated", "schedule", "peak"]

#: Schedules of more steps are summed at so many evenly spaced ones.
_SAMPLES = 1_000_000
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


def scheduled_length(
    schedule: str, peak: float, steps: int, source: str, *, planned: int, warmup: float, floor: float
) -> Length | None:
    """Return the sums over the first ``steps`` of a schedule that was made for ``planned`` steps.

    Args:
        schedule: its name, as in transformers' ``lr_scheduler_type``.
        peak: the highest learning rate.
        steps: steps done.
        source: names the schedule's file.
        planned: steps the schedule is made for.
        warmup: steps of linear rise from 0; ``constant`` has none whatever is asked for, as in transformers.
        floor: the share of the peak it falls to, where the schedule has one.

    Returns:
        None for a schedule whose rates cannot be told beforehand, or whose name is not known.
    """
    name = fold(schedule)
    shape = SHAPES.get(name)
    if shape is None:
        return None
    warmup = 0.0 if name == "constant" else warmup
    samples = min(steps, _SAMPLES)
    t = np.arange(samples) if samples == steps else (np.arange(samples) + 0.5) * (steps / samples) - 0.5
    after = shape(np.maximum(t - warmup, 0.0), max(1.0, planned - warmup), warmup, floor)
    eta = peak * np.where(t < warmup, t / max(1.0, warmup), np.clip(after, 0, None))
    if name == _OWN:
        eta = np.where(t < warmup, peak * (t + 1) / max(1.0, warmup), eta)
    share = steps / samples if samples else 0.0
    return Length(float(eta.sum()) * share, float((eta**2).sum()) * share, "schedule", source)


def peak_length(peak: float, steps: int, source: str) -> Length:
    """Return ``steps * peak``, the most H can be."""
    return Length(peak * steps, peak**2 * steps, "peak", source)


Shape = Callable[[Array, float, float, float], Array]


def _constant(t: Array, falling: float, warmup: float, floor: float) -> Array:
    return np.ones_like(t)


def _linear(t: Array, falling: float, warmup: float, floor: float) -> Array:
    return np.maximum(1 - t / falling, 0)


def _polynomial(t: Array, falling: float, warmup: float, floor: float) -> Array:
    return floor + (1 - floor) * _linear(t, falling, warmup, floor)


def _cosine(t: Array, falling: float, warmup: float, floor: float) -> Array:
    return (1 + np.cos(math.pi * np.minimum(t / falling, 1))) / 2


def _floored_cosine(t: Array, falling: float, warmup: float, floor: float) -> Array:
    return floor + (1 - floor) * _cosine(t, falling, warmup, floor)


def _inverse_root(t: Array, falling: float, warmup: float, floor: float) -> Array:
    scale = warmup or 10_000
    return 1 / np.sqrt((t + scale) / scale)


#: The schedule of ``consilience.training``, whose rise starts one step up.
_OWN = "linear_warm_up_then_cosine_to_zero"
#: By name, the share of the peak t steps after the warm-up (falling steps, warm-up steps and floor given).
SHAPES: dict[str, Shape] = {
    "constant": _constant,
    "constant_with_warmup": _constant,
    "linear": _linear,
    "polynomial": _polynomial,
    "cosine": _floored_cosine,
    "cosine_with_min_lr": _floored_cosine,
    "inverse_sqrt": _inverse_root,
    _OWN: _cosine,
}
