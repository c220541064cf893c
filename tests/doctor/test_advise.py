"""Advice before training: terms by their formulas, and what equalises lengths."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from consilience.__main__ import run
from consilience.doctor.advise import Planned, advise
from consilience.doctor.evidence.training import Training, read_training
from consilience.errors import InputError

PLAN = Planned(0.1, 100, 8, 400, "sgd")


def _other(rate: float, steps: int, optimizer: str = "sgd") -> Training:
    return read_training({"learning_rate": rate, "steps": steps, "optimizer": optimizer, "schedule": "constant"}, "x")


def _leading(plan: Planned) -> float:
    t, n, b = plan.steps, plan.rows, plan.batch_size
    return 4 * plan.learning_rate**2 * (t**2 / n**2 + t / (b * n))


def test_figures_of_a_plan() -> None:
    assert PLAN.length == pytest.approx(10)
    assert PLAN.epochs == pytest.approx(2)
    assert PLAN.stability == pytest.approx(_leading(PLAN))


def test_every_change_tells_its_own_factors() -> None:
    for change in advise(PLAN).changes:
        assert change.length == pytest.approx(change.plan.length / PLAN.length)
        assert change.stability == pytest.approx(_leading(change.plan) / _leading(PLAN))
        assert change.plan != PLAN


def test_the_bound_s_directions() -> None:
    changes = {change.what: change for change in advise(PLAN).changes}
    assert changes["50 steps"].stability < 1
    assert changes["learning rate 0.05"].stability == pytest.approx(0.25)
    assert changes["batches of 16"].length == 1
    assert changes["800 rows"].stability < 1


def test_lengths_are_evened_out_with_those_of_one_optimizer() -> None:
    found = advise(PLAN, [_other(0.1, 200), _other(0.2, 200), _other(0.4, 100), _other(9.0, 900, "adamw")])
    assert (found.target, found.compared) == (pytest.approx(40), 3)
    first, second = found.changes[:2]
    assert first.plan.length == pytest.approx(40)
    assert (second.plan.steps, second.plan.learning_rate) == (400, PLAN.learning_rate)
    assert "0.25 times as long" in found.said[1]


def test_noise_is_compared_with_those_of_one_optimizer() -> None:
    others = [_other(0.1, 200), _other(0.2, 200), _other(0.4, 100), _other(9.0, 900, "adamw")]
    batches = [replace(one, batch_size=8) for one in others]
    assert PLAN.temperature == pytest.approx(PLAN.learning_rate / PLAN.batch_size)
    assert not any("learning rate over batch" in line for line in advise(PLAN, others).said)
    (line,) = [line for line in advise(PLAN, batches).said if "learning rate over batch" in line]
    assert f"{PLAN.temperature / (0.2 / 8):.2g} times" in line
    changes = {change.what: change for change in advise(PLAN).changes}
    assert changes["batches of 16"].temperature == pytest.approx(0.5)
    assert changes["50 steps"].temperature == 1


def test_equal_lengths_need_no_change() -> None:
    found = advise(PLAN, [_other(0.05, 200), _other(0.1, 100)])
    assert found.changes[0].what == "50 steps"
    assert "about as long" in found.said[1]


def test_others_by_another_optimizer_tell_nothing() -> None:
    assert advise(PLAN, [_other(0.05, 200, "adamw")]).target is None


@pytest.mark.parametrize("wrong", [{"learning_rate": 0.0}, {"rows": -1}])
def test_a_plan_out_of_range_is_one_line(wrong: dict[str, float]) -> None:
    values = {"learning_rate": 0.1, "steps": 10, "batch_size": 2, "rows": 20} | wrong
    with pytest.raises(InputError, match=next(iter(wrong))):
        Planned(**values)  # pyright: ignore[reportArgumentType]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "training_args.json"
    log.write_text(
        json.dumps({"learning_rate": 0.1, "max_steps": 400, "optim": "sgd", "lr_scheduler_type": "constant"})
    )
    plan = ["advise", "--learning-rate", "0.1", "--steps", "100", "--batch-size", "8", "--rows", "400"]
    assert run([*plan, "--optimizer", "sgd", "--with", str(log)]) == 0
    assert "400 steps" in capsys.readouterr().out
    assert run([*plan, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["steps"] == 100
    assert run([*plan, "--with", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
