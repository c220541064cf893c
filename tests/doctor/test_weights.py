from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.doctor.theory.weights import (
    bounded_weights,
    objective,
    optimal_weights,
    predicted_increase,
    predicted_losses,
    stability_penalties,
)
from consilience.errors import InputError

Array = npt.NDArray[np.float64]


class Quadratics:
    """Tasks c_k ||x - a_k||^2 / 2 + least_k, and experts near their minima, in floating point of their own."""

    def __init__(self, seed: int, count: int = 4, width: int = 7) -> None:
        random = np.random.default_rng(seed)
        self.base = random.normal(size=width)
        self.minima = random.normal(size=(count, width))
        self.experts = self.minima + 0.3 * random.normal(size=(count, width))
        self.curvatures = random.uniform(0.3, 3, count)
        self.least = random.uniform(0, 1, count)
        self.tau = self.experts - self.base
        self.w = random.dirichlet(np.ones(count))

    def losses(self, x: Array) -> Array:
        """Every task's loss at one point."""
        return self.curvatures / 2 * ((x - self.minima) ** 2).sum(1) + self.least

    @property
    def known(self) -> dict[str, Any]:
        slopes = (self.curvatures[:, None] * (self.experts - self.minima)) @ self.tau.T
        return {"gram": self.tau @ self.tau.T, "slopes": slopes, "curvatures": self.curvatures}

    @property
    def own(self) -> Array:
        return np.array([self.losses(x)[k] for k, x in enumerate(self.experts)])


@given(st.integers(0, 1000), st.lists(st.floats(-1, 2), min_size=4, max_size=4))
def test_the_prediction_is_exact_on_quadratics_for_any_weights(seed: int, p: list[float]) -> None:
    tasks = Quadratics(seed)
    truth = tasks.losses(tasks.base + np.array(p) @ tasks.tau)
    np.testing.assert_allclose(predicted_losses(p, tasks.own, **tasks.known), truth, rtol=1e-9)


def test_for_stationary_experts_the_increase_is_the_curvature_times_half_the_squared_distance() -> None:
    tasks = Quadratics(0)
    tasks.tau = tasks.minima - tasks.base
    merged = tasks.base + tasks.tau.mean(0)
    increase = predicted_increase(np.full(4, 0.25), tasks.tau @ tasks.tau.T, np.zeros((4, 4)), tasks.curvatures)
    np.testing.assert_allclose(increase, tasks.losses(merged) - tasks.least, rtol=1e-9)


def test_layers_add_up_to_the_model_and_may_have_weights_of_their_own() -> None:
    tasks = Quadratics(3, width=6)
    slopes = [
        (tasks.curvatures[:, None] * (tasks.experts - tasks.minima)[:, part]) @ tasks.tau[:, part].T
        for part in (slice(0, 2), slice(2, 6))
    ]
    grams = [tasks.tau[:, part] @ tasks.tau[:, part].T for part in (slice(0, 2), slice(2, 6))]
    p = np.array([[0.1, 0.2, 0.3, 0.4], [0.6, 0.1, -0.1, 0.2]])
    x = tasks.base + np.concatenate([p[0] @ tasks.tau[:, :2], p[1] @ tasks.tau[:, 2:]])
    found = predicted_losses(p, tasks.own, np.array(grams), np.array(slopes), tasks.curvatures)
    np.testing.assert_allclose(found, tasks.losses(x), rtol=1e-9)
    best = optimal_weights(np.array(grams), w=tasks.w, curvatures=tasks.curvatures, slopes=np.array(slopes))
    assert best.shape == (2, 4)
    for layer in range(2):
        alone = optimal_weights(grams[layer], w=tasks.w, curvatures=tasks.curvatures, slopes=slopes[layer])
        np.testing.assert_allclose(best[layer], alone, rtol=1e-9)


def test_the_objective_is_the_weighted_prediction_and_the_price_of_instability() -> None:
    tasks, p, r = Quadratics(1), np.array([0.4, 0.3, -0.2, 0.1]), np.array([0.1, 0.2, 0.3, 0.4])
    truth = tasks.w @ (tasks.losses(tasks.base + p @ tasks.tau) - tasks.own) + 0.5 * r @ p**2
    assert objective(p, w=tasks.w, penalties=r, **tasks.known) == pytest.approx(truth)


@pytest.mark.parametrize("seed", range(6))
def test_no_random_weights_do_better_than_the_optimal_ones(seed: int) -> None:
    tasks, random = Quadratics(seed), np.random.default_rng(seed)
    known: dict[str, Any] = {"w": tasks.w, "penalties": random.exponential(size=4), **tasks.known}
    best = optimal_weights(**known)
    least = objective(best, **known)
    tries = [random.normal(size=(2000, 4)), best + 0.01 * random.normal(size=(2000, 4)), np.full((1, 4), 0.25)]
    assert all(objective(p, **known) >= least - 1e-12 for p in np.concatenate(tries)[:: 1 if seed == 0 else 7])


def test_without_penalties_and_with_equal_curvatures_the_weights_are_the_tasks() -> None:
    tasks = Quadratics(2)
    gram = tasks.known["gram"]
    np.testing.assert_allclose(optimal_weights(gram, w=tasks.w), tasks.w, rtol=1e-9)
    np.testing.assert_allclose(optimal_weights(gram, w=tasks.w, curvatures=np.full(4, 7.0)), tasks.w, rtol=1e-9)


def test_an_expert_with_an_endless_penalty_stays_out_and_the_others_do_as_without_it() -> None:
    tasks = Quadratics(4)
    gram, c = tasks.known["gram"], tasks.curvatures
    large = optimal_weights(gram, w=tasks.w, curvatures=c, penalties=[0, 1e15, 0, 0.1])
    out = optimal_weights(gram, w=tasks.w, curvatures=c, penalties=[0, np.inf, 0, 0.1])
    assert abs(large[1]) < 1e-12
    assert out[1] == 0
    np.testing.assert_allclose(large, out, atol=1e-9)
    rest = [0, 2, 3]
    system = (tasks.w @ c) * gram[np.ix_(rest, rest)] + np.diag([0, 0, 0.1])
    np.testing.assert_allclose(out[rest], np.linalg.solve(system, (gram @ (tasks.w * c))[rest]), rtol=1e-8)
    assert np.isfinite(objective(out, gram, w=tasks.w, curvatures=c, penalties=[0, np.inf, 0, 0.1]))
    assert objective(large, gram, w=tasks.w, curvatures=c, penalties=[0, np.inf, 0, 0.1]) == np.inf


def test_penalties_shrink_a_lone_expert_towards_the_base_as_its_closed_form_says() -> None:
    for penalty in (0.0, 0.5, 3.0):
        found = optimal_weights([[4.0]], curvatures=[2.0], penalties=[penalty])
        np.testing.assert_allclose(found, 8 / (8 + penalty))


def test_duplicates_share_as_their_tasks_do_and_a_zero_task_vector_disturbs_nothing() -> None:
    tau = np.random.default_rng(0).normal(size=(4, 9))
    tau[1], tau[3] = tau[0], 0
    gram, c, w = tau @ tau.T, np.array([1.0, 3.0, 2.0, 1.0]), np.array([0.3, 0.3, 0.3, 0.1])
    found = optimal_weights(gram, w=w, curvatures=c)
    assert found[0] == pytest.approx(found[1])
    assert found[3] == pytest.approx(0.1)
    least = objective(found, gram, w=w, curvatures=c)
    random = np.random.default_rng(1).normal(size=(500, 4))
    assert all(objective(p, gram, w=w, curvatures=c) >= least - 1e-12 for p in random)
    np.testing.assert_allclose(optimal_weights(np.zeros((3, 3))), 1 / 3)


@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 10_000), st.floats(0, 1e6))
@settings(max_examples=60)
def test_the_optimum_is_never_worse_than_uniform_even_where_gram_is_singular(
    count: int, width: int, seed: int, price: float
) -> None:
    random = np.random.default_rng(seed)
    tau = random.normal(size=(count, width)) * 10.0 ** random.integers(-4, 4)
    known: dict[str, Any] = {
        "gram": tau @ tau.T, "w": random.dirichlet(np.ones(count)), "curvatures": random.exponential(size=count) + 1e-3,
        "penalties": price * random.integers(0, 2, count) * random.exponential(size=count),
    }  # fmt: skip
    found = optimal_weights(**known)
    uniform = objective(np.full(count, 1 / count), **known)
    assert np.isfinite(found).all()
    assert objective(found, **known) <= uniform + 1e-9 * abs(uniform)


def test_penalties_are_the_quadratic_part_of_lemma_2() -> None:
    w, eps, smooth, p = np.array([0.4, 0.6]), np.array([0.1, 0.3]), 2.0, np.array([0.7, -0.2])
    price = objective(p, np.zeros((2, 2)), w=w, penalties=stability_penalties(w, smooth, eps))
    assert price == pytest.approx((w * smooth / 2 * p**2 * eps).sum())


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: optimal_weights(np.ones((2, 3))), "gram: has shape"),
        (lambda: optimal_weights([[1.0, 2.0], [2.0, 1.0]]), "negative eigenvalue"),
        (lambda: optimal_weights([[np.nan]]), "finite"),
        (lambda: optimal_weights(np.eye(2), w=[0.5, 0.6]), "sum to 1"),
        (lambda: optimal_weights(np.eye(2), curvatures=[-1, 0.5]), "weighted sum"),
        (lambda: optimal_weights(np.eye(2), curvatures=[np.nan, 1]), "curvatures: holds NaN"),
        (lambda: optimal_weights(np.eye(2), penalties=[-1, 0]), "penalties"),
        (lambda: optimal_weights(np.eye(2), slopes=np.eye(3)), "slopes: has shape"),
        (lambda: predicted_losses([1, 0], [1.0], np.eye(2), np.eye(2), [1, 1]), "losses: have shape"),
        (lambda: objective([1.0], np.eye(2)), "p: has shape"),
    ],
)
def test_wrong_values_are_named(wrong: Callable[[], Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        wrong()


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))])
def test_bounded_weights_are_the_best_of_the_box(seed: int) -> None:
    generator = np.random.default_rng(seed)
    tau, slopes = generator.normal(size=(3, 5)), generator.normal(size=(3, 3))
    known: dict[str, Any] = {"curvatures": np.array([1.0, 0.5, 2.0]), "slopes": 2 * slopes}
    found = bounded_weights(tau @ tau.T, **known)
    assert ((found >= 0) & (found <= 1)).all()
    grid = np.stack(np.meshgrid(*[np.linspace(0, 1, 21)] * 3), -1).reshape(-1, 3)
    values = [float(objective(p, tau @ tau.T, **known)) for p in grid]
    assert float(objective(found, tau @ tau.T, **known)) <= min(values) + 1e-9


def test_bounds_that_do_not_bind_change_nothing() -> None:
    tau = np.array([[1.0, 0.2], [0.1, 1.0]])
    assert bounded_weights(tau @ tau.T) == pytest.approx(optimal_weights(tau @ tau.T))
    assert bounded_weights(tau @ tau.T, penalties=[0.0, np.inf])[1] == 0
