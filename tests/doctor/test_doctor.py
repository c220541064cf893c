"""What the doctor finds in experts that were made sick on purpose."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doctor_models import Make, drawn, moved, write_adapter, write_model

import consilience as cs
from consilience.doctor.diagnosis import Diagnosis
from consilience.doctor.report.text import text
from consilience.errors import InputError
from consilience.recipe.schema import parse_recipe

BASE = drawn(0)


def _diagnose(recipe: dict[str, Any]) -> Diagnosis:
    return cs.diagnose(parse_recipe(recipe, "recipe"))


def _expert(seed: int, by: float = 0.05) -> dict[str, Any]:
    return moved(BASE, drawn(seed), by)


def _flat(tensors: dict[str, Any]) -> np.ndarray:
    return np.concatenate([value.astype(np.float64).ravel() for value in tensors.values()])


def _kinds(found: Diagnosis) -> set[tuple[str, tuple[str, ...]]]:
    return {(one.kind, one.experts) for one in found.findings}


def test_sound_experts_have_no_findings(make: Make) -> None:
    found = _diagnose(make(BASE, a=_expert(1), b=_expert(2), c=_expert(3)))
    assert found.findings == ()
    assert "Nothing is wrong" in text(found)
    assert found.together.displacement == pytest.approx(found.together.orthogonal, rel=0.05)


def test_figures_of_an_expert(make: Make) -> None:
    found = _diagnose(make(BASE, a=_expert(1), b=_expert(2)))
    tau = {name: _flat(_expert(seed)) - _flat(BASE) for seed, name in ((1, "a"), (2, "b"))}
    base = _flat(BASE)
    one = found.experts[0]
    assert one.norm == pytest.approx(np.linalg.norm(tau["a"]), rel=1e-5)
    assert one.relative_norm == pytest.approx(np.linalg.norm(tau["a"]) / np.linalg.norm(base), rel=1e-5)
    assert one.moved == pytest.approx(np.linalg.norm((tau["b"] - tau["a"]) / 2), rel=1e-5)
    assert found.together.displacement == pytest.approx(np.square((tau["b"] - tau["a"]) / 2).sum(), rel=1e-5)
    assert found.pairs[0].cosine == pytest.approx(
        tau["a"] @ tau["b"] / np.linalg.norm(tau["a"]) / np.linalg.norm(tau["b"]), abs=1e-5
    )
    magnitude = sum(np.abs(one).sum() for one in tau.values())
    assert found.together.cancelled == pytest.approx(1 - np.abs(tau["a"] + tau["b"]).sum() / magnitude, abs=1e-5)


def test_figures_of_a_block_are_those_of_its_tensors(make: Make) -> None:
    found = cs.diagnose(parse_recipe(make(BASE, a=_expert(1), b=_expert(2)), "recipe"), exact=True)
    block = next(one for one in found.blocks if one.name == "model.layers.1")
    names = [name for name in BASE if name.startswith("model.layers.1.")]
    tau = [{name: _expert(seed)[name].astype(np.float64) - BASE[name] for name in names} for seed in (1, 2)]
    stacked = np.array([_flat(one) for one in tau])
    assert block.sigma_max == pytest.approx(np.linalg.norm(stacked, 2), rel=1e-5)
    assert block.sigma_max_centred == pytest.approx(np.linalg.norm(stacked - stacked.mean(0), 2), rel=1e-5)
    (pair,) = block.pairs
    assert (pair.first, pair.second) == ("a", "b")
    assert pair.cosine == pytest.approx(block.cosine)
    assert pair.opposite == pytest.approx(np.mean(stacked[0] * stacked[1] < 0), abs=1e-6)
    matrices = [name for name in names if tau[0][name].ndim == 2]
    energy = [[sum(np.square(x[n] @ y[n].T).sum() for n in matrices) for y in tau] for x in tau]
    assert pair.overlap == pytest.approx(energy[0][1] / np.sqrt(energy[0][0] * energy[1][1]), rel=1e-4)
    ranks = [np.square(tau[0][n]).sum() ** 2 / np.square(tau[0][n] @ tau[0][n].T).sum() for n in matrices]
    assert block.effective_ranks[0] == pytest.approx(np.median(ranks), rel=1e-4)
    assert block.effective_rank_errors == (0, 0)


def test_a_sketched_rank_says_how_far_off_it_is(make: Make) -> None:
    recipe = parse_recipe(make(BASE, a=_expert(1), b=_expert(2)), "recipe")
    exact = cs.diagnose(recipe, exact=True).experts[0].effective_rank
    found = [cs.diagnose(recipe, seed=seed).experts[0] for seed in range(24)]
    ranks, errors = (
        np.array([getattr(one, key) for one in found]) for key in ("effective_rank", "effective_rank_error")
    )
    assert np.abs(ranks / exact - 1).max() > 1e-6
    assert (np.abs(ranks - exact) < 6 * errors).all()
    # The median of several matrices varies less than each of them.
    assert 0.3 * ranks.std(ddof=1) < np.median(errors) < 6 * ranks.std(ddof=1)


@pytest.mark.parametrize(
    ("sick", "kind", "severity"),
    [
        (drawn(9), "wrong-base", "stop"),
        (BASE, "no-change", "warning"),
        (moved(BASE, drawn(9), 0.6), "far-from-base", "warning"),
    ],
)
def test_one_sick_expert_is_named(make: Make, sick: dict[str, Any], kind: str, severity: str) -> None:
    found = _diagnose(make(BASE, a=_expert(1), b=_expert(2), sick=sick))
    assert (kind, ("sick",)) in _kinds(found)
    assert next(one for one in found.findings if one.kind == kind).severity == severity


@pytest.mark.parametrize(("factor", "severity"), [(4.0, "note"), (12.0, "warning")])
def test_a_long_task_vector_is_named_and_the_weight_that_evens_it_out(make: Make, factor: float, severity: str) -> None:
    found = _diagnose(make(BASE, a=_expert(1, 0.01), b=_expert(2, 0.01), long=_expert(3, 0.01 * factor)))
    finding = next(one for one in found.findings if one.kind == "long-task-vector")
    assert (finding.experts, finding.severity) == (("long",), severity)
    assert f"{1 / factor:.2f}" in finding.mend


def test_copies_and_scaled_copies_are_seen(make: Make) -> None:
    found = _diagnose(make(BASE, a=_expert(1), again=_expert(1), twice=_expert(1, 0.1), b=_expert(2)))
    assert {("duplicate", ("a", "again")), ("duplicate", ("a", "twice"))} <= _kinds(found)
    assert not any("b" in one.experts for one in found.findings)


def test_a_merge_of_the_others_is_seen(make: Make) -> None:
    half = {name: (_expert(1)[name] + _expert(2)[name]) / 2 for name in BASE}
    found = _diagnose(make(BASE, a=_expert(1), b=_expert(2), half=half))
    finding = next(one for one in found.findings if one.kind == "merge-of-others" and one.experts == ("half",))
    assert "0.50 a + 0.50 b" in finding.what


def test_an_earlier_stage_as_the_base_is_suspected(make: Make) -> None:
    common = moved(BASE, drawn(7), 0.3)
    found = _diagnose(make(BASE, **{name: moved(common, drawn(seed), 0.05) for seed, name in enumerate("abc", 1)}))
    assert "shared-change" in {one.kind for one in found.findings}


def test_experts_that_pull_apart_are_named_with_the_block(make: Make) -> None:
    against = _expert(1)
    first, second = "model.layers.0.mlp.weight", "model.layers.1.mlp.weight"
    against[second] = 2 * BASE[second] - _expert(1)[second]
    against[first] = _expert(5)[first]
    found = _diagnose(make(BASE, a=_expert(1), b=against))
    finding = next(one for one in found.findings if one.kind == "opposed")
    assert finding.places[0].startswith("model.layers.1 (-1.00)")
    block = next(one for one in found.blocks if one.name == "model.layers.1")
    assert (block.pair, block.cancelled) == (("a", "b"), pytest.approx(1, abs=1e-3))


def test_an_expert_of_another_shape_is_put_aside_and_the_rest_is_diagnosed(make: Make) -> None:
    odd = {**_expert(3), "model.norm.weight": np.ones(7, np.float32)}
    found = _diagnose(make(BASE, a=_expert(1), b=_expert(2), odd=odd))
    assert [one.name for one in found.experts] == ["a", "b"]
    assert found.refused[0][0] == "odd"
    assert "model.norm.weight" in found.refused[0][1]
    assert found.findings[0].severity == "stop"


def test_where_no_expert_fits_there_is_one_line(make: Make) -> None:
    odd = {**_expert(3), "model.norm.weight": np.ones(7, np.float32)}
    with pytest.raises(InputError, match=r"model\.norm\.weight"):
        _diagnose(make(BASE, odd=odd))


def test_a_recipe_without_a_base_is_refused(make: Make) -> None:
    recipe = make(BASE, a=_expert(1))
    with pytest.raises(InputError, match="base_model is missing"):
        _diagnose({key: value for key, value in recipe.items() if key != "base_model"} | {"merge_method": "linear"})


def test_files_beside_the_weights_are_read(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", BASE, tokenizer__json="{}", chat_template__jinja="{{ a }}")
    one = write_model(tmp_path / "one", _expert(1), tokenizer__json='{"a": 1}', chat_template__jinja="{{ a }}\n")
    two = write_model(tmp_path / "two", _expert(2), chat_template__jinja="{{ b }}", mergekit_config__yml="x: y")
    recipe = {"merge_method": "ties", "base_model": str(base), "models": [{"model": str(one)}, {"model": str(two)}]}
    found = _diagnose(recipe)
    assert _kinds(found) == {("tokenizer", ("one",)), ("chat-template", ("two",)), ("already-merged", ("two",))}


def test_an_adapter_that_names_another_base_is_noted(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", BASE)
    for name, said in (("one", "org/other-model"), ("two", "/somewhere/base/")):
        write_adapter(tmp_path / name, "model.layers.0.mlp", 2, 1 if name == "one" else 2)
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": said}))
    models = [{"model": str(tmp_path / name)} for name in ("one", "two")]
    found = _diagnose({"merge_method": "ties", "base_model": str(base), "models": models})
    assert {("base-name", ("one",)), ("base-name", ("two",))} <= _kinds(found)  # the last part of a path tells nothing


def test_weights_of_the_recipe_are_used_where_they_are_plain(make: Make) -> None:
    recipe = make(BASE, a=_expert(1), b=_expert(2))
    recipe["models"][0]["parameters"], recipe["models"][1]["parameters"] = {"weight": 0.7}, {"weight": 0.3}
    found = _diagnose(recipe)
    assert ([one.weight for one in found.experts], found.weights) == ([0.7, 0.3], "the recipe's")
    assert found.together.displacement is not None
    recipe["models"][0]["parameters"] = {"weight": [0.1, 0.9]}
    assert _diagnose(recipe).weights == "uniform, 1 / K"


def test_a_report_of_checkpoints_claims_nothing_that_needs_data(make: Make) -> None:
    found = _diagnose(make(BASE, a=_expert(1), b=_expert(2)))
    value = json.loads(json.dumps(found.to_dict()))
    assert value["evidence"] == ["checkpoints"]
    assert not {"training", "probes", "bound"} & {key for key in value if value[key]}
    assert any("logs" in one for one in value["unknown"])
    assert any("probe" in one for one in value["unknown"])
    assert "guarantee" in text(found)


def test_the_command_prints_text_or_json(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from consilience.__main__ import run

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(make(BASE, a=_expert(1), b=_expert(2))))
    assert run(["doctor", str(recipe), "--json"]) == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)["experts"]] == ["a", "b"]
    assert run(["doctor", str(recipe), "--quiet"]) == 0
    assert "Nothing is wrong" in capsys.readouterr().out
    assert run(["doctor", str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
