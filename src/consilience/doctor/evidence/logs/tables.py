"""Logs as tables: CSV and JSONL with a column for the step, under the names that frameworks give them."""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from consilience.doctor.evidence.logs.curve import collect, column, step_key
from consilience.doctor.evidence.logs.facts import Fact, fold, read_facts
from consilience.doctor.evidence.logs.reading import Reading, read_bytes
from consilience.errors import InputError

#: Keys of a row that speak of the run; the last row that has one counts.
_OF_THE_RUN = ("epoch", "total_steps", "max_steps", "total_epochs")
#: No row of a log is longer, in characters.
_LONGEST_ROW = 1 << 20


def read_csv(path: Path) -> Reading:
    """Read a CSV log: a header, then a row a step; commas, semicolons or tabs between.

    A last row that was not written to its end is left out.

    Raises:
        InputError: the file is no such table, or has no column for the step or none of those that are known.
    """
    lines, ended = _lines(path)
    if not lines:
        raise InputError(f"{path}: is empty; name a log with a header and a row a step")
    mark = max(",;\t", key=lines[0].count)
    try:
        rows = list(csv.reader(lines, delimiter=mark))
    except csv.Error as error:
        raise InputError(f"{path}: is no CSV table ({error}); restore it") from None
    header, rows = rows[0], [row for row in rows[1:] if row]
    if rows and len(rows[-1]) < len(header) and not ended:
        rows.pop()
    ragged = [number for number, row in enumerate(rows, 2) if len(row) != len(header)]
    reading = _reading(path, header, [dict(zip(header, row, strict=False)) for row in rows])
    if not ragged:
        return reading
    said = f"{path}: {len(ragged)} rows have more or fewer fields than the header (the first is row {ragged[0]})"
    return replace(reading, unread=(*reading.unread, f"{said}; their fields were taken from the left"))


def read_jsonl(path: Path) -> Reading:
    """Read a JSONL log: an object a line; objects without a step are left out.

    A last line that was not written to its end is left out.

    Raises:
        InputError: a line is no JSON object, or no line has a step and a column that is known.
    """
    rows = list(_objects(path, _lines(path)[0]))
    return _reading(path, list({key: None for row in rows for key in row}), rows)


def looks_like_log(path: Path, head: bytes) -> bool:
    """Whether the first line of a table, whose first bytes are ``head``, has a step and a column that is known."""
    first = head.decode("utf-8", "replace").lstrip("\ufeff").splitlines()[:1]
    if not first:
        return False
    if path.suffix == ".jsonl":
        try:
            value: Any = json.loads(first[0])
        except (ValueError, RecursionError):
            return False
        keys = list(cast(dict[str, Any], value)) if isinstance(value, dict) else []
    else:
        keys = [key.strip('" ') for key in first[0].split(max(",;\t", key=first[0].count))]
    return step_key(keys) is not None and any(map(column, keys))


def _lines(path: Path) -> tuple[list[str], bool]:
    """Return a text's lines that are not blank, and whether the last was written to its end."""
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text (byte {error.start}); is it a log?") from None
    lines = text.split("\n")
    for at, line in enumerate(lines, 1):
        if len(line) > _LONGEST_ROW:
            raise InputError(f"{path}: line {at} has {len(line)} characters; is it a log?")
    return [line.rstrip("\r") for line in lines if line.strip()], text.endswith("\n")


def _objects(path: Path, lines: list[str]) -> Iterator[dict[str, Any]]:
    for at, line in enumerate(lines, 1):
        try:
            value: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            if at == len(lines):
                return
            raise InputError(f"{path}: row {at} is not JSON ({error}); restore the log") from None
        if not isinstance(value, dict):
            raise InputError(f"{path}: row {at} is a JSON {type(value).__name__}, not an object; restore the log")
        yield cast(dict[str, Any], value)


def _reading(path: Path, keys: list[str], rows: list[dict[str, Any]]) -> Reading:
    step = step_key(keys)
    if step is None:
        raise InputError(f"{path}: has no column 'step'; give each row its step")
    if not any(map(column, keys)):
        raise InputError(f"{path}: has no column loss, learning_rate or grad_norm; name a training log")
    rows = [row for row in rows if row.get(step) not in (None, "")]
    return Reading(_facts(path, rows), collect([(row[step], row) for row in rows], str(path)))


def _facts(path: Path, rows: list[dict[str, Any]]) -> Mapping[str, Fact]:
    """Return facts of the run in its last rows, such as the epochs done; a value that is no number is none."""
    last: dict[str, Any] = {}
    for row in rows[-20:]:
        last |= {key: value for key, value in row.items() if fold(key) in _OF_THE_RUN and value not in (None, "")}
    found: dict[str, Fact] = {}
    for key, value in last.items():
        try:
            found |= read_facts({key: value}, str(path), known={"total_epochs": "planned_epochs"})
        except InputError:
            continue
    return found
