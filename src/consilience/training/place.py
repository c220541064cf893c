"""Where a run works and where its result goes: OUT appears whole, OUT.partial is held by one run at a time."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from consilience.checkpoints.json_files import read_object
from consilience.engine.output import discard_folders, install, partial_path, sync_tree, write_json
from consilience.errors import InputError, MachineError

_PLAN = "training-plan.json"
#: The saved state of a run, in OUT.partial.
STATE = "state.safetensors"


def check_out(out: Path, inputs: Sequence[Path], force: bool) -> None:
    """Check that a result can go to OUT.

    Raises:
        InputError: OUT is not empty (without ``force``) or no folder, or is, lies in or holds an input.
    """
    if out.name in ("", ".."):
        raise InputError(f"{out}: is not a name to write to; name a new folder")
    for place in (out.absolute(), partial_path(out.absolute())):
        real = place.resolve()
        for path in (path.resolve() for path in inputs):
            if real == path or real in path.parents or (path.is_dir() and path in real.parents):
                raise InputError(f"{place}: is, or lies in, or holds the input {path}; choose another OUT")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(f"{out}: exists and is not a folder; choose another OUT")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise InputError(f"{out}: exists and is not empty; choose another OUT, or replace it with force")


@contextlib.contextmanager
def claimed(partial: Path, plan: dict[str, Any]) -> Generator[None]:
    """Hold OUT.partial for this run alone: a saved state of another plan is dropped.

    Wrong input leaves nothing behind, but what an earlier run had saved there.

    Raises:
        InputError: another run holds it, or it is somebody else's folder; neither is touched.
    """
    made = _make(partial)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{partial}: another run is writing there; wait for it, or choose another OUT") from None
        if any(partial.iterdir()) and not (partial / _PLAN).is_file():
            raise InputError(f"{partial}: is in the way and no training left it; move it elsewhere")
        earlier = any(path.name != _PLAN for path in partial.iterdir())
        try:
            _adopt(partial, plan)
            yield
        except InputError:
            if not earlier:
                shutil.rmtree(partial)
                discard_folders(made)
            raise
    finally:
        os.close(descriptor)


def _make(partial: Path) -> list[Path]:
    """Make OUT.partial, and return the folders above it that were not there, the innermost first."""
    made = [parent for parent in partial.parents if not parent.exists()]
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        discard_folders(made)
        raise InputError(f"{partial}: cannot be made ({error.strerror}); choose another OUT") from None
    return made


def _adopt(partial: Path, plan: dict[str, Any]) -> None:
    path = partial / _PLAN
    with contextlib.suppress(InputError):
        if path.is_file() and read_object(path) == plan:
            return
    (partial / STATE).unlink(missing_ok=True)
    write_json(path, plan)


@contextlib.contextmanager
def delivery(partial: Path, out: Path) -> Generator[Path]:
    """Give a new folder in OUT.partial to write the result to; then move it to OUT and take OUT.partial away.

    Raises:
        MachineError: the disk is full or failed; the saved state is kept.
    """
    from safetensors import SafetensorError

    result = partial / "result"
    try:
        shutil.rmtree(result, ignore_errors=True)
        result.mkdir()
        yield result
        sync_tree(result)
        install(result, out)
        shutil.rmtree(partial)
    except (OSError, SafetensorError) as error:
        raise MachineError(f"{out}: cannot be written ({error}); mend it, then run this again") from error
