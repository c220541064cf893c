import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import get_scheduler

from consilience.doctor.evidence.logs.curve import Series
from consilience.doctor.evidence.logs.lengths import Schedule, fitted_peak, logged_length, peak_length, scheduled_length
from consilience.training.settings import Settings

points = st.lists(st.tuples(st.integers(1, 60), st.floats(0, 1)), min_size=1, max_size=12, unique_by=lambda p: p[0])


@given(points, st.integers(0, 40))
def test_a_log_with_gaps_is_summed_as_if_every_step_were_interpolated(
    drawn: list[tuple[int, float]], more: int
) -> None:
    steps, values = (np.array(column, float) for column in zip(*sorted(drawn), strict=True))
    last = int(steps[-1]) + more
    eta = np.interp(np.arange(1, last + 1), steps, values)
    found = logged_length(Series(steps, values, "log"), last)
    assert found.value == pytest.approx(eta.sum(), abs=1e-9)
    assert found.squares == pytest.approx((eta**2).sum(), abs=1e-9)
    assert found.how == ("logged" if len(steps) == last else "interpolated")


def test_a_log_that_counts_from_zero_is_the_same_run() -> None:
    rates = np.array([0.1, 0.2, 0.3])
    found = logged_length(Series(np.array([0.0, 1.0, 2.0]), rates, "log"), 3)
    assert (found.value, found.how) == (pytest.approx(0.6), "logged")


def transformers_rates(name: str, steps: int, planned: int, warmup: int, **more: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    schedule: Any = get_scheduler(name, optimizer, warmup, planned, scheduler_specific_kwargs=more or None)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(
    ("name", "ours", "more"),
    [
        ("constant", {}, {}),
        ("constant_with_warmup", {}, {}),
        ("linear", {}, {}),
        ("cosine", {}, {}),
        ("cosine", {"cycles": 1.5}, {"num_cycles": 1.5}),
        ("cosine_with_restarts", {}, {}),
        ("cosine_with_restarts", {"cycles": 3}, {"num_cycles": 3}),
        ("inverse_sqrt", {}, {}),
        ("inverse_sqrt", {"timescale": 20}, {"timescale": 20}),
        ("cosine_with_min_lr", {"floor": 0.1}, {"min_lr_rate": 0.1}),
        ("polynomial", {"floor": 0.1}, {"lr_end": 0.03}),
        ("polynomial", {"floor": 0.1, "power": 2.0}, {"lr_end": 0.03, "power": 2.0}),
    ],
)
@pytest.mark.parametrize(("steps", "warmup"), [(50, 0), (50, 7), (30, 10)])
def test_schedules_are_transformers(
    name: str, ours: dict[str, Any], more: dict[str, Any], steps: int, warmup: int
) -> None:
    rates = transformers_rates(name, steps, 50, warmup, **more)
    schedule = Schedule(name, 50, warmup=warmup, **ours)
    found = scheduled_length(schedule, 0.3, steps, "file")
    assert found is not None
    assert found.value == pytest.approx(math.fsum(rates))
    assert found.squares == pytest.approx(math.fsum(rate**2 for rate in rates))
    assert found.how == "schedule"


@given(st.integers(1, 400), st.floats(0, 1))
@settings(max_examples=40)
def test_our_own_schedule_is_summed_exactly(steps: int, warmup: float) -> None:
    run = Settings(learning_rate=0.01, steps=steps, warmup=warmup)
    rates = [run.learning_rate_at(step) for step in range(steps)]
    schedule = Schedule("linear warm-up, then cosine to zero", steps, warmup=max(1, round(warmup * steps)))
    found = scheduled_length(schedule, 0.01, steps, "file")
    assert found is not None
    assert found.value == pytest.approx(math.fsum(rates))


def test_long_schedules_are_summed_by_sampling() -> None:
    found = scheduled_length(Schedule("cosine", 10**9), 1.0, 10**9, "file")
    assert found is not None
    assert found.value == pytest.approx(5e8, rel=1e-5)
    assert found.squares == pytest.approx(3.75e8, rel=1e-5)


def test_what_cannot_be_told_beforehand_is_not() -> None:
    assert scheduled_length(Schedule("reduce_lr_on_plateau", 10), 1.0, 10, "file") is None
    none = scheduled_length(Schedule("linear", 10), 1.0, 0, "file")
    assert none is not None
    assert none.value == 0
    most = peak_length(0.5, 10, "file")
    assert (most.value, most.squares, most.how) == (5.0, 2.5, "peak")


@pytest.mark.parametrize("late", [0, 1])
def test_a_peak_follows_from_a_schedule_and_a_few_of_its_rates(late: int) -> None:
    rates = [*transformers_rates("cosine_with_restarts", 50, 50, 5, num_cycles=2), 0.0]
    logged = [8, 16, 24, 32]
    series = Series(np.array(logged, float), np.array([rates[step - 1 + late] for step in logged]), "log")
    schedule = Schedule("cosine_with_restarts", 50, warmup=5, cycles=2)
    assert fitted_peak(schedule, series) == pytest.approx(0.3)
    assert fitted_peak(Schedule("linear", 50, warmup=5), series) is None
