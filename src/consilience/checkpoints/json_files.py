"""JSON read from strangers: bounded in size and depth, duplicate keys refused, errors that name the file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from consilience.checkpoints.files import mistaken, regular_size
from consilience.errors import InputError

#: Deeper nesting than any config has; writing it back recurses.
DEPTH_LIMIT = 100


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"key {key!r} appears twice")
        out[key] = value
    return out


def _refuse_lone_surrogates(text: bytes, value: Any) -> None:
    """Refuse strings that are not Unicode text: they can be read as escapes but never written again."""
    if b"\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode("utf-8")


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """Parse ``text`` as one JSON object; ``where`` names it in the ``InputError`` raised when it is not one."""
    try:
        value: Any = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
        _refuse_lone_surrogates(text, value)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error}); restore the file from its source") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: holds a JSON {type(value).__name__}, not an object; restore the file")
    return cast(dict[str, Any], value)


def _deeper_than(value: Any, limit: int) -> bool:
    layer: list[Any] = [value]
    for _ in range(limit):
        parents = [node for node in layer if isinstance(node, dict | list)]
        layer = [child for node in parents for child in (node.values() if isinstance(node, dict) else node)]
    return bool(layer)


def read_object(path: Path, limit: int = 64 << 20) -> dict[str, Any]:
    """Read the JSON object in ``path``.

    Raises:
        InputError: the file cannot be read, is longer than ``limit`` bytes or too deeply nested, or is no JSON object.
    """
    size = regular_size(path)
    if size > limit:
        raise InputError(f"{path}: {size} bytes is too large for a JSON file of this kind (limit {limit}); restore it")
    try:
        with open(path, "rb") as file:
            text = file.read(limit + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); restore it") from None
    known = mistaken(text[:256])
    if known is not None:
        raise InputError(f"{path}: {known}")
    value = parse_object(text, str(path))
    if _deeper_than(value, DEPTH_LIMIT):
        raise InputError(f"{path}: nested more than {DEPTH_LIMIT} levels deep; restore the file from its source")
    return value
