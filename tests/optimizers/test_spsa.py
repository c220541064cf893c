import numpy as np
import pytest
import torch
from toy_losses import Linear, Quadratic, pieces, tensor

from consilience.optimizers.parameterisation import Kind
from consilience.optimizers.settings import Descent, Rule, SpsaSettings
from consilience.optimizers.spsa import Spsa, make_spsa

SLOPE = np.array([[0.5, -1.0, 2.0], [0.0, 3.0, -0.2]])
START = np.full((2, 3), 0.4)


def estimator(kind: Kind = "real", *, gamma: float = 0.0, directions: int = 1, mu: float = 0.05, seed: int = 0) -> Spsa:
    return Spsa(*pieces(kind, START, gamma=gamma), seed, Descent(spsa=SpsaSettings(mu=mu, directions=directions)))


def test_the_estimate_is_unbiased_on_a_linear_loss() -> None:
    directions = 4000
    _, found = estimator(directions=directions)(Linear(SLOPE), tensor(START), 0)
    spread = np.linalg.norm(SLOPE) / np.sqrt(directions)  # bounds every coordinate's standard error
    assert np.abs(found.numpy() - SLOPE).max() < 4 * spread


def test_one_direction_gives_the_slope_along_it() -> None:
    estimate = estimator()
    _, found = estimate(Linear(SLOPE), tensor(START), 7)
    delta = estimate.draw(7)[0].numpy()
    np.testing.assert_allclose(found.numpy(), (SLOPE * delta).sum() * delta, rtol=1e-9)


def test_mu_does_not_matter_where_the_loss_is_quadratic() -> None:
    loss = Quadratic(SLOPE)
    small, large = (estimator(mu=mu)(loss, tensor(START), 3)[1].numpy() for mu in (1e-3, 1.0))
    np.testing.assert_allclose(small, large, rtol=1e-9)


def test_directions_are_signs_from_seed_and_step_alone() -> None:
    estimate = estimator(directions=3)
    drawn = estimate.draw(5)
    assert drawn.shape == (3, 2, 3)
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(drawn, estimator(directions=3).draw(5))
    assert not torch.equal(drawn, estimate.draw(6))
    assert not torch.equal(drawn, estimator(directions=3, seed=1).draw(5))


def test_nothing_is_drawn_for_fixed_coefficients() -> None:
    estimate = Spsa(*pieces("real", START, [True, False, True]), 0, Descent(spsa=SpsaSettings(directions=2)))
    assert not estimate.draw(0)[:, :, 1].any()
    assert estimate.draw(0)[:, :, 0].all()


def test_all_evaluations_of_a_step_are_forward_only_and_of_its_samples() -> None:
    loss = Quadratic(SLOPE, noise=1.0)
    estimate = estimator(directions=3)
    terms, _ = estimate(loss, tensor(START), 9)
    assert [(step, gradient) for step, gradient, _ in loss.calls] == [(9, False)] * 6
    values = [loss(alpha, 9, gradient=False)[0] for _, _, alpha in list(loss.calls)]
    assert terms == pytest.approx({name: np.mean([v[name] for v in values]) for name in ("near", "far")})
    plus, minus = loss.calls[0][2], loss.calls[1][2]
    np.testing.assert_allclose((plus + minus) / 2, START)
    np.testing.assert_allclose(np.abs(plus - minus), 2 * estimate.settings.mu)


def test_the_anchor_is_in_the_estimate_only_without_a_proximal_step() -> None:
    w = tensor(START + 1.0)
    assert not estimator("real", gamma=6.0)(Linear(np.zeros((2, 3))), w, 0)[1].any()
    softplus = estimator("softplus", gamma=6.0, directions=2000, mu=1e-4)
    _, found = softplus(Linear(np.zeros((2, 3))), w, 0)
    held = w.clone().requires_grad_()
    (expected,) = torch.autograd.grad(softplus.anchor.penalty(softplus.map.alpha(held)), held)
    assert expected.all()
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=4 * float(expected.norm()) / np.sqrt(2000))


@pytest.mark.parametrize(("rule", "rate", "directions"), [("adam", 0.05, 1), ("sgd", 0.05, 1), ("sgd", 0.1, 4)])
def test_it_converges_on_a_quadratic(rule: Rule, rate: float, directions: int) -> None:
    goal = [[0.9, 0.1, 0.4], [0.0, 0.6, 1.2]]
    settings = Descent(rule, rate, 400, spsa=SpsaSettings(directions=directions))
    optimizer = make_spsa(settings, *pieces("real", START), seed=1)
    for number in range(400):
        optimizer.step(Quadratic(goal), number)
    np.testing.assert_allclose(optimizer.alpha, goal, atol=0.02)


def test_a_heavy_anchor_is_never_left() -> None:
    optimizer = make_spsa(Descent(), *pieces("real", START, gamma=1e3), seed=0)
    for number in range(5):
        optimizer.step(Quadratic(SLOPE), number)
    assert np.array_equal(optimizer.alpha, START)


@pytest.mark.parametrize("settings", [SpsaSettings(mu=0.0), SpsaSettings(mu=float("nan")), SpsaSettings(directions=0)])
def test_settings_that_estimate_nothing_are_refused(settings: SpsaSettings) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        make_spsa(Descent(spsa=settings), *pieces("real", START), seed=0)
