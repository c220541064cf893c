"""Methods that trim and select, against their formulas in float64: any cut into segments, any threads, adapters too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import consilience as cs
from consilience.api import build_recipe
from consilience.engine import selection
from tests.methods.matrices import CONFIG, Array, draw, write

SHAPES = {"matrix": (43, 29), "kernel": (4, 5, 7), "bias": (101,), "scale": ()}


def largest(tau: Array, first: int, last: int) -> Array:
    """Keep the ranks ``first ... last - 1`` by magnitude."""
    flat = tau.reshape(-1)
    order = np.argsort(-np.abs(flat.astype(np.float32)), kind="stable")[first:last]
    out = np.zeros_like(flat)
    out[order] = flat[order]
    return out.reshape(tau.shape)


def band(tau: Array, density: float, gamma: float) -> Array:
    kept = int(density * tau.size)
    first = min(int(gamma * tau.size), tau.size - kept)
    return largest(tau, first, first + kept)


def agreeing(taus: Array, weights: Array, mean: bool = False) -> Array:
    """Sum (or weighted mean) of the weighted rows that have the sign of their sum, 0 counting as +."""
    w = weights.reshape(-1, *[1] * (taus.ndim - 1))
    signs = np.where((w * taus).sum(0) >= 0, 1, -1)
    mask = np.sign(w * taus) == signs
    total, divisor = (w * taus * mask).sum(0), (w * mask).sum(0)
    return total / np.where(mask.any(0), divisor, 1) if mean else total


def breadcrumbs_ties(taus: Array) -> Array:
    return agreeing(np.stack([band(tau, 0.4, 0.1) for tau in taus]), np.array([0.5, 2.0, 1.0]))


def breadcrumbs_l1(taus: Array) -> Array:
    kept = [band(tau, 0.4, 0.1) for tau in taus]
    ratios = [np.abs(t).sum() / np.abs(k).sum() if np.abs(k).sum() > 0 else 1 for t, k in zip(taus, kept, strict=True)]
    return np.sum([w * r * k for w, r, k in zip((0.5, 2.0, 1.0), ratios, kept, strict=True)], axis=0)


def ties_l1(taus: Array) -> Array:
    kept = [largest(tau, 0, max(int(0.3 * tau.size), 1)) for tau in taus]
    ratios = [np.abs(t).sum() / (np.abs(k).sum() or 1) for t, k in zip(taus, kept, strict=True)]
    scaled = np.stack([r * k for r, k in zip(ratios, kept, strict=True)])
    return agreeing(scaled, np.array([0.5, 2.0, 1.0]), mean=True)


def sce(share: float) -> Callable[[Array], Array]:
    def formula(taus: Array) -> Array:
        spread = taus.var(axis=0)
        order = np.argsort(-spread.reshape(-1).astype(np.float32), kind="stable")
        mask = np.zeros(spread.size)
        mask[order[: int(share * np.count_nonzero(spread))]] = 1
        left = taus * (mask.reshape(spread.shape) if share < 1 else 1)
        energy = (left**2).reshape(len(left), -1).sum(1)
        weights = energy / energy.sum() if energy.sum() else np.full(len(left), 1 / len(left))
        agrees = np.sign(left) == np.where(left.sum(0) >= 0, 1, -1)
        w = weights.reshape(-1, *[1] * spread.ndim) * agrees
        return (w * left).sum(0) / np.maximum(w.sum(0), 1e-6)

    return formula


def ram(taus: Array) -> Array:
    changed = np.abs(taus) > 0.05
    return (taus * changed).sum(0) / np.maximum(changed.sum(0), 1)


def ramplus_tl(taus: Array) -> Array:
    changed = np.abs(taus) > 0.05
    alone = changed & (changed.sum(0) == 1)
    axes = tuple(range(1, taus.ndim))
    shared, unique = (changed & ~alone).sum(axes), alone.sum(axes)
    ratio = np.where(shared > 0, shared / np.maximum(unique, 0.05), 0)
    gain = (1 + 0.3 * np.minimum(ratio, 0.9)).reshape(-1, *[1] * (taus.ndim - 1))
    return np.where(changed.sum(0) > 1, ram(taus), (gain * taus * changed).sum(0))


def arcee_fusion(taus: Array, base: Array) -> Array:
    """Softmax, divergence, sorted importance: over rows along the last axis."""
    tau = taus[0]
    columns = tau.shape[-1] if tau.ndim else 1
    both = [values.reshape(-1, columns) for values in (base + tau, base)]
    powers = [np.exp(values - values.max(1, keepdims=True)) for values in both]
    p, q = (power / power.sum(1, keepdims=True) + 1e-8 for power in powers)
    divergence = (p * np.log(p / q)).sum(1, keepdims=True)
    importance = (np.abs(tau).reshape(-1, columns) * divergence).astype(np.float32)
    ordered = np.sort(importance, axis=None).astype(np.float64)
    lower, median, upper = (ordered[int(share * (tau.size - 1))] for share in (0.25, 0.5, 0.75))
    return np.where(importance.reshape(tau.shape) >= median + 1.2 * (upper - lower), tau, 0)


def magmax(taus: Array) -> Array:
    weighted = taus * np.array([0.5, 2.0, 1.0]).reshape(-1, *[1] * (taus.ndim - 1))
    last = len(taus) - 1 - np.argmax(np.abs(weighted[::-1]), axis=0)  # of equal ones the last
    return 0.7 * np.take_along_axis(weighted, last[None], axis=0)[0]


def emr(taus: Array) -> Array:
    signs = np.where(taus.sum(0) > 0, 1, -1)
    return signs * np.where(taus * signs > 0, np.abs(taus), 0).max(0)


def consensus(taus: Array) -> Array:
    total = taus.sum(0)
    limits = np.array([0.25, 0.5, 1.0]).reshape(-1, *[1] * total.ndim)
    return 0.3 * total * ((np.abs(taus) >= limits * np.abs(total - taus)).sum(0) >= 2)


def pcb(taus: Array) -> Array:
    """The paper's own steps, on sorted copies."""

    def scaled(x: Array) -> Array:
        low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
        return (x - low) / np.where(high > low, high - low, 1)

    def clamped(x: Array, low: float, high: float) -> Array:
        ordered, size = np.sort(x, axis=1), x.shape[1]
        ends = ordered[:, [int(size * low), max(0, int(size * (1 - high) - 1))]]
        return np.clip(x, ends[:, :1], ends[:, 1:])

    flat = taus.reshape(len(taus), -1)
    magnitudes = clamped(np.abs(flat), 1e-4, 1e-4)
    competition = np.exp(len(flat) * scaled(magnitudes) ** 2) * np.tanh(flat * flat.sum(0))
    shares = scaled(clamped(competition, 1 - 0.3, 0))
    merged = (np.sign(flat) * magnitudes * shares).sum(0) / np.maximum(shares.sum(0), 1e-12)
    return 1.2 * merged.reshape(taus.shape[1:])


UNEQUAL = {"e0": 0.5, "e1": 2.0, "e2": 1.0}
#: method, parameters, formula of the stacked task vectors, number of experts
FORMULAS: dict[str, tuple[str, dict[str, Any], Callable[..., Array], int]] = {
    "breadcrumbs_ties": ("breadcrumbs_ties", {"density": 0.4, "gamma": 0.1, "weight": UNEQUAL}, breadcrumbs_ties, 3),
    "breadcrumbs l1": (
        "breadcrumbs", {"density": 0.4, "gamma": 0.1, "weight": UNEQUAL, "rescale": "l1"}, breadcrumbs_l1, 3,
    ),
    "ties l1": ("ties", {"density": 0.3, "weight": UNEQUAL, "rescale": True}, ties_l1, 3),
    "sce": ("sce", {"select_topk": 0.3}, sce(0.3), 3),
    "sce all": ("sce", {"select_topk": 1.0}, sce(1.0), 3),
    "sce two": ("sce", {}, sce(0.1), 2),
    "ram": ("ram", {"epsilon": 0.05}, ram, 3),
    "ramplus_tl": ("ramplus_tl", {"epsilon": 0.05, "r": 0.3, "alpha": 0.9}, ramplus_tl, 3),
    "pcb": ("pcb", {"ratio": 0.3, "lambda": 1.2}, pcb, 3),
    "magmax": ("magmax", {"weight": UNEQUAL, "lambda": 0.7}, magmax, 3),
    "emr": ("emr", {}, emr, 3),
    "consensus": ("consensus", {"tall": {"e0": 0.25, "e1": 0.5, "e2": 1.0}}, consensus, 3),
    "arcee_fusion": ("arcee_fusion", {"whiskers": 1.2}, arcee_fusion, 1),
}  # fmt: skip


def states(
    shapes: dict[str, tuple[int, ...]], count: int, grid: bool
) -> tuple[dict[str, Array], list[dict[str, Array]]]:
    """Return a base and task vectors; on a ``grid`` of few values ties are everywhere."""
    rng = np.random.default_rng(3)
    base = {name: rng.integers(-64, 65, shape) / 64 for name, shape in shapes.items()}
    vectors: list[dict[str, Array]] = []
    for _ in range(count):
        if grid:
            vectors.append({name: np.asarray(rng.integers(-8, 9, shape) / 32) for name, shape in shapes.items()})
        else:
            vectors.append(
                {
                    name: np.asarray(0.1 * rng.standard_normal(shape) * (rng.random(shape) > 0.2))
                    for name, shape in shapes.items()
                }
            )
    return {k: np.asarray(v) for k, v in base.items()}, vectors


def applied(formula: Callable[..., Array], taus: Array, base: Array) -> Array:
    return formula(taus, base) if formula is arcee_fusion else formula(taus)


def check(case: str, shapes: dict[str, tuple[int, ...]], grid: bool, **more: Any) -> None:
    method, parameters, formula, count = FORMULAS[case]
    base, vectors = states(shapes, count, grid)
    experts = {f"e{k}": {n: np.asarray(base[n] + tau[n]) for n in shapes} for k, tau in enumerate(vectors)}
    weights = {
        k: {n: w for n, w in v.items() if n in experts} if isinstance(v, dict) else v for k, v in parameters.items()
    }
    merged: Any = cs.merge(base, experts, method=method, **weights, **more)
    for name in shapes:
        taus = np.stack([experts[n][name] - base[name] for n in experts])
        expected = applied(formula, taus, base[name])
        fine = 1e-5 if formula is pcb else 1e-13  # its quantiles are of float32, and it divides by small shares
        np.testing.assert_allclose(merged[name] - base[name], expected, rtol=0, atol=fine, err_msg=name)


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("case", FORMULAS)
def test_the_formula(case: str, grid: bool) -> None:
    check(case, SHAPES, grid)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", FORMULAS)
def test_the_formula_over_segments_and_from_a_sample(case: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("consilience.engine.plan.SEGMENT", 1 << 14)
    monkeypatch.setattr("consilience.engine.stream.SEGMENT", 1 << 14)
    monkeypatch.setattr("consilience.experts.block.LARGEST_BLOCK", 1 << 13)
    monkeypatch.setattr(selection, "SMALL", 1000)
    monkeypatch.setattr(selection, "TILE", 64)
    for grid in (False, True):
        check(case, {"matrix": (211, 307), "vector": (40_003,)}, grid, threads=threads)


@pytest.mark.parametrize("case", FORMULAS)
def test_adapters_are_merged_as_their_products(case: str, tmp_path: Path) -> None:
    method, parameters, formula, count = FORMULAS[case]
    name, module = "model.layers.0.self_attn.q_proj.weight", "base_model.model.model.layers.0.self_attn.q_proj"
    base = draw(24, 16, seed=0).astype(np.float32)
    write(tmp_path / "base", {name: base}, "{}")
    taus: list[Array] = []
    for k in range(count):
        a, b = (draw(*shape, seed=2 * k + 1 + i).astype(np.float32) for i, shape in enumerate([(3, 16), (24, 3)]))
        b *= np.float32(0.02)
        write(
            tmp_path / f"e{k}", {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, CONFIG,
            "adapter_model.safetensors",
        )  # fmt: skip
        taus.append(2 * b.astype(np.float64) @ a)
    paths = {f"e{k}": str(tmp_path / f"e{k}") for k in range(count)}
    weights = {
        k: {n: w for n, w in v.items() if n in paths} if isinstance(v, dict) else v for k, v in parameters.items()
    }
    cs.merge_recipe(build_recipe(method, str(tmp_path / "base"), paths, weights), tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")[name]
    np.testing.assert_allclose(
        merged - base.astype(np.float64),
        applied(formula, np.stack(taus), base.astype(np.float64)),
        atol=2e-5 if formula is pcb else 2e-6,
    )


def test_selecting_by_variance_leaves_the_base_where_experts_agree() -> None:
    tau = draw(30, 20, seed=1)
    merged: Any = cs.merge({"w": 0 * tau}, {"x": {"w": tau}, "y": {"w": tau}}, method="sce")
    np.testing.assert_array_equal(merged["w"], 0)


def test_a_recipe_of_mergekits_selects_everything_by_equal_weights_where_changes_are_small() -> None:
    """mergekit's floor: mean squares that sum to less than 1e-6 are as good as none."""
    taus = np.stack([1e-4 * draw(30, 20, seed=1), 5e-4 * draw(30, 20, seed=2)])
    experts = {f"e{k}": {"w": tau} for k, tau in enumerate(taus)}
    floored: Any = cs.merge({"w": 0 * taus[0]}, experts, method="sce", select_topk=1.0, shares="floored")
    expected = agreeing(taus, np.ones(2), mean=True)
    np.testing.assert_allclose(floored["w"], expected, atol=1e-18)
    exact: Any = cs.merge({"w": 0 * taus[0]}, experts, method="sce", select_topk=1.0)
    assert np.abs(exact["w"] - expected).max() > 1e-4


def test_a_trim_over_the_model_has_no_norms_to_restore() -> None:
    with pytest.raises(cs.InputError, match="rescale"):
        cs.merge({"w": np.ones(9)}, [{"w": np.zeros(9)}], method="ties", trim="model", rescale="l1")


@pytest.mark.parametrize(("least", "factor"), [(0, 0.3), (4, 0.0)])
def test_a_consensus_of_none_is_task_arithmetic_and_of_more_than_there_are_the_base(least: int, factor: float) -> None:
    taus = {name: draw(30, 20, seed=seed) for seed, name in enumerate("xyz")}
    experts = {name: {"w": tau} for name, tau in taus.items()}
    merged: Any = cs.merge({"w": 0 * taus["x"]}, experts, method="consensus", least=least)
    np.testing.assert_allclose(merged["w"], factor * sum(taus.values()), atol=1e-15)


@pytest.mark.parametrize("method", ["magmax", "emr", "consensus"])
def test_one_expert_is_its_own_largest(method: str) -> None:
    tau = draw(30, 20, seed=0)
    more: dict[str, Any] = {"least": 1} if method == "consensus" else {}
    merged: Any = cs.merge({"w": 0 * tau}, {"x": {"w": tau}}, method=method, **{"lambda": 1.0}, **more)
    np.testing.assert_array_equal(merged["w"], tau)
