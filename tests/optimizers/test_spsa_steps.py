"""Properties of SPSA on the simplex and off it, with losses whose gradients are known."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as searching
from hypothesis import strategies as st
from toy_losses import Linear, Quadratic, pieces, tensor

from consilience.coefficients.coefficients import Alpha
from consilience.errors import InputError
from consilience.learned.loop import descend
from consilience.optimizers.directions import Law, draw
from consilience.optimizers.gradient import Gradient, Loss, Terms, rate_at
from consilience.optimizers.parameterisation import Kind
from consilience.optimizers.settings import Descent, SpsaSettings, adjust
from consilience.optimizers.spsa import GREATEST, LOWEST, Spsa, make_spsa, record_of

patient = searching(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
UNIFORM = np.full((4, 1), 0.25)
PLAIN = Descent("sgd", 0.1, schedule="constant")


class Many:
    """Evaluates several points in one call, and remembers how often."""

    def __init__(self, inner: Loss) -> None:
        self.inner = inner
        self.calls: list[tuple[int, int]] = []

    def __call__(self, alpha: Alpha, step: int, *, gradient: bool) -> tuple[Terms, Alpha | None]:
        raise AssertionError("all points go through at")

    def at(self, points: Sequence[Alpha], step: int) -> list[Terms]:
        self.calls.append((len(points), step))
        return [self.inner(point, step, gradient=False)[0] for point in points]


class Blend:
    """|sum_k alpha_k theta_k - goal|^2 for experts [K, P]: GLUE's problem with the simplest of losses."""

    def __init__(self, experts: Any, goal: Any) -> None:
        self.experts, self.goal = np.asarray(experts, float), np.asarray(goal, float)

    def __call__(self, alpha: Alpha, step: int, *, gradient: bool) -> tuple[Terms, Alpha | None]:
        off = alpha[:, 0] @ self.experts - self.goal
        return {"loss": float(off @ off)}, (2 * self.experts @ off)[:, None] if gradient else None


class Rough:
    """A linear loss with noise of a known size, a function of the coefficients' bits, as rounding is."""

    def __init__(self, slope: Any, noise: float) -> None:
        self.inner, self.noise = Linear(slope), noise

    def __call__(self, alpha: Alpha, step: int, *, gradient: bool) -> tuple[Terms, Alpha | None]:
        bits = np.random.default_rng(alpha.view(np.uint32).ravel())
        value = sum(self.inner(alpha, step, gradient=False)[0].values())
        return {"loss": 1.0 + value + self.noise * bits.standard_normal()}, None


def run(optimizer: Gradient, loss: Loss, steps: range) -> Gradient:
    for number in steps:
        optimizer.step(loss, number)
    return optimizer


def spsa(settings: Descent, kind: Kind = "softmax", start: Any = UNIFORM, gamma: float = 0.0) -> Gradient:
    return make_spsa(settings, *pieces(kind, start, gamma=gamma), seed=1)


@patient
@given(st.integers(1, 6), st.integers(0, 99), st.sampled_from(["w", "alpha"]))
def test_the_simplex_is_never_left(experts: int, seed: int, perturb: Any) -> None:
    settings = adjust(PLAIN, learning_rate=0.5, perturb=perturb)
    optimizer = make_spsa(settings, *pieces("softmax", np.full((experts, 2), 1 / experts)), seed=seed)
    goal = np.random.default_rng(seed).standard_normal((experts, 2))
    for number in range(12):
        optimizer.step(Quadratic(goal), number)
        assert (optimizer.alpha >= 0).all()
        np.testing.assert_allclose(optimizer.alpha.sum(0), 1, atol=1e-12)


def test_a_common_shift_of_the_logits_changes_nothing() -> None:
    mapped, _ = pieces("softmax", UNIFORM)
    w = tensor([[0.3], [-1.0], [2.0], [0.0]])
    np.testing.assert_allclose(mapped.coefficients(w + 17.0), mapped.coefficients(w), rtol=1e-12)


@pytest.mark.parametrize("perturb", ["w", "alpha"])
@patient
@given(order=st.permutations(range(4)))
def test_permuted_experts_have_permuted_coefficients(perturb: Any, order: list[int]) -> None:
    goal = np.array([[0.7], [0.1], [-0.3], [0.5]])
    settings = adjust(PLAIN, perturb=perturb, directions=2)
    one, other = spsa(settings), spsa(settings)
    assert isinstance(one.estimator, Spsa)
    drawn = one.estimator.draw

    def permuted(step: int) -> torch.Tensor:
        return drawn(step)[:, order]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(other.estimator, "draw", permuted)
        run(one, Quadratic(goal), range(5))
        run(other, Quadratic(goal[order]), range(5))
    np.testing.assert_allclose(other.alpha, one.alpha[order], rtol=1e-9)


@pytest.mark.parametrize("mu", [1e-2, 1.0])
def test_signs_are_unbiased_and_unit_vectors_shrink_on_a_quadratic(mu: float) -> None:
    count, experts = 200_000, 5
    loss, x = np.diag([1.0, 4.0, 0.5, 2.0, 3.0]), np.array([0.3, -0.2, 1.0, 0.5, -1.0])
    laws: list[tuple[Law, float]] = [("rademacher", 1.0), ("sphere", 1 / experts)]
    for law, factor in laws:
        u = draw(law, 0, 0, count, experts, np.ones(1, bool))[:, :, 0]
        high, low = (0.5 * np.einsum("ti,ij,tj->t", x + s * mu * u, loss, x + s * mu * u) for s in (1, -1))
        found = ((high - low) / (2 * mu))[:, None] * u
        error = found.std(0) / np.sqrt(count)
        assert (np.abs(found.mean(0) - factor * (loss @ x)) < 3.5 * error).all()


def test_the_bias_falls_with_the_square_of_mu() -> None:
    start = np.array([[0.2, -0.4, 0.9], [0.1, 0.5, -0.3]])

    def loss(alpha: Alpha, step: int, *, gradient: bool) -> tuple[Terms, Alpha | None]:
        return {"loss": float(np.log(np.exp(alpha * [[1.0, 2.0, 3.0]]).sum()) + (alpha**3).sum())}, None

    w = tensor(start).requires_grad_()
    value = torch.log(torch.exp(w * tensor([[1.0, 2.0, 3.0]])).sum()) + (w**3).sum()
    (slope,) = torch.autograd.grad(value, w)
    sizes = np.geomspace(1e-2, 1e-1, 4)
    bias: list[float] = []
    for mu in sizes:
        estimate = Spsa(*pieces("real", start), 0, Descent(spsa=SpsaSettings(mu=mu, directions=200)))
        _, found = estimate(loss, tensor(start), 0)
        u = estimate.draw(0).numpy()
        exact = np.einsum("m,mkn->kn", np.einsum("mkn,kn->m", u, slope.numpy()), u) / len(u)
        bias.append(float(np.linalg.norm(found.numpy() - exact)))
    order = np.polyfit(np.log(sizes), np.log(bias), 1)[0]
    assert order == pytest.approx(2, abs=0.1)


def test_both_losses_of_a_step_see_equal_samples_and_noise() -> None:
    seen: list[tuple[int, float]] = []

    def loss(alpha: Alpha, step: int, *, gradient: bool) -> tuple[Terms, Alpha | None]:
        noise = float(np.random.default_rng(step).standard_normal())
        seen.append((step, noise))
        return {"loss": noise}, None

    optimizer = run(spsa(adjust(PLAIN, directions=3)), loss, range(4, 6))
    assert [step for step, _ in seen] == [4] * 6 + [5] * 6
    assert len({noise for _, noise in seen}) == 2
    assert np.array_equal(optimizer.alpha, UNIFORM), "noise that both share moves nothing"


@pytest.mark.parametrize("perturb", ["w", "alpha"])
def test_all_points_are_evaluated_at_once_where_the_loss_can(perturb: Any) -> None:
    settings = adjust(PLAIN, perturb=perturb, directions=3)
    many = Many(Quadratic(UNIFORM + 0.3, noise=0.2))
    together, apart = spsa(settings), spsa(settings)
    run(together, many, range(4))
    run(apart, many.inner, range(4))
    assert many.calls == [(6, step) for step in range(4)]
    assert np.array_equal(together.alpha, apart.alpha)


@pytest.mark.parametrize("directions", [1, 4])
def test_a_step_is_two_evaluations_a_direction_and_no_gradient(directions: int) -> None:
    loss = Quadratic(UNIFORM + 0.3)
    run(spsa(adjust(PLAIN, directions=directions)), loss, range(5))
    assert [(step, gradient) for step, gradient, _ in loss.calls] == [
        (step, False) for step in range(5) for _ in range(2 * directions)
    ]


def test_the_papers_step() -> None:
    loss = Quadratic(UNIFORM + 0.3)
    optimizer = run(spsa(PLAIN), loss, range(1))
    u = np.random.default_rng([0x5B5A, 1, 0]).integers(0, 2, (4, 1)) * 2.0 - 1.0

    def at(beta: Any) -> float:
        return sum(loss(np.exp(beta) / np.exp(beta).sum(), 0, gradient=False)[0].values())

    d = (at(0.05 * u) - at(-0.05 * u)) / 0.1
    beta = -0.1 * d * u
    np.testing.assert_allclose(optimizer.alpha, np.exp(beta) / np.exp(beta).sum(), rtol=1e-12)


def test_perturbing_coefficients_is_exponentiated_gradient() -> None:
    goal, eta, mu = np.array([[0.9], [0.2], [-0.4], [0.1]]), 0.7, 0.01
    optimizer = spsa(adjust(PLAIN, learning_rate=eta, mu=mu, perturb="alpha", directions=2))
    alpha = UNIFORM
    for number in range(6):
        loss = Quadratic(goal)
        optimizer.step(loss, number)
        points = [point for _, _, point in loss.calls]
        np.testing.assert_allclose([point.sum() for point in points], 1, rtol=1e-12)
        estimate = 0.0
        for plus, minus in zip(points[0::2], points[1::2], strict=True):
            np.testing.assert_allclose((plus + minus) / 2, alpha, atol=1e-9)
            high, low = (sum(loss(point, 0, gradient=False)[0].values()) for point in (plus, minus))
            estimate = estimate + (high - low) / (2 * mu) * (plus - minus) / (2 * mu) / 2
        alpha = alpha * np.exp(-eta * estimate)
        alpha = alpha / alpha.sum()
        np.testing.assert_allclose(optimizer.alpha, alpha, rtol=1e-6)


@pytest.mark.parametrize("kind", ["affine", "softmax"])
@pytest.mark.parametrize("perturb", ["w", "alpha"])
def test_a_lone_expert_stays_alone(kind: Kind, perturb: Any) -> None:
    optimizer = run(spsa(adjust(PLAIN, perturb=perturb), kind, [[1.0]]), Linear([[5.0]]), range(4))
    assert optimizer.alpha.tolist() == [[1.0]]


def test_equal_experts_are_not_told_apart() -> None:
    loss = Blend(np.ones((4, 3)), [3.0, 0.0, 1.0])
    optimizer = run(spsa(PLAIN), loss, range(20))
    np.testing.assert_allclose(optimizer.alpha, UNIFORM, atol=1e-12)


EXPERTS = np.random.default_rng(0).standard_normal((3, 8))
THIRDS = np.full((3, 1), 1 / 3)


@pytest.mark.parametrize("perturb", ["w", "alpha"])
def test_the_expert_that_is_the_target_is_found(perturb: Any) -> None:
    loss = Blend(EXPERTS, EXPERTS[2])
    exact = run(Gradient(adjust(PLAIN, learning_rate=0.5), *pieces("softmax", THIRDS)), loss, range(150))
    assert exact.alpha[2, 0] > 0.95
    found = run(spsa(adjust(PLAIN, learning_rate=0.1, perturb=perturb), start=THIRDS), loss, range(450))
    assert found.alpha[2, 0] > 0.95


@pytest.mark.parametrize("law", ["rademacher", "gaussian", "coordinate", "orthogonal"])
def test_a_target_inside_the_hull_is_recovered(law: Any) -> None:
    truth = np.array([0.5, 0.2, 0.3])
    found = run(
        spsa(adjust(PLAIN, learning_rate=0.1, law=law), start=THIRDS), Blend(EXPERTS, truth @ EXPERTS), range(500)
    )
    np.testing.assert_allclose(found.alpha[:, 0], truth, atol=0.03)


def test_affine_coefficients_reach_beyond_the_hull() -> None:
    loss = Blend(EXPERTS, np.array([1.4, -0.6, 0.2]) @ EXPERTS)
    losses: dict[Kind, float] = {}
    kinds: list[Kind] = ["softmax", "affine"]
    for kind in kinds:
        alpha = run(spsa(adjust(PLAIN, learning_rate=0.02), kind, THIRDS), loss, range(500)).alpha
        losses[kind] = loss(alpha, 0, gradient=False)[0]["loss"]
    assert losses["affine"] < 0.1 * losses["softmax"]


@patient
@given(st.floats(1e-6, 1e6))
def test_normalised_steps_do_not_see_the_losss_unit(unit: float) -> None:
    goal = np.array([[0.7], [0.1], [-0.3], [0.5]])
    settings = adjust(PLAIN, learning_rate=0.2, normalise=True)
    one = run(spsa(settings), Quadratic(goal), range(6))
    other = run(spsa(settings), Quadratic(goal, unit * np.eye(4)), range(6))
    np.testing.assert_allclose(other.alpha, one.alpha, rtol=1e-6)


def test_a_normalised_first_step_changes_logits_by_the_rate() -> None:
    optimizer = spsa(adjust(PLAIN, learning_rate=0.2, normalise=True))
    begun = optimizer.w.detach().clone()
    optimizer.step(Quadratic(np.array([[1.0], [0.0], [0.0], [2.0]])), 0)
    np.testing.assert_allclose((optimizer.w.detach() - begun).abs().numpy(), 0.2, rtol=1e-9)


def test_spalls_gains() -> None:
    settings = adjust(PLAIN, learning_rate=0.3, steps=40, mu=0.2, schedule="spall")
    a, big = 0.3 * 5**0.602, 4.0
    estimate = Spsa(*pieces("real", UNIFORM), 0, settings)
    for t in (0, 1, 7, 39):
        assert settings.learning_rate * rate_at("spall", t, 40) == pytest.approx(a / (big + t + 1) ** 0.602)
        assert estimate.mu_at(t) == pytest.approx(0.2 / (t + 1) ** 0.101)
    loss = Linear(UNIFORM)
    estimate(loss, tensor(UNIFORM), 7)
    assert estimate.record[0].mu == estimate.mu_at(7)


@pytest.mark.parametrize("noise", [1e-4, 1e-3, 5e-3])
def test_mu_is_tuned_to_the_noise_of_the_loss(noise: float) -> None:
    slope = np.array([[1.0], [-0.5], [0.3], [-0.8]])
    optimizer = spsa(adjust(PLAIN, tune_mu=True), "real", np.full((4, 1), 0.3))
    optimizer.step(Rough(slope, noise), 0)
    estimate = optimizer.estimator
    assert isinstance(estimate, Spsa)
    assert estimate.memory.noise == pytest.approx(noise, rel=0.9)
    u = draw("rademacher", 99, 0, 4000, 4, np.ones(1, bool))
    heard = float(np.median(np.abs(2 * estimate.memory.mu * np.einsum("mkn,kn->m", u, slope))))
    assert LOWEST / 2 < heard / estimate.memory.noise < 2 * GREATEST


@pytest.mark.parametrize(("slope", "end"), [(0.0, 1), (1e3, 0)])
def test_tuning_stays_in_its_range(slope: float, end: int) -> None:
    bounds = (0.01, 0.2)
    optimizer = spsa(adjust(PLAIN, tune_mu=True, mu_range=bounds), "real")
    optimizer.step(Rough(np.full((4, 1), slope), 1e-9), 0)
    record = record_of(optimizer)
    assert record is not None
    assert record.steps[0].mu == bounds[end]


def test_noisy_estimates_get_more_directions_and_clear_ones_fewer() -> None:
    settings = adjust(PLAIN, learning_rate=1e-4, directions=2, most_directions=16, law="orthogonal")
    start = np.full((8, 1), 0.3)
    noisy = spsa(settings, "real", start)
    run(noisy, Quadratic(np.zeros((8, 1)), noise=5.0), range(40))
    record = record_of(noisy)
    assert record is not None
    counts = [step.directions for step in record.steps]
    assert counts[:8] == [2] * 8
    assert counts[-1] == 16
    run(noisy, Linear(np.ones((8, 1))), range(40, 120))
    record = record_of(noisy)
    assert record is not None
    assert record.steps[-1].directions < 16


def test_the_record_is_what_was_measured() -> None:
    loss = Quadratic(UNIFORM + 0.3)
    optimizer = run(spsa(adjust(PLAIN, directions=2, mu=0.1)), loss, range(3))
    record = record_of(optimizer)
    assert record is not None
    assert record.size == 4
    values = [sum(loss(point, 0, gradient=False)[0].values()) for _, _, point in list(loss.calls)]
    for number, step in enumerate(record.steps):
        high, low = np.array(values[4 * number : 4 * number + 4]).reshape(2, 2).T
        np.testing.assert_allclose(step.plus, high)
        np.testing.assert_allclose(step.slopes, (high - low) / 0.2)
        np.testing.assert_allclose(step.differences, np.abs(high - low))
        assert (step.step, step.mu, step.directions) == (number, 0.1, 2)
        assert step.loss == pytest.approx(np.mean([high, low]))
        json.dumps(step.line(), allow_nan=False)
    assert record_of(Gradient(PLAIN, *pieces("real", UNIFORM))) is None


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("perturb", ["w", "alpha"])
def test_the_expected_move_is_the_mean_of_moves(perturb: Any, normalise: bool) -> None:
    settings = adjust(PLAIN, learning_rate=1e-6, perturb=perturb, normalise=normalise)
    start = np.random.default_rng(3).dirichlet(np.ones(20))[:, None]
    optimizer = spsa(settings, "softmax", start)
    slope = np.random.default_rng(4).standard_normal((20, 1))
    moved = 0.0
    for number in range(300):
        before = optimizer.alpha
        optimizer.step(Linear(slope), number)
        moved += float(((optimizer.alpha - before) ** 2).sum())
    record = record_of(optimizer)
    assert record is not None
    assert sum(step.expected**2 for step in record.steps) == pytest.approx(moved, rel=0.3)


TRICKY = adjust(
    Descent("sgd", 0.05, 30, schedule="spall"),
    directions=1,
    law="orthogonal",
    normalise=True,
    tune_mu=True,
    most_directions=4,
)


@pytest.mark.parametrize("settings", [TRICKY, adjust(TRICKY, rule="adam", perturb="alpha")])
@pytest.mark.parametrize("stop", [0, 1, 9, 20])
def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path: Path, settings: Descent, stop: int) -> None:
    inner = Quadratic([[0.55], [0.25], [-0.25], [0.45]], noise=0.5)

    def interrupted(alpha: Alpha, step: int, *, gradient: bool) -> tuple[Terms, Alpha | None]:
        if step == stop:
            raise KeyboardInterrupt
        return inner(alpha, step, gradient=gradient)

    whole, first, second = (spsa(settings) for _ in range(3))
    expected = descend(whole, inner, 30)
    with pytest.raises(KeyboardInterrupt):
        descend(first, interrupted, 30, folder=tmp_path)
    found = descend(second, inner, 30, folder=tmp_path)
    assert found.alpha.tobytes() == expected.alpha.tobytes()
    assert found.history == expected.history
    assert record_of(second) == record_of(whole)
    states = second.state(), whole.state()
    assert {key: value.tobytes() for key, value in states[0].items()} == {
        key: value.tobytes() for key, value in states[1].items()
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tune_mu", [False, True])
def test_a_loss_that_is_not_finite_ends_the_run_in_one_line(value: float, tune_mu: bool) -> None:
    def loss(alpha: Alpha, step: int, *, gradient: bool) -> tuple[Terms, Alpha | None]:
        return {"loss": value if tune_mu or step == 3 else float((alpha**2).sum())}, None

    optimizer = run(spsa(adjust(PLAIN, tune_mu=tune_mu)), loss, range(0 if tune_mu else 3))
    before = optimizer.alpha
    with pytest.raises(InputError, match=r"^the loss is not finite at step 3 of spsa \(mu = 0\.05\); lower [^\n]*$"):
        optimizer.step(loss, 3)
    assert np.array_equal(optimizer.alpha, before)


@pytest.mark.parametrize("bounds", [(0.0, 0.1), (0.2, 0.1)])
def test_a_range_of_mu_that_is_none_is_refused(bounds: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        spsa(adjust(PLAIN, mu_range=bounds))
