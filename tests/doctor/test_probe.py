"""Probes of landscapes whose every loss, slope and curvature is known."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import make_llama, make_tokenizer, shake

import consilience as cs
from consilience.doctor.candidates import Candidate, best_scale, candidates, tried
from consilience.doctor.evidence.probe import Probe, probe, pseudo_inverse
from consilience.doctor.findings.finding import Finding
from consilience.doctor.probing import facts, saturation
from consilience.doctor.report.text import text
from consilience.doctor.theory.geometry import Geometry, Vector
from consilience.doctor.trying import Tried
from consilience.errors import InputError
from consilience.progress import CallbackProgress
from consilience.recipe.schema import parse_recipe

NAMES = ("a", "b", "c")


@dataclass
class Quadratics:
    """f_k(x) = floor_k + c_k ||x - centre_k||^2 / 2 + mean over rows of <row, x>, at x = tau^T alpha."""

    tau: Any
    centres: Any
    curvatures: Any
    noise: Any
    floor: float = 0.3

    def rows(self, task: int) -> Sequence[int]:
        return range(self.noise.shape[1])

    def loss(self, task: int, alpha: Vector) -> float:
        return self.slope(task, alpha, self.rows(task))[0]

    def slope(self, task: int, alpha: Vector, rows: Sequence[int]) -> tuple[float, Vector]:
        x = alpha @ self.tau
        tilt = self.noise[task, list(rows)].mean(0)
        away = x - self.centres[task]
        loss = self.floor + self.curvatures[task] * away @ away / 2 + tilt @ x
        return float(loss), self.tau @ (self.curvatures[task] * away + tilt)

    def geometry(self) -> Geometry:
        return Geometry(self.tau @ self.tau.T, np.zeros(len(self.tau)), 1.0)


def _case(seed: int = 0, at_experts: bool = False, noise: float = 0.0, rows: int = 6) -> Quadratics:
    generator = np.random.default_rng(seed)
    tau = generator.normal(size=(3, 8))
    centres = tau if at_experts else tau + 0.2 * generator.normal(size=tau.shape)
    return Quadratics(tau, centres, np.array([1.0, 2.0, 0.5]), noise * generator.normal(size=(3, rows, 8)))


def _probe(case: Quadratics, p: Sequence[float] = (0.5, 0.3, 0.2)) -> Probe:
    return probe(case, case.geometry().gram, np.array(p))


@pytest.mark.parametrize("seed", range(5))
def test_on_quadratics_curvatures_and_predictions_are_exact(seed: int) -> None:
    case = _case(seed)
    found = _probe(case)
    assert found.curvatures == pytest.approx(case.curvatures)
    for weights in np.random.default_rng(seed).normal(size=(20, 3)):
        actual = [case.loss(k, weights) for k in range(3)]
        assert found.predicted(weights) == pytest.approx(np.array(actual), abs=1e-9)


def test_at_stationary_experts_the_rise_is_that_of_the_distance() -> None:
    case = _case(at_experts=True)
    found = _probe(case)
    moves = case.geometry().moves(found.weights)
    assert found.merged - found.own == pytest.approx(case.curvatures * moves / 2)
    assert np.diag(found.slopes) == pytest.approx(np.zeros(3), abs=1e-12)
    assert found.barriers == pytest.approx(np.zeros(3), abs=1e-12)


def test_a_hill_on_the_way_is_a_barrier() -> None:
    class Hill(Quadratics):
        def slope(self, task: int, alpha: Vector, rows: Sequence[int]) -> tuple[float, Vector]:
            s = (1 - alpha[task]) / 0.5
            return float(np.sin(np.pi * s) + 2 * s), np.zeros(3)

    case = _case()
    found = probe(Hill(case.tau, case.centres, case.curvatures, case.noise), case.geometry().gram, np.full(3, 0.5))
    assert found.barriers == pytest.approx(np.ones(3))


def test_noise_is_the_rows_variance_in_the_span() -> None:
    case = _case(noise=1.0, rows=4000)
    inverse = pseudo_inverse(case.tau @ case.tau.T)
    projector = case.tau.T @ inverse @ case.tau
    expected = [np.trace(projector @ np.cov(case.noise[k].T)) for k in range(3)]
    # Halves leave as many degrees of freedom as there are dimensions: the mean over draws is what is right.
    draws = np.mean([_probe(_case(seed, noise=1.0, rows=400)).noise for seed in range(200)], 0)
    assert draws == pytest.approx(np.array(expected), rel=0.2)


def test_heterogeneity_is_the_gradients_distance_in_the_span() -> None:
    case = _case()
    found = _probe(case)
    gradients = -case.curvatures[:, None] * case.centres
    away = gradients - gradients.mean(0)
    projector = case.tau.T @ pseudo_inverse(case.tau @ case.tau.T) @ case.tau
    assert found.heterogeneity == pytest.approx(np.linalg.norm(away @ projector, axis=1))


def test_one_row_has_no_noise_to_speak_of() -> None:
    assert np.isnan(_probe(_case(rows=1)).noise).all()


def test_candidates_are_in_order_and_the_best_weights_are_best() -> None:
    case = _case(3)
    found = candidates(NAMES, _probe(case))
    assert [one.mean for one in found] == sorted(one.mean for one in found)
    best = next(one for one in found if one.name == "weights that the model calls best")
    others = np.random.default_rng(0).uniform(size=(300, 3))
    least = min(np.mean([case.loss(k, p) for k in range(3)]) for p in [*others, *np.eye(3)])
    assert all(0 <= value <= 1 for value in best.weights)
    assert best.mean <= least + 1e-9
    assert best.worst == pytest.approx(max(np.array(best.losses) - _probe(case).own))


def test_the_best_of_each_kind_is_tried() -> None:
    case = _case(3)
    measured = _probe(case)
    predicted, told = candidates(NAMES, measured), list[tuple[int, int]]()
    found = tried(NAMES, measured, predicted, case, CallbackProgress(lambda *done: told.append(done)))
    assert sorted(one.name for one in found) == sorted(one.name for one in predicted)
    shown = [one for one in found if one.measured is not None]
    assert sorted(one.kind for one in shown) == ["average", "given", "scale", "subset", "weights"]
    assert found[: len(shown)] == tuple(shown)
    for one in shown:
        assert one.measured == pytest.approx([case.loss(k, np.array(one.weights)) for k in range(3)])
        assert one.mean == min(other.mean for other in predicted if other.kind == one.kind)
        assert one.worst == pytest.approx(max(np.array(one.measured) - measured.own))
    assert told == [(done, 12) for done in range(1, 13)]


class Cliff(Quadratics):
    """Quadratics that jump where weights are as unequal as those that the model calls best."""

    def loss(self, task: int, alpha: Vector) -> float:
        """Return the loss at weights alpha."""
        unequal = np.ptp(alpha) > 0.2 and np.ptp(alpha) < 0.9 and not np.allclose(alpha, (0.5, 0.3, 0.2))
        return super().loss(task, alpha) + (5.0 if unequal else 0.0)


def test_weights_that_fail_when_tried_are_not_advised() -> None:
    easy = _case(at_experts=True)
    steep = Cliff(easy.tau, easy.centres, easy.curvatures, easy.noise)
    measured = replace(_probe(steep), curvatures=easy.curvatures * np.array([1.0, 4.0, 0.3]))
    found = tried(NAMES, measured, candidates(NAMES, measured), steep)
    by_kind: dict[str, Candidate] = {}
    for one in found:
        by_kind.setdefault(one.kind, one)
    assert by_kind["weights"].mean == min(one.mean for one in found)
    assert by_kind["weights"].measured_mean == max(one.measured_mean or 0.0 for one in found)
    advised = [one.what for one in facts(NAMES, measured, found)[1] if one.kind == "better-weights"]
    assert not any("the model calls best" in what for what in advised)
    assert found[0].kind != "weights"


def test_the_best_scale_is_found_where_a_search_finds_it() -> None:
    case = _case(4)
    found = best_scale(_probe(case))
    assert found is not None
    scales = np.linspace(0, 1.5, 1501)
    means = [np.mean([case.loss(k, np.full(3, s)) for k in range(3)]) for s in scales]
    assert found == pytest.approx(scales[int(np.argmin(means))], abs=1e-3)


def test_saturation_is_the_mean_over_all_subsets() -> None:
    case = _case(5)
    curve, gain = saturation(_probe(case))
    for size in (1, 2, 3):
        subsets = [np.isin(np.arange(3), kept) / size for kept in combinations(range(3), size)]
        expected = np.mean([[case.loss(k, p) for k in range(3)] for p in subsets])
        assert curve[size - 1] == pytest.approx(expected)
    assert gain is not None
    assert gain > 0


def _found(case: Quadratics, p: Sequence[float] = (0.5, 0.3, 0.2)) -> list[Finding]:
    measured = _probe(case, p)
    return facts(NAMES, measured, tried(NAMES, measured, candidates(NAMES, measured), case))[1]


def _kinds(case: Quadratics, p: Sequence[float]) -> dict[str, Finding]:
    return {one.kind: one for one in _found(case, p)}


def test_a_task_that_is_lost_is_named_with_its_losses() -> None:
    case = _case(at_experts=True)
    found = _found(case, (0.0, 0.0, 0.05))
    finding = next(one for one in found if one.kind == "lost-in-the-merge" and one.experts == ("a",))
    assert f"{case.loss(0, np.array([0.0, 0.0, 0.05])):.3f} merged" in finding.what


def test_an_expert_that_is_no_better_than_the_base_is_named() -> None:
    case = _case(at_experts=True)
    case.centres = np.concatenate([case.centres[:2], -case.centres[2:]])
    assert _kinds(case, (0.4, 0.4, 0.2))["no-better-than-base"].experts == ("c",)


def test_an_expert_that_was_stopped_early_is_named() -> None:
    case = _case(at_experts=True)
    case.centres = case.centres * np.array([[2.0], [1.0], [0.7]])
    found = {(one.kind, one.experts) for one in _found(case)}
    assert ("stopped-early", ("a",)) in found
    assert ("trained-too-far", ("c",)) in found
    assert not any(kind in ("stopped-early", "trained-too-far") and experts == ("b",) for kind, experts in found)


def test_a_merge_that_is_best_gets_no_advice() -> None:
    case = _case(at_experts=True)
    best = next(c for c in candidates(NAMES, _probe(case)) if c.name == "weights that the model calls best")
    assert "better-weights" not in _kinds(case, best.weights)


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe of two tiny language models on a base, with probe rows."""
    place = tmp_path_factory.mktemp("language")
    base, tokenizer = make_llama(0), make_tokenizer()
    for name, seed in (("base", None), ("a", 1), ("b", 2)):
        model = base if seed is None else shake(make_llama(0), seed)
        model.save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    rows = {"a": ["red", "blue sky"], "b": ["green tree", "red tree"]}
    models: list[dict[str, Any]] = []
    for name, answers in rows.items():
        lines = [json.dumps({"prompt": "the sky is", "response": answer}) for answer in answers]
        (place / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        models.append({"model": str(place / name), "name": name, "data": {"probe": str(place / f"{name}.jsonl")}})
    return {"merge_method": "linear", "base_model": str(place / "base"), "models": models}


def test_probe_rows_of_a_recipe_are_measured_as_evaluate_measures(language: dict[str, Any], tmp_path: Path) -> None:
    found = cs.diagnose(parse_recipe(language, "recipe"))
    assert found.evidence == ("checkpoints", "probes")
    assert found.probes is not None
    merged = tmp_path / "merged"
    cs.merge(language["base_model"], {m["name"]: m["model"] for m in language["models"]}, merged, method="linear")
    for one, model in zip(found.probes.tasks, language["models"], strict=True):
        for value, folder in ((one.base, language["base_model"]), (one.own, model["model"]), (one.merged, merged)):
            loss = cs.evaluate(str(folder), [f"{one.task}={model['data']['probe']}"]).results[0].loss
            assert loss is not None
            assert value == pytest.approx(loss.value, rel=1e-2)  # products in bfloat16


def test_probes_can_be_left_out_and_must_be_whole(language: dict[str, Any]) -> None:
    assert cs.diagnose(parse_recipe(language, "recipe"), probe_rows=None).probes is None
    half = language | {"models": [language["models"][0], {**language["models"][1], "data": None}]}
    with pytest.raises(InputError, match="b: has no data"):
        cs.diagnose(parse_recipe(half, "recipe"))


def test_the_report_shows_the_losses(language: dict[str, Any]) -> None:
    found = cs.diagnose(parse_recipe(language, "recipe"))
    shown = text(found)
    assert "merges, the best first" in shown
    assert not any("probe" in one for one in found.unknown)
    assert json.loads(json.dumps(found.to_dict()))["probes"]["tasks"][0]["task"] == "a"


def test_stability_weights_are_the_model_s_best(language: dict[str, Any]) -> None:
    recipe = parse_recipe(language | {"merge_method": "stability_weights", "parameters": {"alphabar": 0.5}}, "recipe")
    found = cs.learn(recipe)
    assert found.alpha.shape == (2, 1)
    probes = cs.diagnose(parse_recipe(language, "recipe")).probes
    assert probes is not None
    best = next(one for one in probes.candidates if one.name == "weights that the model calls best")
    assert found.alpha[:, 0] == pytest.approx(np.array(best.weights), rel=1e-3)
    assert found.facts["losses"]["predicted"] == pytest.approx(best.losses, rel=1e-3)
    assert found.facts["prices"] is None
    assert (found.facts["compared"]["measure"], found.facts["compared"]["on"]) == (
        "loss",
        "rows that were learned from",
    )


def test_a_task_that_counts_for_nothing_gets_nothing_for_itself(language: dict[str, Any]) -> None:
    recipe: Any = language | {"merge_method": "stability_weights", "models": [dict(one) for one in language["models"]]}
    recipe["models"][0]["parameters"], recipe["models"][1]["parameters"] = {"importance": 1}, {"importance": 0}
    found = cs.learn(parse_recipe(recipe, "recipe"))
    losses = found.facts["losses"]
    assert losses["predicted"][0] <= min(losses["own"][0], losses["at_alphabar"][0]) + 1e-6


def test_stability_weights_ask_for_probe_rows(language: dict[str, Any]) -> None:
    models = [{"model": one["model"], "name": one["name"]} for one in language["models"]]
    with pytest.raises(InputError, match=r"needs probe rows; give the expert data: \{probe: FILE.jsonl\}"):
        cs.learn(parse_recipe(language | {"merge_method": "stability_weights", "models": models}, "recipe"))


def test_a_method_that_beats_all_weights_is_advised() -> None:
    case = _case(at_experts=True)
    measured = _probe(case)
    found = tried(NAMES, measured, candidates(NAMES, measured), case)
    best = min(one.measured_mean for one in found if one.measured_mean is not None)
    for mean, advised in ((0.9 * best, True), (0.999 * best, False), (1.1 * best, False)):
        methods = (Tried("ties", (mean,) * 3, 0.0, "a"), Tried("dare_ties", (9.0,) * 3, 0.0, "a"))
        kinds = {one.kind: one for one in facts(NAMES, measured, found, methods)[1]}
        assert ("better-method" in kinds) is advised
