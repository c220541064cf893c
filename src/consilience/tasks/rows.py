"""Rows on disk: JSONL whose lines hold ``text``, ``prompt`` (+ ``response``) or ``messages``.

A row may also hold ``choices`` with ``label`` (rank classification), and ``image``. Rows without a ``response`` are
unlabelled: they serve for calibration and for divergences, not for a loss.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError, model_validator

from consilience.checkpoints.files import exists, regular_size, why_absent
from consilience.errors import InputError, nearest

#: Stems that say which part of a data set a file is, not which task: the parent folder names the task instead.
_GENERIC = frozenset(
    ("calibration", "cal", "data", "dev", "eval", "evaluation", "heldout", "held_out", "held-out", "probe", "prompts",
     "rows", "test", "tests", "train", "training", "val", "valid", "validation")
)  # fmt: skip
_NAME = re.compile(r"[\w.+-]+")

Text = Annotated[str, Strict(), Field(min_length=1)]


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text


class Row(BaseModel):
    """One example: exactly one of ``text``, ``prompt`` and ``messages``, and what goes with it.

    ``response`` belongs to ``prompt``; ``choices`` (at least two, distinct) need ``label``, an index into them or one
    of them; a ``response`` beside ``choices`` must be the labelled choice.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: Text | None = None
    prompt: Text | None = None
    response: Text | None = None
    messages: tuple[Message, ...] | None = None
    image: Text | None = None
    label: Annotated[int, Strict()] | Text | None = None
    choices: tuple[Text, ...] | None = None

    @model_validator(mode="after")
    def _coherent(self) -> "Row":
        given = [key for key in ("text", "prompt", "messages") if getattr(self, key) is not None]
        if not given:
            raise ValueError("holds none of text, prompt, messages; give one")
        if len(given) > 1:
            raise ValueError(f"holds both {given[0]} and {given[1]}; keep one")
        if self.response is not None and self.prompt is None:
            raise ValueError(f"response goes with prompt, not with {given[0]}")
        if self.messages is not None and not self.messages:
            raise ValueError("messages is empty")
        if self.choices is not None:
            self._check_choices(self.choices)
        return self

    def _check_choices(self, choices: tuple[str, ...]) -> None:
        if self.text is not None:
            raise ValueError("choices go with prompt or messages, not with text")
        if self.messages is not None and self.messages[-1].role == "assistant":
            raise ValueError("messages end with an assistant turn although choices are to follow; drop that turn")
        if len(choices) < 2 or len(set(choices)) < len(choices):
            raise ValueError("choices must be at least two, all different")
        if self.label is None:
            raise ValueError("choices need a label: the right choice's index, or the choice itself")
        if isinstance(self.label, int) and not 0 <= self.label < len(choices):
            raise ValueError(f"label {self.label} is not an index into {len(choices)} choices (they count from 0)")
        if isinstance(self.label, str) and self.label not in choices:
            raise ValueError(f"label {self.label!r} is not among the choices{nearest(self.label, choices)}")
        if self.response is not None and self.response != choices[self.gold or 0]:
            raise ValueError("response differs from the labelled choice; drop one of the two")

    @property
    def gold(self) -> int | None:
        """Index of the right choice; None without choices."""
        if self.choices is None or self.label is None:
            return None
        return self.label if isinstance(self.label, int) else self.choices.index(self.label)

    @property
    def labelled(self) -> bool:
        """Whether the row says what a model should answer, so that a loss is defined."""
        if self.messages is not None and self.choices is None:
            return any(message.role == "assistant" for message in self.messages)
        return self.text is not None or self.response is not None or self.choices is not None


@dataclass(frozen=True)
class Task:
    """A named set of rows; ``path`` is the file they came from, None for rows made in memory."""

    name: str
    rows: tuple[Row, ...]
    path: Path | None = None

    def where(self, index: int) -> str:
        """Name row ``index`` as an error message should: ``FILE:LINE``, counted from 1."""
        return f"{self.path}:{index + 1}" if self.path else f"task {self.name}, row {index + 1}"

    @cached_property
    def digest(self) -> str:
        """Hash of what the rows say: key order, spacing and line ends do not matter, row order does."""
        state = blake2b(digest_size=16)
        for row in self.rows:
            state.update(row.model_dump_json(exclude_none=True).encode() + b"\n")
        return state.hexdigest()


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"key {key!r} appears twice; keep one")
        out[key] = value
    return out


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON; write a number or null")


#: What a field must be, by pydantic's kind of error, and what JSON calls what it is.
_WANTED = {"string_type": "text", "list_type": "a list", "tuple_type": "a list", "model_type": "an object",
           "int_type": "a whole number"}  # fmt: skip
_JSON_KINDS = {int: "a number", float: "a number", bool: "true or false", list: "a list", dict: "an object",
               type(None): "null", str: "text"}  # fmt: skip


def _explain(error: ValidationError, where: str) -> InputError:
    errors = error.errors(include_url=False)
    unknown = [e for e in errors if e["type"] == "extra_forbidden"]
    first = (unknown or errors)[0]
    place = [
        str(part) for part in first["loc"] if not (isinstance(part, str) and ("[" in part or part in ("int", "str")))
    ]
    if unknown:
        known = list((Message if len(place) > 1 else Row).model_fields)
        return InputError(
            f"{where}: unknown key {'.'.join(place)!r}{nearest(place[-1], known)}; the keys are {', '.join(known)}"
        )
    message = first["msg"].removeprefix("Value error, ")
    wanted = _WANTED.get(first["type"])
    if wanted is not None:
        message = f"is {_JSON_KINDS.get(type(first['input']), 'another value')}, and must be {wanted}"
    if first["type"] == "string_unicode":  # JSON can spell half a surrogate pair, "\\ud800"
        message = "holds half a surrogate pair, which is not text; remove it"
    return InputError(f"{where}: {'.'.join(place)}: {message}" if place else f"{where}: {message}")


def parse_row(line: bytes | str, where: str = "row") -> Row:
    """Parse one line of JSONL; ``where`` names it in errors.

    Raises:
        InputError: the line is not UTF-8, not one JSON object with distinct known keys, or not a coherent ``Row``.
    """
    try:
        text = line.decode("utf-8") if isinstance(line, bytes) else line
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 at byte {error.start} of the line; convert the file to UTF-8") from None
    if not text.strip():
        raise InputError(f"{where}: blank line; remove it (one JSON object per line)")
    try:
        value: Any = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: not valid JSON ({error.msg} at column {error.colno}); one object per line"
        ) from None
    except RecursionError:
        raise InputError(f"{where}: not valid JSON (nested too deeply)") from None
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f'{where}: holds a JSON {type(value).__name__}, not an object; write {{"prompt": ...}}')
    try:
        return Row.model_validate(value)
    except ValidationError as error:
        raise _explain(error, where) from None


def read_rows(path: Path | str) -> tuple[Row, ...]:
    """Read a JSONL file; a byte-order mark and a last line without an end are accepted.

    Raises:
        InputError: the file cannot be read or is empty, or a line is wrong (named ``FILE:LINE``).
    """
    path = Path(path)
    if not exists(path):
        raise InputError(f"{path}: {why_absent(path, what='file')}")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name a .jsonl file in it")
    regular_size(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    if not lines:
        raise InputError(f"{path}: holds no rows; give at least one JSON object")
    return tuple(parse_row(line, f"{path}:{number}") for number, line in enumerate(lines, 1))


def default_name(path: Path) -> str:
    """Name a task after its file: the stem, or the nearest folder above whose name is not generic.

    ``heldout/code.jsonl`` and ``heldout/code/test.jsonl`` are both ``code``; a stem such as ``test`` stays when no
    folder of the path as written says more.
    """
    for name in (path.stem, *(parent.name for parent in path.parents)):
        if name and name.lower() not in _GENERIC:
            return name
    return path.stem


def load_task(spec: Path | str) -> Task:
    """Read a task from ``PATH`` or ``NAME=PATH``.

    Raises:
        InputError: no file, wrong rows, or a name that is not letters, digits, ``.``, ``_``, ``+`` or ``-``.
    """
    name, equals, rest = str(spec).partition("=")
    if isinstance(spec, Path) or not equals or exists(Path(spec)):
        path = Path(spec)
        return Task(default_name(path), read_rows(path), path)
    if not _NAME.fullmatch(name) or not rest:
        raise InputError(f"{spec}: write NAME=PATH, with a name of letters, digits, '.', '_', '+' or '-'")
    return Task(name, read_rows(rest), Path(rest))


def load_tasks(tasks: Sequence[Task | Path | str]) -> list[Task]:
    """Read tasks as ``load_task`` does (values are taken as they are), of which no two may have one name.

    Raises:
        InputError: there is no task, a name is given twice, or as ``load_task``.
    """
    if not tasks:
        raise InputError("no task given; name at least one JSONL file")
    out = [task if isinstance(task, Task) else load_task(task) for task in tasks]
    names = [task.name for task in out]
    for task in out:
        if names.count(task.name) > 1:
            raise InputError(f"{task.path}: two tasks are named {task.name!r}; give one as NAME=PATH")
    return out


@dataclass(frozen=True, slots=True)
class Overlap:
    """Rows that two tasks share: ``pairs`` holds (index in a, index in b), for each row of a its first match in b."""

    n_a: int
    n_b: int
    pairs: tuple[tuple[int, int], ...]

    @property
    def n_shared(self) -> int:
        """Number of rows of a that are also in b."""
        return len(self.pairs)


def _normal(parts: Iterable[str | None]) -> bytes:
    text = unicodedata.normalize("NFKC", " ".join(part for part in parts if part)).casefold()
    return blake2b(" ".join(text.split()).encode(), digest_size=16).digest()


def _contents(row: Row) -> set[bytes]:
    """Hashes of what a row asks, and of everything it says."""
    answer = row.response or (row.choices[row.gold or 0] if row.choices else None)
    if row.messages is None:
        return {_normal([row.image, row.text or row.prompt]), _normal([row.image, row.text or row.prompt, answer])}
    asked = [m.content for m in row.messages if m.role in ("user", "tool")]
    said = [m.content for m in row.messages if m.role not in ("system", "developer")]
    # Without a user's turn nothing is asked, and an empty question would match every other one.
    return {_normal([row.image, *part]) for part in (asked, [*said, answer]) if any(part)}


def row_hashes(row: Row) -> list[str]:
    """Return hashes of what a row asks and of everything it says, by which ``overlap`` recognises it."""
    return sorted(value.hex() for value in _contents(row))


def overlap(a: Task | Path | str, b: Task | Path | str) -> Overlap:
    """Find rows that occur in both of two tasks, for instance calibration and test data.

    Two rows are the same when what they ask (text, prompt, or the user's turns, with the image's name) or all they say
    (that and the answer) is equal after Unicode NFKC, case folding and collapsing white space: a test prompt with
    another answer, or a test row pasted as ``text``, is an overlap too.

    Raises:
        InputError: a file cannot be read or parsed.
    """
    first, second = (t if isinstance(t, Task) else load_task(t) for t in (a, b))
    seen: dict[bytes, int] = {}
    for index, row in enumerate(second.rows):
        for key in _contents(row):
            seen.setdefault(key, index)
    pairs: list[tuple[int, int]] = []
    for index, row in enumerate(first.rows):
        matches = [seen[key] for key in _contents(row) if key in seen]
        if matches:
            pairs.append((index, min(matches)))
    return Overlap(len(first.rows), len(second.rows), tuple(pairs))
