"""Methods within methods, KnOTS, Core Space and SVC: restatements in float64, identities, adapters against products."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import consilience as cs
from consilience.api import build_recipe
from consilience.engine import merge as engine
from consilience.engine.summary import Summary
from tests.methods.matrices import CONFIG, Array, draw, write

SHAPES = [(12, 12), (20, 9), (7, 33)]


def merged(vectors: list[Array], method: str, **arguments: Any) -> Array:
    base = np.zeros_like(vectors[0])
    out: Any = cs.merge({"w": base}, {f"e{k}": {"w": v} for k, v in enumerate(vectors)}, method=method, **arguments)
    return out["w"]


def experts(shape: tuple[int, int], count: int = 3) -> list[Array]:
    return [(0.5 + k) * draw(*shape, seed=k) for k in range(count)]


def ties(rows: list[Array], density: float) -> Array:
    """TIES with its mean, entry by entry."""
    trimmed: list[Array] = []
    for row in rows:
        count = max(1, int(density * row.size))
        limit = np.sort(np.abs(row).ravel())[-count]
        trimmed.append(np.where(np.abs(row) >= limit, row, 0))
    stack = np.stack(trimmed)
    agreeing = stack * (np.sign(stack) == np.sign(stack.sum(0)))
    return agreeing.sum(0) / np.maximum((agreeing != 0).sum(0), 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_knots_is_ties_on_the_common_basis(shape: tuple[int, int]) -> None:
    vectors = experts(shape)
    u, s, v = np.linalg.svd(np.concatenate(vectors, 1), full_matrices=False)
    parts = np.split(s[:, None] * v, 3, axis=1)
    for density in (0.2, 0.6):
        found = merged(vectors, "knots", density=density)
        np.testing.assert_allclose(found, u @ ties(parts, density), atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_core_space_is_ties_on_the_cores(shape: tuple[int, int]) -> None:
    vectors = experts(shape)
    u = np.linalg.svd(np.concatenate(vectors, 1), full_matrices=False)[0]
    v = np.linalg.svd(np.concatenate(vectors), full_matrices=False)[2]
    found = merged(vectors, "core_space", inner="ties", density=0.4)
    np.testing.assert_allclose(found, u @ ties([u.T @ one @ v.T for one in vectors], 0.4) @ v, atol=1e-9)


@pytest.mark.parametrize("method", ["knots", "core_space"])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_linear_or_spectral_is_the_same_within(method: str, shape: tuple[int, int]) -> None:
    vectors = experts(shape)
    total = merged(vectors, method, inner="task_arithmetic")
    np.testing.assert_allclose(total, np.sum(vectors, 0), atol=1e-9)
    half: dict[str, Any] = {"lambda": 0.5}
    np.testing.assert_allclose(merged(vectors, method, inner="task_arithmetic", **half), total / 2, atol=1e-9)
    for inner in ("iso_c", "tsv_m", "wudi"):
        np.testing.assert_allclose(merged(vectors, method, inner=inner), merged(vectors, inner), atol=1e-6)


def test_trims_are_other_methods_within() -> None:
    vectors = experts((20, 9))
    for method in ("knots", "core_space"):
        found, plain = merged(vectors, method, inner="ties"), merged(vectors, "ties")
        assert np.linalg.norm(found - plain) > 0.1 * np.linalg.norm(plain)


def calibrated(merged: Array, vectors: list[Array], alpha: float) -> Array:
    """SVC, one singular direction after the other."""
    u, s, v = np.linalg.svd(merged, full_matrices=False)
    out = np.zeros_like(merged)
    for r in range(len(s)):
        a = u[:, r] @ merged
        shares = [float(a @ (u[:, r] @ one) / ((u[:, r] @ one) @ (u[:, r] @ one))) for one in vectors]
        out += s[r] / np.mean([max(share, alpha) for share in shares]) * np.outer(u[:, r], v[r])
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_svc_divides_each_direction_by_its_shares(shape: tuple[int, int]) -> None:
    vectors = experts(shape)
    for alpha in (0.1, 1 / 3):
        found = merged(vectors, "svc", alpha=alpha)
        np.testing.assert_allclose(found, calibrated(np.sum(vectors, 0), vectors, alpha), atol=1e-8)
    trimmed = merged(vectors, "svc", inner="ties", density=0.5)
    np.testing.assert_allclose(trimmed, calibrated(merged(vectors, "ties", density=0.5), vectors, 0.1), atol=1e-7)


def test_svc_returns_what_experts_share_and_adds_what_they_do_not() -> None:
    (vector,) = experts((12, 9), 1)
    np.testing.assert_allclose(merged([vector] * 4, "svc"), vector, atol=1e-8)
    apart = [np.zeros((12, 9)) for _ in range(3)]
    for k, one in enumerate(apart):
        one[:, 3 * k : 3 * k + 3] = draw(12, 3, seed=k)
    np.testing.assert_allclose(merged(apart, "svc", alpha=1e-6), np.sum(apart, 0), atol=1e-6)


def test_svc_suppresses_the_largest_of_experts_that_use_other_outputs() -> None:
    """Its page says so: output rows of their own, and norms that halve."""
    vectors = [np.zeros((12, 40)) for _ in range(4)]
    for k, one in enumerate(vectors):
        one[3 * k : 3 * k + 3] = draw(3, 40, seed=k) * 0.5**k
        one += 0.02 * draw(12, 40, seed=k + 9)
    found = merged(vectors, "svc")
    kept = [np.linalg.norm(found[3 * k : 3 * k + 3]) / np.linalg.norm(vectors[k][3 * k : 3 * k + 3]) for k in range(4)]
    assert kept == sorted(kept)
    assert kept[0] < 0.5 * kept[-1]


def notes_of_svc(vectors: list[Array], caplog: pytest.LogCaptureFixture, **arguments: Any) -> str:
    caplog.clear()
    merged(vectors, "svc", **arguments)
    return caplog.text


def test_svc_says_that_it_suppresses_the_largest_expert(caplog: pytest.LogCaptureFixture) -> None:
    """Its share is measured; experts of one size, and a single one, are no reason."""
    vectors = [np.zeros((12, 40)) for _ in range(4)]
    for k, one in enumerate(vectors):
        one[3 * k : 3 * k + 3] = draw(3, 40, seed=k) * 0.5**k
        one += 0.02 * draw(12, 40, seed=k + 9)
    said = notes_of_svc(vectors, caplog, alpha=0.2)
    found = merged(vectors, "svc", alpha=0.2)
    shares = [float((found * one).sum() / np.square(one).sum()) for one in vectors]
    times = np.linalg.norm(vectors[0]) / np.linalg.norm(vectors[3])
    assert f"svc, alpha=0.2: holds {shares[0]:.2f} of e0, whose task vector is {times:.2g} times as long" in said
    assert f"as that of e3, and {np.mean(shares[1:]):.2f} of the others" in said
    alike = [draw(12, 40, seed=k) for k in range(4)]
    assert "svc" not in notes_of_svc(alike, caplog)
    assert "svc" not in notes_of_svc([vectors[0], np.zeros((12, 40))], caplog)


def test_svc_says_it_of_files_too_and_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = {f"{k}.weight": np.zeros((12, 40)) for k in range(2)}
    folder = write(tmp_path / "base", base, "{}")
    paths: dict[str, str] = {}
    for k in range(2):
        change = np.zeros((12, 40))
        change[6 * k : 6 * k + 6] = draw(6, 40, seed=k) * 0.1**k
        tensors = {n: change + 0.005 * draw(12, 40, seed=5 + k) for n in base}
        paths[f"x{k}"] = str(write(tmp_path / f"x{k}", tensors, "{}"))
    recipe = build_recipe("svc", str(folder), paths, {})

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(engine, "check_unchanged", fail)
    with pytest.raises((cs.MachineError, OSError)):
        cs.merge_recipe(recipe, tmp_path / "out")
    monkeypatch.undo()
    summary = cs.merge_recipe(recipe, tmp_path / "out")
    assert isinstance(summary, Summary)
    assert summary.resumed_segments == 2
    assert any(note.startswith("svc, alpha=0.1: holds") and "of x0" in note for note in summary.notes)


@pytest.mark.parametrize(("method", "inner"), [("knots", "iso_c"), ("core_space", "iso_c"), ("svc", "task_arithmetic")])
def test_adapters_of_any_ranks_are_merged_as_their_products_are(method: str, inner: str, tmp_path: Path) -> None:
    base = {"layer.q_proj.weight": draw(24, 17, seed=7)}
    folder = write(tmp_path / "base", base, "{}")
    found: list[Array] = []
    models: dict[str, list[Path]] = {"adapters": [], "tuned": []}
    for k, rank in enumerate((2, 3, 5)):
        a, b = draw(rank, 17, seed=10 + k), draw(24, rank, seed=20 + k)
        sides = {"base_model.model.layer.q_proj.lora_A.weight": a, "base_model.model.layer.q_proj.lora_B.weight": b}
        config = CONFIG.replace('"r": 3', f'"r": {rank}').replace('"lora_alpha": 6', f'"lora_alpha": {2 * rank}')
        models["adapters"].append(write(tmp_path / f"a{k}", sides, config, "adapter_model.safetensors"))
        whole = {"layer.q_proj.weight": base["layer.q_proj.weight"] + 2 * b @ a}
        models["tuned"].append(write(tmp_path / f"t{k}", whole, "{}"))
    for kind, paths in models.items():
        out = tmp_path / f"out-{kind}"
        cs.merge(folder, {f"e{k}": str(p) for k, p in enumerate(paths)}, out, method=method, inner=inner)
        found.append(load_file(out / "model.safetensors")["layer.q_proj.weight"].astype(np.float64))
    np.testing.assert_allclose(found[0], found[1], atol=2e-3, rtol=1e-3)


def test_what_no_expert_changes_stays() -> None:
    for method in ("knots", "core_space", "svc"):
        np.testing.assert_array_equal(merged([np.zeros((9, 6))] * 2, method), np.zeros((9, 6)))


def test_an_unknown_inner_method_is_named() -> None:
    with pytest.raises(cs.InputError, match="inner"):
        merged(experts((5, 4)), "knots", inner="dare_ties")
