"""A merge written as an adapter does what the merged weights do: checked with dense float64 products and full SVDs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from consilience.api import build_recipe, merge, plan_recipe
from consilience.engine.adapter_output import write_adapter
from consilience.errors import InputError

SHAPES = {
    "model.layers.0.up.weight": (12, 20),
    "model.layers.1.up.weight": (20, 12),
    "model.layers.1.down.weight": (9, 7),
}


def make_base(folder: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    base = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    folder.mkdir()
    save_file(base, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "toy"}')
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return base


def make_adapter(folder: Path, seed: int, rank: int, alpha: float, names: list[str]) -> dict[str, Any]:
    """Write a LoRA adapter and return its dense updates."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, Any] = {}
    updates: dict[str, Any] = {}
    for name in names:
        rows, columns = SHAPES[name]
        a, b = (
            rng.standard_normal((rank, columns)).astype(np.float32),
            rng.standard_normal((rows, rank)).astype(np.float32),
        )
        stem = "base_model.model." + name.removesuffix(".weight")
        tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
        updates[name] = (alpha / rank) * b.astype(np.float64) @ a.astype(np.float64)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": ["up", "down"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return updates


@pytest.fixture
def suite(tmp_path: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    make_base(tmp_path / "base")
    names = list(SHAPES)
    one = make_adapter(tmp_path / "one", 1, 2, 4.0, names)
    two = make_adapter(tmp_path / "two", 2, 3, 3.0, names[:2])
    return tmp_path, one, two


def update_of(adapter: Path) -> dict[str, Any]:
    """Multiply an adapter's factors out, reading its files without the package."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    out: dict[str, Any] = {}
    for key, a in tensors.items():
        if ".lora_A." in key:
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            r = config["rank_pattern"].get(module, config["r"])
            alpha = config["alpha_pattern"].get(module, config["lora_alpha"])
            assert a.shape[0] == r
            b = tensors[key.replace("lora_A", "lora_B")]
            out[f"{module}.weight"] = (alpha / r) * b.astype(np.float64) @ a.astype(np.float64)
    return out


def plan(folder: Path, method: str = "task_arithmetic", **parameters: Any) -> Any:
    experts = {"one": str(folder / "one"), "two": str(folder / "two")}
    return plan_recipe(build_recipe(method, str(folder / "base"), experts, parameters))


def test_cat_is_the_exact_weighted_sum_and_keeps_every_rank(suite: Any) -> None:
    folder, one, two = suite
    summary = write_adapter(plan(folder, weight={"one": 0.5, "two": -2.0}), folder / "out", "cat")
    found = update_of(folder / "out")
    for name in SHAPES:
        expected = 0.5 * one[name] - 2.0 * two.get(name, 0.0)
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    assert summary.rank == 5
    assert summary.discarded == 0.0


def test_cat_does_what_the_merged_weights_do(suite: Any) -> None:
    folder, _, _ = suite
    write_adapter(plan(folder, weight=0.7), folder / "out", "cat")
    merge(folder / "base", {"one": folder / "one", "two": folder / "two"}, folder / "full", weight=0.7)
    base, full, update = (
        load_file(folder / "base/model.safetensors"),
        load_file(folder / "full/model.safetensors"),
        update_of(folder / "out"),
    )
    for name in SHAPES:
        np.testing.assert_allclose(full[name], base[name] + update[name], atol=2e-5)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_svd_is_the_best_approximation_and_reports_what_it_discards(suite: Any, rank: int) -> None:
    folder, one, two = suite
    summary = write_adapter(plan(folder, weight=0.5), folder / "out", "svd", rank)
    found = update_of(folder / "out")
    lost = total = 0.0
    for name in SHAPES:
        dense = 0.5 * (one[name] + two.get(name, 0.0))
        s = np.linalg.svd(dense, compute_uv=False)
        assert np.linalg.norm(found[name] - dense) == pytest.approx(np.sqrt((s[rank:] ** 2).sum()), abs=1e-5)
        lost, total = lost + (s[rank:] ** 2).sum(), total + (s**2).sum()
    assert summary.discarded == pytest.approx(lost / total, abs=1e-9)


def test_other_methods_are_merged_dense_before_the_svd(suite: Any) -> None:
    folder, _, _ = suite
    summary = write_adapter(plan(folder, "ties", density=0.5), folder / "out", "svd", 3)
    merge(
        folder / "base",
        {"one": folder / "one", "two": folder / "two"},
        folder / "full",
        method="ties",
        density=0.5,
        out_dtype="float64",
    )
    base, full, found = (
        load_file(folder / "base/model.safetensors"),
        load_file(folder / "full/model.safetensors"),
        update_of(folder / "out"),
    )
    lost = total = 0.0
    for name in SHAPES:
        dense = full[name] - base[name]
        s = np.linalg.svd(dense, compute_uv=False)
        assert np.linalg.norm(found[name] - dense) == pytest.approx(np.sqrt((s[3:] ** 2).sum()), abs=1e-5)
        lost, total = lost + (s[3:] ** 2).sum(), total + (s**2).sum()
    assert summary.discarded == pytest.approx(lost / total, abs=1e-6)


def test_what_an_adapter_cannot_be_is_refused_and_leaves_nothing(suite: Any) -> None:
    folder, _, _ = suite
    with pytest.raises(InputError, match="not a weighted sum"):
        write_adapter(plan(folder, "ties"), folder / "out", "cat")
    merge(folder / "base", {"one": folder / "one"}, folder / "dense")
    experts = {"dense": str(folder / "dense"), "one": str(folder / "one")}
    with pytest.raises(InputError, match="not a plain LoRA adapter"):
        write_adapter(
            plan_recipe(build_recipe("task_arithmetic", str(folder / "base"), experts, {})), folder / "out", "cat"
        )
    assert not (folder / "out").exists()
    assert not (folder / "out.partial").exists()


def test_the_adapter_has_a_card_and_lineage(suite: Any) -> None:
    folder, _, _ = suite
    write_adapter(plan(folder), folder / "out", "cat")
    card = (folder / "out/README.md").read_text()
    assert "base_model" not in card.partition("\n---\n")[0]
    assert "library_name: peft" in card
    lineage = json.loads((folder / "out/consilience/lineage.json").read_text())
    assert [model["name"] for model in lineage["models"]] == ["one", "two"]
