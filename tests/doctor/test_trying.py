"""Methods that are tried on probe rows."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_llama, make_tokenizer, shake

import consilience as cs
from consilience.doctor.diagnosis import ProbeFacts
from consilience.doctor.report.page import page
from consilience.doctor.report.text import text
from consilience.doctor.trying import wanted
from consilience.errors import InputError
from consilience.recipe.schema import parse_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe of two tiny language models on a base, with probe rows."""
    place = tmp_path_factory.mktemp("tried")
    models: list[dict[str, Any]] = []
    for name, seed, answers in (
        ("base", None, []),
        ("a", 1, ["red", "blue sky"]),
        ("b", 2, ["green tree", "red tree"]),
    ):
        model = make_llama(0) if seed is None else shake(make_llama(0), seed)
        model.save_pretrained(place / name)
        make_tokenizer().save_pretrained(place / name)
        lines = [json.dumps({"prompt": "the sky is", "response": answer}) for answer in answers]
        (place / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        models.append({"model": str(place / name), "name": name, "data": {"probe": str(place / f"{name}.jsonl")}})
    return {"merge_method": "linear", "base_model": str(place / "base"), "models": models[1:]}


def _probed(recipe: dict[str, Any], *methods: str) -> ProbeFacts:
    found = cs.diagnose(parse_recipe(recipe, "recipe"), methods=methods).probes
    assert found is not None
    return found


def test_a_method_s_merge_is_measured_as_evaluate_measures_it(recipe: dict[str, Any], tmp_path: Path) -> None:
    found = _probed(recipe, "ties:density=0.4,weight=0.9", "dare_linear:density=0.5")
    assert [one.mean for one in found.methods] == sorted(one.mean for one in found.methods)
    ties = next(one for one in found.methods if one.name == "ties:density=0.4,weight=0.9")
    experts = {one["name"]: one["model"] for one in recipe["models"]}
    cs.merge(recipe["base_model"], experts, tmp_path / "merged", method="ties", density=0.4, weight=0.9)
    for loss, own, one in zip(ties.losses, found.tasks, recipe["models"], strict=True):
        exact = cs.evaluate(str(tmp_path / "merged"), [f"{one['name']}={one['data']['probe']}"]).results[0].loss
        assert exact is not None
        assert loss == pytest.approx(exact.value, rel=1e-2)  # products in bfloat16
        assert ties.worst >= loss - own.own - 1e-9


def test_task_arithmetic_is_the_candidate_of_its_weights(recipe: dict[str, Any]) -> None:
    found = _probed(recipe, "task_arithmetic:weight=0.5")
    given = next(one for one in found.candidates if one.kind == "given")
    assert found.methods[0].losses == pytest.approx(given.measured, rel=2e-3)


def test_nothing_is_left_behind(recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    _probed(recipe, "linear")
    with pytest.raises(InputError, match="density"):
        _probed(recipe, "ties:density=7")
    assert list(tmp_path.iterdir()) == []


def test_parameters_are_checked_before_anything_is_read(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def survey(*_args: Any, **_options: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("consilience.doctor.diagnose.survey", survey)
    with pytest.raises(InputError, match=r"--try ties:density=7: .*density.* must lie in \[0, 1\]"):
        _probed(recipe, "ties:density=7")


def test_the_report_shows_them(recipe: dict[str, Any]) -> None:
    found = cs.diagnose(parse_recipe(recipe, "recipe"), methods=["ties:density=0.4"])
    assert "ties:density=0.4" in text(found)
    assert ("Not known" in text(found)) is bool(found.unknown)
    assert "ties:density=0.4" in page(found)
    assert json.loads(json.dumps(found.to_dict()))["probes"]["methods"][0]["name"] == "ties:density=0.4"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("tiles", "tiles.*ties"),
        ("expert_merging", "expert_merging learns"),
        ("ties:density", "write it as METHOD or METHOD:KEY=VALUE"),
        ("ties:=3", "write it as METHOD or METHOD:KEY=VALUE"),
    ],
)
def test_what_cannot_be_tried_is_refused_at_once(asked: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        wanted(asked)


def test_probe_rows_are_needed(recipe: dict[str, Any]) -> None:
    bare = recipe | {"models": [{"model": one["model"], "name": one["name"]} for one in recipe["models"]]}
    with pytest.raises(InputError, match="no expert has data"):
        _probed(bare, "ties")
    with pytest.raises(InputError, match="give probe_rows"):
        cs.diagnose(parse_recipe(recipe, "recipe"), methods=["ties"], probe_rows=None)
