import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from consilience.doctor.theory.bound import spread
from consilience.doctor.theory.saturation import (
    expected_losses,
    expected_member_losses,
    expected_spread,
    fit,
    student_quantile,
    with_typical_expert,
)
from consilience.doctor.theory.weights import predicted_losses
from consilience.errors import InputError


def uniform(subset: tuple[int, ...], count: int) -> Any:
    p = np.zeros(count)
    p[list(subset)] = 1 / len(subset)
    return p


def drawn(count: int, seed: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    tau = random.normal(size=(count, 6)) + 0.5
    return {
        "gram": tau @ tau.T,
        "losses": random.uniform(0, 1, count),
        "slopes": random.normal(size=(count, count)),
        "curvatures": random.uniform(0.1, 2, count),
    }


@pytest.mark.parametrize("count", [2, 3, 5])
def test_expectations_over_subsets_equal_enumeration(count: int) -> None:
    known = drawn(count)
    for size in range(1, count + 1):
        subsets = list(itertools.combinations(range(count), size))
        p = [uniform(subset, count) for subset in subsets]
        assert expected_spread(known["gram"], size) == pytest.approx(
            np.mean([spread(known["gram"], x) for x in p]), abs=1e-12
        )
        each = np.array([predicted_losses(x, **known) for x in p])
        np.testing.assert_allclose(expected_losses(size, **known), each.mean(0))
        members = [
            np.mean([row[j] for row, subset in zip(each, subsets, strict=True) if j in subset]) for j in range(count)
        ]
        np.testing.assert_allclose(expected_member_losses(size, **known), members)


def test_the_quadratic_models_mean_loss_is_a_constant_plus_a_over_k() -> None:
    known = drawn(7)
    losses = [expected_losses(k, **known).mean() for k in range(1, 8)]
    found = fit(range(1, 8), losses)
    assert found.shift == pytest.approx(0, abs=1e-3)
    for k, loss in enumerate(losses, 1):
        assert found.at(k) == pytest.approx(loss, rel=1e-6)


def test_a_typical_expert_continues_the_curve_of_v() -> None:
    gram = drawn(4)["gram"]
    grown = with_typical_expert(gram)
    assert spread(grown, np.full(5, 0.2)) == pytest.approx(expected_spread(gram, 5))
    np.testing.assert_array_equal(grown[:4, :4], gram)
    assert expected_spread(np.eye(3) * 2, 3) == pytest.approx(2 * 2 / 3)


@given(st.floats(-5, 5), st.floats(-3, 3), st.floats(0, 20))
@settings(max_examples=40)
def test_the_fit_gives_back_the_curve_it_was_made_from(limit: float, gain: float, shift: float) -> None:
    sizes = [1, 2, 3, 5, 8, 13]
    found = fit(sizes, [limit + gain / (k + shift) for k in sizes])
    assert found.squares < 1e-8
    for k in (1, 4, 9):
        assert found.at(k) == pytest.approx(limit + gain / (k + shift), abs=1e-3)
    assert found.next_gain(13) == pytest.approx(gain / (13 + shift) - gain / (14 + shift), abs=1e-3)


def test_the_fit_is_the_least_squares_of_another_optimizer() -> None:
    random = np.random.default_rng(3)
    k = np.array([1, 1, 2, 2, 3, 4, 6, 8], float)
    y = 2 + 1.5 / (k + 0.7) + 0.02 * random.normal(size=k.size)
    found = fit(k.tolist(), y.tolist())
    other = optimize.least_squares(lambda x: x[0] + x[1] / (k + x[2]) - y, [1, 1, 1], bounds=([-9, -9, 0], [9, 9, 80]))
    assert found.squares == pytest.approx(2 * other.cost, rel=1e-6)
    assert (found.limit, found.gain, found.shift) == pytest.approx(tuple(other.x), rel=1e-2)
    assert found.identified


def test_prediction_intervals_hold_what_comes_next_about_as_often_as_they_say() -> None:
    random = np.random.default_rng(0)
    k, held = np.array([1, 2, 3, 4, 5, 6, 7, 8], float), []
    for _ in range(60):
        y = 1 + 2 / (k + 1) + 0.05 * random.normal(size=k.size)
        told = fit(k.tolist(), y.tolist()).predict(9, level=0.8)
        assert told.low is not None
        assert told.high is not None
        assert told.low <= told.value <= told.high
        held.append(told.low <= 1 + 2 / 10 + 0.05 * random.normal() <= told.high)
    assert np.mean(held) >= 0.7


def test_three_points_are_fitted_exactly_and_tell_no_interval() -> None:
    told = fit([1, 2, 4], [3.0, 2.0, 1.4]).predict(5)
    assert told.low is told.high is None
    assert told.value < 1.4


def test_a_straight_line_has_no_limit_to_speak_of() -> None:
    assert not fit([1, 2, 3, 4], [4.0, 3.0, 2.0, 1.0]).identified


def test_losses_without_noise_have_an_interval_of_their_value() -> None:
    told = fit([1, 2, 3, 4, 5], [1.0] * 5).predict(6)
    assert (told.low, told.value, told.high) == pytest.approx((1.0, 1.0, 1.0))


@given(st.floats(0.5, 0.999), st.integers(1, 40))
@settings(max_examples=60)
def test_quantiles_are_students(share: float, freedom: int) -> None:
    assert student_quantile(share, freedom) == pytest.approx(stats.t.ppf(share, freedom), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: fit([1, 2], [1.0, 0.5]), "at least three"),
        (lambda: fit([1, 2, 2, 2], [1.0, 0.5, 0.5, 0.4]), "at least three"),
        (lambda: fit([1, 2], [1.0]), "one of each"),
        (lambda: fit([0, 1, 2], [1.0, 0.5, 0.2]), "sizes of at least 1"),
        (lambda: fit([1, 2, 3], [1.0, float("nan"), 0.2]), "sizes and losses"),
        (lambda: fit([1, 2, 3], [1.0, 1e300, 0.2]), "sizes and losses"),
        (lambda: fit([1, 2, 3], [1.0, 0.5, 0.2]).predict(0), "size = 0"),
        (lambda: fit([1, 2, 3], [1.0, 0.5, 0.2]).predict(4, level=1), "level = 1"),
        (lambda: expected_spread([[1.0]], 1), "at least two experts"),
        (lambda: expected_spread(np.eye(2), 0), "size = 0"),
        (lambda: expected_losses(3, **drawn(2)), "at most 2"),
        (lambda: expected_losses(1, np.eye(2), [1.0], np.eye(2), [1, 1]), "losses, slopes, curvatures"),
    ],
)
def test_wrong_values_are_named(wrong: Callable[[], Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        wrong()
