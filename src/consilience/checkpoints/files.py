"""Files named by strangers: looked at before they are opened, and open only so many at a time."""

import contextlib
import errno
import itertools
import os
import shutil
import stat
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from consilience.errors import InputError, nearest


def regular_size(path: Path) -> int:
    """Return the size of the regular file ``path`` in bytes; symlinks are followed.

    A pipe would block whoever opens it, and a device such as /dev/zero never ends.

    Raises:
        InputError: there is no such file, or it is a folder, pipe, socket or device.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); restore it") from None
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: is not a regular file; restore it from its source")
    return status.st_size


class Stamp(NamedTuple):
    """What tells one state of a file from another without reading it."""

    path: str
    size: int
    modified: int
    changed: int
    device: int
    inode: int


def stamp(path: Path) -> Stamp:
    """Return a file's present stamp; symlinks are followed.

    Raises:
        OSError: there is no such file.
    """
    status = path.stat()
    times = status.st_mtime_ns, status.st_ctime_ns
    return Stamp(str(path), status.st_size, *times, status.st_dev, status.st_ino)


def copy_file(source: Path, target: Path, root: Path | None = None) -> None:
    """Copy a file that lies in a model's folder ``root``; see ``check_link``."""
    check_link(source, root)
    shutil.copyfile(source, target)


def check_link(path: Path, root: Path | None = None) -> None:
    """Refuse to copy a link that leads out of the model's folder ``root`` (by default the file's), or no regular file.

    A link may lead to a file of the same folder or, in a hub cache (``models--*/snapshots/REVISION``), to that cache's
    ``blobs``: what else is on the machine is nobody's to publish.

    Raises:
        InputError: names the link.
    """
    regular_size(path)
    if not path.is_symlink():
        return
    real, folder = path.resolve(), (root or path.parent).resolve()
    allowed = [folder]
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        allowed.append(folder.parent.parent / "blobs")
    if not any(place in real.parents for place in allowed):
        raise InputError(f"{path}: is a link to a file outside its folder, which would be copied; copy or remove it")


@dataclass(slots=True)
class Descriptor:
    """An open file's number, and how many use it now."""

    number: int
    users: int = 0


class Descriptors:
    """Files that are opened when they are used; over all, only as many stay open as the system allows.

    ``take`` and ``release`` may be called from several threads; the least recently used files that nobody has taken
    are closed first.
    """

    #: Descriptors that are left to the rest of the process: libraries, pipes, locks.
    SPARED = 64
    _lock = threading.RLock()  # an object may be collected, and closed, while its own thread holds it
    _open: ClassVar[OrderedDict[tuple[int, int], Descriptor]] = OrderedDict()  # by (owner, file)
    _owners = itertools.count()
    _limit = 0

    def __init__(self, files: list[Path], flags: int) -> None:
        self.files, self.flags = files, flags | os.O_CLOEXEC
        self._owner = next(self._owners)

    def take(self, index: int) -> Descriptor:
        """Return file number ``index``, which stays open until it is released.

        Raises:
            OSError: it cannot be opened.
        """
        key = (self._owner, index)
        with self._lock:
            taken = self._open.get(key)
            if taken is None:
                self._evict(max(8, self._most() - self.SPARED) - 1)
                taken = self._open[key] = Descriptor(self._opened(index))
            self._open.move_to_end(key)
            taken.users += 1
            return taken

    def release(self, taken: Descriptor) -> None:
        """Say that a file is not in use any more."""
        with self._lock:
            taken.users -= 1

    def _opened(self, index: int) -> int:
        try:
            return os.open(self.files[index], self.flags, 0o666)
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            self._evict(0)  # others in this process hold more than was spared for them
            return os.open(self.files[index], self.flags, 0o666)

    @classmethod
    def _evict(cls, left: int) -> None:
        too_many = len(cls._open) - left
        idle = [key for key, one in list(cls._open.items()) if one.users == 0] if too_many > 0 else []
        for key in idle[: max(0, too_many)]:
            cls._shut(key)

    @classmethod
    def _shut(cls, key: tuple[int, int]) -> None:
        taken = cls._open.pop(key, None)
        if taken is not None:
            os.close(taken.number)

    @classmethod
    def _most(cls) -> int:
        """Return how many files this process may have open, after raising the limit as far as that goes."""
        if not cls._limit:
            import resource

            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            if soft < hard:
                with contextlib.suppress(ValueError, OSError):
                    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            cls._limit = min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 1 << 16)
        return cls._limit

    def close(self) -> None:
        """Close every file that is open."""
        with self._lock:
            for key in [key for key in list(self._open) if key[0] == self._owner]:
                self._shut(key)


def path_of(value: Any, name: str) -> Path:
    """Return a path that was given as text or as a path.

    Raises:
        InputError: it is neither; ``name`` names the argument.
    """
    if isinstance(value, str | Path):
        return Path(value)
    raise InputError(f"{name}: {value!r} is no path; give one as text")


def why_absent(path: Path, known: Sequence[str] | None = None, what: str = "file or folder") -> str:
    """Say why nothing can be opened at ``path``, and what to do.

    Args:
        path: where ``exists`` finds nothing.
        known: names that may have been meant; by default those beside it.
        what: what there should be.
    """
    try:
        path.lstat()
        path.stat()
    except (OSError, ValueError) as error:
        code, why = getattr(error, "errno", None), getattr(error, "strerror", None) or str(error)
        if code == errno.ELOOP:
            return "is a link that leads back to itself; remove it, or name the place that was meant"
        if code == errno.EACCES:
            return f"cannot be read ({why}); change its permissions, or those of a folder above it"
        if os.path.islink(path):
            return f"is a link to {os.readlink(path)}, which is not there; restore that, or name another"
        if code not in (None, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            return f"cannot be read ({why}); check the path"
    names = siblings(path) if known is None else known
    return f"no such {what}{nearest(path.name, names) or '; check the path'}"


def check_readable(path: Path) -> None:
    """Check that a folder may be listed and entered.

    Raises:
        InputError: names it.
    """
    try:
        if path.is_dir():
            os.scandir(path).close()
            os.stat(f"{path}/.")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); change its permissions") from None


def mistaken(head: bytes) -> str | None:
    """Say what a file is that begins so and was taken for something else; None: it cannot be told."""
    start = head.lstrip()[:100].lower()
    if start.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the file itself; fetch that with: git lfs pull"
    if start.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "is a web page, not the file itself; download it again"
    if head.startswith(b"GGUF"):
        return "is a GGUF file under another ending; name it .gguf"
    return None


def siblings(path: Path) -> list[str]:
    """Return the names beside ``path``, for suggesting the one that was meant; none if they cannot be listed."""
    try:
        return [entry.name for entry in path.parent.iterdir()]
    except (OSError, ValueError):
        return []


def exists(path: Path) -> bool:
    """Whether ``path`` exists; a name that no file can have (too long, holding NUL) does not."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False
