"""The one way out: how every output is claimed, made and installed.

Work towards OUT happens beside it, and OUT changes in one step:

    OUT.partial/work.json   whose folder this is: the digest of the work done here
    OUT.partial/result      what becomes OUT, a folder or a file
    OUT.partial/...         what a rerun goes on from: journal, weights, learned state
    OUT.done                while an installation is tidied up: the digest, how to know the result, what to report
    OUT.kept                files that stood at a replaced OUT and that Consilience had not written

What holds at every moment, in the order in which a run relies on it:

1. OUT.partial belongs to the run that holds its lock; the lock goes with the process.
2. An OUT.partial without a readable ``work.json`` that is not empty, and an OUT.done that is not ours, are somebody
   else's: they are refused and not touched.
3. ``work.json`` names a digest only while everything beside it was made for that digest.
4. OUT is absent, the old one, or complete: it appears by one rename, or by an exchange with the old one, after all
   of it was flushed. Where the file system has no exchange, the old one waits in OUT.partial/previous.
5. OUT.done is written before that rename and removed as the very last change. A rerun that finds it knows by inode and
   time of OUT's list of files (or of OUT, a file) whether the rename happened; if it did, and the digest is its own,
   nothing is left to do but to tidy up.
6. Of a replaced OUT only files are removed that its own list names (``write_manifest``) and that are still so: of
   the same size and time or, where a copy has other times, of the same content. All others are moved to OUT.kept.
7. A run that is refused has changed nothing.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Generator, Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast

from consilience.contents import is_still, known_by, tensor_fingerprints
from consilience.errors import InputError, MachineError, option

#: The folder of an output that holds what Consilience has to say about it, and in it the list of the output's files.
OURS, LINEAGE, MANIFEST = "consilience", "lineage.json", "files.json"
#: Whose folder OUT.partial is.
WORK = "work.json"
_RESULT, _PREVIOUS, _TRASH = "result", "previous", "trash"
_FORMAT = 1
#: What marked an OUT.partial of version 0.1.0; what is left there is done again.
_OLDER = ("consilience/plan.json", "training-plan.json")
_AGAIN = "then run the same command again"
#: How often a place is looked at again whose files another run moves meanwhile.
_TRIES = 20
_LOG = logging.getLogger("consilience")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def partial_path(out: Path) -> Path:
    """Return the folder that work towards ``out`` is done in."""
    return out.with_name(out.name + ".partial")


def done_path(out: Path) -> Path:
    """Return the file that says that ``out`` was installed while the run is still tidying up."""
    return out.with_name(out.name + ".done")


# ----------------------------------------------------------------------------------------------------------------------
# Small files.


def write_file(path: Path, data: bytes | str) -> None:
    """Write a file so that a reader, a kill or a crash sees the old content or the new one, never a part.

    What a killed run leaves is one hidden file of a fixed name, which the next write of ``path`` takes over.

    Raises:
        OSError: the file cannot be written; nothing is left behind.
    """
    content = data.encode("utf-8", errors="backslashreplace") if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.new")
    descriptor = _open_locked(temporary)
    try:
        os.ftruncate(descriptor, 0)
        _write_all(descriptor, content)
        os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _open_locked(path: Path) -> int:
    """Open a file for writing and wait until no other run writes it."""
    while True:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _still_names(path, descriptor):
            return descriptor
        os.close(descriptor)  # another run finished with it, and it has become the file itself


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view.nbytes:
        view = view[os.write(descriptor, view) :]


def json_text(value: Any) -> str:
    """Return readable JSON; what is not Unicode text (a file's odd name) becomes an escape when it is written."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON into a result that nobody reads yet."""
    path.write_text(json_text(value), encoding="utf-8", errors="backslashreplace")


def digest_of(value: Any) -> str:
    """Return what identifies a piece of work: a hash of JSON-able values that decide its result."""
    return blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def _read_ours(path: Path) -> dict[str, Any] | None:
    """Return what one of our own small files says; None if it is not one of ours."""
    try:
        value: Any = json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    return cast(dict[str, Any], value) if isinstance(value, dict) and value.get("format") == _FORMAT else None


def sync_tree(place: Path) -> None:
    """Flush a file, or every file and folder below a folder."""
    names = [place] if place.is_file() else [Path(top) / n for top, _, files in os.walk(place) for n in (*files, "")]
    for path in names:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _still_names(path: Path, descriptor: int) -> bool:
    try:
        there, ours = os.lstat(path), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def _identity(path: Path) -> list[int] | None:
    """Return what tells an output from any other at its place, wherever it is moved on its file system."""
    try:
        status = os.lstat(_manifest(path) if path.is_dir() else path)
    except OSError:
        return None
    return [status.st_ino, status.st_mtime_ns]


def _remove(path: Path) -> None:
    """Remove a file, link or whole folder that is ours; one that is not there is no matter."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------------------
# Which files of an output are ours.


def _manifest(folder: Path) -> Path:
    """Return the file that lists an output's files: its lineage, which says when it was made anyway, or one apart.

    So two outputs of the same command differ in their lineages alone.
    """
    lineage = folder / OURS / LINEAGE
    return lineage if lineage.is_file() else folder / OURS / MANIFEST


def write_manifest(folder: Path, foreign: Iterable[str] = ()) -> None:
    """List a finished output's files, with size, time and content: those that a later ``--force`` may remove.

    The list is ``files`` in ``consilience/lineage.json``, or in ``consilience/files.json`` where there is no lineage.
    It must be the last thing that is written: what changes later is no longer what Consilience wrote.

    Args:
        folder: the output.
        foreign: files in it, relative to it, that are not ours.
    """
    (folder / OURS).mkdir(exist_ok=True)
    path = _manifest(folder)
    document = _read_ours(path) or {"format": _FORMAT}
    before, fingerprints = _states(document), tensor_fingerprints(document)
    states: dict[str, list[Any]] = {}
    for name in sorted({str(path.relative_to(folder)) for path in _files(folder)} - set(foreign)):
        if folder / name != path:
            earlier, stamp = before.get(name), _stamp(folder / name)
            same = earlier is not None and earlier[:2] == stamp
            states[name] = earlier if same and earlier else [*stamp, known_by(folder / name, fingerprints)]
    write_file(path, json_text(document | {"files": states}))


def foreign_files(folder: Path) -> list[str] | None:
    """Return the files below a folder that Consilience has not written, or that were changed since; None: all of them.

    Files are named relative to the folder. Links, pipes and sockets are never ours.
    """
    path = _manifest(folder)
    document = _read_ours(path)
    if document is None or not isinstance(document.get("files"), dict):
        return None
    states = _states(document)
    names = ((str(file.relative_to(folder)), file) for file in _files(folder))
    return sorted(name for name, file in names if file != path and not _unchanged(file, states.get(name)))


def _states(document: dict[str, Any]) -> dict[str, list[Any]]:
    """Return what a list of files says of each: size, time of its last change, and what its content is known by."""
    states: Any = document.get("files")
    if not isinstance(states, dict):
        return {}
    found = cast(dict[str, Any], states).items()
    return {name: state for name, state in found if isinstance(state, list) and len(cast(list[Any], state)) == 3}


def _stamp(path: Path) -> list[int]:
    status = path.lstat()
    return [status.st_size, status.st_mtime_ns]


def _unchanged(path: Path, state: list[Any] | None) -> bool:
    if state is None or not stat.S_ISREG(path.lstat().st_mode):
        return False
    stamp = _stamp(path)
    if stamp == state[:2]:
        return True
    try:
        return stamp[0] == state[0] and is_still(path, str(state[2]))  # copied, or checked out
    except (OSError, InputError):
        return False


def _files(folder: Path) -> Iterable[Path]:
    """Walk files and links (to folders too) below a folder."""
    for top, folders, files in os.walk(folder, onerror=_raise):
        yield from (Path(top) / name for name in files)
        yield from (Path(top) / name for name in folders if (Path(top) / name).is_symlink())


def _raise(error: OSError) -> None:
    raise error


def _set_aside(old: Path, kept: Path) -> None:
    """Move the files of a replaced output that are not ours to ``kept``."""
    foreign = foreign_files(old)
    if foreign is None:
        if any(True for _ in _files(old)):
            os.rename(old, kept)
        return
    for name in foreign:
        (kept / name).parent.mkdir(parents=True, exist_ok=True)
        os.rename(old / name, kept / name)


# ----------------------------------------------------------------------------------------------------------------------
# Whether OUT may be written.


def check_out(out: Path, *, folder: bool = True, force: bool = False, inputs: Iterable[Path] = ()) -> None:
    """Refuse an OUT that would overwrite, or nest with, something; nothing is touched.

    Args:
        out: where the output goes.
        folder: whether it is a folder (else one file).
        force: replace what stands at ``out``.
        inputs: what the work reads.

    Raises:
        InputError: OUT is not free (without ``force``), is of another kind, or is, lies in or holds an input; or its
            OUT.partial was not left by Consilience.
    """
    if out.name in ("", ".."):
        raise InputError(f"{out}: is not a name to write to; name a new {'folder' if folder else 'file'}")
    named = list(inputs)
    for last in (*[False] * _TRIES, True):
        try:
            _refuse_nesting(out, named)
            _look_at_partial(partial_path(out))
            if not done_path(out).exists():  # else the run itself finds out what an earlier one delivered
                _refuse_occupied(out, folder, force)
            return
        except OSError as error:
            if last or not isinstance(error, FileNotFoundError):  # else another run has just moved what was looked at
                raise _impossible(out, error) from None


def _look_at_partial(partial: Path) -> None:
    """Refuse an OUT.partial that another run holds, or that is somebody else's."""
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise _in_the_way(partial)
    try:
        descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    _lock(descriptor, partial, fcntl.LOCK_SH)  # so that no run makes or removes it while it is looked at
    try:
        if _still_names(partial, descriptor):
            _refuse_foreign(partial)
    finally:
        os.close(descriptor)


def _refuse_nesting(out: Path, inputs: Iterable[Path]) -> None:
    names = dict.fromkeys(place for path in inputs for place in (path.absolute(), path.resolve()))
    for place in (out.absolute(), partial_path(out.absolute())):
        real = place.parent.resolve() / place.name
        for path in names:
            if real == path or real in path.parents or (path.is_dir() and path in real.parents):
                raise InputError(f"{place}: is, or lies in, or holds the input {path}; choose another OUT")


def _refuse_occupied(out: Path, folder: bool, force: bool) -> None:
    if out.is_symlink():
        raise InputError(f"{out}: is a symbolic link; name the place it points to, or choose another OUT")
    if os.path.ismount(out):
        raise InputError(f"{out}: is a mount point, which cannot be replaced; name a new folder in it")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        if out.exists() and not folder:
            raise InputError(f"{out}: is a folder, and this command writes a file; choose another OUT")
        return
    if not force:
        raise InputError(f"{out}: exists and is not empty; choose another OUT, or pass {option('force')} to replace it")
    if not (out.is_dir() if folder else out.is_file()):
        kind = "folder" if folder else "file"
        raise InputError(f"{out}: exists and is not a {kind}, which this command writes; choose another OUT")
    for top, _, _ in os.walk(out, onerror=_raise) if folder else ():
        if not os.access(top, os.R_OK | os.W_OK | os.X_OK):  # what it holds could be neither seen nor moved
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), top)


def _in_the_way(path: Path) -> InputError:
    return InputError(f"{path}: is in the way and was not left by an unfinished run; move it elsewhere")


def _refuse_foreign(partial: Path) -> None:
    """Refuse an OUT.partial that no run of ours left; a run killed at once leaves it empty, or with a hidden file."""
    names = {str(path.relative_to(partial)) for path in _files(partial)}
    if names - {f".{WORK}.new"} and _read_ours(partial / WORK) is None and not any(map(names.__contains__, _OLDER)):
        raise _in_the_way(partial)


def _impossible(out: Path, error: OSError) -> InputError | MachineError:
    why = error.strerror or str(error)
    if error.errno == errno.EACCES and error.filename and out in Path(error.filename).parents:
        return InputError(f"{error.filename}: cannot be replaced ({why}); change its mode, or choose another OUT")
    if error.errno in _FULL:
        return MachineError(f"{out}: cannot be created ({why}); free space or fix the disk, {_AGAIN}")
    return InputError(f"{out}: cannot be created ({why}); choose another OUT")


# ----------------------------------------------------------------------------------------------------------------------
# The run.


class Workdir:
    """OUT.partial while one run holds it.

    Attributes:
        out: what is made.
        path: the folder to work in.
        resumed: whether what lies there is an unfinished run's of the same digest.
        delivered: what an earlier run of the same digest reported when it installed OUT and was killed before it had
            tidied up; nothing is left to be done.
        notes: what the user should be told of the installation.
        needs: the bytes that the output takes; 0: not known.
    """

    def __init__(self, out: Path, digest: str, *, folder: bool, force: bool, keep: Sequence[str]) -> None:
        self.out, self.path, self.digest = out, partial_path(out), digest
        self.folder, self.force = folder, force
        self.resumed = False
        self.delivered: dict[str, Any] | None = None
        self.notes: list[str] = []
        self.needs = 0
        self._keep = keep
        self._earlier: set[str] = set()
        self._finished = False
        self._done: int | None = None

    @property
    def result(self) -> Path:
        """Where the output is made: a folder, or a file with OUT's ending."""
        return self.path / (_RESULT if self.folder else f"{_RESULT}{self.out.suffix}")

    def space(self) -> str:
        """Say how much room the output needs, and how much is left."""
        free = shutil.disk_usage(self.out.absolute().parent).free
        needs = f"needs {self.needs / 1e9:.3g} GB of disk" if self.needs else "needs more disk"
        return f"{needs}, and {free / 1e9:.3g} GB are free"

    def new_result(self) -> Path:
        """Return an empty folder to make the output in."""
        self.remove_result()
        self.result.mkdir()
        return self.result

    def remove_result(self) -> None:
        """Remove what an unfinished run left of a result."""
        _remove(self.result)

    def adopt(self) -> None:
        """Keep what an unfinished run of the same digest left; of any other keep what is named to be kept.

        The digest is written last, so that it never stands beside what another one left.
        """
        before = _read_ours(self.path / WORK)
        self.resumed = before is not None and before.get("digest") == self.digest
        self._earlier = {name for name in self._keep if (self.path / name).exists()}
        if not self.resumed:
            write_file(self.path / WORK, json_text({"format": _FORMAT, "digest": None}))
            self._clear({WORK, *self._earlier})
            write_file(self.path / WORK, json_text({"format": _FORMAT, "digest": self.digest}))

    def deliver(self, facts: dict[str, Any]) -> None:
        """Install ``result`` as OUT and take OUT.partial away.

        Args:
            facts: what to report, JSON-able: what ``delivered`` is if this run is killed while it tidies up.

        Raises:
            MachineError: the disk failed, or something appeared at OUT meanwhile; OUT.partial is kept.
        """
        if self.folder:
            write_manifest(self.result)
        sync_tree(self.result)
        marker = {
            "format": _FORMAT,
            "digest": self.digest,
            "result": _identity(self.result),
            "kept": _free_name(self.out, ".kept").name,
            "facts": facts,
        }
        self._announce(marker)
        self._install()
        _sync(self.out.absolute().parent)
        self._tidy(marker)
        self._finished = True

    def recover(self) -> None:
        """Look at what a run that was killed around its installation left, and finish or undo it.

        Raises:
            InputError: OUT or OUT.done are not this run's to change; nothing has been.
        """
        marker = self._marker()
        if marker is None:
            self._restore(_free_name(self.out, ".kept"))
            return
        installed = _identity(self.out) == marker["result"]
        if installed and marker["digest"] == self.digest:
            self._tidy(marker)
            self.delivered, self._finished = marker["facts"], True
            return
        _refuse_occupied(self.out, self.folder, self.force)
        if installed:
            self._tidy(marker)
            self._clear({WORK})
            (self.path / WORK).unlink(missing_ok=True)
        self._restore(self.out.with_name(str(marker["kept"])))
        self._forget()

    def _marker(self) -> dict[str, Any] | None:
        """Return what OUT.done says, which this run holds from now on; None if there is none."""
        path = done_path(self.out)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError:
            raise _in_the_way(path) from None
        _lock(descriptor, path)
        self._done = descriptor
        marker = _read_ours(path)
        if not _still_names(path, descriptor):
            return None  # the run that wrote it has just finished
        if marker is None:
            raise _in_the_way(path)
        return marker

    def _announce(self, marker: dict[str, Any]) -> None:
        """Write OUT.done, held by this run."""
        temporary = self.path / ".done.new"
        self._done = _open_locked(temporary)
        os.ftruncate(self._done, 0)
        _write_all(self._done, json_text(marker).encode())
        os.fsync(self._done)
        os.replace(temporary, done_path(self.out))

    def _install(self) -> None:
        if self.out.exists() and (not self.folder or any(self.out.iterdir())):
            if not self.force:
                self._forget()
                raise MachineError(f"{self.out}: appeared while this run worked; move it elsewhere, {_AGAIN}")
            if not exchange(self.result, self.out):
                os.rename(self.out, self.path / _PREVIOUS)
                os.rename(self.result, self.out)
        else:
            os.rename(self.result, self.out)

    def _restore(self, kept: Path) -> None:
        """Put the old OUT back if a run without the exchange was killed between its two renames.

        If something else has appeared there since, what is not ours of the old one goes to ``kept``.
        """
        previous = self.path / _PREVIOUS
        if previous.exists():
            if not self.out.exists() or (previous.is_dir() and self.out.is_dir() and not any(self.out.iterdir())):
                os.rename(previous, self.out)
            else:
                if previous.is_dir():
                    _set_aside(previous, kept)
                _remove(previous)

    def _tidy(self, marker: dict[str, Any]) -> None:
        """After the installation: keep what was not ours of the old OUT; the rest goes with OUT.partial."""
        kept = self.out.with_name(str(marker["kept"]))
        for old in (self.result, self.path / _PREVIOUS):
            if self.folder and old.is_dir():
                _set_aside(old, kept)
                if old.exists():
                    os.rename(old, self.path / _TRASH)
        # Counted there, for a killed run may have moved some of them.
        count = sum(1 for _ in _files(kept)) if kept.is_dir() else 0
        if count:
            self.notes.append(
                f"{count} file(s) at {self.out} had not been written by Consilience; they are now in {kept}"
            )

    def _forget(self) -> None:
        done_path(self.out).unlink(missing_ok=True)
        if self._done is not None:
            os.close(self._done)
            self._done = None

    def _clear(self, spared: set[str]) -> None:
        for path in self.path.iterdir():
            if path.name not in spared:
                _remove(path)

    def discard(self, made: list[Path]) -> None:
        """Leave nothing behind but what an earlier run had left to be kept."""
        if self._earlier:
            self._clear({WORK, *self._earlier})
            return
        self.remove()
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()

    def remove(self) -> None:
        """Take OUT.partial away: its mark goes last, so that a kill leaves a folder that is known as ours."""
        self._clear({WORK})
        (self.path / WORK).unlink(missing_ok=True)
        self.path.rmdir()

    def close(self) -> None:
        """Finish after a delivery: OUT.done is the last thing to go."""
        try:
            if self._finished:
                self.remove()
                if _last is None:
                    self._forget()
                else:
                    _last.append(self._forget)
                    return
        except BaseException:
            self._release()
            raise
        self._release()

    def _release(self) -> None:
        if self._done is not None:
            os.close(self._done)
            self._done = None


#: What a command does when nothing else is left to do; None: deliveries end at once.
_last: list[Callable[[], None]] | None = None


@contextlib.contextmanager
def whole_command() -> Generator[None]:
    """Let OUT.done stay until a whole command has ended, so that one killed while it says what it did can be rerun."""
    global _last
    before, _last = _last, []
    try:
        yield
    finally:
        endings, _last = _last, before
        for ending in endings:
            with contextlib.suppress(OSError):  # the next run tidies up
                ending()


@contextlib.contextmanager
def workdir(
    out: Path,
    digest: str,
    *,
    folder: bool = True,
    force: bool = False,
    inputs: Iterable[Path] = (),
    keep: Sequence[str] = (),
    summarised: bool = False,
) -> Generator[Workdir]:
    """Hold OUT for this run alone; inside, make ``result`` and ``deliver`` it.

    Wrong input leaves nothing behind; any other end keeps OUT.partial, and a run of the same digest goes on there.

    Args:
        out: what is made.
        digest: identifies the work by everything that decides the result.
        folder: whether OUT is a folder (else one file).
        force: replace what stands at ``out``.
        inputs: what the work reads.
        keep: names in OUT.partial that are worth keeping when the digest is another one, or the input is wrong.
        summarised: whether the caller tells the user what ``notes`` say; else they are logged.

    Raises:
        InputError: see ``check_out``; or another run holds OUT.
        MachineError: the disk is full or failed.
    """
    named = list(inputs)
    check_out(out, folder=folder, force=force, inputs=named)
    made = [parent for parent in partial_path(out.absolute()).parents if not parent.exists()]
    try:
        descriptor = _claim(partial_path(out))
    except OSError as error:
        _remove_empty(made)
        raise _impossible(out, error) from None
    work = Workdir(out, digest, folder=folder, force=force, keep=keep)
    try:
        try:
            _refuse_foreign(work.path)
            work.recover()
            if work.delivered is None:
                _refuse_occupied(out, folder, force)  # again: another run may have finished since
        except InputError:
            work.close()
            _remove_empty([work.path, *made])
            raise
        try:
            if work.delivered is None:
                work.adopt()
            yield work
        except InputError:
            work.discard(made)
            raise
        finally:
            work.close()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # of a copy the system names the source
            raise MachineError(f"{out}: {work.space()} ({error.strerror}); free some, {_AGAIN}") from error
        place = error.filename or str(work.path)
        raise MachineError(f"{place}: {error.strerror or error}; free space or fix the disk, {_AGAIN}") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # what the library makes of a failing disk
            raise
        raise MachineError(f"{work.path}: {error}; free space or fix the disk, {_AGAIN}") from error
    finally:
        os.close(descriptor)
    if not summarised:
        for note in work.notes:
            _LOG.warning("note: %s", note)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _claim(partial: Path) -> int:
    """Make OUT.partial if need be and lock it; return the descriptor that holds the lock."""
    while True:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            partial.mkdir()
        try:
            descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # the run that held it has just finished
        _lock(descriptor, partial)
        if _still_names(partial, descriptor):
            return descriptor
        os.close(descriptor)


def _lock(descriptor: int, place: Path, kind: int = fcntl.LOCK_EX) -> None:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(f"{place}: another run is writing there; wait for it, or choose another OUT") from None


def _free_name(path: Path, ending: str) -> Path:
    number, free = 1, path.with_name(path.name + ending)
    while free.exists() or free.is_symlink():
        number += 1
        free = path.with_name(f"{path.name}{ending}-{number}")
    return free


def exchange(one: Path, other: Path) -> bool:
    """Let two files or folders change places in one step (Linux's renameat2); False where that is not to be had."""
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    if call(here, os.fsencode(one), here, os.fsencode(other), swap) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


# ----------------------------------------------------------------------------------------------------------------------
# Folders for a moment.


@contextlib.contextmanager
def scratch(prefix: str) -> Generator[Path]:
    """Give a folder that goes at the end; those that killed runs have left go first.

    Args:
        prefix: what such folders' names begin with, in the system's folder for temporary files.
    """
    root = Path(tempfile.gettempdir())
    for path in root.glob(f"{prefix}*"):
        with contextlib.suppress(OSError, InputError):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            _lock(descriptor, path)
            try:
                if os.fstat(descriptor).st_uid == os.getuid():
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)
    while True:
        place = Path(tempfile.mkdtemp(prefix=prefix))
        try:
            descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # another run took it for a leftover
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _still_names(place, descriptor):
            break
        os.close(descriptor)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        os.close(descriptor)
