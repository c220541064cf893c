"""Experts that share no initialisation, brought together by permuting their hidden units (weight matching).

A network computes the same with its hidden units in another order. Two networks trained apart have theirs in unrelated
orders, so that their average is one of unrelated units. Sought is the order in which their weights lie closest:

    max over permutations P of  sum_t <theta_ref[t], (P theta)[t]>        equivalently  min ||theta_ref - P theta||^2

One *group* of units is permuted together wherever it occurs: the rows of the layer that makes them, the columns of
those that read them, normalisation in between, and every layer on a residual stream. Given all other groups, the best
order of one group is a linear assignment problem; coordinate descent solves them in turn until none improves.

Source: Ainsworth et al. 2023, Git Re-Basin, arXiv:2209.04836, algorithm 1. Differences: besides the identity, a pass
from input to output, in which every group is matched on the weights whose other axes are settled, is a second start,
and the better end is taken; a step is kept only where the whole sum grows, which a tensor with one group on two axes
needs (the assignment is then only a linearisation). Running statistics move with their channels but are not compared,
and neither is a tensor that the reference lacks or has in another shape (a head of other classes).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from consilience.errors import InputError
from consilience.mixing.symmetry import Axis, Group, Indices, State, Symmetry


@dataclass(frozen=True)
class Aligned:
    """An expert in the reference's order: its state, the permutation of each group, and how far it lies.

    ``state[...][i]`` is unit ``permutations[group][i]`` of the expert as it came. Squared distances and cosines (NaN of
    a vector of zeros) are over ``names``: the compared tensors that any group moves.
    """

    state: dict[str, Tensor]
    permutations: dict[str, Indices]
    names: tuple[str, ...]
    distance_before: float
    distance: float
    cosine_before: float
    cosine: float

    @property
    def moved(self) -> int:
        """The number of units that are not where they were."""
        return sum(int((order != np.arange(len(order))).sum()) for order in self.permutations.values())


def permute(state: State, symmetry: Symmetry, permutations: Mapping[str, Indices]) -> dict[str, Tensor]:
    """Return the state with unit i of every group replaced by unit ``permutations[group][i]``; the same function.

    Groups that are not named stay; tensors that nothing moves are the same objects.

    Raises:
        InputError: no such group, or not a permutation of its units.
    """
    groups = {group.name: group for group in symmetry.groups}
    for name, order in permutations.items():
        if name not in groups:
            raise InputError(f"permutations: there is no group {name!r}; the groups are {', '.join(groups)}")
        if not np.array_equal(np.sort(order), np.arange(groups[name].size)):
            raise InputError(f"permutations: group {name!r} needs every number below {groups[name].size} once")
    return {name: _moved(name, value, symmetry, permutations) for name, value in state.items()}


def _moved(name: str, value: Tensor, symmetry: Symmetry, orders: Mapping[str, Indices], kept: int = -1) -> Tensor:
    """Return one tensor in the new order of all its axes but ``kept``."""
    for axis in range(value.ndim):
        order = np.arange(value.shape[axis])
        for group in symmetry.groups:
            places = group.places.get((name, axis))
            if places is not None and group.name in orders and axis != kept:
                order[places] = places[orders[group.name]]
        if (order != np.arange(len(order))).any():
            value = value.index_select(axis, torch.from_numpy(order).to(value.device))
    return value


def align(reference: State, state: State, symmetry: Symmetry, *, seed: int = 0, sweeps: int = 100) -> Aligned:
    """Return ``state`` with its units in the order in which its weights lie closest to the reference's.

    Args:
        reference: the expert whose order is kept.
        state: the one that is permuted, of any floating dtype; compared in float64 where names and shapes are the
            reference's.
        symmetry: which units may be permuted: ``symmetry_of_module``, or ``symmetry_of_axes``.
        seed: of the order in which the groups take turns.
        sweeps: most turns of every group.

    Raises:
        InputError: there are no groups, or the two states do not meet.
    """
    if not symmetry.groups:
        raise InputError("module: no hidden units were found that may be permuted; state the axes (symmetry_of_axes)")
    names = _compared_names(reference, state, symmetry)
    wide = [{name: one[name].detach().to(torch.float64) for name in names} for one in (reference, state)]
    matching = _Matching(symmetry, *wide)
    start = matching.identity()
    ends = [matching.descend(orders, seed, sweeps) for orders in (dict(start), matching.forward())]
    best = ends[0] if matching.value(ends[0]) >= matching.value(ends[1]) else ends[1]
    lengths = [math.sqrt(sum(float(value.square().sum()) for value in one.values())) for one in wide]
    length = lengths[0] * lengths[1] or math.nan
    return Aligned(
        state=permute(state, symmetry, best),
        permutations=best,
        names=tuple(names),
        distance_before=matching.distance(start),
        distance=matching.distance(best),
        cosine_before=matching.value(start) / length,
        cosine=matching.value(best) / length,
    )


def _compared_names(reference: State, state: State, symmetry: Symmetry) -> list[str]:
    """Return the tensors that are moved and compared.

    Raises:
        InputError: the expert lacks a tensor that is to move, or nothing can be compared.
    """
    for group in symmetry.groups:
        for (name, axis), places in group.places.items():
            if name not in state or state[name].ndim <= axis or state[name].shape[axis] <= int(places.max()):
                raise InputError(f"expert: {name!r} is missing or too small; give one of the architecture stated")
    moved = [name for name in symmetry.names if name not in symmetry.uncompared]
    names = [name for name in moved if name in reference and reference[name].shape == state[name].shape]
    if not names:
        shapes = {name: list(reference[name].shape) if name in reference else "missing" for name in moved[:1]}
        raise InputError(
            f"expert: no tensor is of one shape in both: {moved[0]!r} is {list(state[moved[0]].shape)} but "
            f"{shapes[moved[0]]} in the reference; networks of other widths cannot be aligned, so distil them"
        )
    return names


@dataclass(frozen=True)
class _Matching:
    """Two networks' compared tensors in float64, and the search for an order."""

    symmetry: Symmetry
    reference: dict[str, Tensor]
    state: dict[str, Tensor]

    def identity(self) -> dict[str, Indices]:
        return {group.name: np.arange(group.size) for group in self.symmetry.groups}

    def forward(self) -> dict[str, Indices]:
        """Match every group in turn on what depends on no group that is still to come."""
        orders = self.identity()
        open_groups = set(orders)
        for group in self.symmetry.groups:
            open_groups.discard(group.name)
            compared = self._compared(group)
            names = [name for name, _ in compared]
            anchored = [k for k in compared if names.count(k[0]) == 1 and not self._groups_of(k[0]) & open_groups]
            orders[group.name] = assign(self.similarity(group, orders, anchored or compared))
        return orders

    def descend(self, orders: dict[str, Indices], seed: int, sweeps: int) -> dict[str, Indices]:
        """Improve one group at a time until none can be."""
        random = np.random.default_rng(seed)
        for _ in range(sweeps):
            turns = random.permutation(len(self.symmetry.groups))
            if not any([self._improve(self.symmetry.groups[turn], orders) for turn in turns]):  # all take their turn
                break
        return orders

    def _improve(self, group: Group, orders: dict[str, Indices]) -> bool:
        names = {name for name, _ in self._compared(group)}
        before = self.value(orders, names)
        new = orders | {group.name: assign(self.similarity(group, orders, self._compared(group)))}
        # A gain within rounding could go back and forth for ever.
        if not self.value(new, names) - before > 1e-10 * max(abs(before), 1e-300):
            return False
        orders.update(new)
        return True

    def similarity(self, group: Group, orders: Mapping[str, Indices], keys: Sequence[Axis]) -> npt.NDArray[np.float64]:
        """Return [units, units]: the inner products of the reference's units with the expert's, on the given axes."""
        total = torch.zeros(group.size, group.size, dtype=torch.float64)
        for name, axis in keys:
            places = torch.from_numpy(group.places[name, axis])
            others = _moved(name, self.state[name], self.symmetry, orders, kept=axis)
            one, two = (value.movedim(axis, 0)[places].flatten(1) for value in (self.reference[name], others))
            total += (one @ two.T).cpu()
        return total.numpy()

    def value(self, orders: Mapping[str, Indices], names: set[str] | None = None) -> float:
        """Return the sum of inner products over the named (all) tensors."""
        chosen = self.reference if names is None else {name: self.reference[name] for name in names}
        return sum(
            float((value * _moved(name, self.state[name], self.symmetry, orders)).sum())
            for name, value in sorted(chosen.items())
        )

    def distance(self, orders: Mapping[str, Indices]) -> float:
        """Return the squared distance of the two."""
        return sum(
            float((value - _moved(name, self.state[name], self.symmetry, orders)).square().sum())
            for name, value in self.reference.items()
        )

    def _compared(self, group: Group) -> list[Axis]:
        return [key for key in group.places if key[0] in self.reference]

    def _groups_of(self, name: str) -> set[str]:
        return {group.name for group in self.symmetry.groups if any(name == key[0] for key in group.places)}


def assign(similarity: npt.NDArray[np.float64]) -> Indices:
    """Return the permutation p with the greatest ``sum_i similarity[i, p[i]]``, for [n, n] finite numbers.

    Raises:
        InputError: the package ``scipy`` is missing.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise InputError("alignment: needs scipy; install it with: pip install 'consilience[mixing]'") from None
    _, columns = linear_sum_assignment(similarity, maximize=True)
    return np.asarray(columns, np.int64)
