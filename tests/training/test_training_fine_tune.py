import hashlib
import io
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_base import make_tokenizer

from consilience.checkpoints.adapter import open_adapter
from consilience.errors import InputError, MachineError
from consilience.progress import LineProgress
from consilience.tasks import encode, load_task
from consilience.training import TrainingRecord, fine_tune, read_record
from consilience.training import fine_tuning as module
from consilience.training.sampling import draw

with_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def run(base: Path, tasks: Any, out: Path, **settings: Any) -> TrainingRecord:
    values: dict[str, Any] = {"learning_rate": 2e-2, "steps": 12, "batch_size": 4}
    return fine_tune(base, tasks, out, **(values | settings))


def digests(folder: Path) -> dict[str, str]:
    dated = ("training.json", "files.json")
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in dated)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Stop(Exception):
    """Stands for whatever ends a process between two steps."""


def stopping_at(step: int) -> Callable[[int, int, float], None]:
    def listen(done: int, _total: int, _loss: float) -> None:
        if done == step:
            raise Stop

    return listen


def test_a_full_run_learns_both_tasks_and_says_so(base: Path, tasks: list[Path], tmp_path: Path):
    seen: list[tuple[int, int]] = []
    record = run(base, tasks, tmp_path / "out", steps=40, progress=lambda done, total, _: seen.append((done, total)))
    assert seen == [(i, 40) for i in range(1, 41)]
    assert record.final_loss < record.first_loss / 2
    assert [(share.name, share.drawn) for share in record.tasks] == [("copy", 80), ("judge", 80)]
    assert record.tasks[0].epochs == 16
    assert [point.step for point in record.curve] == [10, 20, 30, 40]
    last = record.curve[-1]
    assert last.loss == pytest.approx(sum(last.tasks.values()) / 2, abs=1e-6)
    assert last.tasks["copy"] < record.curve[0].tasks["copy"]
    assert read_record(tmp_path / "out" / "consilience" / "training.json") == record
    assert not (tmp_path / "out.partial").exists()


def test_a_file_that_cannot_be_copied_is_refused_before_training(
    base: Path, tasks: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    place = tmp_path / "linked"
    shutil.copytree(base, place)
    (tmp_path / "secret").write_text("mine")
    (place / "extra.json").symlink_to("../secret")
    monkeypatch.delattr(module, "load_trainee")
    with pytest.raises(InputError, match=r"extra\.json: is a link to a file outside its folder"):
        run(place, tasks, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_a_full_result_is_a_model_for_transformers_with_the_bases_other_files(
    base: Path, tasks: list[Path], tmp_path: Path
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    record = run(base, tasks, tmp_path / "out")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert record.parameters == sum(p.numel() for p in model.parameters())
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == make_tokenizer().chat_template
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_one_step_is_adamws_on_the_clipped_gradient(base: Path, tasks: list[Path], tmp_path: Path):
    """By the paper's formula for the first step: theta - eta * (g / (|g| + eps) + lambda * theta)."""
    from transformers import AutoModelForCausalLM

    run(base, tasks[:1], tmp_path / "out", steps=1, learning_rate=0.01, weight_decay=0.1, clip=0.5, precision="float32")
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    examples = encode(load_task(tasks[0]), make_tokenizer())
    nats: list[Any] = []
    for _, row in draw([5], 4, 0, 0):
        one = examples[row]
        log = model(torch.tensor([one.inputs])).logits[0].log_softmax(-1)
        nats += [-log[p, t] for p, t in zip(one.positions, one.targets, strict=True)]
    torch.autograd.backward(torch.stack(nats).mean())
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    made = load_file(tmp_path / "out" / "model.safetensors")
    for name, p in model.named_parameters():
        g = p.grad * (0.5 / norm)
        expected = p.detach() * (1 - 0.01 * 0.1) - 0.01 * g / (g.abs() + 1e-8)
        settled = g.abs() > 1e-6  # below, rounding decides the sign
        torch.testing.assert_close(made[name][settled], expected[settled], rtol=1e-4, atol=2e-5, msg=name)


@with_peft
def test_a_lora_opens_as_an_adapter_of_every_linear_layer(base: Path, tasks: list[Path], tmp_path: Path):
    record = run(base, tasks, tmp_path / "out", lora_rank=2, steps=40)
    adapter = open_adapter(tmp_path / "out")
    assert len(adapter.pairs) == 14
    assert {(pair.rank, pair.scale) for pair in adapter.pairs.values()} == {(2, 2.0)}
    assert all(tensor.dtype.name == "BF16" for tensor in adapter.checkpoint.tensors.values())
    assert adapter.config["base_model_name_or_path"] == str(base)
    assert adapter.config["target_modules"] == sorted(adapter.config["target_modules"])
    assert record.final_loss < record.first_loss
    assert (record.lora_rank, record.lora_alpha) == (2, 4.0)
    assert record.target_modules == tuple(adapter.config["target_modules"])
    assert record.parameters == sum(
        t.numel() for t in load_file(tmp_path / "out" / "adapter_model.safetensors").values()
    )
    assert read_record(tmp_path / "out" / "training.json") == record


@with_peft
def test_a_lora_of_chosen_modules_and_alpha(base: Path, tasks: list[Path], tmp_path: Path):
    run(base, tasks, tmp_path / "out", lora_rank=2, lora_alpha=3, target_modules=["q_proj", "v_proj"], steps=2)
    adapter = open_adapter(tmp_path / "out")
    assert len(adapter.pairs) == 4
    assert {pair.scale for pair in adapter.pairs.values()} == {1.5}


@with_peft
@pytest.mark.parametrize("rank", [None, 2])
def test_a_run_that_was_stopped_ends_in_the_same_bytes(base: Path, tasks: list[Path], tmp_path: Path, rank: int | None):
    whole = run(base, tasks, tmp_path / "whole", lora_rank=rank)
    for step in (5, 9):
        with pytest.raises(Stop):
            run(base, tasks, tmp_path / "out", lora_rank=rank, checkpoint_seconds=0.0, progress=stopping_at(step))
        assert not (tmp_path / "out").exists()
    seen: list[int] = []
    rest = run(base, tasks, tmp_path / "out", lora_rank=rank, progress=lambda done, *_: seen.append(done))
    assert seen == [9, 10, 11, 12]  # the step it was stopped in was not saved
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert rest.curve == whole.curve
    assert not (tmp_path / "out.partial").exists()


def test_the_state_of_another_run_is_dropped(base: Path, tasks: list[Path], tmp_path: Path):
    with pytest.raises(Stop):
        run(base, tasks, tmp_path / "out", checkpoint_seconds=0.0, progress=stopping_at(5))
    seen: list[int] = []
    run(base, tasks, tmp_path / "out", seed=1, progress=lambda done, *_: seen.append(done))
    assert seen == list(range(1, 13))


@pytest.mark.slow
def test_a_killed_process_leaves_no_out_and_is_continued(base: Path, tasks: list[Path], tmp_path: Path):
    script = (
        "import os, signal, sys\n"
        "from consilience.training import fine_tune\n"
        "kill = lambda done, *_: done == 6 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "fine_tune(sys.argv[1], sys.argv[3:], sys.argv[2], learning_rate=2e-2, steps=12, batch_size=4, threads=1,\n"
        "          checkpoint_seconds=0.0, progress=kill)\n"
    )
    command = [sys.executable, "-c", script, str(base), str(tmp_path / "out"), *map(str, tasks)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial" / "state.safetensors").is_file()
    seen: list[int] = []
    run(base, tasks, tmp_path / "out", progress=lambda step, *_: seen.append(step))
    assert seen == list(range(6, 13))


def test_a_full_disk_keeps_the_state(base: Path, tasks: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_trained", full)
        with pytest.raises(MachineError, match="No space left on device"):
            run(base, tasks, tmp_path / "out", checkpoint_seconds=0.0)
    assert not (tmp_path / "out").exists()
    seen: list[int] = []
    run(base, tasks, tmp_path / "out", progress=lambda step, *_: seen.append(step))
    assert seen == []  # every step was saved


def test_out_is_replaced_only_with_force(base: Path, tasks: list[Path], tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").touch()
    with pytest.raises(InputError, match="exists and is not empty"):
        run(base, tasks, out, steps=1)
    assert (out / "precious").is_file()
    run(base, tasks, out, steps=1, force=True)
    assert not (out / "precious").exists()
    assert (out / "config.json").is_file()


def test_float32_writes_float32(base: Path, tasks: list[Path], tmp_path: Path):
    run(base, tasks, tmp_path / "out", steps=1, precision="float32")
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float32}
    assert '"dtype": "float32"' in (tmp_path / "out" / "config.json").read_text(encoding="utf-8")


def test_progress_is_told_of_the_loss(base: Path, tasks: list[Path], tmp_path: Path):
    stream = io.StringIO()
    run(base, tasks, tmp_path / "out", steps=2, progress=LineProgress(stream, itertools.count(step=1000).__next__))
    said = stream.getvalue()
    assert said.startswith("training: ")
    assert "2 of 2 steps" in said
    assert "loss 5." in said


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"prompt": "hello"}', "bad.jsonl:2: has no response"),
        ('{"prompt": "hello", "response": 1}', "bad.jsonl:2: response"),
        ('{"prompt": "hello", "image": "a.png", "response": "a"}', "bad.jsonl:2: a language model"),
    ],
)
def test_a_row_that_does_not_suit_is_named(
    base: Path, rows_file: Callable[..., Path], tmp_path: Path, line: str, why: str
):
    path = rows_file("bad", '{"prompt": "a", "response": "b"}', line)
    refused(why, base, [path], tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def refused(why: str, *arguments: Any, **settings: Any) -> None:
    with pytest.raises(InputError, match=why) as caught:
        run(*arguments, **settings)
    assert "\n" not in str(caught.value)


@with_peft
def test_what_does_not_suit_is_one_line_and_leaves_nothing(base: Path, tasks: list[Path], tmp_path: Path):
    out = tmp_path / "new" / "out"
    refused("no task given", base, [], out)
    refused("two tasks are named 'copy'", base, [tasks[0], tasks[0]], out)
    refused("no such file", base, [tmp_path / "absent.jsonl"], out)
    refused("holds no config.json", tmp_path, tasks, out)
    refused("target_modules: .*q_prj", base, tasks, out, lora_rank=2, target_modules=["q_prj"])
    refused("lower it", base, tasks, out, learning_rate=1e30, steps=5, warmup=0.0)
    refused("device = 'nowhere'", base, tasks, out, device="nowhere")
    refused("is, or lies in, or holds the input", base, tasks, base)
    refused("is, or lies in, or holds the input", base, tasks, base / "tuned")
    refused("is, or lies in, or holds the input", base, tasks, tmp_path)
    assert not (tmp_path / "new").exists()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["copy.jsonl", "judge.jsonl"]


def test_somebody_elses_partial_folder_is_not_touched(base: Path, tasks: list[Path], tmp_path: Path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").touch()
    refused("not left by an unfinished run", base, tasks, tmp_path / "out")
    assert (tmp_path / "out.partial" / "thesis.txt").is_file()


def test_a_partial_folder_in_use_is_not_touched(base: Path, tasks: list[Path], tmp_path: Path):
    def rival(_done: int, _total: int, _loss: float) -> None:
        refused("another run is writing there", base, tasks, tmp_path / "out")

    run(base, tasks, tmp_path / "out", steps=1, progress=rival)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_damaged_state_is_named(base: Path, tasks: list[Path], tmp_path: Path):
    with pytest.raises(Stop):
        run(base, tasks, tmp_path / "out", checkpoint_seconds=0.0, progress=stopping_at(3))
    (tmp_path / "out.partial" / "state.safetensors").write_bytes(b"not a state")
    with pytest.raises(MachineError, match=r"state\.safetensors: cannot be read"):
        run(base, tasks, tmp_path / "out")


@pytest.mark.parametrize("text", ["{}", '{"tasks": [], "curve": [], "target_modules": null}', "[", "3"])
def test_what_is_no_record_is_refused(tmp_path: Path, text: str):
    (tmp_path / "training.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"training\.json"):
        read_record(tmp_path / "training.json")


def test_an_adapter_is_no_base(base: Path, tasks: list[Path], tmp_path: Path):
    refused("names an adapter", f"{base}+{base}", tasks, tmp_path / "out")


def test_importing_the_package_loads_no_torch():
    code = "import sys, consilience.training; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
