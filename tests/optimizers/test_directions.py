from typing import get_args

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as searching
from hypothesis import strategies as st

from consilience.optimizers.directions import Law, draw, moments

patient = searching(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
Array = npt.NDArray[np.float64]
LAWS = get_args(Law)
INDEPENDENT: list[Law] = ["rademacher", "gaussian", "sphere"]
BLOCKS: list[Law] = ["coordinate", "orthogonal"]


def slope(size: int) -> Array:
    return np.random.default_rng(size).standard_normal(size)


def estimates(u: Array, g: Array) -> Array:
    """Return the mean over directions of <g, u> u for u [steps, m, n]."""
    return np.einsum("tm,tmn->tn", u @ g, u) / u.shape[1]


def separately(law: Law, count: int, experts: int, steps: int, zero_sum: bool = False) -> Array:
    learned = np.ones(1, bool)
    return np.stack([draw(law, 7, t, count, experts, learned, zero_sum=zero_sum)[:, :, 0] for t in range(steps)])


def together(law: Law, count: int, experts: int, steps: int, zero_sum: bool = False) -> Array:
    """Directions of a step are independent, so one step of many is many steps of few."""
    drawn = draw(law, 7, 0, steps * count, experts, np.ones(1, bool), zero_sum=zero_sum)
    return drawn.reshape(steps, count, experts)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("experts", [2, 5, 10, 20])
def test_signs_and_unit_vectors_have_their_published_errors(experts: int, count: int) -> None:
    g = slope(experts)
    square = g @ g
    signs = estimates(together("rademacher", count, experts, 100_000), g)
    assert ((signs - g) ** 2).sum(1).mean() == pytest.approx((experts - 1) / count * square, rel=0.03)
    unit = estimates(together("sphere", count, experts, 100_000), g)
    expected = ((experts - 1) / experts) ** 2 + (experts - 1) / (count * experts**2)
    assert ((unit - g) ** 2).sum(1).mean() == pytest.approx(expected * square, rel=0.03)


@pytest.mark.parametrize("zero_sum", [False, True])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("law", INDEPENDENT)
def test_moments_of_independent_directions(law: Law, count: int, zero_sum: bool) -> None:
    check_moments(law, together(law, count, 6, 60_000, zero_sum), count, zero_sum)


@pytest.mark.parametrize("zero_sum", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("law", BLOCKS)
def test_moments_of_blocks(law: Law, count: int, zero_sum: bool) -> None:
    check_moments(law, separately(law, count, 6, 3000, zero_sum), count, zero_sum)


def check_moments(law: Law, u: Array, count: int, zero_sum: bool) -> None:
    g = slope(6)
    g = g - g.mean() if zero_sum else g
    found, expected = estimates(u, g), moments(law, count, 6, zero_sum=zero_sum)
    error = found.std(0, ddof=1) / np.sqrt(len(found))
    assert (np.abs(found.mean(0) - expected.mean * g) < 4 * error + 1e-12).all()
    for value, center in ((expected.error, g), (expected.variance, expected.mean * g)):
        squares = ((found - center) ** 2).sum(1) / (g @ g)
        assert abs(squares.mean() - value) < 4 * squares.std(ddof=1) / np.sqrt(len(squares)) + 1e-12


@patient
@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.integers(0, 99))
def test_a_full_rotation_gives_the_gradient_itself(
    experts: int, columns: int, turns: int, zero_sum: bool, seed: int
) -> None:
    size = (experts - zero_sum) * columns
    u = draw("orthogonal", seed, 3, max(1, turns * size), experts, np.ones(columns, bool), zero_sum=zero_sum)
    g = np.random.default_rng(seed).standard_normal((experts, columns))
    g = g - g.mean(0) if zero_sum else g
    found = np.einsum("m,mkn->kn", np.einsum("mkn,kn->m", u, g), u) / len(u)
    np.testing.assert_allclose(found, g, atol=1e-12)
    assert moments("orthogonal", turns * size or 1, experts, columns, zero_sum=zero_sum).error == 0


def test_rotations_are_orthonormal_rows_of_the_size_of_signs() -> None:
    u = draw("orthogonal", 0, 0, 3, 5, np.ones(2, bool)).reshape(3, -1)
    np.testing.assert_allclose(u @ u.T, 10 * np.eye(3), atol=1e-12)


@pytest.mark.parametrize("law", LAWS)
@patient
@given(
    experts=st.integers(1, 5), learned=st.lists(st.booleans(), min_size=1, max_size=4), count=st.integers(1, 9),
    step=st.integers(0, 2**40), zero_sum=st.booleans(),
)  # fmt: skip
def test_draws_are_of_seed_and_step_and_leave_the_rest_alone(
    law: Law, experts: int, learned: list[bool], count: int, step: int, zero_sum: bool
) -> None:
    mask = np.array(learned)
    u = draw(law, 5, step, count, experts, mask, zero_sum=zero_sum)
    assert u.shape == (count, experts, len(mask))
    assert np.isfinite(u).all()
    assert not u[:, :, ~mask].any()
    assert np.array_equal(u, draw(law, 5, step, count, experts, mask, zero_sum=zero_sum))
    if zero_sum:
        np.testing.assert_allclose(u.sum(1), 0, atol=1e-12)


@pytest.mark.parametrize("law", LAWS)
def test_seeds_steps_and_streams_differ(law: Law) -> None:
    mask = np.ones(3, bool)
    drawn = [draw(law, *at, 2, 4, mask, stream=stream) for at, stream in (((0, 0), 0), ((1, 0), 0), ((0, 1), 0))]
    drawn.append(draw(law, 0, 0, 2, 4, mask, stream=1))
    assert not any(np.array_equal(drawn[0], other) for other in drawn[1:])


def test_unit_directions_are_biased_whatever_their_number() -> None:
    # Proposition 1 of the paper, (K - 1) / (m K), is the error at m = 1 and too small at every other.
    experts = 10
    assert moments("sphere", 1, experts).error == pytest.approx((experts - 1) / experts)
    assert moments("sphere", 8, experts).error > (experts - 1) / (8 * experts)
    assert moments("rademacher", 8, experts).error > (experts - 1) / (8 * experts)
