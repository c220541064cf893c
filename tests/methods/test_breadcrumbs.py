"""Breadcrumbs against a sort, and the ranks behind it against an exact one, at the bounds where sampling may miss."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import consilience as cs
from consilience.engine import selection

Array = npt.NDArray[Any]


def crumbs(vector: Array, density: float, gamma: float) -> Array:
    """Sort by magnitude, the lower index first among equals; drop the top, keep what the density asks for."""
    kept = int(density * vector.size)
    top = min(int(gamma * vector.size), vector.size - kept)
    order = np.argsort(-np.abs(vector.astype(np.float32)), kind="stable")
    out = np.zeros_like(vector)
    chosen = order[top : top + kept]
    out[chosen] = vector[chosen]
    return out


def merged(base: Array, experts: dict[str, Array], **arguments: Any) -> Array:
    out: Any = cs.merge({"w": base}, {name: {"w": base + vector} for name, vector in experts.items()}, **arguments)
    return out["w"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-9, 9), min_size=1, max_size=70),
    st.floats(0, 1),
    st.floats(0, 0.5),
    st.integers(0, 2**32 - 1),
)
def test_what_is_kept_is_a_band_of_the_sorted_entries(
    values: list[int], density: float, gamma: float, seed: int
) -> None:
    one = np.array(values, np.float64)
    two = np.random.default_rng(seed).integers(-3, 4, one.size) / 4
    got = merged(
        np.zeros(one.size), {"x": one, "y": two}, method="breadcrumbs", density=density, gamma=gamma,
        weight={"x": 0.5, "y": 2.0},
    )  # fmt: skip
    np.testing.assert_array_equal(got, 0.5 * crumbs(one, density, gamma) + 2 * crumbs(two, density, gamma))


def test_a_density_that_leaves_nothing_to_drop_keeps_everything() -> None:
    vector = np.arange(1.0, 101.0)
    got = merged(np.zeros(100), {"x": vector}, method="breadcrumbs", density=1.0, gamma=0.01, weight=1)
    np.testing.assert_array_equal(got, vector)


def heavy(rng: Any, size: int) -> Array:
    """Few distinct values: most lie on a threshold."""
    return rng.integers(-2, 3, size) / 8


def clustered(rng: Any, size: int) -> Array:
    """Large entries in one stretch that no sampled tile meets."""
    vector = 1e-3 * rng.standard_normal(size)
    vector[5000 : 5000 + size // 6] = 5 + rng.standard_normal(size // 6)
    return vector


def spread(rng: Any, size: int) -> Array:
    return rng.standard_normal(size) * np.exp(3 * rng.standard_normal(size))


@pytest.mark.parametrize("draw", [heavy, clustered, spread])
@pytest.mark.parametrize("method", ["ties", "breadcrumbs"])
@pytest.mark.parametrize("threads", [1, 2])
def test_sampled_bounds_lead_to_the_exact_ranks(
    draw: Any, method: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several segments and blocks, a sample much smaller than the tensor, and densities on both sides of a cluster."""
    monkeypatch.setattr("consilience.engine.plan.SEGMENT", 1 << 16)
    monkeypatch.setattr(selection, "SMALL", 1000)
    monkeypatch.setattr(selection, "TILE", 64)
    vector = draw(np.random.default_rng(5), 300_001)
    for density in (0.01, 0.17, 0.5, 0.83):
        gamma = 0.02 if method == "breadcrumbs" else 0.0
        more = {"gamma": gamma} if gamma else {}
        got = merged(
            np.zeros(vector.size), {"x": vector}, method=method, density=density, weight=1, threads=threads, **more
        )
        np.testing.assert_array_equal(got, crumbs(vector, density, gamma))


def test_a_sample_that_misleads_costs_a_pass_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ranking whose sampled tiles hold the small entries only."""
    monkeypatch.setattr(selection, "TILE", 64)
    found: list[int] = []
    share: Any = selection.Selection._share_ties  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(selection.Selection, "_share_ties", lambda self: (found.append(self.missed), share(self)))
    vector = np.random.default_rng(0).standard_normal(1 << 18)
    tiles = np.arange(vector.size) % (selection.SHARE * 64) < 64
    vector[tiles] *= 1e-6
    got = merged(np.zeros(vector.size), {"x": vector}, method="ties", density=0.3, weight=1)
    np.testing.assert_array_equal(got, crumbs(vector, 0.3, 0.0))
    assert found[0] >= 1
