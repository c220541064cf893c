"""YAML read from strangers: bounded size, bounded expansion of aliases, duplicate keys refused."""

from pathlib import Path
from typing import Any

import yaml

from consilience.errors import InputError

SIZE_LIMIT = 1 << 20
NODE_LIMIT = 100_000

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _line(node: Any) -> str:
    return f"line {node.start_mark.line + 1}"


def _expanded(node: Any, sizes: dict[int, int], open_nodes: set[int], where: str) -> int:
    """Return how many nodes ``node`` stands for once its aliases are written out; refuse bombs and cycles."""
    if id(node) in sizes:
        return sizes[id(node)]
    if id(node) in open_nodes:
        raise InputError(f"{where}: {_line(node)}: an alias refers to itself; write the value out")
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
        raise InputError(f"{where}: {len(text)} characters is too long for a recipe (limit {SIZE_LIMIT})")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise InputError(f"{where}: is empty; see 'consilience merge --help' for an example")
        _expanded(node, {}, set(), where)
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark: Any = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        raise InputError(f"{where}: {place}not valid YAML ({problem}); fix the line") from None
    except (RecursionError, ValueError, OverflowError) as error:
        raise InputError(
            f"{where}: not a usable YAML document ({type(error).__name__}: {error}); write it plainer"
        ) from None


def read_yaml(path: Path) -> Any:
    """Parse the YAML document in the file ``path``."""
    try:
        if path.stat().st_size > SIZE_LIMIT:
            raise InputError(f"{path}: {path.stat().st_size} bytes is too long for a recipe (limit {SIZE_LIMIT})")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); is it a recipe file?") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text; is it a recipe file?") from None
    return parse_yaml(text, str(path))
