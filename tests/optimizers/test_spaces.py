from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as searching
from hypothesis import strategies as st
from toy_losses import Quadratic, tensor

from consilience.coefficients.coefficients import Alpha
from consilience.errors import InputError
from consilience.optimizers.anchor import Anchor
from consilience.optimizers.gradient import Terms
from consilience.optimizers.kept import screen
from consilience.optimizers.make import make_optimizer
from consilience.optimizers.parameterisation import Parameterisation, parameterise
from consilience.optimizers.settings import Descent, SpsaSettings
from consilience.optimizers.spaces import (
    Space,
    Trusted,
    centred,
    cluster,
    hierarchical,
    low_rank,
    make_space,
    spread,
    trust,
)

patient = searching(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
Array = npt.NDArray[np.float64]
ONE = np.ones(1, bool)
SPACES: list[Space] = ["simplex", "affine", "task_vector"]


def experts(count: int, size: int = 12, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((count, size))


def uniform(count: int, columns: int = 1) -> Array:
    return np.full((count, columns), 1 / count)


def distance(tau: Array, alpha: Alpha) -> float:
    """The distance that the Gram matrix stands for, from the parameters themselves."""
    return float(np.linalg.norm(alpha[:, 0] @ tau - tau.mean(0)))


def maps(count: int = 5) -> dict[str, Parameterisation]:
    tau, start = experts(count), uniform(count)
    gram = tau @ tau.T
    return {
        "simplex in a ball": make_space("simplex", start, ONE, gram=gram, radius=0.8),
        "affine in a ball": make_space("affine", start, ONE, gram=gram, radius=0.8),
        "task vectors in a ball": make_space("task_vector", start, ONE, gram=gram, radius=0.8),
        "low rank": low_rank(gram, 2, start, ONE),
        "low rank in a ball": trust(low_rank(gram, 2, start, ONE), gram, 0.8),
        "hierarchical": hierarchical(cluster(gram, 2), start, ONE),
    }


NAMES = list(maps())


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "spsa", "cma"])
@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_moves_in_every_space(name: str, optimizer: str) -> None:
    tau, mapped = experts(5), maps()[name]
    goal = np.array([2.0, -1.0, 0.5, -0.5, 0.0]) @ tau

    def loss(alpha: Alpha, step: int, *, gradient: bool) -> tuple[Terms, Alpha | None]:
        off = alpha[:, 0] @ tau - goal
        return {"loss": float(off @ off)}, (2 * tau @ off)[:, None] if gradient else None

    anchor = Anchor(mapped.start, mapped.learned, 0.0)
    made = make_optimizer(optimizer, Descent(learning_rate=0.01, steps=25), mapped, anchor, 0)
    first = sum(loss(made.alpha, 0, gradient=False)[0].values())
    for number in range(25):
        made.step(loss, number)
        if "ball" in name:
            assert distance(tau, made.alpha) <= 0.8 * (1 + 1e-6)
        if "task" not in name:
            assert made.alpha.sum() == pytest.approx(1)
    assert sum(loss(made.alpha, 0, gradient=False)[0].values()) < first
    other = make_optimizer(optimizer, Descent(learning_rate=0.01, steps=25), mapped, anchor, 0)
    other.restore(made.state())
    assert np.array_equal(other.alpha, made.alpha)


@pytest.mark.parametrize("name", NAMES)
@patient
@given(seed=st.integers(0, 30))
def test_inverses_bring_coefficients_back(name: str, seed: int) -> None:
    mapped = maps()[name]
    w = mapped.initial() + 0.1 * tensor(np.random.default_rng(seed).standard_normal(mapped.start.shape))
    alpha = mapped.alpha(w)
    np.testing.assert_allclose(mapped.alpha(mapped.invert(alpha)).numpy(), alpha.numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("space", SPACES)
@patient
@given(seed=st.integers(0, 50), radius=st.floats(0.05, 5))
def test_what_leaves_the_ball_comes_back_to_its_nearest_point(space: Space, seed: int, radius: float) -> None:
    tau = experts(4, seed=seed)
    mapped = make_space(space, uniform(4), ONE, gram=tau @ tau.T, radius=radius)
    assert isinstance(mapped, Trusted)
    w = 2 * tensor(np.random.default_rng(seed).standard_normal((4, 1)))
    free = mapped.inner.coefficients(w)
    mapped.project(w)
    held = mapped.coefficients(w)
    out = distance(tau, free)
    if out <= radius:
        np.testing.assert_allclose(held, free, rtol=1e-9)
        return
    mean = tau.mean(0)
    nearest = mean + radius / out * (free[:, 0] @ tau - mean)
    np.testing.assert_allclose(held[:, 0] @ tau, nearest, rtol=1e-7, atol=1e-9)


def test_a_ball_holds_all_columns_together() -> None:
    tau = np.stack([experts(3, seed=seed) for seed in range(2)])
    gram = np.einsum("nkp,njp->nkj", tau, tau)
    mapped = trust(parameterise("affine", uniform(3, 2), np.ones(2, bool)), gram, 0.5)
    w = tensor([[2.0, 0.1], [0.0, 1.0], [-1.0, 0.0]])
    mapped.project(w)
    alpha = mapped.coefficients(w)
    off = [(alpha[:, n] - 1 / 3) @ tau[n] for n in range(2)]
    assert np.linalg.norm(np.concatenate(off)) == pytest.approx(0.5)


def test_columns_that_are_not_learned_do_not_count_for_the_ball() -> None:
    start = np.array([[1 / 3, 9.0], [1 / 3, 0.0], [1 / 3, -9.0]])
    mapped = trust(parameterise("affine", start, np.array([True, False])), np.eye(3), 0.1)
    w = mapped.initial()
    mapped.project(w)
    assert np.array_equal(mapped.coefficients(w), start)


def test_the_derivative_within_the_ball_is_the_inner_maps() -> None:
    mapped = make_space("simplex", uniform(3), ONE, gram=np.eye(3), radius=0.5)
    w = mapped.initial().requires_grad_()
    (slope,) = torch.autograd.grad((mapped.alpha(w) * tensor([[1.0], [2.0], [4.0]])).sum(), w)
    np.testing.assert_allclose(slope[:, 0].numpy(), (np.array([1, 2, 4]) - 7 / 3) / 3, rtol=1e-12)


@patient
@given(st.integers(0, 50))
def test_the_spread_is_that_of_the_parameters(seed: int) -> None:
    tau = experts(5, seed=seed)
    off = tau - tau.mean(0)
    np.testing.assert_allclose(centred(tau @ tau.T), off @ off.T, atol=1e-10)
    assert spread(tau @ tau.T) == pytest.approx(np.sqrt((off**2).sum(1).mean()))


@patient
@given(st.integers(0, 50), st.integers(1, 4))
def test_low_rank_directions_are_singular_vectors(seed: int, rank: int) -> None:
    tau = experts(5, seed=seed)
    mapped = low_rank(tau @ tau.T, rank, uniform(5), ONE)
    basis = mapped.basis.numpy()
    _, _, right = np.linalg.svd((tau - tau.mean(0)).T)
    np.testing.assert_allclose(np.abs(np.sum(basis * right[:rank].T, 0)), 1, rtol=1e-6)
    np.testing.assert_allclose(basis.sum(0), 0, atol=1e-9)
    assert (basis.max(0) == np.abs(basis).max(0)).all()
    z = tensor(np.random.default_rng(seed).standard_normal((rank, 1)))
    np.testing.assert_allclose(mapped.coefficients(z), 1 / 5 + basis @ z.numpy())


def test_a_full_rank_is_the_affine_space() -> None:
    tau, start = experts(4), np.array([[0.9], [0.3], [-0.4], [0.2]])
    mapped = low_rank(tau @ tau.T, 3, start, ONE)
    np.testing.assert_allclose(mapped.coefficients(mapped.initial()), start, atol=1e-12)


@pytest.mark.parametrize("rank", [0, 3])
def test_a_rank_that_the_experts_do_not_have_is_refused(rank: int) -> None:
    tau = experts(4)
    tau[3] = tau[2]
    with pytest.raises(InputError, match=f"^parts: {rank} is not among 1 to 2,"):
        low_rank(tau @ tau.T, rank, uniform(4), ONE)


@patient
@given(st.integers(0, 50), st.integers(1, 6))
def test_hierarchical_weights_are_a_softmax_in_and_across(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    labels = np.unique(rng.integers(0, count, 6), return_inverse=True)[1].astype(np.int64)
    start, w = rng.dirichlet(np.ones(6), 2).T, rng.standard_normal((6, 2))
    mapped = hierarchical(labels, start, np.ones(2, bool))
    np.testing.assert_allclose(mapped.coefficients(mapped.initial()), start, rtol=1e-9)
    groups = [np.flatnonzero(labels == c) for c in range(labels.max() + 1)]
    score = np.exp([w[own].sum(0) / np.sqrt(len(own)) for own in groups])
    expected = np.zeros((6, 2))
    for c, own in enumerate(groups):
        expected[own] = score[c] / score.sum(0) * np.exp(w[own]) / np.exp(w[own]).sum(0)
    np.testing.assert_allclose(mapped.coefficients(tensor(w)), expected, rtol=1e-9)


def test_hierarchical_keeps_what_is_not_learned() -> None:
    start = np.array([[0.5, -2.0], [0.25, 7.0], [0.25, 0.0]])
    mapped = hierarchical(np.array([0, 0, 1]), start, np.array([True, False]))
    w = mapped.initial().requires_grad_()
    (slope,) = torch.autograd.grad((mapped.alpha(w) * tensor([[1.0, 1], [2, 2], [4, 4]])).sum(), w)
    assert np.array_equal(mapped.coefficients(w)[:, 1], start[:, 1])
    assert torch.isfinite(slope).all()
    assert not slope[:, 1].any()
    assert slope[:, 0].all()


def average_linkage(distance: Array, count: int) -> list[set[int]]:
    """Join the two groups of least mean distance, by going through all pairs of members."""
    groups = [{k} for k in range(len(distance))]
    while len(groups) > count:
        pairs = [(i, j) for i in range(len(groups)) for j in range(i + 1, len(groups))]
        near = min(pairs, key=lambda p: np.mean([distance[a, b] for a in groups[p[0]] for b in groups[p[1]]]))
        groups[near[0]] |= groups.pop(near[1])
    return groups


@patient
@given(st.integers(1, 9), st.integers(0, 99), st.data())
def test_clusters_are_those_of_average_linkage(count: int, seed: int, data: st.DataObject) -> None:
    tau = experts(count, 4, seed)
    wanted = data.draw(st.integers(1, count))
    labels = cluster(tau @ tau.T, wanted)
    unit = tau / np.linalg.norm(tau, axis=1, keepdims=True)
    expected = {frozenset(group) for group in average_linkage(1 - unit @ unit.T, wanted)}
    assert {frozenset(np.flatnonzero(labels == c).tolist()) for c in range(wanted)} == expected
    first = [int(np.flatnonzero(labels == c)[0]) for c in range(wanted)]
    assert first == sorted(first)


def test_a_hundred_experts_fall_into_their_families() -> None:
    rng = np.random.default_rng(0)
    family = rng.integers(0, 10, 100)
    tau = rng.standard_normal((10, 40))[family] + 0.2 * rng.standard_normal((100, 40))
    labels = cluster(tau @ tau.T)
    assert len({(int(a), int(b)) for a, b in zip(family, labels, strict=True)}) == 10


def test_a_task_vector_of_nothing_is_clustered_too() -> None:
    tau = np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 0.1]])
    assert cluster(tau @ tau.T, 2).tolist() == [0, 1, 0]


@patient
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8), st.data())
def test_screening_keeps_the_best(losses: list[float], data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, len(losses)))
    kept = screen(losses, keep)
    assert len(kept) == keep
    assert list(kept) == sorted(kept)
    assert max(losses[k] for k in kept) <= min((losses[k] for k in range(len(losses)) if k not in kept), default=9)


def test_screening_drops_what_is_not_finite_and_keeps_the_first_of_equals() -> None:
    assert screen([float("nan"), 1.0, 1.0, float("inf"), 0.5], 2) == (1, 4)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: make_space("simplex", uniform(3), ONE, radius=1.0), "trust: a radius needs the experts' Gram matrix"),
        (lambda: make_space("simplex", uniform(3), ONE, gram=np.eye(3), radius=-1.0), "trust: the radius is -1"),
        (
            lambda: make_space("affine", np.array([[3.0], [0.0], [0.0]]), ONE, gram=np.eye(3), radius=0.5),
            "trust: the start lies",
        ),
        (lambda: cluster(np.eye(3), 4), "parts: 4 clusters cannot be made of 3 experts"),
        (lambda: screen([1.0, float("nan")], 2), "keep: 2 experts of 2 cannot be kept, 1 have a finite loss"),
        (lambda: screen([1.0], 0), "keep: 0 experts"),
        (
            lambda: make_optimizer(
                "spsa",
                Descent(spsa=SpsaSettings(perturb="alpha")),
                maps()["low rank"],
                Anchor(tensor([[0.0]]), torch.ones(1), 0),
                0,
            ),
            "perturb: alpha cannot be perturbed in low_rank coordinates",
        ),
    ],
)
def test_what_cannot_be_is_refused(build: Any, said: str) -> None:
    with pytest.raises(InputError) as caught:
        build()
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_a_ball_bounds_spsas_outer_points_too() -> None:
    tau = experts(3)
    mapped = make_space("affine", uniform(3), ONE, gram=tau @ tau.T, radius=0.01)
    loss = Quadratic(np.array([[3.0], [0.0], [-2.0]]))
    made = make_optimizer(
        "spsa", Descent("sgd", spsa=SpsaSettings(mu=0.5)), mapped, Anchor(mapped.start, mapped.learned, 0.0), 0
    )
    made.step(loss, 0)
    assert all(distance(tau, alpha) <= 0.01 * (1 + 1e-6) for _, _, alpha in loss.calls)
