"""What is remembered between runs: small JSON files under the hash of everything they depend on.

The folder is ``$CONSILIENCE_CACHE``, or ``$XDG_CACHE_HOME/consilience``, or ``~/.cache/consilience``. Deleting it costs
time only. A file that does not parse is ignored and rewritten, and a folder that cannot be written turns the cache off
without a word: it is never a reason to fail.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from consilience.workdir import write_file


def cache_root() -> Path:
    """Return the folder of everything that is remembered; it need not exist."""
    own = os.environ.get("CONSILIENCE_CACHE")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    base = Path(shared) if shared and os.path.isabs(shared) else Path.home() / ".cache"
    return base / "consilience"


def _place(folder: Path, key: str) -> Path:
    return folder / key[:2] / f"{key}.json"


def recall(folder: Path, key: str) -> dict[str, Any] | None:
    """Return what a folder of the cache has under a key, or None (also for a file that is damaged)."""
    try:
        value: Any = json.loads(_place(folder, key).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return cast(dict[str, Any], value) if isinstance(value, dict) else None


def remember(folder: Path, key: str, value: Mapping[str, Any]) -> None:
    """Write a value under a key, whole or not at all."""
    place = _place(folder, key)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_file(place, json.dumps(value, allow_nan=False).encode())
    except OSError:
        return
