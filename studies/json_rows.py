"""How results are written: compact JSON that a diff still shows by key and by row."""

import json
from typing import Any

WIDTH = 120


def json_rows(value: Any, *, allow_nan: bool = False) -> str:
    """Return ``value`` as JSON without indentation, ending in a newline.

    A mapping or list at the two outermost levels that is longer than ``WIDTH`` characters has a line per entry;
    everything deeper stays on its entry's line. Reading the text returns the same numbers.

    Args:
        value: mappings, lists, strings, numbers, booleans and None.
        allow_nan: write NaN and infinities as Python's ``json`` does, which other readers refuse.

    Raises:
        TypeError: ``value`` holds something else.
        ValueError: a number is NaN or infinite, without ``allow_nan``.
    """
    return _lines(value, 2, allow_nan) + "\n"


def _lines(value: Any, levels: int, allow_nan: bool) -> str:
    text = json.dumps(value, allow_nan=allow_nan, ensure_ascii=False, separators=(",", ":"))
    if levels == 0 or len(text) <= WIDTH:
        return text
    if isinstance(value, dict):
        entries = [_key(key) + _lines(entry, levels - 1, allow_nan) for key, entry in value.items()]
        return "{\n" + ",\n".join(entries) + "\n}"
    if isinstance(value, list | tuple):
        return "[\n" + ",\n".join(_lines(entry, levels - 1, allow_nan) for entry in value) + "\n]"
    return text


def _key(key: Any) -> str:
    # Within a mapping json.dumps writes numbers, booleans and None as the strings that JSON's keys have to be.
    return json.dumps({key: 0}, ensure_ascii=False, separators=(",", ":"))[1:-2]
