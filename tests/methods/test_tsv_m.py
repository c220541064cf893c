"""TSV-M against its formula by eigenvalues in float64, its identities, and adapters against their products."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import consilience as cs
from consilience.api import build_recipe
from consilience.engine import merge as engine
from consilience.engine.summary import Summary
from consilience.errors import MachineError
from tests.methods.matrices import CONFIG, Array, draw, write


def inverse_root(gram: Array) -> Array:
    """Return gram^(-1/2) on its range."""
    values, vectors = np.linalg.eigh(gram)
    roots = np.where(values > 1e-9 * values.max(), 1 / np.sqrt(np.abs(values)), 0)
    return vectors @ np.diag(roots) @ vectors.T


def formula(vectors: list[Array]) -> Array:
    """Leading triples, orthogonal by the inverse root of their Gram matrix instead of an SVD."""
    count = max(1, min(vectors[0].shape) // len(vectors))
    parts = [np.linalg.svd(vector, full_matrices=False) for vector in vectors]
    kept = [min(count, int((s > 1e-6 * s[0]).sum()) if s[0] else 0) for _, s, _ in parts]
    u = np.concatenate([u[:, :c] for (u, _, _), c in zip(parts, kept, strict=True)], 1)
    s = np.concatenate([s[:c] for (_, s, _), c in zip(parts, kept, strict=True)])
    v = np.concatenate([v[:c].T for (_, _, v), c in zip(parts, kept, strict=True)], 1)
    return (u @ inverse_root(u.T @ u)) @ np.diag(s) @ (v @ inverse_root(v.T @ v)).T


def merged(base: Array, vectors: list[Array], **arguments: Any) -> Array:
    experts = {f"e{k}": {"w": base + vector} for k, vector in enumerate(vectors)}
    out: Any = cs.merge({"w": base}, experts, method="tsv_m", **arguments)
    return out["w"]


@pytest.mark.parametrize("shape", [(24, 24), (40, 13), (9, 31)])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_formula(shape: tuple[int, int], count: int) -> None:
    base, vectors = draw(*shape, seed=0), [0.1 * draw(*shape, seed=k + 1) for k in range(count)]
    np.testing.assert_allclose(merged(base, vectors) - base, formula(vectors), atol=1e-9)
    np.testing.assert_allclose(merged(base, vectors, **{"lambda": 0.3}) - base, 0.3 * formula(vectors), atol=1e-9)


def test_one_expert_is_returned_as_it_is() -> None:
    base, vector = draw(20, 12, seed=0), draw(20, 12, seed=1)
    np.testing.assert_allclose(merged(base, [vector]), base + vector, atol=1e-12)


def test_orthogonal_task_vectors_add_up_exactly() -> None:
    """Row and column spaces apart, ranks below floor(r / K): null directions must not enter."""
    u, v = (np.linalg.qr(draw(18, 18, seed=seed))[0] for seed in (1, 2))
    vectors = [u[:, :3] @ np.diag([3.0, 2, 1]) @ v[:3], u[:, 5:7] @ np.diag([2.0, 0.5]) @ v[4:6]]
    np.testing.assert_allclose(merged(np.zeros((18, 18)), vectors), sum(vectors), atol=1e-12)


def test_more_experts_than_the_rank_lose_none() -> None:
    """floor(2 / 5) = 0 triples would be none; an update of each is left."""
    vectors = [draw(2, 50, seed=k) for k in range(5)]
    for k in range(5):
        changed = [2 * vector if j == k else vector for j, vector in enumerate(vectors)]
        assert np.abs(merged(np.zeros((2, 50)), changed) - merged(np.zeros((2, 50)), vectors)).max() > 1e-3


def test_an_expert_that_changes_nothing_and_tensors_that_are_no_matrices() -> None:
    base = {"w": draw(6, 5, seed=0), "b": draw(4, seed=1), "c": draw(2, 3, 2, seed=2), "e": np.zeros((0, 3))}
    x = {name: value + 0.1 for name, value in base.items()}
    experts = {"x": x, "same": base}
    for others, share in (("mean", 0.5), ("sum", 1.0), ("base", 0.0)):
        out: Any = cs.merge(base, experts, method="tsv_m", others=others)
        np.testing.assert_allclose(out["w"], base["w"] + 0.1, atol=1e-12)
        for name in "bc":
            np.testing.assert_allclose(out[name], base[name] + 0.1 * share, atol=1e-12)


def test_adapters_stay_factored_and_are_their_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = draw(20, 30, seed=0)
    name = "model.layers.0.self_attn.q_proj.weight"
    base_path = write(tmp_path / "base", {name: base}, "{}")
    experts: dict[str, str] = {}
    vectors: list[Array] = []
    for k in range(3):
        b, a = draw(20, 3, seed=2 * k + 1), draw(3, 30, seed=2 * k + 2)
        key = f"base_model.model.{name.removesuffix('.weight')}"
        factors = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
        experts[f"e{k}"] = str(write(tmp_path / f"e{k}", factors, CONFIG, "adapter_model.safetensors"))
        vectors.append(2.0 * b.astype(np.float32) @ a.astype(np.float32))
    whole: list[str] = []
    monkeypatch.setattr("consilience.experts.stack.Stack.whole", lambda self: whole.append(self.name))
    cs.merge_recipe(build_recipe("tsv_m", str(base_path), experts, {}), tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")[name]
    np.testing.assert_allclose(got, base + formula(vectors), atol=2e-4)
    assert not whole


def test_an_interrupted_merge_goes_on_with_the_next_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix is one unit of the journal."""
    base = {f"{k}.weight": draw(30, 20, seed=k) for k in range(4)}
    paths = {"base": write(tmp_path / "base", base, "{}")}
    for k, name in enumerate(("x", "y")):
        paths[name] = write(tmp_path / name, {n: a + draw(30, 20, seed=9 + k) for n, a in base.items()}, "{}")
    recipe = build_recipe("tsv_m", str(paths["base"]), {n: str(paths[n]) for n in ("x", "y")}, {})
    cs.merge_recipe(recipe, tmp_path / "whole")

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(engine, "check_unchanged", fail)
    with pytest.raises((MachineError, OSError)):
        cs.merge_recipe(recipe, tmp_path / "out")
    monkeypatch.undo()
    summary = cs.merge_recipe(recipe, tmp_path / "out")
    assert isinstance(summary, Summary)
    assert summary.resumed_segments == 4
    for name in base:
        one, two = (load_file(tmp_path / out / "model.safetensors")[name] for out in ("whole", "out"))
        np.testing.assert_array_equal(one, two)


def test_nan_is_named(tmp_path: Path) -> None:
    vector = draw(5, 4, seed=0)
    vector[2, 2] = np.nan
    with pytest.raises(cs.InputError, match="e0: tensor 'w': 1 of its 20 values are NaN or Inf"):
        merged(np.zeros((5, 4)), [vector])
