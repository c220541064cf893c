import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.doctor.theory.bound import (
    PARTS,
    Array,
    constant_power,
    distances,
    excess_risk,
    gradient_power,
    growth,
    noise_variance,
    optimisation_bound,
    spread,
    spread_bound,
    spread_of_lengths,
    spread_of_pairs,
    stability_bound,
    stability_leading,
    stability_part,
)
from consilience.errors import InputError


def ranks(values: Any) -> Array:
    return np.argsort(np.argsort(values)).astype(float)


def spearman(left: Any, right: Any) -> float:
    return float(np.corrcoef(ranks(left), ranks(right))[0, 1])


class LeastSquares:
    """Losses (a.x - y)^2 / 2 of n samples, and the n + 1 runs of SGD on them and on each with one sample replaced."""

    def __init__(self, seed: int, rows: int, width: int = 4) -> None:
        self.random = np.random.default_rng(seed)
        self.rows, self.width = rows, width
        truth = self.random.normal(size=width)
        a = self.random.normal(size=(rows + 1, rows, width)) / math.sqrt(width)
        noise = self.random.normal(size=(rows + 1, rows))
        fresh = np.eye(rows + 1, rows, dtype=bool)
        a = np.where(fresh[:, :, None], a, a[-1])
        noise = np.where(fresh, noise, noise[-1])
        self.a, self.y = a, a @ truth + noise

    @property
    def smoothness(self) -> float:
        return float((self.a**2).sum(-1).max())

    def run(self, rate: float, steps: int, batch: int) -> tuple[Array, list[float], float]:
        """Return all ends [n + 1, width] (the last saw the original samples), ||grad f|| by step, and max variance."""
        x = np.zeros((self.rows + 1, self.width))
        norms, variance = [], 0.0
        for _ in range(steps):
            each = (self.a[-1] @ x[-1] - self.y[-1])[:, None] * self.a[-1]
            mean = each.mean(0)
            norms.append(float(np.linalg.norm(mean)))
            variance = max(variance, float(((each - mean) ** 2).sum(1).mean()))
            drawn = self.random.integers(0, self.rows, batch)
            a, y = self.a[:, drawn], self.y[:, drawn]
            x -= rate * np.einsum("rb,rbd->rd", np.einsum("rbd,rd->rb", a, x) - y, a) / batch
        return x, norms, variance


def test_lemma_1_dominates_simulated_stability_and_ranks_it() -> None:
    random = np.random.default_rng(5)
    bounds, leads, found = [], [], []
    for setting in range(20):
        rows, batch = int(random.integers(10, 60)), int(random.choice([1, 4, 16]))
        steps = int(random.integers(5, 60))
        tasks = [LeastSquares(100 * setting + seed, rows) for seed in range(4)]
        rate = float(random.uniform(0.02, 0.2)) / max(task.smoothness for task in tasks)
        runs = [task.run(rate, steps, batch) for task in tasks]
        found.append(np.mean([((ends[:-1] - ends[-1]) ** 2).sum(1).mean() for ends, _, _ in runs]))
        powers = [gradient_power([rate] * steps, norms, variance) or 0.0 for _, norms, variance in runs]
        power = float(np.mean(powers))
        known: dict[str, float] = {"steps": steps, "rows": rows, "batch": batch, "power": power}
        bounds.append(stability_bound(**known, growth=growth(None, None, convex=True)))
        leads.append(stability_leading(**known))
    assert (np.array(bounds) >= found).all()
    assert spearman(bounds, found) > 0.9
    assert spearman(leads, found) > 0.9


@pytest.mark.parametrize("p", [0.3, 1.0, -0.4])
def test_lemma_2_replacing_a_sample_moves_the_merge_by_the_weight_times_the_experts_move(p: float) -> None:
    ends, _, _ = LeastSquares(3, 12).run(0.1, 30, 4)
    others = np.random.default_rng(0).normal(size=(2, 4))
    merges = others.sum(0) * 0.35 + p * ends
    moved = np.linalg.norm(merges[:-1] - merges[-1], axis=1)
    assert moved.max() > 0
    np.testing.assert_allclose(moved, abs(p) * np.linalg.norm(ends[:-1] - ends[-1], axis=1), rtol=1e-9, atol=1e-12)


def test_lemma_2_bounds_the_generalisation_gap_of_least_squares() -> None:
    gaps, moves, losses, smoothness = [], [], [], 0.0
    for seed in range(60):
        task = LeastSquares(seed, 8)
        ends, _, _ = task.run(0.2 / task.smoothness, 60, 4)
        own = (task.a[-1] @ ends[-1] - task.y[-1]) ** 2 / 2
        fresh = [(task.a[i, i] @ ends[-1] - task.y[i, i]) ** 2 / 2 for i in range(8)]
        gaps.append(np.mean(fresh) - own.mean())
        moves.append(((ends[:-1] - ends[-1]) ** 2).sum(1).mean())
        losses.append(own.mean())
        smoothness = max(smoothness, task.smoothness)
    bound = stability_part(1.0, float(np.mean(moves)), float(np.mean(losses)), smoothness)
    assert bound is not None
    assert bound >= np.mean(gaps) - 2 * np.std(gaps) / math.sqrt(len(gaps))


def test_lemma_2_is_the_minimum_over_its_free_parameter() -> None:
    p, eps, loss, smooth = -0.4, 0.03, 1.7, 2.5
    free = np.geomspace(1e-3, 1e4, 200_001)
    least = (smooth / free * loss + (smooth + free) / 2 * p**2 * eps).min()
    assert stability_part(p, eps, loss, smooth) == pytest.approx(least, rel=1e-6)


vectors = st.integers(1, 6).flatmap(
    lambda count: st.tuples(
        st.lists(st.lists(st.floats(-5, 5), min_size=3, max_size=3), min_size=count, max_size=count),
        st.lists(st.floats(0.01, 1), min_size=count, max_size=count),
    )
)


@given(vectors)
def test_v_has_three_forms_and_does_not_change_with_a_common_shift(drawn: tuple[Any, Any]) -> None:
    tau, p = np.array(drawn[0]), np.array(drawn[1]) / np.sum(drawn[1])
    gram = tau @ tau.T
    size = 1e-9 * (1 + gram.max())
    direct = (p * ((p @ tau - tau) ** 2).sum(1)).sum()
    assert spread(gram, p) == pytest.approx(direct, abs=size)
    assert spread_of_lengths(gram, p) == pytest.approx(direct, abs=size)
    assert spread_of_pairs(gram, p) == pytest.approx(direct, abs=size)
    shifted = tau + np.array([1.0, -2.0, 0.5])
    assert spread(shifted @ shifted.T, p) == pytest.approx(direct, abs=100 * size)


@given(vectors, st.floats(-2, 2))
def test_distances_hold_for_weights_of_any_sum_and_for_stacks(drawn: tuple[Any, Any], scale: float) -> None:
    tau, p = np.array(drawn[0]), scale * np.array(drawn[1])
    direct = ((p @ tau - tau) ** 2).sum(1)
    stack = np.stack([np.outer(column, column) for column in tau.T])
    each = distances(stack, np.broadcast_to(p, (3, len(p))))
    np.testing.assert_allclose(distances(tau @ tau.T, p), direct, atol=1e-8)
    np.testing.assert_allclose(each.sum(0), direct, atol=1e-8)


def test_v_is_zero_for_equal_task_vectors_alone_and_known_for_orthogonal_ones() -> None:
    p = np.full(4, 0.25)
    assert spread(np.full((4, 4), 7.0), p) == 0
    nearly = np.full((4, 4), 7.0) + np.diag([0.0, 0.0, 0.0, 1e-3])
    assert spread(nearly, p) > 0
    orthogonal = 3.0 * np.eye(4)
    assert spread(orthogonal, p) == pytest.approx(0.75 * 3)
    np.testing.assert_allclose(distances(orthogonal, p), 0.75 * 3)


class NoisyQuadratics:
    """Tasks f_k = c ||x - a_k||^2 / 2, trained from 0 by gradient steps with normal noise; moments in closed form."""

    def __init__(self) -> None:
        random = np.random.default_rng(1)
        self.curvature, self.variance, self.width = 0.8, 0.5, 6
        self.minima = random.normal(size=(3, self.width))

    def simulate(self, rates: list[float], steps: list[int], batch: int, runs: int = 300) -> Array:
        random = np.random.default_rng(2)
        ends = np.zeros((runs, 3, self.width))
        for k, (rate, count) in enumerate(zip(rates, steps, strict=True)):
            x = np.zeros((runs, self.width))
            for _ in range(count):
                noise = random.normal(size=x.shape) * math.sqrt(self.variance / batch / self.width)
                x -= rate * (self.curvature * (x - self.minima[k]) + noise)
            ends[:, k] = x
        return ends

    def excess(self, k: int, rate: float, steps: int, batch: int) -> float:
        """E[f_k(x_k) - min f_k] by the recursion of mean and variance."""
        shrink = 1 - rate * self.curvature
        far = float((self.minima[k] ** 2).sum()) * shrink ** (2 * steps)
        spread = sum(shrink ** (2 * t) for t in range(steps)) * rate**2 * self.variance / batch
        return self.curvature / 2 * (far + spread)


def test_lemma_3_bounds_the_spread_of_experts_with_unequal_lengths_on_a_noisy_quadratic() -> None:
    tasks, p = NoisyQuadratics(), np.array([0.5, 0.3, 0.2])
    rates, steps, batch = [0.1, 0.05, 0.2], [10, 40, 15], 2
    ends = tasks.simulate(rates, steps, batch)
    gradients = -tasks.curvature * tasks.minima
    mean = p @ gradients
    excursions = [float(((ends[:, k] ** 2).sum(1)).mean()) for k in range(3)]
    parts = spread_bound(
        p.tolist(),
        lengths=[eta * t for eta, t in zip(rates, steps, strict=True)],
        gradient=float(np.linalg.norm(mean)),
        heterogeneity=[float(np.linalg.norm(row - mean)) for row in gradients],
        smoothness=tasks.curvature,
        excursions=excursions,
        squares=[eta**2 * t for eta, t in zip(rates, steps, strict=True)],
        variances=[tasks.variance] * 3,
        batches=[batch] * 3,
    )
    seen = float(np.mean([spread(run @ run.T, p) for run in ends]))
    assert parts.bound is not None
    assert parts.bound >= seen
    assert parts.part("unequal") == pytest.approx(
        4 * np.cov([1.0, 2.0, 3.0], aweights=p, ddof=0) * float(mean @ mean), rel=1e-12
    )
    assert all((value or 0) > 0 for value in parts.noise)


def test_the_optimisation_bound_dominates_the_exact_error_of_a_noisy_quadratic() -> None:
    tasks = NoisyQuadratics()
    for rate, steps, batch in itertools.product([0.1, 0.5, 1.0], [0, 1, 5, 50], [1, 8]):
        bound = optimisation_bound(
            initial=tasks.excess(0, rate, 0, batch), rate=rate, steps=steps, pl=tasks.curvature,
            smoothness=tasks.curvature, variance=tasks.variance, batch=batch,
        )  # fmt: skip
        assert bound is not None
        assert bound >= tasks.excess(0, rate, steps, batch) - 1e-12


def test_the_total_is_u_shaped_in_steps_and_its_parts_are_monotone() -> None:
    tasks, rate, batch, rows, p = NoisyQuadratics(), 0.05, 4, 400, [1 / 3] * 3
    smooth = tasks.curvature

    def terms(steps: int) -> Any:
        shrink = 1 - (1 - rate * smooth) ** steps
        moved = shrink * tasks.minima
        excess = [tasks.excess(k, rate, steps, batch) for k in range(3)]
        start = [2 * smooth * tasks.excess(k, rate, 0, batch) for k in range(3)]
        power = [constant_power(rate, steps, value, tasks.variance) for value in start]
        return excess_risk(
            p, p, smoothness=smooth, optimisation=excess, gradients=[2 * smooth * value for value in excess],
            moves=distances(moved @ moved.T, np.array(p)).tolist(), merged_losses=[0.3] * 3,
            stabilities=[stability_bound(steps=steps, rows=rows, batch=batch, power=x, growth=0.0) for x in power],
        )  # fmt: skip

    found = [terms(steps) for steps in (1, 2, 4, 8, 16, 32, 64, 128)]
    totals = [each.total for each in found]
    best = int(np.argmin(totals))
    assert 0 < best < len(totals) - 1
    assert all(np.diff(totals[: best + 1]) < 0)
    assert all(np.diff(totals[best:]) > 0)
    alone = [each.part("optimisation") + each.part("gradient") for each in found]
    assert all(np.diff(alone) < 0)
    for name in ("displacement", "stability"):
        assert all(np.diff([each.part(name) for each in found]) > 0)


def bound_of(**changed: float) -> list[float]:
    """Stability, its leading part, noise and optimisation of one setting with changed values."""
    at: dict[str, float] = {"rate": 0.1, "steps": 50, "rows": 200, "batch": 8, **changed}
    power = constant_power(at["rate"], at["steps"], 1.0, 2.0)
    known: dict[str, Any] = {name: at[name] for name in ("steps", "rows", "batch")}
    eps = stability_bound(**known, power=power, growth=growth(at["rate"] * at["steps"], 1.0))
    noise = spread_bound([1.0], squares=[at["rate"] ** 2 * at["steps"]], variances=[2.0], batches=[at["batch"]])
    error = optimisation_bound(
        initial=1.0, rate=at["rate"], steps=at["steps"], pl=0.2, smoothness=1.0, variance=0.0, batch=at["batch"]
    )
    values = [eps, stability_leading(**known, power=power), noise.part("noise"), error]
    found = [value for value in values if value is not None]
    assert len(found) == 4
    return found


def test_the_bound_moves_with_every_setting_as_it_should() -> None:
    eps, lead, noise, error = bound_of()
    for changed in (bound_of(rate=0.2), bound_of(steps=100)):
        assert changed[0] > eps
        assert changed[1] > lead
        assert changed[2] > noise
        assert changed[3] < error
    bigger = bound_of(batch=16)
    assert bigger[0] < eps
    assert bigger[1] < lead
    assert bigger[2] < noise
    more = bound_of(rows=400)
    assert more[0] < eps
    assert more[1] < lead


def test_the_bound_by_step_is_the_constant_one_for_constant_steps() -> None:
    assert gradient_power([0.1] * 7, [3.0] * 7, 2.0) == pytest.approx(constant_power(0.1, 7, 9.0, 2.0))
    eps = stability_bound(steps=7, rows=20, batch=2, power=constant_power(0.1, 7, 9.0, 2.0), growth=0.35)
    assert eps == pytest.approx(math.exp(1.7) * 0.01 * (8 / 400 + 1 / 40) * 7 * 4 * 11)


def test_the_noise_scale_gives_back_the_variance_it_was_made_from() -> None:
    gradient, variance, batch = 3.0, 40.0, 16
    assert noise_variance(variance / gradient, gradient + variance / batch, batch) == pytest.approx(variance)
    assert noise_variance(None, 1.0, 2) is None


KNOWN: dict[str, Any] = {
    "smoothness": 2.0,
    "optimisation": [0.1, 0.2],
    "gradients": [0.01, 0.02],
    "moves": [0.5, 0.6],
    "stabilities": [0.001, 0.002],
    "merged_losses": [1.0, 1.1],
}


def test_the_total_is_the_sum_of_the_theorems_terms() -> None:
    found = excess_risk([0.25, 0.75], [0.5, 0.4], **KNOWN)
    by_hand = 0.0
    for k, (w, p) in enumerate(((0.25, 0.5), (0.75, 0.4))):
        eps = math.sqrt(KNOWN["stabilities"][k])
        by_hand += w * (
            KNOWN["optimisation"][k] + KNOWN["gradients"][k] / 4 + 2 * KNOWN["moves"][k]
            + p * eps * math.sqrt(4 * KNOWN["merged_losses"][k]) + p**2 * eps**2
        )  # fmt: skip
    assert found.total == pytest.approx(by_hand)
    assert found.dominant == "displacement"
    assert found.missing == ()
    assert found.total == pytest.approx(sum(w * (found.expert(k) or 0) for k, w in enumerate(found.weights)))


@pytest.mark.parametrize("gone", [*KNOWN, "one"])
def test_what_is_not_known_stays_so_in_every_sum_that_needs_it(gone: str) -> None:
    known: dict[str, Any] = {**KNOWN, "moves": [0.5, None]} if gone == "one" else {**KNOWN, gone: None}
    found = excess_risk([0.5, 0.5], [0.5, 0.5], **known)
    needs = {
        "smoothness": ("gradient", "displacement", "stability"), "optimisation": ("optimisation",),
        "gradients": ("gradient",), "moves": ("displacement",), "one": ("displacement",),
        "stabilities": ("stability",), "merged_losses": ("stability",),
    }[gone]  # fmt: skip
    assert found.total is None
    assert {name for name in PARTS if found.part(name) is None} == set(needs)
    assert {name for name, _ in found.missing} == set(needs)
    if gone == "one":
        assert found.missing == (("displacement", 1),)
        assert found.expert(0) is not None
        assert found.expert(1) is None


def test_with_checkpoints_alone_nothing_is_a_number_but_what_they_say() -> None:
    found = excess_risk([0.5, 0.5], [0.5, 0.5], moves=[1.0, 2.0])
    assert found.total is found.dominant is None
    assert all(found.part(name) is None for name in PARTS)
    parts = spread_bound([0.5, 0.5])
    assert parts.bound is None
    assert set(parts.unequal + parts.heterogeneity + parts.drift + parts.noise) == {None}
    empty = {"steps": None, "rows": None, "batch": None, "power": None}
    assert stability_leading(**empty) is stability_bound(**empty, growth=None) is None


def test_an_expert_without_weight_need_not_be_known() -> None:
    first: dict[str, Any] = {
        name: [value[0], None] if isinstance(value, list) else value for name, value in KNOWN.items()
    }
    found = excess_risk([1.0, 0.0], [1.0, 0.0], **first)
    assert found.total is not None
    parts = spread_bound([1.0, 0.0], lengths=[0.5, None], gradient=1.0)
    assert parts.part("unequal") == 0


def test_equal_lengths_have_no_unequal_part_however_they_came_about() -> None:
    same = spread_bound([0.5, 0.5], lengths=[0.002 * 500, 0.0005 * 2000], gradient=3.0)
    other = spread_bound([0.5, 0.5], lengths=[1.0, 2.0], gradient=3.0)
    assert same.part("unequal") == pytest.approx(0, abs=1e-12)
    assert other.part("unequal") == pytest.approx(4 * 0.25 * 9)


@given(st.floats(1, 1e9), st.floats(1, 1e9), st.floats(1, 1e6), st.floats(0, 1e9), st.floats(0, 1e9))
@settings(max_examples=50)
def test_the_leading_part_is_never_above_the_bound(t: float, n: float, b: float, power: float, rho: float) -> None:
    known: dict[str, Any] = {"steps": t, "rows": n, "batch": b, "power": power}
    bound, lead = stability_bound(**known, growth=rho), stability_leading(**known)
    assert lead is not None
    assert bound is not None
    assert lead <= bound


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: excess_risk([0.5, 0.6], [0.5, 0.5]), "sum to 1"),
        (lambda: excess_risk([], []), "sum to 1"),
        (lambda: excess_risk([0.5, 0.5], [1.0]), "p: has 1 values"),
        (lambda: excess_risk([0.5, 0.5], [0.5, 0.5], moves=[1.0]), "moves: has 1 values"),
        (lambda: excess_risk([1.0], [1.0], smoothness=0.0), "smoothness = 0.0"),
        (lambda: spread_bound([1.5, -0.5]), "at least 0"),
        (lambda: spread_bound([float("nan"), 1.0]), "at least 0"),
        (lambda: stability_leading(steps=1, rows=0, batch=1, power=1), "rows = 0"),
        (lambda: gradient_power([0.1], [1.0, 2.0], 1.0), "one of each a step"),
        (
            lambda: optimisation_bound(initial=1, rate=3, steps=1, pl=0.1, smoothness=1, variance=1, batch=1),
            "at most 1 / smoothness",
        ),
        (
            lambda: optimisation_bound(initial=1, rate=0.1, steps=1, pl=2, smoothness=1, variance=1, batch=1),
            "at most the smoothness",
        ),
    ],
)
def test_wrong_numbers_are_named(wrong: Callable[[], Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        wrong()
