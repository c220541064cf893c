"""Which tensors share a coefficient: groups by name, and the contiguous chunks a group is cut into.

grouping     one group per
global       model
block        transformer block (the name up to its first number); tensors outside blocks by their module
module       module (the name less its last part: a weight and its bias)
tensor       tensor
re:PATTERN   distinct match of the pattern (its capture groups, if it has any); tensors it does not match: one group
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from consilience.errors import InputError, nearest

GROUPINGS = ("global", "block", "module", "tensor")
#: The group of tensors that a ``re:`` grouping does not match.
REST = "rest"
_BLOCK = re.compile(r"^((?:.*?\.)?\d{1,9})\.")


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors that share coefficients.

    ``tensors`` are (name, number of elements) in the order in which they are laid end to end; the group's elements are
    cut into ``chunks`` pieces of (nearly) equal size, whose coefficients have the indices ``first ... first + chunks``.
    A group that is not ``learned`` keeps its coefficients whatever the optimizer does.
    """

    name: str
    tensors: tuple[tuple[str, int], ...]
    chunks: int
    first: int
    learned: bool = True

    @property
    def numel(self) -> int:
        """Number of elements of all its tensors."""
        return sum(numel for _, numel in self.tensors)


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements ``start ... stop`` of a flattened (row-major) tensor share the coefficients of index ``index``."""

    start: int
    stop: int
    index: int


def group_namer(grouping: str) -> Callable[[str], str]:
    """Return the function from a tensor's name to its group's.

    Raises:
        InputError: no such grouping, or the pattern is not a regular expression.
    """
    if grouping == "global":
        return lambda name: "global"
    if grouping == "block":
        return lambda name: match[1] if (match := _BLOCK.match(name)) else _module(name)
    if grouping == "module":
        return _module
    if grouping == "tensor":
        return lambda name: name
    if not grouping.startswith("re:"):
        raise InputError(
            f"grouping {grouping!r}: write one of {', '.join(GROUPINGS)}, or re:PATTERN{nearest(grouping, GROUPINGS)}"
        )
    try:
        pattern = re.compile(grouping[3:])
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"grouping {grouping!r}: not a regular expression ({error}); correct it") from None
    return lambda name: _matched(pattern, name)


def _module(name: str) -> str:
    return name.rpartition(".")[0] or name


def _matched(pattern: re.Pattern[str], name: str) -> str:
    match = pattern.search(name)
    if match is None:
        return REST
    return ".".join(part for part in match.groups() if part is not None) if match.groups() else match[0]


def boundaries(numel: int, chunks: int) -> list[int]:
    """Return the ``chunks + 1`` edges of balanced pieces: ``floor(i * numel / chunks)``.

    No piece is empty while ``chunks <= numel``, so every coefficient acts on something. (The released code of Expert
    Merging cuts pieces of ``ceil(numel / chunks)``, which can leave the last coefficients without elements.)
    """
    return [i * numel // chunks for i in range(chunks + 1)]


def make_groups(
    tensors: Iterable[tuple[str, int]],
    grouping: str,
    chunks: Callable[[str], int] | None = None,
) -> tuple[Group, ...]:
    """Group tensors, in the order of their first members.

    Args:
        tensors: (name, number of elements) of every tensor that gets coefficients.
        grouping: see the module's docstring.
        chunks: number of coefficients of a group, by its name; 0 means one that is not learned. Default: 1 each.
            Never more than the group has elements.
    """
    name_of = group_namer(grouping)
    members: dict[str, list[tuple[str, int]]] = {}
    for name, numel in tensors:
        if numel:
            members.setdefault(name_of(name), []).append((name, numel))
    groups: list[Group] = []
    first = 0
    for name, held in members.items():
        wanted = 1 if chunks is None else chunks(name)
        count = min(max(wanted, 1), sum(numel for _, numel in held))
        groups.append(Group(name, tuple(held), count, first, wanted > 0))
        first += count
    return tuple(groups)


def pieces_of(group: Group) -> dict[str, tuple[Piece, ...]]:
    """Return each tensor's pieces: the group's chunks where they meet the tensor, in order, without gaps."""
    edges = boundaries(group.numel, group.chunks)
    found: dict[str, tuple[Piece, ...]] = {}
    begin = chunk = 0
    for name, numel in group.tensors:
        end, pieces = begin + numel, list[Piece]()
        while chunk < group.chunks and edges[chunk] < end:
            low, high = max(edges[chunk], begin), min(edges[chunk + 1], end)
            if low < high:
                pieces.append(Piece(low - begin, high - begin, group.first + chunk))
            if edges[chunk + 1] > end:
                break
            chunk += 1
        found[name] = tuple(pieces)
        begin = end
    return found
