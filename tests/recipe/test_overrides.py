"""Values of a recipe that options and arguments replace: what counts then, what is told of it, what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

import consilience as cs
from consilience.__main__ import run
from consilience.api import override_recipe

VALUE: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [
        {"model": "x/math", "parameters": {"weight": 0.5, "density": 0.1}},
        {"model": "code", "parameters": {"density": [{"filter": "mlp", "value": 0.3}, {"value": 0.4}]}},
    ],
    "parameters": {"density": 0.5, "normalize": True},
}


def told(recipe: cs.Recipe) -> list[str]:
    return [override.note for override in recipe.overrides]


def own(recipe: cs.Recipe, key: str) -> list[Any]:
    return [entry.parameters.get(key) for entry in recipe.models]


def test_a_value_for_all_replaces_the_recipe_s_and_every_model_s_own() -> None:
    recipe = override_recipe(VALUE, {"density": 0.3})
    assert recipe.parameters["density"] == 0.3
    assert own(recipe, "density") == [None, None]
    assert own(recipe, "weight") == [0.5, None]  # what was not named stays
    (note,) = told(recipe)
    assert "replaces the recipe's 0.5" in note
    assert "math 0.1" in note
    assert '"filter": "mlp"' in note
    assert recipe.overrides[0].replaced == {
        "parameters.density": 0.5,
        "models.math.parameters.density": 0.1,
        "models.code.parameters.density": [{"filter": "mlp", "value": 0.3}, {"filter": None, "value": 0.4}],
    }
    assert override_recipe(VALUE).overrides == ()


@pytest.mark.parametrize("given", [{"math.density": 0.3}, {"experts.math.density": 0.3}, {"density": {"math": 0.3}}])
def test_a_value_for_one_expert_replaces_its_own_alone(given: dict[str, Any]) -> None:
    recipe = override_recipe(VALUE, given)
    assert recipe.parameters["density"] == 0.5
    assert own(recipe, "density")[0] == 0.3
    assert own(recipe, "density")[1] == cs.Recipe.model_validate(VALUE).models[1].parameters["density"]
    assert "its own 0.1" in told(recipe)[0]


def test_what_is_for_one_expert_wins_in_either_order() -> None:
    for given in ({"weight": 0.2, "code.weight": 0.7}, {"code.weight": 0.7, "weight": 0.2}):
        recipe = override_recipe(VALUE, given)
        assert recipe.parameters["weight"] == 0.2
        assert own(recipe, "weight") == [None, 0.7]


def test_another_method_takes_our_defaults_and_leaves_out_what_it_does_not_have() -> None:
    recipe = override_recipe(VALUE, method="slerp")
    assert recipe.merge_method == "slerp"
    assert recipe.parameters.keys() == set()
    assert not recipe.mergekit
    (note,) = told(recipe)
    for word in ("replaces ties", "slerp has no such parameter", "density", "normalize", "weight"):
        assert word in note


def test_keys_of_the_recipe_are_replaced() -> None:
    recipe = override_recipe(VALUE | {"dtype": "bf16"}, out_dtype="float16", seed=3, private=["head.*"])
    assert (recipe.output_dtype, recipe.seed, recipe.private) == ("F16", 3, ["head.*"])
    assert told(recipe)[0].endswith("replaces bf16")
    assert told(recipe)[1].endswith("replaces 0")


WRONG: list[tuple[dict[str, Any], list[str]]] = [
    ({"parameters": {"densty": 0.3}}, ["densty", "'ties'", "'density'"]),
    ({"parameters": {"zzz": 0.3}}, ["zzz", "it has: ", "density"]),
    ({"parameters": {"meth.weight": 0.3}}, ["'meth'", "'math'"]),
    ({"parameters": {"a.b.weight": 0.3}}, ["a.b.weight", "EXPERT.KEY"]),
    ({"parameters": {"experts.weight": 0.3}}, ["'experts'", "math, code"]),
    ({"parameters": {3: 0.3}}, ["key 3 is a int"]),
    ({"parameters": ["density"]}, ["parameters", "list", "mapping"]),
    ({"parameters": {"code.normalize": False}}, ["normalize", "shared"]),
    ({"parameters": {"density": 2}}, ["density=2", "[0, 1]"]),
    ({"parameters": {"density": "much"}}, ["density=much", "number"]),
    ({"parameters": {"density": None}}, ["density", "number"]),
    ({"parameters": {"out_dtype": "float16"}}, ["out_dtype", "no parameter", "dtype"]),
    ({"parameters": {"normalize": True}}, ["normalize", "changes nothing"]),
    ({"parameters": {"math.density": 0.1}}, ["math.density", "changes nothing"]),
    ({"parameters": {"code.weight": 1.0}}, ["code.weight", "changes nothing"]),  # mergekit's default, in its form
    ({"method": "ties"}, ["ties", "changes nothing"]),
    ({"method": "tise"}, ["tise", "'ties'"]),
    ({"seed": 0}, ["seed", "changes nothing"]),
    ({"seed": -1}, ["seed"]),
    ({"out_dtype": "float8"}, ["out_dtype", "float8"]),
    ({"sed": 0}, ["sed", "'seed'"]),
]


LAYERED: dict[str, Any] = {
    "slices": {
        "merge_method": "linear",
        "slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}, {"model": "b", "layer_range": [0, 2]}]}],
    },
    "modules": {"merge_method": "linear", "modules": {"default": {"models": [{"model": "a"}, {"model": "b"}]}}},
    "documents": [
        {"name": "s", "merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]},
        {"merge_method": "linear", "models": [{"model": "s"}, {"model": "b"}]},
    ],
}


@pytest.mark.parametrize("kind", LAYERED)
def test_what_each_part_may_have_of_its_own_is_not_replaced(kind: str) -> None:
    given: list[dict[str, Any]] = [{"parameters": {"weight": 0.3}}, {"method": "ties"}]
    given += [{"out_dtype": "float16"}] if kind == "documents" else []
    for each in given:
        with pytest.raises(cs.InputError, match=f"(weight=0.3|ties|float16): .* has {kind}, and each"):
            override_recipe(LAYERED[kind], each.pop("parameters", None), **each)


@pytest.mark.parametrize("kind", ["slices", "modules"])
def test_keys_that_count_for_all_parts_are_replaced(kind: str) -> None:
    recipe = override_recipe(LAYERED[kind], out_dtype="float16", seed=3)
    assert (recipe.output_dtype, recipe.seed) == ("F16", 3)
    assert [one.key for one in recipe.overrides] == ["out_dtype", "seed"]


def test_close_values_are_told_apart_in_notes() -> None:
    assert "0.1234567" in told(override_recipe(VALUE, {"density": 0.1234567}))[0]
    assert "1234567" in told(override_recipe(VALUE, seed=1234567))[0]


@pytest.mark.parametrize(("given", "words"), WRONG, ids=lambda value: str(value)[:40])
def test_what_is_wrong_or_changes_nothing_is_refused(given: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(cs.InputError) as caught:
        override_recipe(VALUE, given.get("parameters"), **{k: v for k, v in given.items() if k != "parameters"})
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe whose paths start from its own folder, which is not the current one."""
    rng = np.random.default_rng(0)
    for name in ("base", "x/math", "code"):
        path = tmp_path / "here" / name
        path.mkdir(parents=True)
        arrays = {
            f"layers.{i}.{part}.w": rng.standard_normal((6, 6)).astype(np.float32) for i in (0, 1) for part in "ab"
        }
        save_file(arrays, path / "model.safetensors")
        (path / "config.json").write_text('{"model_type": "toy"}')
    text = VALUE | {"merge_method": "task_arithmetic", "parameters": {"weight": 0.5}}
    text["models"] = [{"model": "x/math", "parameters": {"weight": 0.1}}, {"model": "code"}]
    (tmp_path / "here" / "recipe.yaml").write_text(yaml.safe_dump(text))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def arrays(path: Path) -> dict[str, Any]:
    return load_file(path / "model.safetensors")


def expected(folder: Path, math: float, code: float) -> dict[str, Any]:
    base, one, two = (
        {n: v.astype(np.float64) for n, v in arrays(folder / "here" / name).items()}
        for name in ("base", "x/math", "code")
    )
    return {n: base[n] + math * (one[n] - base[n]) + code * (two[n] - base[n]) for n in base}


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ([], (0.1, 0.5)),
        (["--set", "weight=0.3"], (0.3, 0.3)),
        (["--set", "experts.code.weight=0.7"], (0.1, 0.7)),
        (["--set", "weight=0.3", "--set", "math.weight=0.2"], (0.2, 0.3)),
    ],
)
def test_the_command_line_merges_by_the_values_that_were_given(
    folder: Path, options: list[str], weights: tuple[float, float], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["merge", "here/recipe.yaml", "out", *options]) == 0
    printed = capsys.readouterr().out
    for name, value in expected(folder, *weights).items():
        np.testing.assert_allclose(arrays(folder / "out")[name], value, rtol=1e-6, atol=1e-6)
    lineage = json.loads((folder / "out/consilience/lineage.json").read_text())
    resolved = (folder / "out/consilience/recipe.yaml").read_text()
    given = [option for option in options if option != "--set"]
    assert [one["option"] for one in lineage.get("overrides", [])] == [f"--set {option}" for option in given]
    assert sum(line.startswith("# --set ") for line in resolved.splitlines()) == len(given)
    assert all(printed.count(f"note: --set {option}: replaces") == 1 for option in given)
    # The resolved recipe is what was merged: it gives the same bytes without any option.
    (folder / "here/resolved.yaml").write_text(resolved)
    assert run(["merge", "here/resolved.yaml", "again", "-q"]) == 0
    assert (folder / "again/model.safetensors").read_bytes() == (folder / "out/model.safetensors").read_bytes()


def test_check_and_a_dry_run_tell_what_is_replaced(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--method", "ties", "--set", "density=0.3", "--dtype", "bfloat16", "--seed", "7"]
    assert run(["check", "here/recipe.yaml", *options, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["method"] == "ties"
    assert run(["merge", "here/recipe.yaml", "out", *options, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for option in ("--method ties", "--set density=0.3", "--dtype bfloat16", "--seed 7"):
        assert sum(note.startswith(f"{option}: ") for note in facts["notes"]) == 1
        assert printed.count(f"{option}: ") == 1
    assert "F32->BF16" in printed
    assert not (folder / "out").exists()


def test_an_overridden_recipe_still_lies_where_it_was_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["merge", "here/recipe.yaml", "here", "--force", "--set", "weight=0.3"]) == 2
    assert "recipe.yaml: lies in here" in capsys.readouterr().err


def test_experts_without_names_are_told_apart_by_their_parents(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "here/x/math").rename(folder / "here/x/last")
    (folder / "here/y").mkdir()
    (folder / "here/code").rename(folder / "here/y/last")
    arguments = ["merge", "here/base", "out", "-e", "here/x/last", "-e", "here/y/last/", "--set", "x-last.weight=0.2"]
    assert run([*arguments, "--set", "y-last.weight=0.6"]) == 0
    (folder / "here/x/last").rename(folder / "here/x/math")
    (folder / "here/y/last").rename(folder / "here/code")
    for name, value in expected(folder, 0.2, 0.6).items():
        np.testing.assert_allclose(arrays(folder / "out")[name], value, rtol=1e-6, atol=1e-6)
    capsys.readouterr()
    assert run(["check", "here/base", "-e", "here/x/math", "-e", "two=here/code", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["experts"] == ["math", "two"]


def test_a_path_with_an_equals_sign_needs_no_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "here/code").rename(folder / "lr=0.1")
    for given in ("lr=0.1", "./lr=0.1", "here/../lr=0.1"):
        assert run(["check", "here/base", "-e", given, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["experts"] == ["lr-0-1"]
