"""Which units of an architecture may be put in any order together, as they are stated by hand."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from consilience.errors import InputError, nearest

Indices = npt.NDArray[np.int64]
State = Mapping[str, Tensor]
#: A tensor's name and one of its axes.
Axis = tuple[str, int]
#: What lies on one axis of a tensor, as it is stated by hand.
AxisEntry = str | Sequence[str | int] | None
Axes = Mapping[str, Sequence[AxisEntry]]


@dataclass(frozen=True)
class Group:
    """Units that may be put in any order together.

    ``places`` maps (tensor, axis) to [units, m]: row i holds the m positions of unit i on that axis.
    """

    name: str
    places: Mapping[Axis, Indices]

    @property
    def size(self) -> int:
        """The number of units."""
        return len(next(iter(self.places.values())))


@dataclass(frozen=True)
class Symmetry:
    """The groups of an architecture, from input to output, and the tensors that move with them uncompared."""

    groups: tuple[Group, ...]
    uncompared: frozenset[str] = frozenset()

    @property
    def names(self) -> list[str]:
        """The tensors that any group moves."""
        return sorted({name for group in self.groups for name, _ in group.places})


def symmetry_of_axes(axes: Axes, state: State) -> Symmetry:
    """Return the symmetry that ``axes`` state: for every tensor, what each of its axes belongs to.

    An axis is None (fixed), a group's name, or a list of what lies on it end to end: groups' names, and numbers of
    fixed positions. In a tensor's name ``*`` stands for any text without dots, and in its groups' names for the same
    text: ``layers.*.up.weight: [hidden.*, stream]`` states one group ``hidden.0``, ``hidden.1``, ... a layer.

    A group has as many units as its shortest axis is long. An axis of its own that is longer holds ``length / units``
    neighbouring positions of each unit, as after flattening [units, height, width]. ``running_mean`` and
    ``running_var`` are not compared.

    Raises:
        InputError: a tensor is missing, has another number of axes, or lengths that no block size explains.
    """
    stated = _stated_tensors(axes, state)
    alone = {
        (name, axis): parts[0]
        for name, tensor in stated.items()
        for axis, parts in enumerate(tensor)
        if len(parts) == 1 and isinstance(parts[0], str)
    }
    units: dict[str, int] = {}
    for (name, axis), group in alone.items():
        units[group] = min(units.get(group, state[name].shape[axis]), state[name].shape[axis])
    places: dict[str, dict[Axis, Indices]] = {}
    for name, tensor in stated.items():
        for axis, parts in enumerate(tensor):
            for group, positions in _positions(name, axis, state[name].shape[axis], parts, units).items():
                places.setdefault(group, {})[name, axis] = positions
    uncompared = frozenset(name for name in stated if name.endswith(("running_mean", "running_var")))
    return Symmetry(tuple(Group(group, held) for group, held in places.items()), uncompared)


def _stated_tensors(axes: Axes, state: State) -> dict[str, list[list[str | int]]]:
    """Return tensor -> axis -> what lies on it, with every ``*`` replaced."""
    stated: dict[str, list[list[str | int]]] = {}
    for pattern, groups in axes.items():
        matcher = re.compile(re.escape(pattern).replace(r"\*", "([^.]*)"))
        matches = [match for name in state if (match := matcher.fullmatch(name))]
        if not matches:
            raise InputError(f"axes: {pattern!r} is not in the state{nearest(pattern, list(state))}")
        for match in matches:
            name = match.string
            if state[name].ndim != len(groups):
                raise InputError(
                    f"axes: {name!r} has {state[name].ndim} axes and {len(groups)} are stated; name every axis"
                )
            stated[name] = [_parts(entry, match.groups()) for entry in groups]
    return stated


def _parts(entry: AxisEntry, texts: Sequence[str]) -> list[str | int]:
    parts: Sequence[str | int] = [] if entry is None else [entry] if isinstance(entry, str) else entry
    return [_filled(part, texts) if isinstance(part, str) else part for part in parts]


def _filled(group: str, texts: Sequence[str]) -> str:
    for text in texts:
        group = group.replace("*", text, 1)
    return group


def _positions(
    name: str, axis: int, length: int, parts: Sequence[str | int], units: Mapping[str, int]
) -> dict[str, Indices]:
    """Return group -> [units, m] positions on one axis."""
    where = f"axes: {name!r}: axis {axis}"
    if len(parts) == 1 and isinstance(parts[0], str):
        group = parts[0]
        if not units[group] or length % units[group]:
            raise InputError(f"{where} has {length} positions, no multiple of the {units[group]} units of {group!r}")
        return {group: np.arange(length).reshape(units[group], -1)}
    found: dict[str, list[Indices]] = {}
    start = 0
    for part in parts:
        if isinstance(part, str) and part not in units:
            raise InputError(f"{where}: group {part!r} has no axis of its own, so its size is not known; state one")
        width = units[part] if isinstance(part, str) else part
        if isinstance(part, str):
            found.setdefault(part, []).append(np.arange(start, start + width))
        start += width
    if parts and start != length:
        raise InputError(f"{where} has {length} positions and the parts stated for it have {start}; correct them")
    return {group: np.stack(blocks, axis=1) for group, blocks in found.items()}
