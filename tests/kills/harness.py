"""Kill a command before each of its state-changing calls, look at what it leaves, and run it again.

One process loads the program; every run is a fork of it, so that hundreds of kills take seconds.

    python harness.py KIND PLACE [--random KILLS]

With ``--random`` the kills come at random times instead.
"""

import argparse
import builtins
import functools
import io
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.kills.commands import COMMANDS, Command

Tree = dict[str, bytes]
#: Files that say when they were made, or list times and hashes of files that are compared themselves.
_DATED = ("lineage.json", "coefficients.json", "training.json", "collapse.json", "routing.json", "files.json")
_CALLS = (
    "mkdir", "rmdir", "unlink", "remove", "rename", "replace", "link", "symlink", "truncate", "ftruncate", "write",
    "pwrite", "chmod", "utime",
)  # fmt: skip


class Fuse:
    """Counts state-changing calls and kills the process before number ``at`` (never, if that is negative)."""

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0

    def burn(self) -> None:
        """Count one call."""
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``call`` with the fuse in front."""

        @functools.wraps(call)
        def counted(*arguments: Any, **more: Any) -> Any:
            self.burn()
            return call(*arguments, **more)

        return counted

    def opened(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return an ``open`` that counts where it may change a file."""

        @functools.wraps(call)
        def counted(file: Any, mode: str = "r", *arguments: Any, **more: Any) -> Any:
            if any(letter in mode for letter in "wax+"):
                self.burn()
            return call(file, mode, *arguments, **more)

        return counted

    def os_opened(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return an ``os.open`` that counts where it may change a file."""

        @functools.wraps(call)
        def counted(path: Any, flags: int, *arguments: Any, **more: Any) -> Any:
            if flags & (os.O_CREAT | os.O_TRUNC):
                self.burn()
            return call(path, flags, *arguments, **more)

        return counted

    def arm(self) -> None:
        """Put the fuse before all calls of this process."""
        import consilience.workdir as workdir

        for name in _CALLS:
            setattr(os, name, self.before(getattr(os, name)))
        os.open = self.os_opened(os.open)
        builtins.open = self.opened(builtins.open)
        io.open = self.opened(io.open)
        workdir.exchange = self.before(workdir.exchange)


def forked(job: Callable[[], int]) -> int:
    """Run ``job`` in a fork and return its exit status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            status = job()
        finally:
            sys.stdout.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def once(command: Command, fuse: Fuse) -> int:
    """Run the command in a fork."""

    def job() -> int:
        fuse.arm()
        status = command.run()
        if fuse.at < 0:
            Path(os.environ["FUSE_COUNT"]).write_text(str(fuse.count))
        return status

    return forked(job)


def killed_after(command: Command, seconds: float) -> int:
    """Run the command in a fork and kill it after so many seconds; return how it ended."""
    child = os.fork()
    if child == 0:
        os._exit(command.run())
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def tree(place: Path) -> Tree:
    """Return every file below a folder, with what differs from run to run taken out."""
    found: Tree = {}
    for path in sorted(place.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            found[f"{path.relative_to(place)}/"] = b""
        elif path.name in _DATED:
            found[str(path.relative_to(place))] = _timeless(json.loads(path.read_bytes()))
        else:
            found[str(path.relative_to(place))] = path.read_bytes()
    return found


def _timeless(value: Any) -> bytes:
    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            plain = {k: clean(v) for k, v in value.items() if k not in ("created", "seconds", "files")}
            return plain | ({"files": sorted(value["files"])} if isinstance(value.get("files"), dict) else {})
        return [clean(one) for one in value] if isinstance(value, list) else value

    return json.dumps(clean(value), sort_keys=True).encode()


@contextmanager
def prepared(source: Path) -> Generator[Path]:
    """Give a fresh copy of the place that a command runs in, as the current folder."""
    place = source.parent / "place"  # always the same, for some outputs name it
    shutil.copytree(source, place, symlinks=True, copy_function=shutil.copy2)
    before = Path.cwd()
    os.chdir(place)
    try:
        yield place
    finally:
        os.chdir(before)
        shutil.rmtree(place)


def differences(found: Tree, wanted: Tree) -> list[str]:
    """Return the names in which two trees differ."""
    return sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))


def check_between(command: Command, place: Path, old: Tree, new: Tree, at: int) -> str:
    """After a kill, OUT is absent, the old one or complete; return which."""
    out = place / command.out
    if not out.exists():
        assert not old, f"kill {at}: {command.out} was there and is gone"
        return "absent"
    now = tree(out) if out.is_dir() else {"": out.read_bytes()}
    if not differences(now, new):
        return "complete"
    if command.unfinished is not None:
        now, old, new = ({n: d for n, d in one.items() if not command.unfinished(n)} for one in (now, old, new))
        if not differences(now, new):
            return "complete"
    assert old, f"kill {at}: {command.out} is there and is not complete: {differences(now, new)}"
    assert not differences(now, old), f"kill {at}: {command.out} is neither old nor new: {differences(now, old)}"
    return "old"


def kill_everywhere(command: Command, source: Path, random_kills: int = 0, seed: int = 0) -> dict[str, int]:
    """Kill a command before every call (or at random times), and rerun it; return how many kills left OUT how.

    Raises:
        AssertionError: something was torn, lost or left, or the rerun did not end well.
    """
    os.environ["FUSE_COUNT"] = str(source.parent / "count")
    with prepared(source):
        assert command.run() == 0  # here, not in a fork: what it loads and compiles is there for all that follow
    with prepared(source) as place:
        old = _output(command, place)
        began = time.monotonic()
        status = once(command, Fuse(-1))
        seconds = time.monotonic() - began
        assert status == 0, f"the undisturbed run ended with {status}"
        new, wanted = _output(command, place), tree(place)
        foreign = _foreign(place / command.out)
    total = int((source.parent / "count").read_text())
    assert total > 10, f"only {total} state-changing calls were counted"
    seen = {"absent": 0, "old": 0, "complete": 0, "over": 0, "too late": 0}
    draw = random.Random(seed)
    for at in range(random_kills or total):
        with prepared(source) as place:
            status = killed_after(command, draw.random() * seconds) if random_kills else once(command, Fuse(at))
            if status == 0 and random_kills:
                seen["too late"] += 1
                continue
            assert status == -signal.SIGKILL, f"kill {at} of {total}: ended with {status}"
            if random_kills and not differences(tree(place), wanted):
                seen["over"] += 1  # after its last change: all is there, and only the exit status was not given
                continue
            seen[check_between(command, place, old, new, at)] += 1
            again = once(command, Fuse(10**9))
            assert again == 0, f"kill {at} of {total}: the same command then ended with {again}"
            left = differences(tree(place), wanted)
            assert not left, f"kill {at} of {total}: after the rerun these differ: {left}"
            found = _foreign(place / command.out)
            assert found == foreign, f"kill {at} of {total}: {found} are foreign after the rerun"
    return seen | {"calls": total}


def _foreign(out: Path) -> list[str] | None:
    from consilience.workdir import foreign_files

    return foreign_files(out) if out.is_dir() else []


def _output(command: Command, place: Path) -> Tree:
    out = place / command.out
    return tree(out) if out.is_dir() else {"": out.read_bytes()} if out.exists() else {}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=sorted(COMMANDS))
    parser.add_argument("place", type=Path)
    parser.add_argument("--random", type=int, default=0, metavar="KILLS", help="kill at so many random times instead")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    source = given.place.resolve() / "source"
    source.mkdir(parents=True)
    os.chdir(source)
    command = COMMANDS[given.kind]
    command.prepare()
    sys.stdout.write(json.dumps(kill_everywhere(command, source, given.random, given.seed)) + "\n")


if __name__ == "__main__":
    main()
