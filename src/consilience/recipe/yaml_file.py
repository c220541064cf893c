"""YAML read from strangers: bounded size, bounded expansion of aliases, duplicate keys refused."""

import re
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import yaml

from consilience.checkpoints.files import exists, why_absent
from consilience.errors import InputError

SIZE_LIMIT = 1 << 20
NODE_LIMIT = 100_000
#: No path, pattern or number is longer; YAML's base-60 integers take quadratic time.
SCALAR_LIMIT = 10_000
#: More merges than any recipe chains.
DOCUMENT_LIMIT = 100
#: Deeper nesting than any recipe has; composing recurses.
DEPTH_LIMIT = 100

_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


_TEXT, _INT, _FLOAT = (f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float"))
#: Numbers as YAML 1.2 has them: 1e-3 is one; 1:30 is not 90, and 010 not 8.
_NUMBERS = {
    _INT: r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$",
    _FLOAT: r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
}


class _Loader(_Base):
    """The safe loader; numbers are YAML 1.2's, and keys are the text that was written (``on``, ``1``)."""

    yaml_implicit_resolvers: ClassVar[Any] = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
        for first, resolvers in _Base.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag in _IMPLICIT:
                key.tag = _TEXT
        return super().construct_mapping(node, deep)


for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), list("-+.0123456789"))
#: What a plain key may be taken for.
_IMPLICIT = (_INT, _FLOAT, *(f"tag:yaml.org,2002:{kind}" for kind in ("bool", "null", "timestamp")))
#: What PyYAML lets out when a tag and its value do not go together (``!!int ""``, ``!!timestamp x``, ``!!bool x``).
_CONSTRUCTION = (RecursionError, ValueError, OverflowError, AttributeError, IndexError, KeyError, TypeError)


def _line(node: Any) -> str:
    return f"line {node.start_mark.line + 1}"


def _too_deep(text: str) -> Any:
    """Return the first event nested deeper than the limit, or None.

    The stream of events is flat; composing recurses, and the C composer would take the process down.
    """
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEPTH_LIMIT:
            return event
    return None


def _refuse_deep(text: str, where: str) -> None:
    try:
        event = _too_deep(text)
    except yaml.MarkedYAMLError as error:
        # libyaml scans ahead of its events and has a nesting limit of its own, so it may fail on levels whose events it
        # has yet to give out. It does give them out where the text ends before what it refused.
        event, mark = None, error.problem_mark
        if mark is not None:
            with suppress(yaml.YAMLError):
                event = _too_deep(text[: mark.index])
        if event is None:
            raise
    if event is not None:
        raise InputError(f"{where}: {_line(event)}: nested more than {DEPTH_LIMIT} levels deep; write it plainer")


def _expanded(node: Any, sizes: dict[int, int], open_nodes: set[int], where: str) -> int:
    """Return how many nodes ``node`` stands for once its aliases are written out; refuse bombs and cycles."""
    if id(node) in sizes:
        return sizes[id(node)]
    if id(node) in open_nodes:
        raise InputError(f"{where}: {_line(node)}: an alias refers to itself; write the value out")
    if isinstance(node, yaml.ScalarNode) and len(node.value) > SCALAR_LIMIT:
        raise InputError(f"{where}: {_line(node)}: a value of {len(node.value)} characters is too long; shorten it")
    open_nodes.add(id(node))
    children: list[Any] = []
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise InputError(f"{where}: {_line(key)}: key {key.value!r} appears twice; remove one")
                seen.add(key.value)
            children += [key, value]
    elif isinstance(node, yaml.SequenceNode):
        children = list(node.value)
    size = 1 + sum(_expanded(child, sizes, open_nodes, where) for child in children)
    if size > NODE_LIMIT:
        raise InputError(
            f"{where}: {_line(node)}: more than {NODE_LIMIT} values once aliases are expanded; write it shorter"
        )
    open_nodes.discard(id(node))
    sizes[id(node)] = size
    return size


def parse_yaml(text: str, where: str) -> Any:
    """Parse one YAML document into plain Python values; ``where`` names it in errors.

    Raises:
        InputError: not YAML, several documents, duplicate keys, self-reference, or an alias bomb.
    """
    if len(text) > SIZE_LIMIT:
        raise InputError(f"{where}: too long for a recipe (limit {SIZE_LIMIT} characters); is it a recipe file?")
    try:
        _refuse_deep(text, where)
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise InputError(f"{where}: is empty; see 'consilience merge --help' for an example")
        _expanded(node, {}, set(), where)
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark: Any = getattr(error, "problem_mark", None)
        if "single document" in str(getattr(error, "context", "")):
            raise InputError(
                f"{where}: line {mark.line + 1}: a second document begins; to fix it, write one recipe a file"
            ) from None
        place = f"line {mark.line + 1}: " if mark is not None else ""
        problem = " ".join(filter(None, (getattr(error, part, None) for part in ("context", "problem")))) or str(error)
        raise InputError(f"{where}: {place}not valid YAML ({problem}); fix the line") from None
    except _CONSTRUCTION as error:
        raise InputError(
            f"{where}: not a usable YAML document ({type(error).__name__}: {error}); write it plainer"
        ) from None


def parse_documents(text: str, where: str) -> list[Any]:
    """Parse the YAML documents of a text, each as ``parse_yaml`` does; empty ones do not count."""
    if len(text) > SIZE_LIMIT:
        raise InputError(f"{where}: too long for a recipe (limit {SIZE_LIMIT} characters); is it a recipe file?")
    try:
        _refuse_deep(text, where)
        starts = [event.start_mark for event in yaml.parse(text, Loader=_Loader) if _begins(event)]
    except (yaml.YAMLError, *_CONSTRUCTION):
        return [parse_yaml(text, where)]  # says what is wrong
    if len(starts) < 2:
        return [parse_yaml(text, where)]
    if len(starts) > DOCUMENT_LIMIT:
        raise InputError(f"{where}: more than {DOCUMENT_LIMIT} documents; is it a recipe file?")
    lines = text.splitlines(keepends=True)
    cuts = [mark.line for mark in starts] + [len(lines)]
    # Line numbers in errors are those of the file.
    parts = ["\n" * first + "".join(lines[first:stop]) for first, stop in pairwise(cuts)]
    return [parse_yaml(part, where) for part in parts if part.replace("---", "").strip()]


def _begins(event: Any) -> bool:
    return isinstance(event, yaml.DocumentStartEvent)


def read_documents(path: Path) -> list[Any]:
    """Parse the YAML documents in the file ``path``."""
    return parse_documents(_text(path), str(path))


def read_yaml(path: Path) -> Any:
    """Parse the YAML document in the file ``path`` (a pipe will do: only as much as a recipe may hold is read)."""
    return parse_yaml(_text(path), str(path))


def _text(path: Path) -> str:
    if not exists(path):
        raise InputError(f"{path}: {why_absent(path, what='recipe file')}")
    try:
        with open(path, "rb") as file:
            return file.read(SIZE_LIMIT + 1).decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); is it a recipe file?") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text; is it a recipe file?") from None
