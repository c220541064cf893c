import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from consilience.doctor.evidence.logs.folder import read_file, read_folder
from consilience.doctor.evidence.training import Training, read_training
from consilience.errors import InputError
from consilience.training.settings import Settings


def log(steps: int, peak: float = 1e-3, every: int = 1) -> list[dict[str, Any]]:
    """A linear decay, logged as transformers does: the rate that the step used."""
    rates = [peak * (1 - t / steps) for t in range(steps)]
    logged = range(every, steps + 1, every)
    return [{"step": t, "loss": 2 / t, "learning_rate": rates[t - 1], "grad_norm": 1.0} for t in logged]


def state(steps: int = 20, **more: Any) -> dict[str, Any]:
    return {
        "global_step": steps, "max_steps": steps, "epoch": 2.0, "num_train_epochs": 2, "train_batch_size": 4,
        "logging_steps": 10, "log_history": log(steps), "best_model_checkpoint": "/elsewhere/checkpoint-1", **more,
    }  # fmt: skip


def put(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_a_trainer_state_says_what_was_done(tmp_path: Path) -> None:
    found = read_training(put(tmp_path / "trainer_state.json", state()), "a")
    assert (found.steps, found.planned_steps, found.epochs, found.batch_per_device) == (20, 20, 2.0, 4)
    assert found.batch_size is None
    assert found.length is not None
    assert found.length.how == "logged"
    assert found.length.value == pytest.approx(sum(1e-3 * (1 - t / 20) for t in range(20)))
    assert found.sources["steps"].endswith("trainer_state.json: global_step")
    assert found.learning_rate == 1e-3
    assert found.final_loss == pytest.approx((2 / 19 + 2 / 20) / 2)


def test_the_newest_checkpoint_counts_and_the_folders_own_state_where_it_went_further(tmp_path: Path) -> None:
    for steps in (9, 10, 100):
        put(tmp_path / f"checkpoint-{steps}" / "trainer_state.json", state(steps))
    assert read_training(tmp_path, "a").steps == 100
    put(tmp_path / "trainer_state.json", state(120))
    assert read_training(tmp_path, "a").steps == 120
    assert read_training(tmp_path / "checkpoint-9", "a").steps == 9


def test_real_arguments_complete_a_state(tmp_path: Path) -> None:
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-3,
        num_train_epochs=2, weight_decay=0.1, optim="adamw_torch", lr_scheduler_type="linear", report_to=[],
        use_cpu=True,
    )  # fmt: skip
    put(tmp_path / "training_args.json", {**arguments.to_dict(), "world_size": 2, "train_samples": 160})
    put(tmp_path / "trainer_state.json", state())
    found = read_training(tmp_path, "a")
    assert (found.batch_size, found.devices, found.accumulation, found.rows) == (16, 2, 2, 160)
    assert (found.optimizer, found.family, found.weight_decay, found.schedule) == (
        "adamw_torch",
        "adamw",
        0.1,
        "linear",
    )
    assert found.conflicts == ()


def test_a_pickle_that_is_a_call_is_left_unread_without_running_it(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Code:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(ran),))

    torch.save(Code(), tmp_path / "training_args.bin")
    put(tmp_path / "log.csv", "step,loss\n1,2\n")
    found = read_training(tmp_path, "a")
    (line,) = found.unread
    assert "left unread" in line
    assert "training_args.json" in line
    assert "\n" not in line
    assert read_file(tmp_path / "training_args.bin").unread == found.unread
    assert not ran.exists()


def test_plain_values_in_a_torch_file_are_read_and_a_bomb_is_not(tmp_path: Path) -> None:
    path = tmp_path / "training_args.bin"
    torch.save({"learning_rate": 1e-3, "max_steps": 10, "lr_scheduler_type": "constant"}, path)
    found = read_training(path, "a")
    assert found.length is not None
    assert (found.length.value, found.length.how) == (pytest.approx(1e-2), "schedule")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * (1 << 24))
    with pytest.raises(InputError, match="packed as torch never does"):
        read_file(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02r\xff\xff\xff\xff")
    assert read_file(path).unread
    path.write_bytes(b"not a zip")
    with pytest.raises(InputError, match="not a readable torch file"):
        read_file(path)


@pytest.mark.parametrize("protocol", [2, 4])
def test_settings_are_read_off_a_pickle_s_opcodes_and_nests_are_not_walked(tmp_path: Path, protocol: int) -> None:
    nest: list[Any] = []
    for _ in range(60):  # 2^60 entries to whoever walks it
        nest = [nest, nest]
    arguments = TrainingArguments(str(tmp_path), learning_rate=0.5, optim="sgd", report_to=[], use_cpu=True)
    vars(arguments)["hub_token"] = nest  # of another type than it is declared, as a file may be
    path = tmp_path / "training_args.bin"
    torch.save(arguments, path, pickle_protocol=protocol)
    facts = read_file(path).facts
    assert (facts["learning_rate"].value, facts["optimizer"].value) == (0.5, "sgd")
    tuples = b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))  # a key that takes for ever to hash
    for pickled in (b"\x80\x02})" + tuples + b"K\x01s.", b"\x80\x02]q\x00h\x00a.", b"."):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickled)
        assert "left unread" in read_file(path).unread[0]


AXOLOTL = """
base_model: some/model
adapter: lora
lora_r: 16
lora_alpha: 32
datasets:
  - path: math.jsonl
    type: alpaca
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 3
max_steps: 50
optimizer: paged_adamw_8bit
lr_scheduler: cosine
learning_rate: 2e-4
warmup_ratio: 0.1
weight_decay: 0.0
deepspeed: {zero: 3}
"""
FACTORY = """
model_name_or_path: some/model
finetuning_type: full
dataset: identity,alpaca
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-5
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
"""
TRL = """
model_name_or_path: some/model
dataset_name: trl-lib/Capybara
use_peft: true
lora_r: 32
learning_rate: 2.0e-4
max_steps: 100
per_device_train_batch_size: 2
optim: adamw_torch
"""


def test_configs_of_three_frameworks_are_read(tmp_path: Path) -> None:
    first = read_training(put(tmp_path / "axolotl.yaml", AXOLOTL), "a")
    assert (first.adapter, first.lora_rank, first.lora_alpha, first.data) == ("lora", 16, 32, ("math.jsonl",))
    assert (first.family, first.steps, first.warmup_steps, first.accumulation) == ("adamw", 50, 5.0, 4)
    assert first.length is not None
    assert first.length.how == "schedule"
    second = read_training(put(tmp_path / "factory.yml", FACTORY), "b")
    assert (second.adapter, second.epochs, second.data) == ("full", 3.0, ("identity", "alpaca"))
    assert second.steps is second.length is None
    third = read_training(put(tmp_path / "trl.yaml", TRL), "c")
    assert (third.adapter, third.data) == ("lora", ("trl-lib/Capybara",))
    assert third.length is not None
    assert (third.length.value, third.length.how) == (pytest.approx(0.02), "peak")


def test_an_adapters_config_and_logs_in_folders_are_found(tmp_path: Path) -> None:
    put(tmp_path / "adapter_config.json", {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q"]})
    put(tmp_path / "logs" / "version_1" / "metrics.csv", "step,loss,lr\n1,2,0.1\n2,1,0.1\n")
    put(tmp_path / "train.jsonl", '{"prompt": "a"}\n' * 3)
    put(tmp_path / "values.csv", "name,score\na,1\n")
    put(tmp_path / "deploy.yaml", "replicas: 3\n")
    put(tmp_path / "src" / "other.csv", "step,loss\n99,2\n")
    found = read_training(tmp_path, "a")
    assert (found.adapter, found.lora_rank, found.steps) == ("lora", 8, 2)
    assert found.unread == ()
    assert found.length is not None
    assert found.length.value == pytest.approx(0.2)


def test_our_own_record_is_read(tmp_path: Path) -> None:
    share = {"name": "math", "path": "/p", "digest": "d", "rows": 40, "drawn": 100, "tokens": 9, "cut": 0}
    record = {
        "base": "b", "base_digest": "x", "tasks": [share], "learning_rate": 1e-3, "steps": 25, "batch_size": 4,
        "warmup": 0.2, "weight_decay": 0.0, "clip": 1.0, "seed": 0, "precision": "mixed", "lora_rank": 8,
        "lora_alpha": 16.0, "target_modules": None, "parameters": 10, "first_loss": 3.0, "final_loss": 2.0,
        "curve": [{"step": 10, "loss": 2.5, "tasks": {}}, {"step": 25, "loss": 2.0, "tasks": {}}],
        "seconds": 1.0, "threads": 1, "device": "cpu", "versions": {},
        "optimizer": "AdamW, betas 0.9 and 0.999, epsilon 1e-8", "schedule": "linear warm-up, then cosine to zero",
    }  # fmt: skip
    put(tmp_path / "consilience" / "training.json", record)
    found = read_training(tmp_path, "a")
    assert (found.steps, found.rows, found.epochs, found.family, found.data) == (25, 40, 2.5, "adamw", ("math",))
    assert found.conflicts == ()
    run = Settings(learning_rate=1e-3, steps=25, warmup=0.2)
    assert found.length is not None
    assert found.length.value == pytest.approx(sum(run.learning_rate_at(step) for step in range(25)))
    for wrong in ({"tasks": [{**share, "rows": "x"}]}, {"warmup": "x"}, {"steps": 1e999}, {"lora_rank": "x"}):
        put(tmp_path / "training.json", {**record, **wrong})
        with pytest.raises(InputError, match=r"training\.json"):
            read_file(tmp_path / "training.json")


def test_links_out_of_the_folder_are_left_unread_and_named(tmp_path: Path) -> None:
    outside = put(tmp_path / "secret" / "trainer_state.json", state())
    run = tmp_path / "run"
    put(run / "log.csv", "step,loss\n1,2\n")
    (run / "trainer_state.json").symlink_to(outside)
    (run / "logs").symlink_to(outside.parent)
    (run / "loop.csv").symlink_to("loop.csv")
    found = read_training(run, "a")
    assert found.steps == 1
    (line,) = found.unread
    assert "leads out of the folder" in line
    assert "trainer_state.json" in line


def test_a_hub_caches_links_are_its_files(tmp_path: Path) -> None:
    blob = put(tmp_path / "models--a" / "blobs" / "abc", state())
    snapshot = tmp_path / "models--a" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "trainer_state.json").symlink_to(Path("../../blobs") / blob.name)
    assert read_training(snapshot, "a").steps == 20


def test_names_inside_files_are_not_followed(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "trainer_state.json", state(77))
    said = {"output_dir": str(tmp_path / "elsewhere"), "learning_rate": 1.0, "logging_dir": "../elsewhere"}
    put(tmp_path / "run" / "args.json", said)
    assert read_training(tmp_path / "run", "a").steps is None


def test_one_bad_file_among_good_ones_is_told_and_alone_it_is_an_error(tmp_path: Path) -> None:
    put(tmp_path / "trainer_state.json", '{"log_history": [')
    with pytest.raises(InputError, match="holds no training log that can be read"):
        read_training(tmp_path, "a")
    put(tmp_path / "logs" / "log.csv", "step,loss\n1,2\n")
    found = read_training(tmp_path, "a")
    assert found.steps == 1
    assert "not valid JSON" in found.unread[0]


BOMB = "\n".join(["a0: &a0 [1, 1]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 30))])


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("trainer_state.json", {"log_history": {}, "global_step": 1}, "log_history: must be a list"),
        ("trainer_state.json", {"log_history": [], "global_step": "many"}, "global_step: 'many' is not a number"),
        ("trainer_state.json", {"log_history": [], "epoch": [1]}, "epoch: "),
        ("trainer_state.json", "[1]", "not an object"),
        ("trainer_state.json", '{"a": ' * 5000 + "1" + "}" * 5000, "trainer_state"),
        ("args.json", {"learning_rate": {"a": 1}}, "learning_rate: "),
        ("run.yaml", "learning_rate: fast\n", "learning_rate: 'fast'"),
        ("run.yaml", "a: &a [1]\n" + "\n".join(f"b{i}: &b{i} [*a, *a]" for i in range(3)), "says nothing"),
        ("run.yaml", "- 1\n", "says nothing"),
        ("run.yaml", "a: b: c", "not valid YAML"),
        ("run.yaml", BOMB, "expanded"),
        ("adapter_config.json", {"peft_type": "LORA", "r": -1}, "r: -1 is out of its range"),
        ("run.txt", "hello", "of a kind that is read"),
    ],
)
def test_malformed_files_are_named_in_one_line(tmp_path: Path, name: str, value: Any, says: str) -> None:
    path = put(tmp_path / name, value)
    with pytest.raises(InputError, match=says) as caught:
        read_training(path, "a")
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_odd_places_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").mkdir()
    for source, says in (
        (tmp_path, "holds no training log"),
        (tmp_path / "trainer_stat.json", r"did you mean 'trainer_state.json'"),
        (tmp_path / "x\0y", "no such log"),
    ):
        with pytest.raises(InputError, match=says):
            read_training(source, "a")
    os.mkfifo(tmp_path / "log.csv")
    os.mkfifo(tmp_path / "run.log")
    for name in ("log.csv", "run.log"):
        with pytest.raises(InputError, match="not a regular file"):
            read_file(tmp_path / name)
    with pytest.raises(InputError, match="holds no training log"):
        read_folder(tmp_path)


def test_files_that_are_too_large_are_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "log.csv", "wb") as file:
        file.write(b"step,loss\n1,2\n")
        file.truncate(65 << 20)
    with pytest.raises(InputError, match="too many for a log"):
        read_file(tmp_path / "log.csv")
    put(tmp_path / "trainer_state.json", state())
    assert "too many" in read_training(tmp_path, "a").unread[0]


def test_states_with_odd_logs_keep_what_is_sound(tmp_path: Path) -> None:
    text = json.dumps(state(log_history=[])).replace(
        '"log_history": []',
        '"log_history": [{"step": 1, "loss": NaN, "learning_rate": "1e-3"}, 7, null, {"loss": 3}, '
        '{"step": 20, "learning_rate": 1e999, "loss": 1.5}, {"step": 20, "train_runtime": 1, "train_loss": 9}]',
    )
    found: Training = read_training(put(tmp_path / "trainer_state.json", text), "a")
    assert found.curve.series["loss"].values.tolist() == [1.5]
    assert found.curve.series["learning_rate"].values.tolist() == [1e-3]
    assert found.curve.skipped == 3
    assert (found.highest_rate, found.learning_rate, found.length) == (1e-3, None, None)  # one of 20 is not the peak
