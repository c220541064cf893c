"""Iso-C and Iso-CTS against restatements in float64, their identities, and adapters against their products."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import consilience as cs
from tests.methods.matrices import CONFIG, Array, draw, write

SHAPES = [(24, 24), (40, 13), (9, 31)]


def merged(base: Array, vectors: list[Array], method: str, **arguments: Any) -> Array:
    experts = {f"e{k}": {"w": base + vector} for k, vector in enumerate(vectors)}
    out: Any = cs.merge({"w": base}, experts, method=method, **arguments)
    return out["w"] - base


def polar(a: Array) -> Array:
    """Return A (A^T A)^(-1/2) by eigenvalues."""
    values, vectors = np.linalg.eigh(a.T @ a)
    roots = np.where(values > 1e-9 * values.max(), 1 / np.sqrt(np.abs(values)), 0)
    return a @ (vectors * roots) @ vectors.T


def iso(total: Array) -> Array:
    """Iso-C of a sum of full rank: its polar factor, which needs no SVD, times the mean of the singular values."""
    wide = total.shape[0] < total.shape[1]
    factor = polar(total.T).T if wide else polar(total)
    return factor * np.linalg.svd(total, compute_uv=False).mean()


def iso_cts(vectors: list[Array], common: float = 0.8) -> Array:
    """As published, for a sum of full rank: r = min(m, n)."""
    u, s, v = np.linalg.svd(sum(vectors, np.zeros_like(vectors[0])), full_matrices=False)
    r, count = len(s), len(vectors)
    own = min(round((r - int(common * r)) / count), r // count)
    c = r - own * count
    us, ss, vs = [u[:, :c]], [s[:c]], [v[:c].T]
    for vector in vectors:
        a, b, d = np.linalg.svd((np.eye(len(u)) - u[:, :c] @ u[:, :c].T) @ vector, full_matrices=False)
        us, ss, vs = [a[:, :own], *us], [b[:own], *ss], [d[:own].T, *vs]
    return np.concatenate(ss).mean() * polar(np.concatenate(us, 1)) @ polar(np.concatenate(vs, 1)).T


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_formulas(shape: tuple[int, int], count: int) -> None:
    base, vectors = draw(*shape, seed=0), [0.1 * draw(*shape, seed=k + 1) for k in range(count)]
    np.testing.assert_allclose(merged(base, vectors, "iso_c"), iso(np.sum(vectors, 0)), atol=1e-9)
    np.testing.assert_allclose(merged(base, vectors, "iso_c", flatten="all"), iso(np.sum(vectors, 0)), atol=1e-9)
    half: dict[str, Any] = {"lambda": 0.5}
    np.testing.assert_allclose(merged(base, vectors, "iso_c", **half), 0.5 * iso(np.sum(vectors, 0)), atol=1e-9)
    for common in (0.8, 0.3):
        expected = iso_cts(vectors, common)
        np.testing.assert_allclose(merged(base, vectors, "iso_cts", common=common), expected, atol=1e-8)
    np.testing.assert_allclose(merged(base, vectors, "iso_cts", common=1.0), iso(np.sum(vectors, 0)), atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(1e-3, 1e3), st.sampled_from(["iso_c", "iso_cts"]))
def test_scale_and_rotations_pass_through(seed: int, scale: float, method: str) -> None:
    vectors = [draw(10, 7, seed=seed + k) for k in range(3)]
    left, right = (np.linalg.qr(draw(n, n, seed=seed + 9))[0] for n in (10, 7))
    plain = merged(np.zeros((10, 7)), vectors, method)
    turned = merged(np.zeros((10, 7)), [scale * left @ vector @ right for vector in vectors], method)
    np.testing.assert_allclose(turned, scale * left @ plain @ right, atol=1e-8 * scale)


def test_the_spectrum_is_flat_over_the_rank_alone() -> None:
    """Four values of rank 4; official codes' mean is over all twelve, and their null directions are arbitrary."""
    vectors = [draw(12, 2, seed=k) @ draw(2, 15, seed=k + 5) for k in range(2)]
    values = np.linalg.svd(sum(vectors, np.zeros((12, 15))), compute_uv=False)
    for method in ("iso_c", "iso_cts"):
        found = np.linalg.svd(merged(np.zeros((12, 15)), vectors, method), compute_uv=False)
        assert int((found > 1e-9 * found[0]).sum()) == 4
        np.testing.assert_allclose(found[:4], found[0])
    np.testing.assert_allclose(
        np.linalg.svd(merged(np.zeros((12, 15)), vectors, "iso_c"), compute_uv=False)[0], values[:4].mean()
    )
    official = np.linalg.svd(merged(np.zeros((12, 15)), vectors, "iso_c", flatten="all"), compute_uv=False)
    np.testing.assert_allclose(official, values.sum() / 12)


@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
def test_an_expert_that_changes_nothing_and_tensors_that_are_no_matrices(method: str) -> None:
    base = {"w": draw(6, 5, seed=0), "b": draw(4, seed=1), "same": draw(3, 3, seed=2), "e": np.zeros((0, 3))}
    vector = draw(6, 5, seed=3)
    x = base | {"w": base["w"] + vector, "b": base["b"] + 0.1}
    for others, share in (("mean", 0.5), ("sum", 1.0), ("base", 0.0)):
        out: Any = cs.merge(base, {"x": x, "y": base}, method=method, others=others)
        np.testing.assert_allclose(out["b"], base["b"] + 0.1 * share, atol=1e-12)
        np.testing.assert_array_equal(out["same"], base["same"])
        if method == "iso_c":
            np.testing.assert_allclose(out["w"], base["w"] + iso(vector), atol=1e-9)


@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
def test_adapters_are_merged_as_their_products(tmp_path: Path, method: str) -> None:
    base = draw(20, 30, seed=0)
    name = "model.layers.0.self_attn.q_proj.weight"
    folder = write(tmp_path / "base", {name: base}, "{}")
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    experts: dict[str, str] = {}
    for k in range(3):
        a, b = draw(3, 30, seed=10 + k), draw(20, 3, seed=20 + k)
        factors = {f"{stem}A.weight": a, f"{stem}B.weight": b}
        experts[f"x{k}"] = str(write(tmp_path / f"x{k}", factors, CONFIG, "adapter_model.safetensors"))
    arguments: dict[str, Any] = {"common": 0.5} if method == "iso_cts" else {}
    cs.merge(folder, experts, tmp_path / "out", method=method, **arguments)
    found = load_file(tmp_path / "out" / "model.safetensors")[name]
    vectors = [
        2
        * load_file(tmp_path / f"x{k}" / "adapter_model.safetensors")[f"{stem}B.weight"].astype(float)
        @ load_file(tmp_path / f"x{k}" / "adapter_model.safetensors")[f"{stem}A.weight"].astype(float)
        for k in range(3)
    ]
    expected = merged(np.zeros((20, 30)), vectors, method, **arguments)
    np.testing.assert_allclose(found - base, expected, atol=2e-4 * np.abs(expected).max())
