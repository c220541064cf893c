import csv
import io
import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.doctor.evidence.logs.curve import collect, column, step_key
from consilience.doctor.evidence.logs.facts import FIELDS, fold, number, read_facts
from consilience.doctor.evidence.logs.tables import looks_like_log, read_csv, read_jsonl
from consilience.errors import InputError


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def pairs(reading: Any, name: str) -> list[tuple[float, float]]:
    series = reading.curve.series[name]
    return list(zip(series.steps.tolist(), series.values.tolist(), strict=True))


@pytest.mark.parametrize(
    ("header", "mark"),
    [
        ("step,loss,learning_rate,grad_norm", ","),
        ("global_step;train/loss;lr;gradient-norm", ";"),
        ("Step\tTraining Loss\tlr-AdamW\tgrad norm", "\t"),
        ('"trainer/global_step","train_loss_step","Learning Rate","gnorm"', ","),
    ],
)
def test_columns_are_known_by_many_names(tmp_path: Path, header: str, mark: str) -> None:
    rows = [["10", "1.5", "5e-5", "2"], ["20", "1.25", "2.5E-5", "3"]]
    path = written(tmp_path, "log.csv", "\n".join([header, *(mark.join(row) for row in rows)]) + "\n")
    found = read_csv(path)
    assert pairs(found, "loss") == [(10, 1.5), (20, 1.25)]
    assert pairs(found, "learning_rate") == [(10, 5e-5), (20, 2.5e-5)]
    assert pairs(found, "grad_norm") == [(10, 2), (20, 3)]
    assert looks_like_log(path, path.read_bytes())


def test_evaluations_and_summaries_are_no_training_losses() -> None:
    assert [column(key) for key in ("eval/loss", "eval_loss", "val_loss", "lr_scheduler_type")] == [None] * 4
    rows: list[tuple[Any, dict[str, Any]]] = [(1, {"loss": 2.0}), (1, {"train_loss": 9.0, "train_runtime": 3.0})]
    assert collect(rows, "log").series["loss"].values.tolist() == [2.0]


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(-1e6, 1e6), st.floats(0, 1)), min_size=1, max_size=20))
@settings(max_examples=30)
def test_csv_and_jsonl_give_back_what_was_logged(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    rows = sorted({row[0]: row for row in rows}.values())
    folder = tmp_path_factory.mktemp("log")
    text = io.StringIO()
    csv.writer(text).writerows([["step", "loss", "lr"], *rows])
    lines = [json.dumps({"step": step, "loss": loss, "lr": rate}) for step, loss, rate in rows]
    for found in (
        read_csv(written(folder, "a.csv", text.getvalue())),
        read_jsonl(written(folder, "a.jsonl", "\n".join(lines))),
    ):
        assert pairs(found, "loss") == [(step, loss) for step, loss, _ in rows]
        assert pairs(found, "learning_rate") == [(step, rate) for step, _, rate in rows]
        assert found.curve.skipped == 0


def test_a_last_line_that_is_being_written_is_left_out_and_a_broken_one_in_the_middle_is_named(tmp_path: Path) -> None:
    good = '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n'
    found = read_jsonl(written(tmp_path, "a.jsonl", good + '{"step": 3, "lo'))
    assert pairs(found, "loss") == [(1, 2.0), (2, 1.0)]
    with pytest.raises(InputError, match=r"b\.jsonl: row 2 is not JSON"):
        read_jsonl(written(tmp_path, "b.jsonl", '{"step": 1, "loss": 2.0}\n{"st\n' + good))
    with pytest.raises(InputError, match="row 1 is a JSON list"):
        read_jsonl(written(tmp_path, "c.jsonl", "[1]\n" + good))
    cut = "step,loss,lr\n1,2,0.1\n2,1.5"
    assert pairs(read_csv(written(tmp_path, "a.csv", cut)), "loss") == [(1, 2.0)]
    assert pairs(read_csv(written(tmp_path, "a.csv", cut + "\n")), "loss") == [(1, 2.0), (2, 1.5)]


def test_values_that_are_no_finite_numbers_are_skipped_and_counted(tmp_path: Path) -> None:
    rows = [
        '{"step": 1, "loss": NaN, "grad_norm": Infinity, "lr": "1e-4"}',
        '{"step": 2, "loss": "inf", "grad_norm": 1e400, "lr": [1]}',
        '{"step": 3, "loss": 1.0, "grad_norm": -1, "lr": true}',
        '{"step": "x", "loss": 1.0}',
        '{"step": 1e300, "loss": 1.0}',
        '{"step": -4, "loss": 1.0}',
        '{"eval_loss": 1.0}',
        '{"step": 4.0, "loss": null, "lr": ""}',
        '{"step": 5, "loss": 1e13}',
    ]
    found = read_jsonl(written(tmp_path, "a.jsonl", "\n".join(rows)))
    assert pairs(found, "loss") == [(3, 1.0)]
    assert pairs(found, "learning_rate") == [(1, 1e-4)]
    assert "grad_norm" not in found.curve.series
    assert found.curve.skipped == 11


def test_a_restart_replaces_what_was_logged_after_it() -> None:
    rows = [(step, {"loss": float(step)}) for step in (1, 2, 3, 4)] + [(3, {"loss": 30.0}), (3, {"loss": 31.0})]
    series = collect(rows, "log").series["loss"]
    assert (series.steps.tolist(), series.values.tolist()) == ([1, 2, 3], [1, 2, 31])


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "", "is empty"),
        ("a.csv", "epoch,loss\n1,2\n", "no column 'step'"),
        ("a.csv", "step,accuracy\n1,2\n", "no column loss"),
        ("a.csv", 'step,loss\n1,"2\n' + "x" * 200_000, "no CSV table"),
        ("a.csv", "step,loss\n" + "1" * (1 << 20) + "0\n", "line 2 has"),
        ("a.jsonl", '{"text": "a"}\n', "no column 'step'"),
        ("a.jsonl", "[" * 100_000 + "\n{}", "row 1 is not JSON"),
    ],
)
def test_other_tables_are_named(tmp_path: Path, name: str, text: str, says: str) -> None:
    path = written(tmp_path, name, text)
    with pytest.raises(InputError, match=says) as caught:
        (read_csv if name.endswith("csv") else read_jsonl)(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert not looks_like_log(path, path.read_bytes()[:1000]) or "line 2" in says or "CSV" in says


def test_text_of_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("step,loss\n1,é\n".encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8"):
        read_csv(path)


@given(st.binary(max_size=300))
@settings(max_examples=80)
def test_any_bytes_give_a_log_or_one_line(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("log") / "a.jsonl"
    path.write_bytes(data)
    messages: list[str] = []
    for reader in (read_jsonl, read_csv):
        try:
            reader(path)
        except InputError as error:
            messages.append(str(error))
    assert not any("\n" in message for message in messages)


@given(st.text(string.printable, max_size=12))
def test_numbers_are_finite_or_none(text: str) -> None:
    found = number(text)
    assert found is None or abs(found) <= 1e12


def test_numbers_may_be_spelled() -> None:
    assert [number(value) for value in ("5e-5", " 3 ", 7, 1.5)] == [5e-5, 3, 7, 1.5]
    assert [number(value) for value in (True, None, "x", "nan", float("inf"), 10**400, 1e13, [1])] == [None] * 8


def test_keys_of_many_frameworks_name_the_same_fields() -> None:
    transformers = {"per_device_train_batch_size": 4, "learning_rate": "5e-5", "optim": "adamw_torch", "max_steps": -1}
    axolotl = {"micro_batch_size": 4, "lr": 5e-5, "optimizer": "adamw_torch", "warmup_steps": 0.1, "adapter": ""}
    first, second = read_facts(transformers, "a"), read_facts(axolotl, "b")
    for name in ("batch_per_device", "learning_rate", "optimizer"):
        assert first[name].value == second[name].value
    assert first["learning_rate"].source == "a: learning_rate"
    assert "planned_steps" not in first
    assert second["warmup_ratio"].value == 0.1
    assert second["adapter"].value == "full"
    nested = read_facts({"lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "datasets": [{"path": "x"}, "y"]}, "c")
    assert nested["least_share"].value == 0.1
    assert nested["data"].value == ("x", "y")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"learning_rate": "fast"}, "run: learning_rate: 'fast' is not a number"),
        ({"learning_rate": float("nan")}, "is not a number"),
        ({"learning_rate": [1]}, "is not a number"),
        ({"learning_rate": True}, "is not a number"),
        ({"learning_rate": 1e300}, "is not a number"),
        ({"learning_rate": -1}, "out of its range"),
        ({"warmup_ratio": 2}, "out of its range"),
        ({"batch_size": 0}, "out of its range"),
        ({"batch_size": 1.5}, "whole number"),
        ({"learning_rat": 1}, "unknown key 'learning_rat'; did you mean 'learning_rate'"),
        ({3: 1}, "unknown key '3'; use steps"),
    ],
)
def test_wrong_values_name_file_and_key(values: dict[Any, Any], says: str) -> None:
    with pytest.raises(InputError, match=says.replace("?", r"\?")):
        read_facts(values, "run", strict=True)


def test_fields_and_step_names_are_folded() -> None:
    assert fold("Trainer/Global-Step ") == "trainer_global_step"
    assert step_key(["loss", "_step"]) == "_step"
    assert step_key(["epoch"]) is None
    assert len(set(FIELDS)) == len(FIELDS)
