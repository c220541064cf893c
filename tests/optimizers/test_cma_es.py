import sys
from pathlib import Path

import numpy as np
import pytest
from toy_losses import Linear, Quadratic, pieces

from consilience.coefficients.coefficients import Alpha
from consilience.errors import InputError
from consilience.optimizers.cma_es import SEPARABLE_ABOVE, CmaEs
from consilience.optimizers.gradient import Loss, Terms
from consilience.optimizers.parameterisation import Kind
from consilience.optimizers.settings import CmaSettings, Descent

START = np.array([[0.3, 0.3], [0.2, 0.2]])
GOAL = np.array([[0.9, 0.1], [0.0, 0.6]])


def run(optimizer: CmaEs, loss: Loss, steps: int) -> CmaEs:
    for number in range(steps):
        optimizer.step(loss, number)
    return optimizer


def test_it_converges_on_a_quadratic() -> None:
    hessian = np.diag([1.0, 30.0, 5.0, 0.3])
    found = run(CmaEs(Descent(), *pieces("real", START), seed=0), Quadratic(GOAL, hessian), 60)
    np.testing.assert_allclose(found.alpha, GOAL, atol=1e-3)


def test_only_the_order_of_losses_counts() -> None:
    class Cubed(Quadratic):
        def __call__(self, alpha: Alpha, step: int, *, gradient: bool) -> tuple[Terms, Alpha | None]:
            terms, slope = super().__call__(alpha, step, gradient=gradient)
            return {"cubed": sum(terms.values()) ** 3}, slope

    plain, cubed = (run(CmaEs(Descent(), *pieces("real", START), seed=0), loss(GOAL), 8) for loss in (Quadratic, Cubed))
    assert np.array_equal(plain.alpha, cubed.alpha)


def test_the_anchor_is_part_of_the_fitness() -> None:
    found = run(CmaEs(Descent(), *pieces("real", START, gamma=100.0), seed=0), Quadratic(GOAL), 40)
    np.testing.assert_allclose(found.alpha, START, atol=1e-3)


def test_a_box_is_never_left() -> None:
    start = np.array([[0.0, 1.0], [0.02, 0.5]])
    loss = Linear([[-1.0, 1.0], [1.0, -1.0]])
    seen: list[Alpha] = []

    def watched(alpha: Alpha, step: int, *, gradient: bool) -> tuple[Terms, Alpha | None]:
        seen.append(alpha)
        return loss(alpha, step, gradient=gradient)

    optimizer = CmaEs(Descent(), *pieces("box", start), seed=0)
    assert np.array_equal(optimizer.alpha, start)
    run(optimizer, watched, 40)
    assert all(((alpha >= 0) & (alpha <= 1)).all() for alpha in seen)
    np.testing.assert_allclose(optimizer.alpha, [[1.0, 0.0], [0.0, 1.0]], atol=1e-3)


def test_a_step_is_a_generation_after_its_mean() -> None:
    loss = Quadratic(GOAL, noise=1.0)
    optimizer = CmaEs(Descent(cma=CmaSettings(population=5)), *pieces("real", START, gamma=0.5), seed=0)
    for number in (3, 4):
        mean = optimizer.alpha
        loss.calls.clear()
        terms = optimizer.step(loss, number)
        assert [(step, gradient) for step, gradient, _ in loss.calls] == [(number, False)] * 6
        assert np.array_equal(loss.calls[0][2], mean)
        anchor = pytest.approx(0.5 * np.abs(mean - START).mean())
        assert terms == loss(mean, number, gradient=False)[0] | {"anchor": anchor}


def test_sigma_is_the_first_populations_width() -> None:
    loss = Quadratic(np.zeros((2, 30)))
    optimizer = CmaEs(
        Descent(cma=CmaSettings(sigma=0.2, population=40)), *pieces("real", np.full((2, 30), 0.3)), seed=0
    )
    optimizer.step(loss, 0)
    drawn = np.array([alpha for _, _, alpha in loss.calls[1:]])
    assert drawn.std() == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize("kind", ["real", "box"])
def test_many_coefficients_have_a_diagonal_covariance(kind: Kind) -> None:
    count = SEPARABLE_ABOVE // 2 + 1
    start = np.full((2, count), 0.3)
    optimizer = CmaEs(Descent(), *pieces(kind, start), seed=0)
    few = CmaEs(Descent(), *pieces(kind, start[:, 1:]), seed=0)
    assert optimizer.strategy.opts["CMA_diagonal"] is True
    assert few.strategy.opts["CMA_diagonal"] is False
    loss = Quadratic(np.full((2, count), 0.6))
    first = sum(optimizer.step(loss, 0).values())
    run(optimizer, loss, 60)
    assert sum(optimizer.step(loss, 61).values()) < 0.5 * first


@pytest.mark.parametrize("learned", [[True, False], [False, False]])
def test_one_coefficient_or_none(learned: list[bool]) -> None:
    loss = Quadratic([[0.9, 0.9]])
    optimizer = run(CmaEs(Descent(), *pieces("real", [[0.3, 0.4]], learned), seed=0), loss, 30)
    np.testing.assert_allclose(optimizer.alpha, [[0.9 if learned[0] else 0.3, 0.4]], atol=1e-3)
    other = CmaEs(Descent(), *pieces("real", [[0.3, 0.4]], learned), seed=0)
    other.restore(optimizer.state())
    assert np.array_equal(other.alpha, optimizer.alpha)


def test_a_long_run_does_not_collapse() -> None:
    optimizer = run(
        CmaEs(Descent(cma=CmaSettings(population=4)), *pieces("real", [[0.3]]), seed=0), Quadratic([[0.9]]), 400
    )
    assert optimizer.alpha[0, 0] == pytest.approx(0.9, abs=1e-9)
    assert optimizer.strategy.stds.min() > 1e-13


def test_losses_that_are_not_finite_rank_last() -> None:
    inner = Quadratic(GOAL)

    def diverging(alpha: Alpha, step: int, *, gradient: bool) -> tuple[Terms, Alpha | None]:
        terms, _ = inner(alpha, step, gradient=gradient)
        return {"loss": float("nan") if alpha[0, 0] < 0.25 else sum(terms.values())}, None

    np.testing.assert_allclose(
        run(CmaEs(Descent(), *pieces("real", START), seed=0), diverging, 50).alpha, GOAL, atol=1e-3
    )


def test_seeds_differ_and_the_global_generator_is_left_alone() -> None:
    np.random.seed(5)
    expected = np.random.standard_normal()
    np.random.seed(5)
    one, two = (run(CmaEs(Descent(), *pieces("real", START), seed), Quadratic(GOAL), 2).alpha for seed in (0, 1))
    assert np.random.standard_normal() == expected
    assert not np.array_equal(one, two)


def test_it_is_silent_and_writes_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cma_signals.in").write_text("{'popsize': 3}")
    optimizer = run(CmaEs(Descent(), *pieces("real", START), seed=0), Linear(np.zeros((2, 2))), 3)
    assert len(optimizer.told[-1]) == 8
    assert [path.name for path in tmp_path.iterdir()] == ["cma_signals.in"]
    assert capfd.readouterr() == ("", "")


def test_a_state_that_cannot_be_replayed_is_refused() -> None:
    made = pieces("real", START)
    state = run(CmaEs(Descent(), *made, seed=0), Quadratic(GOAL), 4).state()
    with pytest.raises(InputError, match="cannot be replayed with this version of cma"):
        CmaEs(Descent(), *made, seed=1).restore(state)


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(InputError, match=r"^optimizer: 'cma' .* pip install 'consilience\[evolve\]'$"):
        CmaEs(Descent(), *pieces("real", START), seed=0)
