"""What the doctor says of genuine Trainer folders: settings read without running code, lengths compared rightly."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from consilience.doctor.evidence.training import Training, read_training
from tests.real_files.support import cli, hf, peft, real_file, tiny

SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_key_value_heads": 2}


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Sixteen rows of noise."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, 60, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def trained(folder: Path, model: Any = None, **settings: Any) -> list[float]:
    """Train a tiny model with transformers' Trainer; return the learning rate of every step."""
    given = {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "max_steps": 20, "logging_steps": 7} | settings
    arguments = hf.TrainingArguments(
        str(folder), report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, **given
    )
    trainer = hf.Trainer(tiny("Llama", **SMALL) if model is None else model, arguments, train_dataset=Rows())
    rates: list[float] = []

    class Seen(hf.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            rates.append(more["optimizer"].param_groups[0]["lr"])

    trainer.add_callback(Seen())
    trainer.train()
    trainer.save_model(str(folder))
    trainer.save_state()
    return rates


def doctor(tmp_path: Path, **experts: Path) -> tuple[Any, str]:
    """Return the doctor's report on experts of a tiny Llama, as JSON and as text."""
    tiny("Llama", **SMALL).save_pretrained(tmp_path / "base")
    words = [word for name, path in experts.items() for word in ("-e", f"{name}={path}")]
    told = cli("doctor", tmp_path / "base", *words)
    assert told.code == 0, told.said
    return json.loads(cli("doctor", tmp_path / "base", *words, "--json").out), told.out


def kinds(report: Any) -> list[str]:
    return [one["kind"] for one in report["findings"]]


@real_file(12, family="transformers Trainer", option="adamw beside sgd, 5 logged steps", expected="lr of every step",
           before="wrong numbers")  # fmt: skip
def test_lengths_of_two_optimizers_are_not_compared(tmp_path: Path) -> None:
    rates = trained(tmp_path / "a", logging_steps=5)
    trained(tmp_path / "b", optim="sgd", learning_rate=0.5, lr_scheduler_type="constant")
    report, text = doctor(tmp_path, a=tmp_path / "a", b=tmp_path / "b")
    assert "unequal-length" not in kinds(report)
    first, second = report["training"]
    assert (first["optimizer"], second["optimizer"]) == ("adamw_torch_fused", "sgd")
    assert first["length"] == pytest.approx(sum(rates))
    assert second["length"] == pytest.approx(10)
    assert "multiplying" not in text
    assert "not read" not in text


@pytest.mark.parametrize(
    "settings",
    [
        {"lr_scheduler_type": "cosine", "warmup_steps": 3},
        {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 3}},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}, "logging_steps": 15},
        {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 0.25},
        {"optim": "adafactor", "logging_steps": 500},
    ],
    ids=["warm-up", "restarts", "power", "ratio", "nothing logged"],
)
@real_file(12, family="transformers Trainer", option="schedules with few logged rates", expected="lr of every step",
           before="wrong numbers")  # fmt: skip
def test_the_peak_and_the_length_are_those_of_the_schedule(tmp_path: Path, settings: dict[str, Any]) -> None:
    rates = trained(tmp_path / "a", **settings)
    found: Training = read_training(str(tmp_path / "a"), "a")
    assert found.learning_rate == pytest.approx(1e-3)
    assert found.length is not None
    assert found.length.value == pytest.approx(sum(rates), rel=1e-4)
    assert (found.steps, found.batch_size, found.conflicts, found.unread) == (20, 2, (), ())


@real_file(12, family="PEFT on the Trainer", option="eight adapters by adamw, accumulation 2", expected="lr of steps",
           before="wrong numbers")  # fmt: skip
def test_eight_unequal_trainings_are_one_note(tmp_path: Path) -> None:
    experts: dict[str, Path] = {}
    lengths: dict[str, float] = {}
    for k in range(8):
        path = tmp_path / f"x{k}"
        model = peft.get_peft_model(tiny("Llama", **SMALL), peft.LoraConfig(target_modules=["q_proj"], r=2))
        lengths[f"x{k}"] = sum(trained(path, model, gradient_accumulation_steps=2, max_steps=k + 2))
        experts[f"x{k}"] = path
    report, text = doctor(tmp_path, **experts)
    (unequal,) = [one for one in report["findings"] if one["kind"] == "unequal-length"]
    assert unequal["severity"] == "note"
    assert [one["length"] for one in report["training"]] == pytest.approx(list(lengths.values()))
    assert [one["batch_size"] for one in report["training"]] == [4] * 8
    assert {one["adapter"] for one in report["training"]} == {"lora"}
    above = text.split("\nexpert ")[0]
    assert above.count("note:") <= 2
    assert "27 of 30" not in text
    assert "multipl" not in above


@real_file(12, family="transformers Trainer", option="trainer_state.json alone", expected="the state's own log",
           before="wrong numbers")  # fmt: skip
def test_without_an_optimizer_nothing_is_compared(tmp_path: Path) -> None:
    for name, steps in (("a", 4), ("b", 20)):
        trained(tmp_path / name, max_steps=steps, logging_steps=1)
        (tmp_path / name / "training_args.bin").unlink()
    report, text = doctor(tmp_path, a=tmp_path / "a", b=tmp_path / "b")
    assert not {"unequal-length", "hot-training"} & set(kinds(report))
    assert "the optimizer of a, b" in text


@real_file(12, family="transformers Trainer", option="trainer_state.json alone, logged after the peak",
           expected="the state's own log", before="wrong numbers")  # fmt: skip
def test_the_highest_logged_rate_is_no_peak(tmp_path: Path) -> None:
    trained(tmp_path / "a", learning_rate=1e-3, logging_steps=10)
    (tmp_path / "a" / "training_args.bin").unlink()
    report, text = doctor(tmp_path, a=tmp_path / "a")
    (one,) = report["training"]
    assert (one["learning_rate"], one["highest_rate"]) == (None, pytest.approx(0.55e-3))
    assert ">= 0.00055" in text
    assert one["length"] is None  # two rates show no schedule, and the most it can be is not known


@real_file(12, family="transformers Trainer", option="sgd with momentum beside sgd", expected="optim_args",
           before="wrong numbers")  # fmt: skip
def test_momentum_is_another_optimizer(tmp_path: Path) -> None:
    trained(tmp_path / "a", optim="sgd", max_steps=5, logging_steps=1)
    trained(tmp_path / "b", optim="sgd", optim_args="momentum=0.9", logging_steps=1)
    report, _ = doctor(tmp_path, a=tmp_path / "a", b=tmp_path / "b")
    assert "unequal-length" not in kinds(report)
    assert "different-family" in kinds(report)
    assert [one["stability"] is None for one in report["training"]] == [False, True]


@real_file(12, family="torch", option="training_args.bin that runs code", expected="nothing runs",
           before="wrong numbers")  # fmt: skip
def test_arguments_with_a_call_run_nothing(tmp_path: Path) -> None:
    trained(tmp_path / "a")
    ran = tmp_path / "ran"

    class Code:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(ran),))

    arguments = hf.TrainingArguments(str(tmp_path), learning_rate=0.25, report_to=[], use_cpu=True)
    arguments.hub_token = Code()
    torch.save(arguments, tmp_path / "a" / "training_args.bin")
    found = read_training(str(tmp_path / "a"), "a")
    assert found.learning_rate == 0.25
    assert not ran.exists()


@real_file(12, family="trl", option="SFTConfig, a subclass with objects of its own", expected="its fields",
           before="wrong numbers")  # fmt: skip
def test_a_subclass_of_the_arguments_is_read(tmp_path: Path) -> None:
    trained(tmp_path / "a")
    (tmp_path / "a" / "training_args.bin").unlink()
    arguments = SftLike(str(tmp_path), learning_rate=1e-3, max_steps=20, optim="lion_32bit", report_to=[], use_cpu=True)
    arguments.model_init_kwargs = {"dtype": torch.bfloat16, "sizes": torch.ones(2)}
    torch.save(arguments, tmp_path / "a" / "training_args.bin")
    found = read_training(str(tmp_path / "a"), "a")
    assert (found.family, found.learning_rate, found.unread) == ("lion", 1e-3, ())


class SftLike(hf.TrainingArguments):
    """As trl's config: more fields, pickled with their objects."""

    model_init_kwargs: dict[str, Any] | None = None


@real_file(12, family="CSV log", option="a restart with another rate", expected="the sum of the rates that were used",
           before="right")  # fmt: skip
def test_a_restarted_log_counts_what_was_done(tmp_path: Path) -> None:
    rows = [(t, 0.1) for t in range(1, 8)] + [(t, 0.05) for t in range(4, 11)]
    lines = ["step,loss,lr", *(f"{step},1.0,{rate}" for step, rate in rows)]
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    found = read_training([{"optimizer": "sgd"}, str(tmp_path / "log.csv")], "a")
    assert found.length is not None
    assert (found.length.value, found.length.how) == (pytest.approx(3 * 0.1 + 7 * 0.05), "logged")
