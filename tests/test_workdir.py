"""Claiming, installing and removing: what one process sees of another, and what a kill leaves."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from consilience import workdir as module
from consilience.__main__ import run
from consilience.errors import InputError, MachineError
from consilience.workdir import Workdir, foreign_files, scratch, workdir, write_file, write_manifest
from tests.kills.commands import write_models


def deliver(out: Path, digest: str = "one", text: str = "new", force: bool = False) -> list[str]:
    """Write a folder with one file."""
    with workdir(out, digest, force=force) as work:
        if work.delivered is None:
            (work.new_result() / "file.txt").write_text(text)
            work.deliver({"text": text})
        return work.notes


def during(out: Path, digest: str, body: Callable[[Workdir], None], keep: Sequence[str] = ()) -> None:
    """Do something while OUT is held."""
    with workdir(out, digest, keep=keep) as work:
        body(work)


def writes(name: str, then: BaseException, first: Callable[[Workdir], None] = lambda work: None) -> Any:
    """What writes a file into OUT.partial and then fails."""

    def body(work: Workdir) -> None:
        first(work)
        (work.path / name).write_text("of this run")
        raise then

    return body


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


def test_an_output_appears_and_nothing_else_is_left(tmp_path: Path) -> None:
    deliver(tmp_path / "deep" / "out")
    assert names(tmp_path / "deep") == ["out"]
    assert (tmp_path / "deep/out/file.txt").read_text() == "new"
    listed = json.loads((tmp_path / "deep/out/consilience/files.json").read_text())
    assert list(listed["files"]) == ["file.txt"]


def test_wrong_input_leaves_no_folder_that_was_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="wrong"):
        during(tmp_path / "deep/er/out", "one", writes("weights", InputError("wrong")))
    assert names(tmp_path) == []


def test_what_was_to_be_kept_outlives_wrong_input_and_another_digest(tmp_path: Path) -> None:
    def check(work: Workdir) -> None:
        assert not work.resumed
        assert names(work.path) == ["learned", "work.json"]

    out = tmp_path / "out"
    learned = writes("learned", KeyboardInterrupt(), lambda work: (work.path / "other").touch())
    with pytest.raises(KeyboardInterrupt):
        during(out, "one", learned, keep=("learned",))
    with pytest.raises(InputError, match="wrong"):
        during(out, "two", writes("more", InputError("wrong"), check), keep=("learned",))
    assert names(tmp_path / "out.partial") == ["learned", "work.json"]
    with workdir(out, "two", keep=("learned",)) as work:
        assert work.resumed
        (work.new_result() / "file.txt").write_text("new")
        work.deliver({})
    assert names(tmp_path) == ["out"]


def test_another_digest_never_finds_what_the_first_one_left(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        during(out, "one", writes("weights", KeyboardInterrupt()))
    with workdir(out, "one") as work:
        assert work.resumed
        assert (work.path / "weights").read_text() == "of this run"
    with workdir(out, "two") as work:
        assert not work.resumed
        assert names(work.path) == ["work.json"]


def test_a_held_output_is_refused_and_not_touched(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with workdir(out, "one") as work:
        (work.path / "weights").write_text("mine")
        with pytest.raises(InputError, match="another run is writing there"), workdir(out, "one"):
            pass
        assert names(work.path) == ["weights", "work.json"]
        (work.new_result() / "file.txt").write_text("new")
        work.deliver({})
    with pytest.raises(InputError, match="exists and is not empty"), workdir(out, "two"):
        pass
    assert names(tmp_path) == ["out"]


def test_runs_that_come_and_go_never_hold_an_output_together(tmp_path: Path) -> None:
    """Threads claim and finish as fast as they can; the lock of a removed folder must not count."""
    inside, most, errors = [0], [0], list[BaseException]()
    guard = threading.Lock()

    def run(number: int) -> None:
        for step in range(30):
            try:
                with workdir(tmp_path / "out", f"{number} {step}", force=True) as work:
                    with guard:
                        inside[0] += 1
                        most[0] = max(most[0], inside[0])
                    (work.new_result() / "file.txt").write_text(f"{number} {step}")
                    with guard:
                        inside[0] -= 1
                    work.deliver({})
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {type(error) for error in errors} <= {InputError}
    assert all("another run" in str(error) for error in errors)
    assert most == [1]
    assert names(tmp_path) == ["out"]


def test_something_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def body(work: Workdir) -> None:
        (work.new_result() / "file.txt").write_text("new")
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
        work.deliver({})

    with pytest.raises(MachineError, match="appeared while this run worked"):
        during(out, "one", body)
    assert (out / "thesis.txt").read_text() == "mine"
    assert names(tmp_path) == ["out", "out.partial"]
    (out / "thesis.txt").unlink()
    deliver(out)
    assert names(tmp_path) == ["out"]


def test_a_strangers_mark_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "out.done").write_text("my notes")
    with pytest.raises(InputError, match=r"out\.done: is in the way"), workdir(tmp_path / "out", "one"):
        pass
    assert names(tmp_path) == ["out.done"]


# ----------------------------------------------------------------------------------------------------------------------
# Whose files they are.


def test_files_that_are_not_listed_or_newer_are_foreign(tmp_path: Path) -> None:
    deliver(tmp_path / "out")
    out = tmp_path / "out"
    assert foreign_files(out) == []
    (out / "sub").mkdir()
    (out / "sub/notes.txt").write_text("mine")
    (out / "link").symlink_to("file.txt")
    time.sleep(0.02)
    (out / "file.txt").write_text("mine now")
    assert foreign_files(out) == ["file.txt", "link", "sub/notes.txt"]
    (out / "consilience/files.json").write_text("[]")
    assert foreign_files(out) is None


def test_a_folder_of_a_stranger_is_kept_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "a").mkdir(parents=True)
    (out / "a/thesis.txt").write_text("mine")
    (out / "empty").mkdir()
    notes = deliver(out, force=True)
    assert notes == [f"1 file(s) at {out} had not been written by Consilience; they are now in {out}.kept"]
    assert (tmp_path / "out.kept/a/thesis.txt").read_text() == "mine"
    assert (tmp_path / "out.kept/empty").is_dir()
    assert names(tmp_path) == ["out", "out.kept"]


def test_an_own_output_is_replaced_without_a_word(tmp_path: Path) -> None:
    deliver(tmp_path / "out", text="old")
    assert deliver(tmp_path / "out", "two", force=True) == []
    assert (tmp_path / "out/file.txt").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_a_file_that_was_moved_over_ours_is_foreign_however_old_it_is(tmp_path: Path) -> None:
    deliver(tmp_path / "out")
    mine = tmp_path / "mine"
    mine.write_text("new")
    os.utime(mine, (1e9, 1e9))
    mine.replace(tmp_path / "out/file.txt")
    assert foreign_files(tmp_path / "out") == []  # the same content
    mine.write_text("old")
    os.utime(mine, (1e9, 1e9))
    mine.replace(tmp_path / "out/file.txt")
    assert foreign_files(tmp_path / "out") == ["file.txt"]


def test_a_copy_with_other_times_is_still_ours(tmp_path: Path) -> None:
    deliver(tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "copy", copy_function=shutil.copyfile)
    for number, path in enumerate(sorted((tmp_path / "copy").rglob("*"), reverse=True)):
        os.utime(path, (2e9 + number, 2e9 + number))
    assert foreign_files(tmp_path / "copy") == []


def test_large_weights_are_known_again_by_their_fingerprints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("consilience.contents._LARGE", 1000)
    monkeypatch.chdir(tmp_path)
    write_models()
    assert run(["merge", "base", "out", "-e", "a=a", "--method", "linear", "-q"]) == 0
    states = json.loads((tmp_path / "out/consilience/lineage.json").read_text())["files"]
    assert states["model.safetensors"][2].startswith("tensors:")
    weights = tmp_path / "out/model.safetensors"
    os.utime(weights, (1e9, 1e9))
    assert foreign_files(tmp_path / "out") == []
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, (1e9, 1e9))
    assert foreign_files(tmp_path / "out") == ["model.safetensors"]


def test_pipes_and_sockets_are_foreign(tmp_path: Path) -> None:
    deliver(tmp_path / "out")
    os.mkfifo(tmp_path / "out/pipe")
    deliver(tmp_path / "out", "two", force=True)
    assert names(tmp_path / "out.kept") == ["pipe"]


def test_a_folder_that_cannot_be_seen_into_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "out/secret"
    secret.mkdir(parents=True)
    (secret / "thesis.txt").write_text("mine")
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != secret and allowed(path, mode))
    with pytest.raises(InputError, match=r"out/secret: cannot be replaced \(Permission denied\); change its mode"):
        deliver(tmp_path / "out", force=True)
    assert names(tmp_path) == ["out"]


def test_a_mount_point_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "out")
    with pytest.raises(InputError, match="is a mount point"):
        deliver(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_a_manifest_leaves_out_what_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    (tmp_path / "b").write_text("")
    write_manifest(tmp_path, {"b"})
    assert foreign_files(tmp_path) == ["b"]


# ----------------------------------------------------------------------------------------------------------------------
# After a kill around the installation.


class Killed(BaseException):
    """What stands for a kill: nothing is tidied up after it."""


def killed(out: Path, monkeypatch: pytest.MonkeyPatch, where: str, text: str = "new", force: bool = False) -> None:
    """Deliver, and be killed as soon as a method of the folder is called (or, after ``-``, has been)."""
    kept = getattr(Workdir, where.lstrip("-"))

    def fall(self: Workdir, *arguments: Any) -> None:
        if where.startswith("-"):
            kept(self, *arguments)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Workdir, where.lstrip("-"), fall)
        with pytest.raises(Killed):
            deliver(out, text=text, force=force)


def test_a_refused_run_leaves_a_killed_one_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    killed(out, monkeypatch, "-_install")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="exists and is not empty"):
        deliver(out, "two")
    assert sorted(tmp_path.rglob("*")) == before
    deliver(out)
    assert names(tmp_path) == ["out"]


def test_another_folder_is_not_taken_for_what_was_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    killed(out, monkeypatch, "-_install")
    for path in sorted(out.rglob("*"), reverse=True):  # the folder itself stays, as one with the same inode would
        path.rmdir() if path.is_dir() else path.unlink()
    deliver(out)
    assert (out / "file.txt").read_text() == "new"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("where", ["_tidy", "-_tidy"])
def test_a_rerun_says_where_files_went_that_a_killed_run_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    killed(out, monkeypatch, where, force=True)
    said = f"1 file(s) at {out} had not been written by Consilience; they are now in {out}.kept"
    assert deliver(out, force=True) == [said]
    assert caplog.messages == [f"note: {said}"]
    assert names(tmp_path) == ["out", "out.kept"]


@pytest.mark.parametrize("digest", ["one", "two"])
def test_without_an_exchange_an_old_output_outlives_what_appears_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digest: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    monkeypatch.setattr(module, "exchange", lambda one, other: False)
    rename = os.rename

    def fall(one: Path, other: Path) -> None:
        rename(one, other)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fall)
        with pytest.raises(Killed):
            deliver(out, force=True)
    assert names(tmp_path) == ["out.done", "out.partial"]
    out.mkdir()
    (out / "more.txt").write_text("mine too")
    deliver(out, digest, force=True)
    assert sorted(path.name for path in tmp_path.rglob("*.txt")) == ["file.txt", "more.txt", "thesis.txt"]
    assert names(out) == ["consilience", "file.txt"]
    assert not list(tmp_path.glob("out.[dp]*"))


# ----------------------------------------------------------------------------------------------------------------------
# Small files and folders for a moment.

KILLED_WRITE = """
import os, signal, sys
from pathlib import Path
from consilience.workdir import write_file
calls = 0
def before(call):
    def counted(*a, **k):
        global calls
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        calls += 1
        return call(*a, **k)
    return counted
for name in ("open", "ftruncate", "write", "fsync", "replace", "close"):
    setattr(os, name, before(getattr(os, name)))
write_file(Path(sys.argv[1]), "x" * 1000)
"""


@pytest.mark.parametrize("at", range(6))
def test_a_killed_write_leaves_the_old_or_the_new_and_the_next_one_nothing_else(tmp_path: Path, at: int) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    ended = subprocess.run([sys.executable, "-c", KILLED_WRITE, str(path), str(at)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert path.read_text() == ("x" * 1000 if at == 5 else "old")
    write_file(path, "newer")
    assert path.read_text() == "newer"
    assert names(tmp_path) == ["report.html"]


def test_writes_of_one_file_at_once_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "state"
    texts = [str(number) * 50_000 for number in range(4)]

    def write(text: str) -> None:
        for _ in range(20):
            write_file(path, text)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts
    assert names(tmp_path) == ["state"]


def test_a_folder_for_a_moment_goes_and_so_do_those_of_killed_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    (tmp_path / "try-killed").mkdir()
    (tmp_path / "try-killed/model").write_text("gigabytes")
    (tmp_path / "other").mkdir()
    living = tmp_path / "try-living"
    living.mkdir()
    held = os.open(living, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with scratch("try-") as place:
        (place / "model").write_text("x")
        assert names(tmp_path) == sorted(["other", place.name, "try-living"])
    assert names(tmp_path) == ["other", "try-living"]
    os.close(held)
