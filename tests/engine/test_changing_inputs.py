"""Inputs that change while they are merged, and more files than the system lets a process open."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import consilience as cs
from consilience.__main__ import run
from consilience.checkpoints.files import Descriptors
from consilience.engine.stream import Streamer

NAMES = ("one", "two", "three")


def state(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal((7, 300)).astype(np.float32) for name in NAMES}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, model in enumerate(("base", "a", "b")):
        (tmp_path / model).mkdir()
        (tmp_path / model / "config.json").write_text('{"model_type": "none"}')
        save_file(state(seed), tmp_path / model / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


EXPERT = Path("a/model.safetensors")


def overwrite(path: Path = EXPERT) -> None:
    """Other values in the same file: same size, same inode."""
    other = Path("other.safetensors")
    save_file({name: value + 1 for name, value in load_file(path).items()}, other)
    path.write_bytes(other.read_bytes())
    other.unlink()


def overwrite_and_set_the_time_back() -> None:
    before = os.stat(EXPERT)
    overwrite()
    os.utime(EXPERT, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace() -> None:
    before = os.stat(EXPERT)
    EXPERT.rename("old.safetensors")
    EXPERT.write_bytes(Path("old.safetensors").read_bytes())
    os.utime(EXPERT, ns=(before.st_atime_ns, before.st_mtime_ns))


def while_merging(monkeypatch: pytest.MonkeyPatch, change: Callable[[], None], after: int = 1) -> None:
    """Let ``change`` happen once ``after`` segments have been finished."""
    finish: Any = Streamer._finish  # pyright: ignore[reportPrivateUsage]
    done: list[int] = []

    def finished(self: Any, *arguments: Any) -> None:
        finish(self, *arguments)
        done.append(1)
        if len(done) == after:
            change()

    monkeypatch.setattr(Streamer, "_finish", finished)


MERGE = ["merge", "base", "out", "-e", "a=a", "-e", "b=b", "-q", "--threads", "1"]


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear"])
@pytest.mark.parametrize("after", [1, 3])
@pytest.mark.parametrize("change", [overwrite, overwrite_and_set_the_time_back, replace, EXPERT.unlink])
def test_an_input_that_changes_is_named_and_nothing_is_installed(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    method: str,
    after: int,
    change: Callable[[], None],
) -> None:
    with monkeypatch.context() as patch:
        while_merging(patch, change, after)
        assert run([*MERGE, "--method", method]) == 2
    err = capsys.readouterr().err
    assert err == f"consilience: {EXPERT}: changed while it was being merged; leave it alone and run the merge again\n"
    assert not Path("out").exists()
    assert not Path("out.partial").exists()


def test_values_that_a_change_breaks_are_blamed_on_the_change(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half-written values may be NaN: the file that changed is the cause, not what it holds for the moment."""

    def spoil() -> None:
        EXPERT.write_bytes(EXPERT.read_bytes()[:-40] + b"\xff" * 40)

    while_merging(monkeypatch, spoil)
    assert run(MERGE) == 2
    assert f"{EXPERT}: changed while" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_file_beside_the_weights_that_changes_is_named(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = Path("base", name)
    path.write_text("{}")

    def change() -> None:
        path.write_text('{"half": "of another one"}')

    while_merging(monkeypatch, change)
    assert run(MERGE) == 2
    assert f"{path}: changed while it was being merged" in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize("change", [lambda: EXPERT.chmod(0o600), lambda: os.link(EXPERT, "second-name")])
def test_values_that_stay_are_no_change(
    place: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[], None]
) -> None:
    """A backup that links files, or a change of permissions, is no reason to refuse."""
    while_merging(monkeypatch, change)
    assert run(MERGE) == 0
    expected = state(0)["two"] + (state(1)["two"] - state(0)["two"]) + (state(2)["two"] - state(0)["two"])
    np.testing.assert_allclose(load_file("out/model.safetensors")["two"], expected, rtol=1e-6, atol=1e-6)


def test_passes_that_read_different_values_are_noticed_whatever_the_files_say(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file system with coarse times may show no change at all: what the passes read is compared itself."""
    monkeypatch.setattr("consilience.engine.unchanged._now", lambda before: before)  # pyright: ignore
    from consilience.engine.selection import Selection

    share: Any = Selection._share_ties  # pyright: ignore[reportPrivateUsage]

    def shared(self: Any) -> None:
        share(self)
        if EXPERT.stat().st_nlink == 1:
            os.link(EXPERT, "changed")  # once
            overwrite()

    monkeypatch.setattr(Selection, "_share_ties", shared)
    assert run([*MERGE, "--method", "ties", "--set", "density=0.5"]) == 2
    assert "changed while it was being merged" in capsys.readouterr().err
    assert not Path("out").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Descriptors.

LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (96, 96))
from consilience.__main__ import main
main()
"""


def write_shards(folder: Path, seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    weight_map: dict[str, str] = {}
    for i in range(count):
        name = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        save_file({f"layers.{i}.weight": rng.standard_normal((3, 5)).astype(np.float32)}, folder / name)
        weight_map[f"layers.{i}.weight"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_more_shards_than_files_that_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 shards in each of three inputs and in the output, and 96 descriptors."""
    monkeypatch.chdir(tmp_path)
    for seed, model in enumerate(("base", "a", "b")):
        Path(model).mkdir()
        Path(model, "config.json").write_text('{"model_type": "none"}')
        write_shards(Path(model), seed, 200)
    arguments = ["merge", "base", "out", "-e", "a=a", "-e", "b=b", "-q", "--shard-size", "64", "--method", "linear"]
    ended = subprocess.run([sys.executable, "-c", LIMITED, *arguments], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert len(list(Path("out").glob("*.safetensors"))) == 200
    for i in (0, 99, 199):
        name = f"model-{i + 1:05d}-of-00200.safetensors"
        a, b = (load_file(f"{model}/{name}")[f"layers.{i}.weight"] for model in ("a", "b"))
        np.testing.assert_allclose(load_file(f"out/{name}")[f"layers.{i}.weight"], (a + b) / 2, rtol=1e-6)


def test_descriptors_are_shared_out_and_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / f"{i}" for i in range(40)]
    for i, path in enumerate(files):
        path.write_text(str(i))
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(Descriptors, "_limit", Descriptors.SPARED + 10)
    pool = Descriptors(files, os.O_RDONLY)
    in_use = [pool.take(i) for i in range(12)]  # more than may stay open: what is in use is never closed
    assert [os.pread(one.number, 9, 0) for one in in_use] == [b"%d" % i for i in range(12)]
    for one in in_use:
        pool.release(one)
    for i in (*range(12, 40), *range(40)):
        one = pool.take(i)
        assert os.pread(one.number, 9, 0) == b"%d" % i
        pool.release(one)
        assert len(os.listdir("/proc/self/fd")) <= before + 10
    pool.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_limit_is_raised_as_far_as_it_goes() -> None:
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 0
    result = cs.merge({"w": np.zeros(2, np.float32)}, [{"w": np.ones(2, np.float32)}])
    assert isinstance(result, dict)
    np.testing.assert_array_equal(result["w"], np.ones(2, np.float32))
