"""Which units of an architecture may be put in any order together, as they are stated by hand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from consilience.errors import InputError

Indices = npt.NDArray[np.int64]
State = Mapping[str, Tensor]
#: A tensor's name and one of its axes.
Axis = tuple[str, int]


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


def symmetry_of_axes(axes: Mapping[str, Sequence[str | None]], state: State) -> Symmetry:
    """Return the symmetry that ``axes`` state: for every tensor, the group that each axis belongs to (None: fixed).

    An axis that is longer than its group holds ``length / units`` neighbouring positions of each unit, as after
    flattening [units, height, width]. ``running_mean`` and ``running_var`` are not compared.

    Raises:
        InputError: a tensor is missing, has another number of axes, or lengths that no block size explains.
    """
    found: dict[str, list[Axis]] = {}
    for name, groups in axes.items():
        if name not in state or state[name].ndim != len(groups):
            has = f"has {state[name].ndim} axes" if name in state else "is not in the state"
            raise InputError(
                f"axes: {name!r} {has} and {len(groups)} are stated; name every axis of every tensor there"
            )
        for axis, group in enumerate(groups):
            if group is not None:
                found.setdefault(group, []).append((name, axis))
    uncompared = frozenset(name for name in axes if name.endswith(("running_mean", "running_var")))
    return Symmetry(tuple(_stated(group, places, state) for group, places in found.items()), uncompared)


def _stated(group: str, places: Sequence[Axis], state: State) -> Group:
    lengths = {(name, axis): state[name].shape[axis] for name, axis in places}
    units = min(lengths.values())
    for (name, axis), length in lengths.items():
        if not units or length % units:
            raise InputError(
                f"axes: {name!r} has {length} on axis {axis}, no multiple of the {units} units of {group!r}"
            )
    return Group(group, {key: np.arange(length).reshape(units, -1) for key, length in lengths.items()})
