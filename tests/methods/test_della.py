"""DELLA's law, rank by rank, its rescalings, and that masks depend on nothing but seed, tensor, expert and element."""

from typing import Any

import numpy as np
import pytest

import consilience as cs
from tests.engine.test_mergekit_trims import MAKER, ORACLE
from tests.methods.matrices import Array, draw


def pruned(tau: Array, **arguments: Any) -> Array:
    merged: Any = cs.merge({"w": 0 * tau}, {"x": {"w": tau}}, method="della_linear", **arguments)
    return merged["w"]


def ranks(tau: Array) -> Array:
    """Return every entry's rank in its row, 0 for the smallest magnitude, the lower index first among equals."""
    order = np.argsort(np.abs(tau.astype(np.float32)), axis=1, kind="stable")
    out = np.empty(tau.shape)
    np.put_along_axis(out, order, np.arange(tau.shape[1])[None, :], axis=1)
    return out


def law(tau: Array, density: float, epsilon: float) -> Array:
    return density - epsilon + 2 * epsilon * ranks(tau) / (tau.shape[1] - 1)


def draws(kind: str) -> Array:
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((600, 37))
    return {
        "normal": normal,
        "few values": np.round(2 * normal) / 4,
        "a cluster": np.where(rng.random(normal.shape) < 0.03, 1e6 * normal, 1 + 1e-4 * normal),
        "zeros": 0 * normal,
        "wide": rng.standard_normal((5, 20_011)) * np.exp(4 * rng.standard_normal((5, 20_011))),
    }[kind]


@pytest.mark.parametrize("kind", ["normal", "few values", "a cluster", "zeros", "wide"])
def test_what_is_kept_is_divided_by_the_probability_of_its_rank(kind: str) -> None:
    tau = draws(kind)
    found = pruned(tau, density=0.4, epsilon=0.3)
    kept = found != 0
    np.testing.assert_allclose(found[kept], (tau / law(tau, 0.4, 0.3))[kept], rtol=1e-13)
    if kind != "zeros":
        np.testing.assert_array_equal(pruned(tau, density=0.4, epsilon=0.3, rescale=False)[kept], tau[kept])
        assert abs(kept.mean() / (tau != 0).mean() - law(tau, 0.4, 0.3)[tau != 0].mean()) < 5 / np.sqrt(tau.size)


@pytest.mark.parametrize(("density", "epsilon"), MAKER.LAWS)
def test_every_rank_is_kept_as_often_as_the_law_says_here_and_in_mergekit(density: float, epsilon: float) -> None:
    tau = MAKER.law_input()
    factor, l1, *theirs = ORACLE[f"law|{density}"]
    found = pruned(tau, density=density, epsilon=epsilon, rescale="l1").astype(np.float64)
    ours = MAKER.by_rank(tau, found)
    expected = density - epsilon + 2 * epsilon * np.arange(tau.shape[1]) / (tau.shape[1] - 1)
    for share in (ours, np.array(theirs)):
        deviations = (share - expected) / np.sqrt(expected * (1 - expected) / len(tau))
        assert np.abs(deviations).max() < 4.5
        assert abs(np.square(deviations).mean() - 1) < 5 * np.sqrt(2 / len(expected))
    ratio = found[found != 0] / tau[found != 0]
    assert np.ptp(ratio) < 1e-6 * factor  # one factor for all, theirs up to the draw
    assert abs(np.median(ratio) - factor) < 0.05 * factor
    np.testing.assert_allclose(np.abs(found).sum(), np.abs(tau).sum(dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(l1, np.abs(tau).sum(dtype=np.float64), rtol=1e-5)


def test_draws_are_unbiased_and_independent() -> None:
    tau = draw(30, 11, seed=2)
    samples = np.stack([pruned(tau, density=0.5, epsilon=0.3, seed=seed) for seed in range(400)])
    p = law(tau, 0.5, 0.3)
    errors = (samples.mean(0) - tau) / (np.abs(tau) * np.sqrt((1 - p) / p / len(samples)))
    assert np.abs(errors).max() < 5
    assert abs(np.square(errors).mean() - 1) < 0.4
    masks = (samples != 0).reshape(len(samples), -1).astype(float)
    correlations = np.corrcoef(masks.T)[np.triu_indices(tau.size, 1)]
    assert abs(correlations.mean()) < 5 / np.sqrt(len(samples) * len(correlations))


@pytest.mark.parametrize("rescale", ["exact", "l1"])
@pytest.mark.parametrize("shape", [(211, 307), (9, 4, 301), (40_003,), (12_007, 3), (5, 9000)])
def test_the_same_for_any_segments_blocks_and_threads(
    shape: tuple[int, ...], rescale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taus = [draw(*shape, seed=seed).astype(np.float32) for seed in (3, 4)]
    base = {"w": draw(*shape, seed=5).astype(np.float32)}
    experts = {f"e{k}": {"w": base["w"] + tau} for k, tau in enumerate(taus)}
    arguments: dict[str, Any] = {"method": "della", "density": 0.6, "epsilon": 0.2, "rescale": rescale, "seed": 7}
    whole: Any = cs.merge(base, experts, **arguments)
    monkeypatch.setattr("consilience.engine.plan.SEGMENT", 1 << 14)
    monkeypatch.setattr("consilience.experts.block.LARGEST_BLOCK", 1 << 13)
    for threads in (1, 2):
        cut: Any = cs.merge(base, experts, threads=threads, **arguments)
        np.testing.assert_array_equal(cut["w"], whole["w"])


def test_it_elects_and_divides_what_the_drop_leaves() -> None:
    taus = {name: draw(40, 30, seed=seed) for seed, name in enumerate("xyz")}
    weights = {"x": 0.5, "y": -1.0, "z": 2.0}
    arguments: dict[str, Any] = {"density": {"x": 0.4, "y": 0.0, "z": 1.0}, "epsilon": 0.3, "seed": 3}
    experts = {name: {"w": tau} for name, tau in taus.items()}
    left: list[Array] = []
    for name in taus:  # each expert's own draw: the others weigh nothing
        alone = {other: float(other == name) for other in taus}
        part: Any = cs.merge({"w": 0 * taus["x"]}, experts, method="della_linear", weight=alone, **arguments)
        left.append(weights[name] * part["w"])
    np.testing.assert_array_equal(left[1], 0)
    np.testing.assert_array_equal(left[2], 2 * taus["z"])
    rows = np.stack(left)
    agrees = np.sign(rows) == np.where(rows.sum(0) >= 0, 1, -1)
    w = np.array(list(weights.values()))[:, None, None]
    divisor = np.where(agrees.any(0), (w * agrees).sum(0), 1)
    for normalize in (True, False):
        merged: Any = cs.merge(
            {"w": 0 * taus["x"]}, experts, method="della", weight=weights, normalize=normalize, **{"lambda": 0.7},
            **arguments,
        )  # fmt: skip
        expected = 0.7 * (rows * agrees).sum(0) / (divisor if normalize else 1)
        np.testing.assert_allclose(merged["w"], expected, atol=1e-14)


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.1), (0.9, 0.2), (0.5, 0.5)])
def test_probabilities_outside_their_range_are_refused(density: float, epsilon: float) -> None:
    with pytest.raises(cs.InputError, match=r"x: density .* epsilon"):
        pruned(np.ones((3, 4)), density=density, epsilon=epsilon)
