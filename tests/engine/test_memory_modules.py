"""``cs.merge`` on torch modules and on recipes given as plain values: the breadth of the command line, in memory."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

import consilience as cs

F64 = np.float64


class Tied(nn.Module):
    """Two layers, an embedding that is the head's weight, a buffer that is saved and one that is not."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Embedding(7, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor(seed))
        self.register_buffer("scratch", torch.full((2,), float(seed)), persistent=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def state(model: Any) -> dict[str, Any]:
    return {name: value.detach().double().numpy() for name, value in model.state_dict().items()}


def task_arithmetic(base: Any, experts: list[Any], weights: list[float]) -> dict[str, Any]:
    start = state(base)
    return {
        name: value + sum(w * (state(e)[name] - value) for w, e in zip(weights, experts, strict=True))
        for name, value in start.items()
        if name != "steps"
    }


def test_modules_give_a_module_like_the_base() -> None:
    base, one, two = (Tied(seed) for seed in range(3))
    before = {seed: state(model) for seed, model in enumerate((base, one, two))}
    merged = cs.merge(base, {"one": one, "two": two}, weight={"one": 0.5, "two": 0.25})
    assert isinstance(merged, Tied)
    assert merged is not base
    for name, value in task_arithmetic(base, [one, two], [0.5, 0.25]).items():
        np.testing.assert_allclose(state(merged)[name], value, rtol=1e-6, atol=1e-6)
    assert merged.head.weight is merged.embed.weight  # what is tied stays tied
    assert state(merged)["steps"] == 0  # integers are the base's
    assert dict(merged.named_buffers())["scratch"].tolist() == [0.0, 0.0]
    assert all(p.requires_grad and p.grad_fn is None and p.is_leaf for p in merged.parameters())
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.fill_(7)  # shares no memory with the inputs
    for seed, model in enumerate((base, one, two)):
        for name, value in before[seed].items():
            np.testing.assert_array_equal(state(model)[name], value)


def test_a_module_takes_the_dtype_that_is_asked_for() -> None:
    base, one = Tied(0), Tied(1)
    merged = cs.merge(base, [one], out_dtype=torch.bfloat16)
    assert isinstance(merged, Tied)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert merged.head.weight is merged.embed.weight
    expected = torch.tensor(task_arithmetic(base, [one], [1.0])["layers.1.weight"])
    assert torch.equal(merged.state_dict()["layers.1.weight"], expected.float().bfloat16())


def test_modules_without_a_base_and_mixed_with_state_dicts() -> None:
    one, two = Tied(1), Tied(2)
    mean = cs.merge(None, [one, two], method="linear")
    assert isinstance(mean, Tied)
    np.testing.assert_allclose(
        state(mean)["layers.0.bias"], (state(one)["layers.0.bias"] + state(two)["layers.0.bias"]) / 2, rtol=1e-6
    )
    as_state = cs.merge(None, [one.state_dict(), two], method="linear")
    assert isinstance(as_state, dict)
    assert torch.equal(as_state["layers.0.bias"], mean.state_dict()["layers.0.bias"])


def test_no_gradient_flows() -> None:
    base, one = Tied(0), Tied(1)
    merged = cs.merge(base.state_dict(keep_vars=True), [one.state_dict(keep_vars=True)])
    assert isinstance(merged, dict)
    assert not any(value.requires_grad for value in merged.values())


def models(count: int = 3, library: str = "numpy") -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    names = [*(f"layers.{i}.{part}.w" for i in range(3) for part in ("attn", "mlp")), "head.w"]
    states = [{n: rng.standard_normal((5, 6)).astype(np.float32) for n in names} for _ in range(count)]
    if library == "torch":
        return [{n: torch.from_numpy(value) for n, value in one.items()} for one in states]
    return states


RECIPE: dict[str, Any] = {
    "merge_method": "dare_linear",
    "parameters": {"density": 0.5, "rescale": "exact"},
    "seed": 5,
    "out_dtype": "float16",
    "private": ["head.*"],
}
OWN: list[dict[str, Any]] = [{"weight": [0.2, 0.8]}, {"weight": [{"filter": "mlp", "value": 0.4}, {"value": 0.6}]}]


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_a_recipe_of_state_dicts_gives_the_bytes_of_the_same_recipe_of_files(tmp_path: Path, library: str) -> None:
    states = models(library="numpy")
    for name, one in zip(("base", "a", "b"), states, strict=True):
        (tmp_path / name).mkdir()
        save_file(one, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"model_type": "toy"}')
    paths = [{"model": f"{tmp_path}/{n}", "name": n, "parameters": p} for n, p in zip("ab", OWN, strict=True)]
    summary = cs.merge(RECIPE | {"base_model": f"{tmp_path}/base", "models": paths}, out=tmp_path / "out")
    held = models(library=library)
    entries = [{"model": m, "name": n, "parameters": p} for m, n, p in zip(held[1:], "ab", OWN, strict=True)]
    merged = cs.merge(RECIPE | {"base_model": held[0], "models": entries})
    assert isinstance(merged, dict)
    assert not isinstance(summary, dict)
    expected = load_file(tmp_path / "out/model.safetensors")
    for name, value in expected.items():
        assert value.dtype == np.float16
        np.testing.assert_array_equal(np.asarray(merged[name]), value)
    # By arguments, the same again.
    weight = {"a": [0.2, 0.8], "b": [{"filter": "mlp", "value": 0.4}, {"value": 0.6}]}
    again = cs.merge(
        held[0], {"a": held[1], "b": held[2]}, method="dare_linear", weight=weight, density=0.5, rescale="exact",
        seed=5, out_dtype="float16", private="head.*",
    )  # fmt: skip
    assert isinstance(again, dict)
    for name, value in expected.items():
        np.testing.assert_array_equal(np.asarray(again[name]), value)


def test_filters_and_gradients_of_one_expert() -> None:
    base, a, b = models()
    own = {"a": [0.0, 1.0], "b": [{"filter": "mlp", "value": 0.5}, {"value": 2.0}]}
    merged = cs.merge(base, {"a": a, "b": b}, weight=own)
    assert isinstance(merged, dict)
    for name, value in merged.items():
        t = int(name.split(".")[1]) / 2 if name.startswith("layers") else 0.0
        start = base[name].astype(F64)
        expected = start + t * (a[name] - start) + (0.5 if "mlp" in name else 2.0) * (b[name] - start)
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)


def test_arguments_beside_a_recipe_replace_its_values() -> None:
    base, a = models(2)
    notes: list[str] = []
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": base,
        "models": [{"model": a, "parameters": {"weight": 1}}],
    }
    merged = cs.merge(recipe, weight=0.25, noted=notes.append)
    assert isinstance(merged, dict)
    for name, value in merged.items():
        np.testing.assert_allclose(value, base[name] + 0.25 * (a[name].astype(F64) - base[name]), rtol=1e-5, atol=1e-5)
    assert [note for note in notes if "weight=0.25: replaces" in note and "expert-1 1" in note] == notes[:1]


def test_a_base_listed_among_the_models_is_no_expert() -> None:
    base, a = models(2)
    recipe = {"merge_method": "ties", "base_model": base, "models": [{"model": base}, {"model": a}]}
    merged = cs.merge(recipe, density=0.5)
    expected = cs.merge(base, [a], method="ties", density=0.5)
    assert isinstance(merged, dict)
    assert isinstance(expected, dict)
    for name, value in expected.items():
        np.testing.assert_array_equal(merged[name], value)


def test_notes_and_progress_are_told() -> None:
    base, a = models(2)
    base["count"], a["count"] = np.array([1]), np.array([2])
    notes: list[str] = []
    seen: list[tuple[int, int]] = []
    cs.merge(base, [a], noted=notes.append, progress=lambda done, total: seen.append((done, total)))
    assert any("count" in note for note in notes)
    assert seen
    assert seen[-1][0] == seen[-1][1]


WRONG: dict[str, tuple[Any, list[str]]] = {
    "no experts": (lambda s: cs.merge(s[0]), ["experts", "missing"]),
    "a path alone": (lambda s: cs.merge("base", out="out"), ["experts", "missing"]),
    "no recipe": (lambda s: cs.merge("gone.yaml", out="out"), ["gone.yaml"]),
    "mixed": (
        lambda s: cs.merge({"method": "linear", "models": [{"model": s[0]}, {"model": "path"}]}),
        ["state dicts and paths"],
    ),
    "unknown key": (
        lambda s: cs.merge({"method": "linear", "models": [{"model": s[0], "paramters": {}}]}),
        ["paramters", "'parameters'"],
    ),
    "unknown parameter": (
        lambda s: cs.merge({"method": "linear", "models": [{"model": s[0], "parameters": {"wieght": 1}}]}),
        ["wieght", "'weight'"],
    ),
    "unknown method": (lambda s: cs.merge({"method": "linaer", "models": [{"model": s[0]}]}), ["'linear'"]),
    "no tensor": (lambda s: cs.merge({"method": "linear", "models": [{"model": {"w": [1.0]}}]}), ["'w'", "list"]),
    "force": (lambda s: cs.merge(s[0], s[1:], force=True), ["force", "no effect"]),
    "as_adapter": (lambda s: cs.merge(s[0], s[1:], as_adapter="cat"), ["as_adapter", "no effect"]),
    "tokenizer": (lambda s: cs.merge(s[0], s[1:], tokenizer="base"), ["tokenizer", "no effect"]),
    "device": (lambda s: cs.merge(s[0], s[1:], device="cuda"), ["device", "no effect"]),
    "noted": (lambda s: cs.merge("base", ["a"], "out", noted=print), ["noted", "no effect"]),
    "an idle override": (
        lambda s: cs.merge({"method": "linear", "models": [{"model": s[0]}]}, weight=1),
        ["weight=1", "changes nothing"],
    ),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=list(WRONG))
def test_wrong_calls_say_what_and_where(wrong: tuple[Any, list[str]]) -> None:
    call, words = wrong
    with pytest.raises(cs.InputError) as caught:
        call(models())
    assert [word for word in words if word not in str(caught.value)] == []


def test_dir_shows_the_api() -> None:
    assert set(cs.__all__) <= set(dir(cs))
    for name in ("merge", "merge_recipe", "override_recipe", "plan_recipe", "learn", "diagnose"):
        assert getattr(cs, name).__doc__


def test_the_documentation_s_examples_do_what_they_say() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "recipes.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    found: dict[str, Any] = {}
    exec(block, found)
    base, math, code = (found[name].weight.detach().double() for name in ("base", "math", "code"))
    torch.testing.assert_close(
        found["model"].weight.detach().double(), base + 0.7 * (math - base) + 0.3 * (code - base), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(found["total"].weight.detach().double(), 0.7 * math + code, rtol=1e-5, atol=1e-6)
    assert isinstance(found["state"]["weight"], torch.Tensor)
    assert found["arrays"]["w"].dtype == np.float16
    assert found["arrays"]["w"].tolist() == [1.0] * 3
