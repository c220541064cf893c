"""Kills, full disks and bad bytes: OUT appears whole or not at all, and a rerun continues."""

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import consilience as cs
from consilience.__main__ import run
from consilience.engine.journal import Journal
from consilience.engine.summary import Summary

SEGMENT = 4096
METHOD: dict[str, Any] = {"method": "ties", "density": 0.3}
#: 8 tensors of 6 segments.
NAMES = [f"model.layers.{i}.weight" for i in range(8)]
SEGMENTS = 48


def write_models(folder: Path) -> None:
    rng = np.random.default_rng(21)
    base = {name: rng.standard_normal((5, 4099)).astype(ml_dtypes.bfloat16) for name in NAMES}
    for model in ("base", "a", "b"):
        (folder / model).mkdir()
        (folder / model / "config.json").write_text('{"model_type": "none"}')
        change = {n: 0 if model == "base" else rng.standard_normal(v.shape) * 0.1 for n, v in base.items()}
        state = {n: np.asarray(v.astype(np.float64) + change[n]).astype(v.dtype) for n, v in base.items()}
        save_file(state, folder / model / "model.safetensors")
    (folder / "base" / "tokenizer.json").write_text("{}")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("consilience.engine.plan.SEGMENT", SEGMENT)
    return tmp_path


def merge(out: str = "out", **more: Any) -> Summary:
    summary = cs.merge("base", {"a": "a", "b": "b"}, out, **(METHOD | more))
    assert isinstance(summary, Summary)
    return summary


ARGUMENTS = ["merge", "base", "out", "-e", "a=a", "-e", "b=b", "--method", "ties", "--set", "density=0.3", "-q"]


def command(*more: str) -> int:
    return run([*ARGUMENTS, *more])


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("consilience: ")
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def same_as_uninterrupted(out: str = "out") -> None:
    """``out`` holds what a run that nothing disturbed writes, and nothing else."""
    if not Path("expected").exists():
        merge("expected")

    def files(folder: str) -> dict[str, bytes]:
        found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}
        lineage = json.loads(found.pop("consilience/lineage.json"))
        found["fingerprint"] = lineage["output"]["fingerprint"].encode()
        found.pop("README.md")  # names OUT
        return found

    ours, theirs = files(out), files("expected")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert not Path(out + ".partial").exists()
    assert not Path(out + ".replaced").exists()


def unfinished(out: str = "out", exists: bool = False) -> None:
    """OUT is absent, and what is kept holds no file that a loader would take for a model."""
    assert Path(out).exists() == exists
    assert Path(out + ".partial").is_dir()
    assert not list(Path(out + ".partial").rglob("*.safetensors"))
    assert not (Path(out + ".partial") / "model.safetensors.index.json").exists()


def failing_after(writes: int, code: int = errno.ENOSPC) -> Callable[..., int]:
    """An ``os.pwrite`` that fails, as a full disk does, after so many calls."""
    real, calls = os.pwrite, itertools.count()

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        if next(calls) >= writes:
            raise OSError(code, os.strerror(code))
        return real(descriptor, data, offset)

    return pwrite


def interrupt_by_full_disk(monkeypatch: pytest.MonkeyPatch, writes: int = 20, **more: Any) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing_after(writes))
        with pytest.raises(cs.MachineError):
            merge(**more)


def journal() -> Path:
    return Path("out.partial/journal.jsonl")


# ----------------------------------------------------------------------------------------------------------------------
# Signals, on a real process that writes slowly.

DRIVER = """
import itertools, signal, sys, time
import consilience.engine.merge as merge
import consilience.engine.plan as plan
from consilience.engine.journal import Journal
from consilience.engine.output import FileSink

# A shell has its background jobs ignore this signal, and they pass that on: tests may run in one.
signal.signal(signal.SIGINT, signal.default_int_handler)
plan.SEGMENT = 4096
merge.Journal = lambda path, flush: Journal(path, flush, period=0.02)
write, calls = FileSink.write, itertools.count()
def slow(self, *arguments):
    # The first few are on disk soon; the rest takes so long that a busy machine has time to send its signal.
    time.sleep(0.05 if next(calls) < 12 else 0.5)
    write(self, *arguments)
FileSink.write = slow
from consilience.__main__ import main
main()
"""


def stopped_by(number: signal.Signals) -> tuple[int, str]:
    """Start a merge in another process, send it a signal once some segments are on disk; return how it ended."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", DRIVER, *ARGUMENTS, "--threads", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (journal().exists() and journal().read_bytes().count(b"\n") >= 4):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    text = process.communicate(timeout=30)[0]
    return process.returncode, text


@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGINT))],
)
def test_a_stopped_run_is_continued(place: Path, number: signal.Signals) -> None:
    status, text = stopped_by(number)
    if number is signal.SIGKILL:
        assert (status, text) == (-signal.SIGKILL, "")
    else:
        assert status == 130
        assert text == "consilience: interrupted; partial output is kept, run the same command again to continue\n"
    unfinished()
    summary = merge()
    assert 4 <= summary.resumed_segments < SEGMENTS
    same_as_uninterrupted()


def test_a_file_size_limit_is_a_machine_error(place: Path) -> None:
    """RLIMIT_FSIZE stands in for a quota: the kernel refuses the bytes, and Python ignores SIGXFSZ."""
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n" + DRIVER
    result = subprocess.run([sys.executable, "-c", limited, *ARGUMENTS], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("consilience: ")
    assert result.stderr.count("\n") == 1
    unfinished()
    merge()
    same_as_uninterrupted()


# ----------------------------------------------------------------------------------------------------------------------
# A full disk.


@pytest.mark.parametrize("writes", [0, 1, 20])
def test_a_full_disk_keeps_the_partial_output(
    place: Path, writes: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing_after(writes))
        assert command() == 1
    message = complaint(capsys)
    assert "No space left on device" in message
    assert "out" in message  # says which place is full
    assert "run the same command again" in message
    unfinished()
    assert merge().resumed_segments == writes
    same_as_uninterrupted()


def test_too_little_space_is_seen_before_anything_is_computed(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        usage = type(shutil.disk_usage("."))(10**9, 10**9 - 1000, 1000)
        patch.setattr(shutil, "disk_usage", lambda path: usage)  # pyright: ignore[reportUnknownLambdaType]
        assert command() == 1
    assert "out: needs" in complaint(capsys)
    assert not Path("out").exists()
    merge()
    same_as_uninterrupted()


@pytest.mark.parametrize(
    "step",
    [
        "consilience.engine.output.FileSink.finish",
        "consilience.engine.merge.verify_headers",
        "consilience.engine.merge.lineage",
        "consilience.engine.output.copy_side_files",
        "consilience.workdir.sync_tree",
        "consilience.workdir.Workdir._announce",
        "consilience.workdir.Workdir._install",
    ],
)
def test_a_disk_that_fills_up_at_the_end_is_continued_too(
    place: Path, step: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(step, full)
        assert command() == 1
    complaint(capsys)
    assert not Path("out").exists()
    assert Path("out.partial").is_dir()
    assert merge().resumed_segments == SEGMENTS  # the weights were all there
    same_as_uninterrupted()


def test_a_failing_journal_fails_the_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", broken)
        with pytest.raises(cs.MachineError, match="Input/output error"):
            merge()
    unfinished()
    merge()
    same_as_uninterrupted()


# ----------------------------------------------------------------------------------------------------------------------
# A crash of the machine cannot be staged here, but the order of flushes that survives one can be observed.


def test_data_is_flushed_before_the_journal_speaks_of_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = {name: getattr(os, name) for name in ("pwrite", "fdatasync")}
    written: set[int] = set()
    durable: set[int] = set()
    lock = threading.Lock()

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        count = real["pwrite"](descriptor, data, offset)
        with lock:
            written.add(offset)
        return count

    def fdatasync(descriptor: int) -> None:
        with lock:
            before = set(written)
        real["fdatasync"](descriptor)
        durable.update(before)

    def check(self: Journal, *arguments: Any) -> None:
        flush(self, *arguments)
        ends = [json.loads(line)["segment"] for line in journal().read_text().splitlines()]
        assert len(ends) <= len(durable)

    flush: Any = Journal._flush  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(os, "fdatasync", fdatasync)
    monkeypatch.setattr(Journal, "_flush", check)
    merge()
    assert len(durable) >= SEGMENTS


def test_everything_is_flushed_before_out_appears(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: set[int] = set()
    at_install: list[set[int]] = []
    real_sync = os.fsync

    def fsync(descriptor: int) -> None:
        real_sync(descriptor)
        flushed.add(os.fstat(descriptor).st_ino)

    def watching(real: Callable[..., None]) -> Callable[..., None]:
        def rename(source: Any, target: Any, **more: Any) -> None:
            if Path(target).name == "out":
                at_install.append(set(flushed))
                flushed.clear()
            real(source, target, **more)

        return rename

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", watching(os.rename))
    monkeypatch.setattr(os, "replace", watching(os.replace))
    merge()
    (before,) = at_install
    unflushed = [str(p) for p in (Path("out"), *Path("out").rglob("*")) if p.stat().st_ino not in before]
    assert unflushed == []
    assert place.stat().st_ino in flushed  # the rename itself


# ----------------------------------------------------------------------------------------------------------------------
# What a rerun trusts.


def test_a_rerun_computes_only_what_is_missing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_by_full_disk(monkeypatch, threads=1)
    written: list[str] = []
    real = os.pwrite

    def counting(descriptor: int, data: Any, offset: int) -> int:
        written.append("")
        return real(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", counting)
        assert merge(threads=2).resumed_segments == 20
    assert len(written) == SEGMENTS - 20 + 1  # and the header
    same_as_uninterrupted()


def test_two_interruptions_in_a_row(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_by_full_disk(monkeypatch, 10)
    interrupt_by_full_disk(monkeypatch, 10)
    assert merge().resumed_segments == 20
    same_as_uninterrupted()


def change_expert() -> None:
    state = load_file("a/model.safetensors")
    before = os.stat("a/model.safetensors")
    save_file({n: (v.astype(np.float32) * 1.5).astype(v.dtype) for n, v in state.items()}, "a/model.safetensors")
    assert os.stat("a/model.safetensors").st_size == before.st_size


def replace_by_older_expert() -> None:
    change_expert()
    os.utime("a/model.safetensors", (1, 1))


@pytest.mark.parametrize("change", [change_expert, replace_by_older_expert])
def test_a_changed_input_is_not_continued(
    place: Path, change: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_by_full_disk(monkeypatch)
    change()
    assert merge().resumed_segments == 0
    same_as_uninterrupted()


@pytest.mark.parametrize("other", [{"density": 0.4}, {"seed": 1}, {"out_dtype": "float32"}, {"allow_nonfinite": True}])
def test_another_recipe_is_not_continued(place: Path, other: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_by_full_disk(monkeypatch, **other)
    assert merge().resumed_segments == 0
    same_as_uninterrupted()


def set_alpha(alpha: float) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": alpha, "target_modules": ["weight"]}
    Path("adapter/adapter_config.json").write_text(json.dumps(config))


def write_adapter() -> None:
    rng = np.random.default_rng(22)
    Path("adapter").mkdir()
    set_alpha(4)
    factors: dict[str, Any] = {}
    for name in NAMES:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        factors[f"{module}.lora_A.weight"] = rng.standard_normal((2, 4099)).astype(np.float32)
        factors[f"{module}.lora_B.weight"] = rng.standard_normal((5, 2)).astype(np.float32)
    save_file(factors, "adapter/adapter_model.safetensors")


def test_a_changed_adapter_config_is_not_continued(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The factors' file is untouched, but lora_alpha scales the update."""
    write_adapter()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing_after(20))
        with pytest.raises(cs.MachineError):
            cs.merge("base", ["adapter"], "out")
    set_alpha(8)
    for name in ("out", "expected"):
        cs.merge("base", ["adapter"], name)
    same_as_uninterrupted()


def cut_last_line(text: bytes) -> bytes:
    return text[:-25]


def append(more: bytes) -> Callable[[bytes], bytes]:
    return lambda text: text + more


BAD_LINES = {
    "cut": cut_last_line,
    "cut to nothing": lambda text: b"",
    "binary": append(b"\x00\xff\xfe\n"),
    "not an object": append(b"[1, 2]\nnull\n7\n"),
    "unknown keys": append(b'{"tensor": 0, "segment": 0, "surprise": 1}\n'),
    "no such tensor": append(b'{"tensor": 999, "segment": 0, "inputs": [[0, 0]], "output": [0, 0]}\n'),
    "no such segment": append(b'{"tensor": 0, "segment": 999, "inputs": [[0, 0]], "output": [0, 0]}\n'),
    "wrong types": append(b'{"tensor": "0", "segment": null, "inputs": 5, "output": "x"}\n'),
    "wrong lengths": append(b'{"tensor": 7, "segment": 5, "inputs": [], "output": []}\n'),
    "twice": lambda text: text + text,
}


@pytest.mark.parametrize("damage", BAD_LINES.values(), ids=list(BAD_LINES))
def test_a_damaged_journal_costs_at_most_its_damaged_lines(
    place: Path, damage: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_by_full_disk(monkeypatch)
    journal().write_bytes(damage(journal().read_bytes()))
    assert merge().resumed_segments <= 20
    same_as_uninterrupted()


def test_a_line_cut_by_a_crash_does_not_hide_what_the_rerun_journals(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_by_full_disk(monkeypatch, 10)
    journal().write_bytes(cut_last_line(journal().read_bytes()))
    interrupt_by_full_disk(monkeypatch, 10)
    assert merge().resumed_segments == 19
    same_as_uninterrupted()


def test_another_tools_folder_in_the_way_is_left_alone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out.partial").mkdir()
    Path("out.partial/thesis.txt").write_text("years of work")
    assert command() == 2
    assert "out.partial" in complaint(capsys)
    assert command("--force") == 2
    complaint(capsys)
    assert Path("out.partial/thesis.txt").read_text() == "years of work"


def test_a_file_in_the_way_is_left_alone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out.partial").write_text("years of work")
    assert command() == 2
    assert "out.partial" in complaint(capsys)
    assert Path("out.partial").read_text() == "years of work"


def test_wrong_input_leaves_nothing_behind(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = load_file("a/model.safetensors")
    state[NAMES[-1]][4, 4000] = np.nan
    save_file(state, "a/model.safetensors")
    before = sorted(p.name for p in place.iterdir())
    assert command() == 2
    assert NAMES[-1] in complaint(capsys)
    assert sorted(p.name for p in place.iterdir()) == before


# ----------------------------------------------------------------------------------------------------------------------
# Verification.


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("position", [-1, -30_000, -200_000])
def test_a_bit_that_flips_after_the_write_is_found(
    place: Path, position: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import consilience.engine.merge as module

    verify: Any = module._verify  # pyright: ignore[reportPrivateUsage]

    def flipped(*arguments: Any) -> None:
        flip(Path("out.partial/weights-00000.part"), position)
        verify(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_verify", flipped)
        assert command() == 1
    message = complaint(capsys)
    assert "reads back differently" in message
    assert "model.layers." in message
    unfinished()
    assert command() == 0  # "run the same command again" must not meet the same bytes for ever
    same_as_uninterrupted()


def test_bytes_that_change_between_runs_do_not_reach_out(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_by_full_disk(monkeypatch, threads=1)
    weights = Path("out.partial/weights-00000.part")
    first = next(i for i, byte in enumerate(weights.read_bytes()) if byte)
    flip(weights, first + 100)
    statuses = [command(), command()]
    assert statuses in ([0, 2], [1, 0])  # found while resuming, or by the verification (2: OUT exists)
    same_as_uninterrupted()


# ----------------------------------------------------------------------------------------------------------------------
# --force.


def old_model() -> dict[str, Any]:
    cs.merge("base", ["a"], "out", method="linear")
    Path("out/notes.txt").write_text("old")
    return {n: v.tobytes() for n, v in load_file("out/model.safetensors").items()}


def test_force_replaces_all_of_the_old_model(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old_model()
    assert command() == 2
    assert "--force" in complaint(capsys)
    assert Path("out/notes.txt").exists()
    assert command("--force") == 0
    same_as_uninterrupted()


def test_force_keeps_the_old_model_when_the_new_merge_fails(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = old_model()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing_after(20))
        assert command("--force") == 1
    complaint(capsys)
    unfinished(exists=True)
    assert {n: v.tobytes() for n, v in load_file("out/model.safetensors").items()} == old
    assert Path("out/notes.txt").read_text() == "old"
    assert command("--force") == 0
    same_as_uninterrupted()


def test_force_keeps_the_old_model_when_the_last_rename_fails(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The new model cannot take OUT's place: the old one must stand there again."""
    old = old_model()

    def failing(source: Any, target: Any) -> bool:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr("consilience.workdir.exchange", failing)
        assert command("--force") == 1
    complaint(capsys)
    assert {n: v.tobytes() for n, v in load_file("out/model.safetensors").items()} == old
    assert command("--force") == 0
    same_as_uninterrupted()


def test_force_without_an_exchange_of_folders_keeps_the_old_model_too(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where two folders cannot be exchanged, the second of two renames may fail; a rerun has the old one."""
    old = old_model()
    rename = os.rename

    def failing(source: Any, target: Any, **more: Any) -> None:
        if str(source).endswith("out.partial/result"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target, **more)

    with monkeypatch.context() as patch:
        patch.setattr("consilience.workdir.exchange", lambda one, other: False)  # pyright: ignore
        with monkeypatch.context() as broken:
            broken.setattr(os, "rename", failing)
            assert command("--force") == 1
        complaint(capsys)
        assert not Path("out").exists()
        assert command("--set", "lambda=0.4") == 2  # another command puts the old model back before it refuses
        assert "--force" in complaint(capsys)
        assert {n: v.tobytes() for n, v in load_file("out/model.safetensors").items()} == old
        assert command("--force") == 0
    same_as_uninterrupted()


def test_a_flat_state_dict_of_any_size_is_written_whole(place: Path) -> None:
    """A file has no index, so a shard size cannot apply to it."""
    for name in ("base", "a", "b"):
        shutil.copy(f"{name}/model.safetensors", f"{name}.safetensors")
    arguments = ["merge", "base.safetensors", "out.safetensors", "-e", "a=a.safetensors", "-e", "b=b.safetensors", "-q"]
    status = run([*arguments, "--shard-size", "50KB"])
    if status == 0:
        assert sorted(load_file("out.safetensors")) == NAMES
    else:  # refusing is as good as ignoring
        assert status == 2
        assert not Path("out.safetensors").exists()
