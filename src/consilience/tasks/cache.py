"""Results kept as small JSON files, under the hash of everything they depend on.

They are in the folder ``evaluate`` of the cache (see ``consilience.cache``).
"""

import json
import time
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from consilience import cache
from consilience.errors import InputError

#: Change when the meaning of a stored result changes.
VERSION = 2
#: A file changed less than this many nanoseconds ago may change again within its time stamp's granularity (git's
#: "racily clean" problem), so its digest is not remembered yet.
_SETTLED_NS = 2_000_000_000
_IRRELEVANT = (".md", ".txt.gz", ".png", ".jpg", ".svg", ".lock")


def cache_folder() -> Path:
    """Return where results are kept; it need not exist."""
    return cache.cache_root() / "evaluate"


def key_of(parts: Mapping[str, Any]) -> str:
    """Hash JSON-able values into a file name."""
    text = json.dumps({"version": VERSION, **parts}, sort_keys=True, allow_nan=False)
    return blake2b(text.encode(), digest_size=20).hexdigest()


def recall(kind: str, key: str) -> dict[str, Any] | None:
    """Return what was remembered under a key, or None (also for a file that is damaged)."""
    return cache.recall(cache_folder() / kind, key)


def remember(kind: str, key: str, value: Mapping[str, Any]) -> None:
    """Write a value under a key, whole or not at all."""
    cache.remember(cache_folder() / kind, key, value)


def file_digest(path: Path) -> str:
    """Hash a file's whole content (BLAKE2b), remembered by its path, size, times and inode.

    Raises:
        OSError: the file cannot be read.
    """
    state = path.stat()
    identity = [str(path.resolve()), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino, state.st_dev]
    key = key_of({"file": identity})
    known = recall("files", key)
    if known is not None and isinstance(known.get("digest"), str):
        return str(known["digest"])
    digest = blake2b(digest_size=20)
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(4 << 20))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    after = path.stat()
    settled = time.time_ns() - max(state.st_mtime_ns, state.st_ctime_ns) > _SETTLED_NS
    if settled and (after.st_mtime_ns, after.st_size) == (state.st_mtime_ns, state.st_size):
        remember("files", key, {"digest": digest.hexdigest(), "path": identity[0]})
    return digest.hexdigest()


def fingerprint(folder: Path) -> str:
    """Hash the names and contents of the files at the top of a model or adapter folder, but for cards and pictures.

    An adapter may also be a file alone.

    Raises:
        InputError: the folder or a file in it cannot be read.
    """
    try:
        files = sorted(
            path
            for path in ([folder] if folder.is_file() else folder.iterdir())
            if path.is_file() and not path.name.startswith(".") and path.suffix.lower() not in _IRRELEVANT
        )
        return key_of({"files": [[path.name, path.stat().st_size, file_digest(path)] for path in files]})
    except OSError as error:
        raise InputError(
            f"{error.filename or folder}: cannot be read ({error.strerror}); check the model folder"
        ) from None
