from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as searching
from hypothesis import strategies as st
from toy_losses import pieces

from consilience.coefficients.coefficients import Alpha
from consilience.optimizers.diagnosis import FEWEST, Measured, Record, diagnose, pack, unpack
from consilience.optimizers.gradient import Terms
from consilience.optimizers.parameterisation import Kind
from consilience.optimizers.settings import Descent, adjust
from consilience.optimizers.spsa import make_spsa, record_of

patient = searching(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
INSIDE = [0.4, 0.3, 0.2, 0.1]
OUTSIDE = [1.6, -0.2, -0.2, -0.2]


class Regression:
    """Mean squared error of a blend of four experts, whose target each minibatch moves by ``noise``."""

    def __init__(self, blend: Any, noise: float = 0.0, rounding: float = 0.0) -> None:
        self.experts = np.random.default_rng(0).standard_normal((4, 20))
        self.target, self.noise, self.rounding = np.asarray(blend) @ self.experts, noise, rounding
        self.seen = 0

    def __call__(self, alpha: Alpha, step: int, *, gradient: bool) -> tuple[Terms, Alpha | None]:
        self.seen += 1
        shift = self.noise * np.random.default_rng(step).standard_normal(20)
        off = alpha[:, 0] @ self.experts - self.target - shift
        return {"loss": float(off @ off) / 20 + self.rounding * float(np.random.default_rng(self.seen).normal())}, None


def after(loss: Regression, steps: int, rate: float, kind: Kind = "softmax", **more: Any) -> Record:
    settings = adjust(Descent("sgd", rate, steps, schedule="constant"), **more)
    optimizer = make_spsa(settings, *pieces(kind, np.full((4, 1), 0.25)), seed=0)
    for number in range(steps):
        optimizer.step(loss, number)
    record = record_of(optimizer)
    assert record is not None
    return record


@pytest.mark.parametrize(
    ("verdict", "record"),
    [
        ("converged", lambda: after(Regression(INSIDE), 500, 0.3)),
        ("improving", lambda: after(Regression(INSIDE), 60, 0.01)),
        ("oscillating", lambda: after(Regression(INSIDE), 100, 1.2, "affine", directions=4, law="orthogonal")),
        ("oscillating", lambda: after(Regression(INSIDE, 0.5), 200, 0.6, "affine", directions=4, law="orthogonal")),
        ("noisy", lambda: after(Regression(INSIDE, 2.0), 200, 0.3)),
        ("no signal", lambda: after(Regression(INSIDE), 60, 1e-9, mu=1e-7)),
        ("outside the hull", lambda: after(Regression(OUTSIDE), 500, 0.5)),
    ],
)
def test_runs_are_told_apart(verdict: str, record: Any) -> None:
    found = diagnose(record())
    assert found.verdict == verdict
    assert found.advice
    assert "\n" not in found.advice
    assert all(isinstance(value, float) and np.isfinite(value) for value in found.evidence.values())


def test_measured_noise_takes_the_place_of_rounding() -> None:
    record = after(Regression(INSIDE, rounding=1e-2), 60, 1e-4, mu=0.05, tune_mu=True, mu_range=(0.05, 0.05))
    found = diagnose(record)
    assert found.verdict == "no signal"
    assert found.evidence["noise"] == pytest.approx(1e-2, rel=0.9)


def test_a_run_that_ends_above_the_best_expert_is_outside_the_hull() -> None:
    record = after(Regression(INSIDE), 500, 0.3)
    best = float(np.mean([step.loss for step in record.steps[-50:]]))
    assert diagnose(record, single=[1.0, best / 2, 3.0, 4.0]).verdict == "outside the hull"
    assert diagnose(record, single=[1.0, best * 2, 3.0, 4.0]).verdict == "converged"


def test_off_the_simplex_a_weight_of_one_is_no_vertex() -> None:
    assert diagnose(after(Regression(OUTSIDE), 500, 0.1, "affine")).verdict != "outside the hull"


def test_a_run_of_few_steps_says_nothing() -> None:
    with pytest.raises(ValueError, match="cannot be diagnosed"):
        diagnose(after(Regression(INSIDE), FEWEST - 1, 0.1))


NUMBER = st.floats(-1e6, 1e6)


@st.composite
def measured(draw: st.DrawFn) -> Measured:
    m = draw(st.integers(1, 4))
    plus, minus = (tuple(draw(st.lists(NUMBER, min_size=m, max_size=m))) for _ in range(2))
    expected, power, lag = (draw(NUMBER) for _ in range(3))
    alpha = tuple(draw(st.lists(NUMBER, min_size=3, max_size=3)))
    return Measured(draw(st.integers(0, 10**6)), draw(st.floats(1e-3, 1)), plus, minus, expected, power, lag, alpha)


@patient
@given(st.lists(measured(), max_size=6))
def test_a_record_comes_back_from_its_arrays(steps: list[Measured]) -> None:
    arrays = pack(steps)
    assert unpack(arrays) == steps
    assert all(value.dtype == np.float64 for value in arrays.values())


class Many:
    """Mean squared error of a blend of many experts, whose target (a blend of three) each minibatch moves."""

    def __init__(self, count: int, noise: float) -> None:
        self.experts = np.random.default_rng(count).standard_normal((count, 200))
        self.target, self.noise = self.experts[:3].mean(0), noise

    def __call__(self, alpha: Alpha, step: int, *, gradient: bool) -> tuple[Terms, Alpha | None]:
        return {"loss": self.value(alpha[:, 0], self.noise * np.random.default_rng(step).standard_normal(200))}, None

    def value(self, weights: Any, shift: Any = 0.0) -> float:
        return float(np.square(weights @ self.experts - self.target - shift).mean())


@pytest.mark.parametrize("count", [20, 30, 100])
@pytest.mark.parametrize(
    ("rate", "noise", "more"),
    [(0.02, 1.0, {"normalise": True}), (0.1, 0.3, {}), (0.02, 5.0, {"normalise": True, "directions": 4})],
    ids=["small steps", "plain slopes", "noise"],
)
def test_weights_that_could_not_move_have_not_converged(
    count: int, rate: float, noise: float, more: dict[str, Any]
) -> None:
    loss = Many(count, noise)
    record = _searched(loss, count, 60, rate, **more)
    end = np.array(record.steps[-1].alpha)
    assert loss.value(end) > 0.5 * loss.value(np.full(count, 1 / count))  # most of the way is left
    assert diagnose(record).verdict == "unsettled"


def test_many_weights_that_hover_about_the_best_have_converged() -> None:
    loss = Many(20, 0.1)
    loss.target = loss.experts.mean(0)
    assert diagnose(_searched(loss, 20, 1000, 0.02, normalise=True)).verdict == "converged"


def _searched(loss: Any, count: int, steps: int, rate: float, **more: Any) -> Record:
    settings = adjust(Descent("sgd", rate, steps, schedule="constant"), **more)
    optimizer = make_spsa(settings, *pieces("softmax", np.full((count, 1), 1 / count)), seed=1)
    for number in range(steps):
        optimizer.step(loss, number)
    record = record_of(optimizer)
    assert record is not None
    return record
