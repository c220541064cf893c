"""JSON read from strangers: size-bounded, duplicate keys refused, errors that name the file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from consilience.errors import InputError


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"key {key!r} appears twice")
        out[key] = value
    return out


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """Parse ``text`` as one JSON object; ``where`` names it in the ``InputError`` raised when it is not one."""
    try:
        value: Any = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error}); restore the file from its source") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: holds a JSON {type(value).__name__}, not an object; restore the file")
    return cast(dict[str, Any], value)


def read_object(path: Path, limit: int = 64 << 20) -> dict[str, Any]:
    """Read the JSON object in ``path``.

    Raises:
        InputError: the file cannot be read, is larger than ``limit`` bytes, or holds no JSON object.
    """
    try:
        size = path.stat().st_size
        if size > limit:
            raise InputError(f"{path}: {size} bytes is too large for a JSON file of this kind (limit {limit})")
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    return parse_object(text, str(path))
