"""What logs add to a diagnosis."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doctor_models import Make, drawn, moved, write_model

import consilience as cs
from consilience.doctor.diagnosis import Diagnosis
from consilience.doctor.evidence.training import Training, read_training
from consilience.doctor.findings.from_training import bound_facts, findings
from consilience.doctor.report.text import text
from consilience.doctor.theory.geometry import Geometry
from consilience.recipe.schema import parse_recipe

BASE = drawn(0)


def _trained(name: str, **facts: Any) -> Training:
    return read_training({"optimizer": "sgd", "adapter": "full", "schedule": "constant", **facts}, name)


def _state(folder: Path, rate: float, steps: int, norm: float = 2.0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    history = [{"step": s, "learning_rate": rate, "grad_norm": norm, "loss": 1.0} for s in range(1, steps + 1)]
    value = {"log_history": history, "global_step": steps, "max_steps": steps, "train_batch_size": 8}
    (folder / "trainer_state.json").write_text(json.dumps(value))
    return folder


def _diagnose(recipe: dict[str, Any]) -> Diagnosis:
    return cs.diagnose(parse_recipe(recipe, "recipe"))


def test_logs_that_the_recipe_names_are_read(make: Make, tmp_path: Path) -> None:
    recipe = make(BASE, a=moved(BASE, drawn(1), 0.05), b=moved(BASE, drawn(2), 0.05))
    for model, rate in zip(recipe["models"], (0.1, 0.3), strict=True):
        model["data"] = {"logs": str(_state(tmp_path / f"logs-{model['name']}", rate, 10))}
    found = _diagnose(recipe)
    assert found.evidence == ("checkpoints", "logs")
    assert [one.length for one in found.training] == pytest.approx([1.0, 3.0])
    assert [one.length_from for one in found.training] == ["logged", "logged"]
    assert not any(one.kind == "unequal-length" for one in found.findings)  # no optimizer is known
    assert any("the optimizer of a, b" in one for one in found.unknown)
    for model, optimizer in zip(recipe["models"], ("sgd", "SGD"), strict=True):
        put = Path(model["data"]["logs"]) / "training_args.json"
        put.write_text(json.dumps({"optim": optimizer, "learning_rate": 0.1 if optimizer == "sgd" else 0.3}))
    (unequal,) = [one for one in _diagnose(recipe).findings if one.kind == "unequal-length"]
    assert unequal.experts == ("a", "b")
    assert "b 3, a 1" in unequal.what
    assert "leave the task vectors as they are" in unequal.mend
    assert not any("training lengths" in one for one in found.unknown)
    assert "length H" in text(found)


def test_logs_in_an_expert_s_own_folder_are_found(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", BASE)
    one = write_model(tmp_path / "one", moved(BASE, drawn(1), 0.05))
    two = write_model(tmp_path / "two", moved(BASE, drawn(2), 0.05))
    _state(one, 0.1, 5)
    models = [{"model": str(one)}, {"model": str(two)}]
    found = _diagnose({"merge_method": "linear", "base_model": str(base), "models": models})
    assert [one.steps for one in found.training] == [5, None]
    assert any("training lengths" in line and "two" in line for line in found.unknown)


@pytest.mark.parametrize(("rates", "steps", "flagged"), [((0.2, 0.05), (10, 40), False), ((0.2, 0.2), (10, 40), True)])
def test_equal_lengths_are_not_flagged_whatever_the_rates(
    rates: tuple[float, float], steps: tuple[int, int], flagged: bool
) -> None:
    trainings = [_trained(n, learning_rate=r, steps=s) for n, r, s in zip("ab", rates, steps, strict=True)]
    assert any(one.kind == "unequal-length" for one in findings(trainings)) is flagged


def test_lengths_of_different_optimizers_are_not_compared() -> None:
    other = _trained("b", learning_rate=0.9, steps=90, optimizer="adamw")
    trainings = [_trained("a", learning_rate=0.1, steps=10), other]
    kinds = {one.kind for one in findings(trainings)}
    assert "different-family" in kinds
    assert "unequal-length" not in kinds


@pytest.mark.parametrize(
    ("rate", "batch", "flagged"), [(0.1, 8, False), (0.8, 8, True), (0.8, 64, False), (0.2, 2, True)]
)
def test_a_hot_training_is_named(rate: float, batch: int, flagged: bool) -> None:
    others = [_trained(name, learning_rate=0.1, steps=100, batch_size=8) for name in "ab"]
    hot = _trained("c", learning_rate=rate, steps=int(10 / rate), batch_size=batch)
    found = {one.experts: one.what for one in findings([*others, hot]) if one.kind == "hot-training"}
    assert (("c",) in found) is flagged
    assert len(found) == flagged
    assert hot.temperature == pytest.approx(rate / batch)


def test_a_schedule_s_temperature_weighs_rates_by_themselves(tmp_path: Path) -> None:
    rates = np.linspace(0.3, 0.1, 21)
    history = [{"step": s, "learning_rate": r, "loss": 1.0} for s, r in enumerate(rates.tolist(), 1)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history, "global_step": 21}))
    found = read_training([{"batch_size": 8}, str(tmp_path)], "a").temperature
    assert found == pytest.approx((rates**2).sum() / rates.sum() / 8, rel=1e-3)


def test_contradictions_and_many_epochs_are_noted(tmp_path: Path) -> None:
    (tmp_path / "training_args.json").write_text(json.dumps({"learning_rate": 0.5, "optim": "sgd"}))
    _state(tmp_path, 0.1, 4)
    contradicted = read_training([{"learning_rate": 0.2, "steps": 4}, str(tmp_path)], "a")
    assert any(one.kind == "contradictory-logs" for one in findings([contradicted]))
    many = _trained("a", learning_rate=0.1, steps=100, rows=10, batch_size=5, epochs=50)
    assert [one.kind for one in findings([many])] == ["many-epochs"]


def _geometry() -> Geometry:
    return Geometry(np.array([[2.0, 0.5], [0.5, 1.0]]), np.zeros(2), 9.0)


def test_terms_that_nothing_tells_stay_unknown() -> None:
    trainings = [_trained("a", learning_rate=0.1, steps=10), _trained("b", learning_rate=0.1, steps=30)]
    found = bound_facts(trainings, _geometry(), np.array([0.5, 0.5]))
    assert found is not None
    assert set(found.displacement.values()) == {None}
    assert set(found.risk.values()) == {None}
    assert found.dominant is None


def test_weights_off_the_simplex_have_no_bound() -> None:
    trainings = [_trained("a", learning_rate=0.1, steps=10), _trained("b", learning_rate=0.1, steps=30)]
    assert bound_facts(trainings, _geometry(), np.array([1.0, 1.0])) is None


def test_with_logs_and_probes_the_terms_are_the_formulas() -> None:
    from test_probe import _case, _probe  # pyright: ignore[reportPrivateUsage]

    case = _case(noise=1.0)
    probe = _probe(case)
    lengths = (1.0, 2.0, 6.0)
    facts = {"steps": 10, "batch_size": 4, "rows": 100}
    trainings = [_trained(n, learning_rate=h / 10, **facts) for n, h in zip("abc", lengths, strict=True)]
    p = probe.weights
    found = bound_facts(trainings, case.geometry(), p, probe)
    assert found is not None
    h, mean = np.array(lengths), float(p @ np.array(lengths))
    smooth = probe.curvatures.max()
    tau = np.diag(case.geometry().gram)
    assert found.displacement["unequal"] == pytest.approx(4 * p @ (h - mean) ** 2 * probe.base_gradient**2)
    assert found.displacement["heterogeneity"] == pytest.approx(4 * p @ (h**2 * probe.heterogeneity**2))
    assert found.displacement["drift"] == pytest.approx(4 * smooth**2 * p @ (h**2 * tau))
    assert found.displacement["noise"] == pytest.approx(4 * p @ (h**2 / 10 * probe.noise / 4))
    assert found.risk["displacement"] == pytest.approx(smooth * case.geometry().moves(p).mean())
