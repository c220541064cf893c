import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilience.doctor.evidence.training import UNEQUAL, Training, compare, read_training
from consilience.doctor.theory.bound import gradient_power, spread_bound
from consilience.errors import InputError


def plain(**fields: Any) -> Training:
    return read_training(fields, "expert")


def constant(rate: float, steps: int, **more: Any) -> Training:
    return plain(learning_rate=rate, steps=steps, schedule="constant", optimizer="sgd", adapter="full", **more)


@given(st.floats(1e-6, 1.0), st.integers(1, 1000), st.integers(2, 8))
def test_equal_lengths_are_not_flagged_however_rate_and_steps_share_them(rate: float, steps: int, factor: int) -> None:
    equal = compare([constant(rate * factor, steps), constant(rate, steps * factor)])
    assert not equal.unequal
    (group,) = equal.lengths
    assert group.variation == pytest.approx(0, abs=1e-12)
    assert group.scales == pytest.approx((1, 1))
    assert group.approximate == ("schedule",)
    longer = compare([constant(rate, steps), constant(rate, steps * factor)])
    assert longer.unequal
    values = longer.lengths[0].values
    assert values == pytest.approx((rate * steps, rate * steps * factor))
    part = spread_bound([0.5, 0.5], lengths=values, gradient=1.0).part("unequal")
    assert part == pytest.approx(4 * longer.lengths[0].variation * np.mean(values) ** 2)


def test_task_vectors_are_scaled_to_the_median_length() -> None:
    found = compare([constant(0.1, 10), constant(0.1, 60), constant(0.1, 20), constant(0.1, 0)])
    (group,) = found.lengths
    assert group.target == pytest.approx(1.5)
    assert group.scales == (pytest.approx(1.5), pytest.approx(0.25), pytest.approx(0.75), None)


def test_slightly_different_lengths_are_not_unequal() -> None:
    assert not compare([constant(0.1, 100), constant(0.1, math.floor(100 * UNEQUAL))]).unequal
    assert compare([constant(0.1, 100), constant(0.1, math.ceil(100 * UNEQUAL) + 1)]).unequal


def test_lengths_are_compared_within_one_optimizer_and_kind_alone() -> None:
    common: dict[str, Any] = {"learning_rate": 1.0, "schedule": "constant"}
    found = compare([
        plain(**common, steps=10, optimizer="adamw_torch", adapter="lora"),
        plain(**common, steps=1000, optimizer="sgd", adapter="lora"),
        plain(**common, steps=10, optimizer="paged_adamw_8bit", adapter="qlora", weight_decay=0.1),
        plain(**common, steps=500, optimizer="AdamW, betas 0.9 and 0.999", adapter="full"),
        plain(**common, steps=70),
        plain(rows=3),
    ])  # fmt: skip
    assert [(group.optimizer, group.adapter, group.experts) for group in found.lengths] == [
        ("adamw", "lora", (0, 2)), ("sgd", "lora", (1,)), ("adamw", "full", (3,)), (None, None, (4,)),
    ]  # fmt: skip
    assert not found.unequal
    assert found.unknown == (5,)
    assert found.lengths[0].approximate == ("optimizer", "weight decay", "adapter", "schedule")
    assert {difference.field: difference.values for difference in found.differences} == {
        "family": ("adamw", "sgd", "adamw", "adamw", None, None),
        "adapter": ("lora", "lora", "lora", "full", None, None),
    }


def test_what_differs_is_told_as_values() -> None:
    found = compare([constant(0.1, 10, batch_size=8, data="a,b"), constant(0.1, 10, batch_size=64, data=["a", "b"])])
    (difference,) = found.differences
    assert (difference.field, difference.values) == ("batch_size", (8, 64))


def test_nothing_known_is_nothing_said() -> None:
    empty = plain()
    assert empty.length is empty.steps is empty.family is empty.gradient is empty.final_gradient is None
    assert empty.power(1.0) is None
    found = compare([empty, empty])
    assert (found.lengths, found.unknown, found.differences) == ((), (0, 1), ())


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({"batch_per_device": 2, "devices": 4, "accumulation": 8}, "batch_size", 64),
        ({"batch_per_device": 2, "accumulation": 8}, "batch_size", None),
        ({"steps": 100, "batch_size": 8, "epochs": 2}, "rows", 400),
        ({"rows": 400, "epochs": 2, "batch_size": 8}, "steps", 100),
        ({"steps": 100, "batch_size": 8, "rows": 400}, "epochs", 2.0),
        ({"steps": 100, "rows": 400, "epochs": 2}, "batch_size", 8),
        ({"max_steps": 100, "batch_size": 8, "rows": 400}, "epochs", 2.0),
        ({"num_train_epochs": 3, "max_steps": 10}, "epochs", None),
        ({"num_train_epochs": 3}, "epochs", 3),
        ({"warmup_ratio": 0.1, "steps": 50}, "warmup_steps", 5.0),
        ({"warmup_ratio": 0.1, "warmup_steps": 0, "steps": 50}, "warmup_steps", 5.0),
    ],
)
def test_what_follows_is_inferred_and_nothing_else(fields: dict[str, Any], name: str, value: Any) -> None:
    found = plain(**fields)
    assert getattr(found, name) == value
    assert (name in found.sources) == (value is not None)
    assert found.conflicts == ()


def test_a_stopped_run_follows_the_schedule_that_was_planned() -> None:
    whole = plain(learning_rate=1.0, steps=100, max_steps=100, schedule="linear").length
    half = plain(learning_rate=1.0, steps=50, max_steps=100, schedule="linear").length
    assert whole is not None
    assert half is not None
    assert half.value == pytest.approx(sum(1 - t / 100 for t in range(50)))
    assert half.value / whole.value == pytest.approx(0.75, abs=0.01)


def test_a_length_that_is_given_counts() -> None:
    found = plain(length=3.0, steps=10, learning_rate=1.0, schedule="constant").length
    assert found is not None
    assert (found.value, found.squares, found.how) == (3.0, None, "given")


def write(path: Path, rows: list[tuple[Any, ...]], header: str = "step,loss,lr,grad_norm") -> Path:
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def test_several_sources_complete_each_other_and_contradictions_are_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", [(t, 2 / t, 0.1, 3.0) for t in range(1, 11)])
    said = {"rows": 40, "batch_size": 8, "optimizer": "sgd", "learning_rate": 0.05, "epochs": 9, "steps": 5}
    found = read_training([said, path], "math")
    assert (found.rows, found.optimizer, found.final_loss) == (40, "sgd", 0.2)
    assert [(conflict.field, conflict.kept.value, conflict.other.value) for conflict in found.conflicts] == [
        ("steps", 5, 10), ("learning_rate", 0.05, 0.1), ("epochs", 9, 1.0),
    ]  # fmt: skip
    assert found.conflicts[0].kept.source == "math: steps"
    assert str(path) in found.conflicts[0].other.source
    more = read_training([{"batch_size": 8}, {"batch_per_device": 2, "devices": 2, "accumulation": 1}], "math")
    assert [(conflict.field, conflict.other.value) for conflict in more.conflicts] == [("batch_size", 4)]
    again = read_training([{"optimizer": "SGD"}, {"optim": "sgd", "lr": 0.1}, {"lr": 0.1 + 1e-12}], "math")
    assert again.conflicts == ()


def test_a_log_that_ends_just_before_the_planned_end_was_finished(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", [(t, 1.0, 0.1, 1.0) for t in range(10, 100, 10)])
    assert read_training([path, {"max_steps": 95}], "a").steps == 95
    assert read_training([path, {"max_steps": 200}], "a").steps == 90


def test_a_log_of_the_beginning_does_not_stand_for_the_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", [(t, 1.0, 0.1, 1.0) for t in range(1, 11)])
    known: dict[str, Any] = {"steps": 100, "learning_rate": 0.1}
    scheduled = read_training([{**known, "schedule": "linear"}, path], "a").length
    assert scheduled is not None
    assert (scheduled.how, scheduled.value) == ("schedule", pytest.approx(5.05))
    sparse = read_training([known, path], "a").length
    assert sparse is not None
    assert sparse.how == "interpolated"


def test_the_power_of_a_log_is_its_steps_own_sum(tmp_path: Path) -> None:
    rows = [(t, 1.0, 0.1 / t, 3.0 + t) for t in range(1, 31)]
    found = read_training(write(tmp_path / "log.csv", rows), "a")
    rates, norms = [row[2] for row in rows], [row[3] for row in rows]
    assert found.power(2.0) == pytest.approx(gradient_power(rates, norms, 2.0))
    assert found.power(None) is None
    assert found.gradient == pytest.approx(np.mean(np.square(norms)))
    assert found.final_gradient == pytest.approx(np.mean(np.square(norms[-3:])))
    flat = read_training([write(tmp_path / "flat.csv", [(5, 1.0, "", 2.0)]), {"steps": 9, "lr": 0.1}], "a")
    assert flat.power(1.0) == pytest.approx(9 * 0.01 * 4 * 5)


def test_the_last_logged_noise_scale_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", [(t, t) for t in range(1, 11)], "step,gradient_noise_scale")
    assert read_training(path, "a").noise_scale == 10


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: read_training({"learning_rte": 1}, "math"), "math: unknown key 'learning_rte'; did you mean"),
        (lambda: read_training({"steps": "many"}, "math"), "math: steps: 'many' is not a number"),
        (lambda: read_training([3], "math"), "math: logs: must be a path or a mapping, not a int"),
        (lambda: read_training([{"steps": 1}, None], "math"), "not a NoneType"),
        (lambda: read_training("/no/such/place", "math"), "no such log or folder"),
    ],
)
def test_wrong_sources_are_named(wrong: Callable[[], Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        wrong()
