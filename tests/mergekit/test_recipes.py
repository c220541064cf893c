"""Recipes in the styles of model cards, run unchanged: mergekit 0.1.5's answers, whose fingerprints are stored."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from named_models import base_of, fingerprint, names_in, state, write
from safetensors.torch import load_file

from consilience.__main__ import run
from consilience.methods.registry import MERGEKIT_METHODS

HERE = Path(__file__).parent
RECIPES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((HERE / "recipes").glob("*.yml"))}
ANSWERS: dict[str, npt.NDArray[Any]] = dict(np.load(HERE / "data" / "recipe_answers.npz"))


def load_maker() -> Any:
    spec = importlib.util.spec_from_file_location("make_recipe_answers", HERE / "data" / "make_recipe_answers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKER = load_maker()
#: Recipes that mergekit 0.1.5 does not get through, and why.
FAILS_THERE = {"passthrough-pruned": "writes a config whose layer_types are the longer model's"}
#: Recipes whose answers there are others, and why.
WRONG_THERE: dict[str, str] = {}
QUICK = {
    "linear-card-fields", "linear-with-density", "slerp-models", "slerp-with-weights", "ties-gradients",
    "task_arithmetic-adapters", "dare_ties-three", "quoted-numbers",
}  # fmt: skip


def merge(folder: Path, recipe: str, out: str) -> dict[str, Any]:
    """Write a recipe and its models, merge it as a user does, and return the output's tensors."""
    for name in names_in(recipe):
        write(folder, name)
    (folder / f"{out}.yml").write_text(recipe, encoding="utf-8")
    assert run(["merge", f"{out}.yml", out, "-q"]) == 0
    return {
        name: value for file in sorted((folder / out).glob("*.safetensors")) for name, value in load_file(file).items()
    }


def fused(tensors: dict[str, Any]) -> dict[str, Any]:
    """Return a mixture's tensors as mergekit writes them: the experts of a layer as one tensor a projection."""
    out: dict[str, Any] = {}
    for name, value in tensors.items():
        place, mixture, part = name.partition(".block_sparse_moe.")
        if not mixture or part == "gate.weight":
            out[f"{place}.mlp.{part}" if mixture else name] = value
        elif part == "experts.0.w1.weight":
            experts = [f"{place}.block_sparse_moe.experts.{number}" for number in range(3)]
            ups = [torch.cat([tensors[f"{each}.{part}.weight"] for part in ("w1", "w3")]) for each in experts]
            out[f"{place}.mlp.experts.gate_up_proj"] = torch.stack(ups)
            out[f"{place}.mlp.experts.down_proj"] = torch.stack([tensors[f"{each}.w2.weight"] for each in experts])
    return out


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in RECIPES]
)
def test_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = RECIPES[name]
    unchanged = merge(tmp_path, recipe, "out")
    dtypes = re.findall(r"^(?:out_)?dtype: [\"']?(\w+)", recipe, flags=re.M)
    assert {str(value.dtype) for value in unchanged.values()} == {f"torch.{dtypes[-1]}"}
    merged = unchanged
    if dtypes[-1] != "float32":
        merged = merge(tmp_path, MAKER.in_float32(recipe), "float32")
        assert merged.keys() == unchanged.keys()
        for tensor, value in merged.items():
            given = unchanged[tensor]
            rounding = 0.51 * torch.finfo(given.dtype).eps
            torch.testing.assert_close(given.float(), value, rtol=rounding, atol=1e-7, msg=f"{tensor}: not as rounded")
    start = state(base_of(names_in(recipe)[0]))
    assert any(
        tensor not in start or not np.array_equal(value.numpy(), start[tensor]) for tensor, value in merged.items()
    )
    if name in MAKER.RANDOM or name in FAILS_THERE or name in WRONG_THERE:
        return
    expected = dict(zip(str(ANSWERS[f"{name}|names"]).split("\n"), ANSWERS[name], strict=True))
    merged = fused(merged) if "8x7B" in recipe else merged
    start = fused({key: torch.from_numpy(value) for key, value in start.items()})
    assert merged.keys() == expected.keys()
    for tensor, value in merged.items():
        size, *prints = expected[tensor]
        assert value.numel() == size, tensor
        array = value.numpy().astype(np.float64)
        base = start[tensor].numpy() if tensor in start else np.zeros(1)
        change = np.linalg.norm(array - base if base.shape == array.shape else array)
        error = np.abs(fingerprint(tensor, array) - prints).max()
        # 1e-5 of the merged task vector's norm, and what float32 rounds off the weights
        assert error <= 1e-5 * change + 3e-7 * np.linalg.norm(array), f"{tensor}: {error} of {change}"


def test_every_recipe_has_an_answer_or_a_reason() -> None:
    without = {name for name in RECIPES if name not in ANSWERS}
    assert without == set(MAKER.RANDOM) | FAILS_THERE.keys()
    assert len(RECIPES) >= 60


def test_all_of_mergekits_methods_have_recipes() -> None:
    used = {
        word for recipe in RECIPES.values() for word in re.findall(r"^merge_method: [\"']?(\w+)", recipe, flags=re.M)
    }
    assert used == MERGEKIT_METHODS
