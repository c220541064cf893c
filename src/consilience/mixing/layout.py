"""Where a module's floating-point parameters and buffers lie in one row of numbers.

Parameters of one group are neighbours, so that a group is one slice of the row; tied parameters lie there once. A
float buffer takes the coefficients of the parameters nearest to it: those of its own module, else of the closest
module that holds any.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from consilience.coefficients.groups import Group, make_groups
from consilience.errors import InputError
from consilience.name_filter import any_filter, name_filter

#: Modules whose running statistics depend on the weights before them.
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor at elements ``start ... stop`` of the row; ``names`` are all its names, ``index`` its coefficient's."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    start: int
    stop: int
    index: int

    @property
    def name(self) -> str:
        """Its first name."""
        return self.names[0]

    def of(self, row: torch.Tensor) -> torch.Tensor:
        """Return the tensor as a view of ``row`` [P]."""
        return row[self.start : self.stop].view(self.shape)


@dataclass(frozen=True, slots=True)
class Span:
    """Elements ``start ... stop`` of the row share the coefficients of index ``index``."""

    start: int
    stop: int
    index: int


@dataclass(frozen=True)
class Layout:
    """The rows' order: ``parameters`` and float ``buffers``, each in a row of its own.

    ``copied`` are the persistent tensors that are not floating point, or are empty: they are copied, never averaged.
    ``variances`` are the buffers that hold a running variance.
    """

    groups: tuple[Group, ...]
    parameters: tuple[Slot, ...]
    buffers: tuple[Slot, ...]
    copied: tuple[str, ...]
    variances: frozenset[str]

    @property
    def count(self) -> int:
        """N, the number of coefficients per expert."""
        return len(self.groups)

    @property
    def spans(self) -> tuple[Span, ...]:
        """Return one span per group, in the order of the coefficients."""
        return _spans(self.parameters)

    @property
    def buffer_spans(self) -> tuple[Span, ...]:
        """Return the buffers' spans."""
        return _spans(self.buffers)

    @property
    def names(self) -> set[str]:
        """Return every name that a state dict of the module holds."""
        slots = (*self.parameters, *self.buffers)
        return {name for slot in slots for name in slot.names} | set(self.copied)


def _spans(slots: Sequence[Slot]) -> tuple[Span, ...]:
    found: list[Span] = []
    for slot in slots:
        if found and found[-1].index == slot.index:
            found[-1] = Span(found[-1].start, slot.stop, slot.index)
        else:
            found.append(Span(slot.start, slot.stop, slot.index))
    return tuple(found)


def lay_out(module: nn.Module, grouping: str = "global", exclude: Sequence[str] = ()) -> Layout:
    """Return the layout of a module's persistent tensors.

    Args:
        module: whose names count; its values do not.
        grouping: which parameters share a coefficient; see ``consilience.coefficients.groups``.
        exclude: patterns (``consilience.name_filter``) of parameters whose coefficients are not learned: a last group.

    Raises:
        InputError: there is no floating-point parameter that is not excluded, one is complex, the grouping is none, or
            a pattern matches nothing.
    """
    parameters = _named_once(module.named_parameters(remove_duplicate=False))
    persistent = set(module.state_dict())
    buffers = [
        (names, value)
        for names, value in _named_once(module.named_buffers(remove_duplicate=False))
        if names[0] in persistent
    ]
    for names, value in (*parameters, *buffers):
        if value.is_complex():
            raise InputError(f"module: {names[0]!r} is complex; mixing needs real tensors: split it into two")
    floats = [(names, value) for names, value in parameters if _averaged(value)]
    if not floats:
        raise InputError("module: has no floating-point parameter to mix; pass the module that holds the weights")
    groups = _groups([(names, value.numel()) for names, value in floats], grouping, exclude)
    index = {name: group.first for group in groups for name, _ in group.tensors}
    owners = {name: at for names, _ in floats for name in names for at in [index[names[0]]]}
    held = [(names, value) for names, value in buffers if _averaged(value)]
    copied = [name for names, value in (*parameters, *buffers) if not _averaged(value) for name in names]
    return Layout(
        groups,
        _slots(floats, [index[names[0]] for names, _ in floats]),
        _slots(held, [_nearest(names[0], owners) for names, _ in held]),
        tuple(copied),
        frozenset(f"{name}.running_var" for name, part in module.named_modules() if isinstance(part, BATCH_NORMS)),
    )


def _groups(sizes: Sequence[tuple[tuple[str, ...], int]], grouping: str, exclude: Sequence[str]) -> tuple[Group, ...]:
    for pattern in exclude:
        test = name_filter(pattern, "exclude")
        if not any(test(name) for names, _ in sizes for name in names):
            raise InputError(f"exclude: {pattern!r} matches no parameter")
    apart = any_filter(exclude, "exclude")
    fixed = {names[0] for names, _ in sizes if any(apart(name) for name in names)}
    tensors = [(names[0], numel) for names, numel in sizes]
    groups = make_groups([one for one in tensors if one[0] not in fixed], grouping)
    if not groups:
        raise InputError("exclude: nothing is left to learn; exclude less")
    last = make_groups([one for one in tensors if one[0] in fixed], "global", lambda _name: 0)
    return (*groups, *(replace(one, name="excluded", first=len(groups)) for one in last))


def _averaged(value: torch.Tensor) -> bool:
    return value.is_floating_point() and value.numel() > 0


def _named_once(named: Iterable[tuple[str, torch.Tensor]]) -> list[tuple[tuple[str, ...], torch.Tensor]]:
    """Return each tensor with all its names."""
    found: dict[int, tuple[list[str], torch.Tensor]] = {}
    for name, value in named:
        found.setdefault(id(value), ([], value))[0].append(name)
    return [(tuple(names), value) for names, value in found.values()]


def _slots(tensors: Sequence[tuple[tuple[str, ...], torch.Tensor]], indices: Sequence[int]) -> tuple[Slot, ...]:
    slots: list[Slot] = []
    start = 0
    for index, (names, value) in sorted(zip(indices, tensors, strict=True), key=lambda pair: pair[0]):
        slots.append(Slot(names, tuple(value.shape), start, start + value.numel(), index))
        start += value.numel()
    return tuple(slots)


def _nearest(buffer: str, owners: dict[str, int]) -> int:
    """Return the coefficient of the first parameter that shares the longest module path with ``buffer``."""
    path = buffer.split(".")[:-1]

    def shared(name: str) -> int:
        other = name.split(".")[:-1]
        return next(
            (i for i, (a, b) in enumerate(zip(path, other, strict=False)) if a != b), min(len(path), len(other))
        )

    return owners[max(owners, key=shared)]
