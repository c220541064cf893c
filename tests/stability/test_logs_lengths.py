import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import get_scheduler

from consilience.stability.logs.curve import Series
from consilience.stability.logs.lengths import logged_length, peak_length, scheduled_length
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
    ("name", "floor", "more"),
    [
        ("constant", 0.0, {}),
        ("constant_with_warmup", 0.0, {}),
        ("linear", 0.0, {}),
        ("cosine", 0.0, {}),
        ("inverse_sqrt", 0.0, {}),
        ("cosine_with_min_lr", 0.1, {"min_lr_rate": 0.1}),
        ("polynomial", 0.1, {"lr_end": 0.03}),
    ],
)
@pytest.mark.parametrize(("steps", "warmup"), [(50, 0), (50, 7), (30, 10)])
def test_schedules_are_transformers(name: str, floor: float, more: dict[str, Any], steps: int, warmup: int) -> None:
    rates = transformers_rates(name, steps, 50, warmup, **more)
    found = scheduled_length(name, 0.3, steps, "file", planned=50, warmup=warmup, floor=floor)
    assert found is not None
    assert found.value == pytest.approx(math.fsum(rates))
    assert found.squares == pytest.approx(math.fsum(rate**2 for rate in rates))
    assert found.how == "schedule"


@given(st.integers(1, 400), st.floats(0, 1))
@settings(max_examples=40)
def test_our_own_schedule_is_summed_exactly(steps: int, warmup: float) -> None:
    run = Settings(learning_rate=0.01, steps=steps, warmup=warmup)
    rates = [run.learning_rate_at(step) for step in range(steps)]
    found = scheduled_length(
        "linear warm-up, then cosine to zero", 0.01, steps, "file",
        planned=steps, warmup=max(1, round(warmup * steps)), floor=0.0,
    )  # fmt: skip
    assert found is not None
    assert found.value == pytest.approx(math.fsum(rates))


def test_long_schedules_are_summed_by_sampling() -> None:
    found = scheduled_length("cosine", 1.0, 10**9, "file", planned=10**9, warmup=0, floor=0.0)
    assert found is not None
    assert found.value == pytest.approx(5e8, rel=1e-5)
    assert found.squares == pytest.approx(3.75e8, rel=1e-5)


def test_what_cannot_be_told_beforehand_is_not() -> None:
    assert scheduled_length("reduce_lr_on_plateau", 1.0, 10, "file", planned=10, warmup=0, floor=0) is None
    none = scheduled_length("linear", 1.0, 0, "file", planned=10, warmup=0, floor=0)
    assert none is not None
    assert none.value == 0
    most = peak_length(0.5, 10, "file")
    assert (most.value, most.squares, most.how) == (5.0, 2.5, "peak")
