"""Files named by strangers, looked at before they are opened."""

import stat
from pathlib import Path

from consilience.errors import InputError


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
