"""What was read of one file, and how large a file may be."""

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from consilience.doctor.evidence.logs.curve import Curve
from consilience.doctor.evidence.logs.facts import Fact
from consilience.errors import InputError

#: The most that is read of a log, in bytes.
LIMIT = 64 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """Facts by field, a curve, and lines about what was left unread."""

    facts: Mapping[str, Fact] = field(default_factory=dict[str, Fact])
    curve: Curve = field(default_factory=Curve)
    unread: tuple[str, ...] = ()


def read_bytes(path: Path, limit: int = LIMIT) -> bytes:
    """Return a regular file's bytes.

    Raises:
        InputError: it cannot be read, is no regular file, or is longer than ``limit`` bytes.
    """
    try:
        # A pipe put in the file's place after a look at it would block an ordinary open.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"{path}: is not a regular file; name a training log")
            if status.st_size > limit:
                raise InputError(f"{path}: {status.st_size} bytes are too many for a log (limit {limit}); thin it out")
            return file.read(limit + 1)[:limit]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); restore it") from None
