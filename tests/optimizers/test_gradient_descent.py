from typing import Any

import numpy as np
import pytest
import torch
from toy_losses import Linear, Quadratic, pieces, tensor

from consilience.coefficients.coefficients import Alpha
from consilience.optimizers.anchor import Anchor
from consilience.optimizers.gradient import Gradient, Terms, rate_at
from consilience.optimizers.parameterisation import Kind
from consilience.optimizers.settings import Descent, Rule

START = [[0.3, 0.3, 0.3], [0.2, 0.2, 0.2]]
GOAL = [[0.9, -0.4, 0.3], [0.1, 0.7, 1.4]]


def curvature(size: int, seed: int = 3) -> Alpha:
    """Return a well conditioned positive definite matrix that couples all coordinates."""
    root = np.random.default_rng(seed).standard_normal((size, size)) / size
    return np.eye(size) + root @ root.T


def follow(optimizer: Gradient, loss: Any, steps: int, start: int = 0) -> list[Terms]:
    return [optimizer.step(loss, number) for number in range(start, start + steps)]


def by_hand(settings: Descent, loss: Any, start: Any, steps: int) -> Alpha:
    """Adam, AdamW and SGD from their papers' formulas."""
    w, m, v = np.array(start), 0.0, 0.0
    first, second = settings.betas
    for t in range(steps):
        g = loss(w, t, gradient=True)[1]
        rate = settings.learning_rate * rate_at(settings.schedule, t, settings.steps)
        if settings.rule != "adamw":
            g = g + settings.weight_decay * w
        if settings.clip:
            g = g * min(1.0, settings.clip / (np.linalg.norm(g) + 1e-6))
        if settings.rule == "sgd":
            w = w - rate * g
            continue
        if settings.rule == "adamw":
            w = w - rate * settings.weight_decay * w
        m, v = first * m + (1 - first) * g, second * v + (1 - second) * g * g
        w = w - rate * (m / (1 - first ** (t + 1))) / (np.sqrt(v / (1 - second ** (t + 1))) + settings.eps)
    return w


@pytest.mark.parametrize("rule", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "restarts"])
@pytest.mark.parametrize(("clip", "decay"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.1)])
def test_without_an_anchor_the_rules_are_the_textbooks(rule: Rule, schedule: Any, clip: float, decay: float) -> None:
    settings = Descent(rule, 0.05, 60, decay, schedule, clip, betas=(0.8, 0.95), eps=1e-6)
    loss = Quadratic(GOAL, curvature(6), noise=0.1)
    optimizer = Gradient(settings, *pieces("real", START))
    follow(optimizer, loss, 60)
    np.testing.assert_allclose(optimizer.alpha, by_hand(settings, loss, START, 60), rtol=1e-9)


@pytest.mark.parametrize("kind", ["sigmoid", "softplus", "softmax", "affine"])
def test_the_chain_rule_goes_through_the_map_and_the_anchor(kind: Kind) -> None:
    mapped, anchor = pieces(kind, START, gamma=0.7)
    loss = Quadratic([[0.9, -0.4, 0.2], [0.1, 0.7, 1.4]])
    optimizer = Gradient(Descent("sgd", 0.1, schedule="constant"), mapped, anchor)
    follow(optimizer, loss, 1)  # off the anchor, where the penalty has a slope
    w = optimizer.w.detach().clone()

    def total(at: torch.Tensor) -> float:
        terms, _ = loss(mapped.coefficients(at), 1, gradient=False)
        return sum(terms.values()) + float(anchor.penalty(mapped.alpha(at)))

    slope = torch.zeros_like(w)
    for index in np.ndindex(2, 3):
        step = torch.zeros_like(w)
        step[index] = 1e-6
        slope[index] = (total(w + step) - total(w - step)) / 2e-6
    optimizer.step(loss, 1)
    np.testing.assert_allclose((w - optimizer.w.detach()).numpy() / 0.1, slope.numpy(), rtol=1e-6, atol=1e-8)


def lasso(goal: Any, hessian: Alpha, at: Any, slope: float, low: float = -np.inf, high: float = np.inf) -> Alpha:
    """Minimise 0.5 (x - goal)' H (x - goal) + slope |x - at| over [low, high] by proximal gradient steps."""
    x, goal, at = np.array(at, float).ravel(), np.ravel(goal), np.ravel(at)
    rate = 1 / np.linalg.norm(hessian, 2)
    for _ in range(500):
        y = x - rate * hessian @ (x - goal)
        x = np.clip(at + np.sign(y - at) * np.maximum(np.abs(y - at) - rate * slope, 0), low, high)
    return x.reshape(np.shape(START))


@pytest.mark.parametrize(
    ("rule", "rate", "clip"), [("adam", 0.03, 0.0), ("adam", 0.03, 0.1), ("adamw", 0.03, 0.0), ("sgd", 0.3, 0.0)]
)
@pytest.mark.parametrize(
    ("kind", "gamma"),
    [("real", 0.3), *(pytest.param(*case, marks=pytest.mark.slow) for case in [("real", 3.0), ("box", 1.5)])],
)
def test_descent_ends_at_the_solution_of_loss_plus_anchor(
    rule: Rule, rate: float, clip: float, kind: Kind, gamma: float
) -> None:
    hessian = curvature(6)
    optimizer = Gradient(Descent(rule, rate, 600, clip=clip), *pieces(kind, START, gamma=gamma))
    follow(optimizer, Quadratic(GOAL, hessian), 600)
    bounds = (0.0, 1.0) if kind == "box" else (-np.inf, np.inf)
    expected = lasso(GOAL, hessian, START, gamma / 6, *bounds)
    held = expected == START
    assert held.any()
    assert not held.all()
    np.testing.assert_allclose(optimizer.alpha, expected, atol=1e-4)
    assert np.array_equal(optimizer.alpha == START, held), "coefficients at the anchor are on it, not near it"


@pytest.mark.parametrize("rule", ["adam", "adamw", "sgd"])
def test_a_heavy_anchor_is_never_left(rule: Rule) -> None:
    optimizer = Gradient(Descent(rule, 0.02), *pieces("real", START, gamma=1e3))
    for number in range(20):
        terms = optimizer.step(Quadratic(GOAL, noise=1.0), number)
        assert np.array_equal(optimizer.alpha, START)
        assert terms["anchor"] == 0.0


def test_the_anchor_may_be_elsewhere_than_the_start() -> None:
    mapped, _ = pieces("real", START)
    anchor = Anchor(tensor(GOAL), mapped.learned, 1e3)
    optimizer = Gradient(Descent("sgd", 0.1), mapped, anchor)
    terms = optimizer.step(Quadratic(START), 0)
    assert terms["anchor"] == pytest.approx(1e3 * np.abs(np.subtract(START, GOAL)).mean())
    assert np.array_equal(optimizer.alpha, GOAL)


def test_terms_are_those_before_the_step() -> None:
    loss = Quadratic(GOAL)
    optimizer = Gradient(Descent(), *pieces("real", START, gamma=0.1))
    for number in range(3):
        before = loss(optimizer.alpha, number, gradient=False)[0]
        found = optimizer.step(loss, number)
        assert {name: found[name] for name in before} == before
        assert set(found) == {*before, "anchor"}
        assert (found["anchor"] > 0) == (number > 0)


def test_fixed_coefficients_stay_whatever_pulls_at_them() -> None:
    start = np.array([[0.3, 1.7], [0.2, -0.4]])
    optimizer = Gradient(Descent("adamw", 0.1, weight_decay=0.5), *pieces("box", start, [True, False], 0.1))
    follow(optimizer, Linear(np.ones((2, 2))), 5)
    assert np.array_equal(optimizer.alpha[:, 1], start[:, 1])
    assert (optimizer.alpha[:, 0] < start[:, 0]).all()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedules_fall_to_a_tenth(schedule: Any) -> None:
    rates = [rate_at(schedule, step, 7) for step in range(7)]
    assert rates[0] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert rates == sorted(rates, reverse=True)
    assert rates[3] == pytest.approx(0.55)
    assert rate_at(schedule, 0, 1) == 1.0


def test_restarts_are_torchs() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    rule = torch.optim.SGD([weight], lr=0.5)
    reference = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(rule, T_0=50, T_mult=2, eta_min=0.05)
    for step in range(400):
        assert 0.5 * rate_at("restarts", step, 10) == pytest.approx(rule.param_groups[0]["lr"], rel=1e-12)
        rule.step()
        reference.step()


def test_a_restored_state_is_left_as_it_was() -> None:
    loss, made = Quadratic(GOAL), pieces("real", START)
    first = Gradient(Descent(), *made)
    follow(first, loss, 3)
    state = first.state()
    copies = {key: value.copy() for key, value in state.items()}
    other = Gradient(Descent(), *made)
    other.restore(state)
    follow(other, loss, 4, start=3)
    follow(first, loss, 4, start=3)
    assert all(np.array_equal(state[key], copies[key]) for key in copies)


def test_restoring_the_beginning_forgets_the_moments() -> None:
    loss, made = Quadratic(GOAL), pieces("real", START)
    used, fresh = Gradient(Descent(), *made), Gradient(Descent(), *made)
    beginning = used.state()
    follow(used, loss, 3)
    used.restore(beginning)
    follow(used, loss, 3)
    follow(fresh, loss, 3)
    assert np.array_equal(used.alpha, fresh.alpha)
