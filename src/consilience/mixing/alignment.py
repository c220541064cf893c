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
needs (the assignment is then only a linearisation). Running statistics move with their channels but are not compared.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

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


@dataclass(frozen=True)
class Aligned:
    """An expert in the reference's order: its state, the permutation of each group, and how far it lies.

    ``state[...][i]`` is unit ``permutations[group][i]`` of the expert as it came. The squared distances are over the
    compared tensors that any group moves.
    """

    state: dict[str, Tensor]
    permutations: dict[str, Indices]
    distance_before: float
    distance: float


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
        state: the one that is permuted: names and shapes as the reference's, any floating dtype; compared in float64.
        symmetry: which units may be permuted: ``symmetry_of_module``, or ``symmetry_of_axes``.
        seed: of the order in which the groups take turns.
        sweeps: most turns of every group.

    Raises:
        InputError: there are no groups, or the two states do not meet.
    """
    if not symmetry.groups:
        raise InputError("module: no hidden units were found that may be permuted; state the axes (symmetry_of_axes)")
    matching = _Matching(symmetry, _wide(reference, symmetry, "reference"), _wide(state, symmetry, "expert"))
    ends = [matching.descend(start, seed, sweeps) for start in (matching.identity(), matching.forward())]
    best = ends[0] if matching.value(ends[0]) >= matching.value(ends[1]) else ends[1]
    return Aligned(
        permute(state, symmetry, best), best, matching.distance(matching.identity()), matching.distance(best)
    )


def _wide(state: State, symmetry: Symmetry, where: str) -> dict[str, Tensor]:
    for group in symmetry.groups:
        for (name, axis), places in group.places.items():
            if name not in state or state[name].ndim <= axis or state[name].shape[axis] <= int(places.max()):
                raise InputError(f"{where}: {name!r} is missing or too small; all experts must have one architecture")
    return {name: state[name].detach().to(torch.float64) for name in symmetry.names if name not in symmetry.uncompared}


@dataclass(frozen=True)
class _Matching:
    """Two networks' compared tensors in float64, and the search for an order."""

    symmetry: Symmetry
    reference: dict[str, Tensor]
    state: dict[str, Tensor]

    def __post_init__(self) -> None:
        for name, value in self.reference.items():
            if value.shape != self.state[name].shape:
                shapes = f"{list(self.state[name].shape)} but {list(value.shape)}"
                raise InputError(f"expert: {name!r} is {shapes} in the reference; all must have one architecture")

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
        return [key for key in group.places if key[0] not in self.symmetry.uncompared]

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


def symmetry_of_module(module: nn.Module, example: Tensor) -> Symmetry:
    """Return the groups of hidden units of a module, from the graph of one forward pass.

    Every channel is followed through the graph: convolutions and linear layers make new ones, normalisation, pointwise
    functions, pooling and flattening pass them on, sums tie them (residual streams, also where a shortcut pads with
    zero channels), concatenation joins them. Channels that occur at the same places in the same roles form a group.
    What an operation that is not known here reads is fixed, so a symmetry may be missed, but none is invented:
    attention's heads, for one, stay as they are.

    Args:
        module: traced by ``torch.export`` in eval mode; its state and modes are left as they are.
        example: an input of at least two rows, [n, ...].

    Raises:
        InputError: the module cannot be traced.
    """
    modes = [(part, part.training) for part in module.modules()]
    try:
        exported = torch.export.export(module.eval(), (example,), strict=False)
    except Exception as error:
        raise InputError(f"module: cannot be traced ({error}); state its axes yourself (symmetry_of_axes)") from error
    finally:
        for part, training in modes:
            part.training = training
    trace = _Trace(_parameters(exported.graph_signature, module), _Elements())
    for node in exported.graph.nodes:
        trace.visit(node)
    return trace.symmetry(module)


def _parameters(signature: Any, module: nn.Module) -> dict[str, str]:
    """Return placeholder -> tensor in the state dict; a tensor under several names goes by its first."""
    held: dict[str, str] = signature.inputs_to_parameters | signature.inputs_to_buffers
    first = {alias: names[0] for names in _aliases(module) for alias in names}
    return {node: first[name] for node, name in held.items() if name in first}


def _aliases(module: nn.Module) -> list[list[str]]:
    """Return the state dict's tensors by name; those that are one tensor together."""
    state = module.state_dict(keep_vars=True)
    found: dict[int, list[str]] = {}
    for name, value in state.items():
        found.setdefault(id(value), []).append(name)
    return list(found.values())


@dataclass
class _Elements:
    """Channels as elements of a union-find; tied ones move together, fixed ones not at all."""

    parent: list[int] = field(default_factory=list[int])
    fixed: set[int] = field(default_factory=set[int])

    def fresh(self, count: int) -> Indices:
        first = len(self.parent)
        self.parent += range(first, first + count)
        return np.arange(first, first + count)

    def root(self, element: int) -> int:
        while self.parent[element] != element:
            self.parent[element] = self.parent[self.parent[element]]
            element = self.parent[element]
        return element

    def tie(self, one: Indices, other: Indices) -> None:
        for a, b in zip(one.tolist(), other.tolist(), strict=True):
            if a >= 0 and b >= 0:
                self.parent[self.root(b)] = self.root(a)

    def fix(self, elements: Indices) -> None:
        self.fixed.update(int(e) for e in elements if e >= 0)


@dataclass(frozen=True)
class _Value:
    """A tensor of the graph whose axis ``dim`` holds channels: their elements, and what was done to each (roles).

    Element -1 is a constant, the same in whatever order. Channels that had different things done to them have
    different roles, for they could not change places.
    """

    dim: int
    elements: Indices
    roles: Indices


#: What hands every channel on as it is, or works on each by itself without being tagged as pointwise.
_PASSING = frozenset(
    ("dropout", "feature_dropout", "alpha_dropout", "clone", "contiguous", "detach", "alias", "to", "_to_copy")
) | {"softmax", "log_softmax", "hardswish", "log_sigmoid"}
#: What works on the axes behind [n, channels].
_SPATIAL = frozenset(
    f"{kind}{d}d" for kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "upsample_nearest") for d in (1, 2, 3)
) | {"upsample_bilinear2d", "upsample_bicubic2d"}
#: What shows part of another tensor: written to in place, the other changes unseen.
_VIEWS = frozenset(("slice", "select", "narrow", "split", "chunk"))
_Rule = Callable[["_Trace", Any, str], _Value | None]


@dataclass
class _Trace:
    """Follows channels through a graph."""

    parameters: dict[str, str]
    elements: _Elements
    values: dict[Any, _Value | None] = field(default_factory=dict[Any, _Value | None])
    axes: dict[Axis, list[tuple[Indices, Indices]]] = field(default_factory=dict[Axis, list[tuple[Indices, Indices]]])
    known_roles: dict[Any, int] = field(default_factory=dict[Any, int])

    def visit(self, node: Any) -> None:
        """Find the channels of one node."""
        if node.op == "output":
            self.fix(node)
        if node.op != "call_function":
            return
        name = _operation(node)
        rule = None if name.endswith("_") and _operation(node.args[0]) in _VIEWS else self._rule(name.rstrip("_"), node)
        found = rule(self, node, name.rstrip("_")) if rule is not None else None
        if found is None:
            self.fix(node)
        self.values[node] = found

    @staticmethod
    def _rule(name: str, node: Any) -> _Rule | None:
        if name in _RULES:
            return _RULES[name]
        if name in _PASSING:
            return _passing
        if name in _SPATIAL:
            return _spatial
        return _pointwise if torch.Tag.pointwise in getattr(node.target, "tags", ()) else None

    def fix(self, node: Any) -> None:
        """Fix all channels that a node reads."""
        for source in node.all_input_nodes:
            value = self.values.get(source)
            if value is not None:
                self.elements.fix(value.elements)

    def value(self, node: Any) -> _Value | None:
        """Return the channels of an argument."""
        return self.values.get(node) if hasattr(node, "op") else None

    def role(self, *facts: Any) -> int:
        """Return the number of a role."""
        return self.known_roles.setdefault(facts, len(self.known_roles))

    def roles(self, node: Any, *before: Indices) -> Indices:
        """Return the roles of channels after a node, from those of its arguments."""
        return np.array([self.role(node.name, *facts) for facts in zip(*(b.tolist() for b in before), strict=True)])

    def place(self, node: Any, axis: int, elements: Indices, roles: Indices) -> bool:
        """Say that a parameter's axis holds these channels; False where the node is none or the axis does not fit."""
        name = self.parameters.get(getattr(node, "name", ""))
        if name is None or _shape(node)[axis] != len(elements):
            return False
        known = self.axes.setdefault((name, axis), [])
        if known:
            self.elements.tie(known[0][0], elements)
            # Where another use holds a constant there is no element to move it with.
            self.elements.fix(elements[known[0][0] < 0])
            self.elements.fix(known[0][0][elements < 0])
        known.append((elements, roles))
        return True

    def symmetry(self, module: nn.Module) -> Symmetry:
        """Return the groups: free elements that occur at the same axes in the same roles."""
        fixed = {self.elements.root(element) for element in self.elements.fixed}
        spots: dict[int, dict[Axis, list[tuple[Any, int]]]] = {}
        for key, known in self.axes.items():
            for place, element in enumerate(known[0][0].tolist()):
                if element >= 0 and (root := self.elements.root(element)) not in fixed:
                    role = tuple(int(roles[place]) for _, roles in known)
                    spots.setdefault(root, {}).setdefault(key, []).append((role, place))
        alike: dict[Any, list[dict[Axis, list[int]]]] = {}
        for held in spots.values():
            ordered = {key: sorted(found) for key, found in sorted(held.items())}
            signature = tuple((key, tuple(role for role, _ in found)) for key, found in ordered.items())
            alike.setdefault(signature, []).append({k: [place for _, place in f] for k, f in ordered.items()})
        names = {group[0]: group for group in _aliases(module)}
        groups = [_group(f"p{n}", units, names) for n, units in enumerate(u for u in alike.values() if len(u) > 1)]
        return Symmetry(tuple(groups), frozenset(name for name, _ in module.named_buffers(remove_duplicate=False)))


def _group(name: str, units: Sequence[Mapping[Axis, list[int]]], aliases: Mapping[str, list[str]]) -> Group:
    places = {key: np.array([unit[key] for unit in units], np.int64) for key in units[0]}
    return Group(name, {(alias, axis): held for (first, axis), held in places.items() for alias in aliases[first]})


def _operation(node: Any) -> str:
    return getattr(getattr(node.target, "_schema", None), "name", "").removeprefix("aten::")


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _argument(node: Any, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _passing(trace: _Trace, node: Any, _: str) -> _Value | None:
    value = trace.value(node.args[0])
    return None if value is None else _Value(value.dim, value.elements, trace.roles(node, value.roles))


def _spatial(trace: _Trace, node: Any, name: str) -> _Value | None:
    value = trace.value(node.args[0])
    return _passing(trace, node, name) if value is not None and value.dim == 1 and len(_shape(node)) > 2 else None


def _convolution(trace: _Trace, node: Any, _: str) -> _Value | None:
    source, weight, bias = node.args[0], node.args[1], _argument(node, 2, "bias")
    value, outputs, groups = trace.value(source), _shape(weight)[0], _argument(node, 6, "groups", 1)
    batched = len(_shape(source)) == len(_shape(weight))
    if not batched or (value is not None and value.dim != 1):
        return None
    if value is not None and groups == len(value.elements) > 1:
        return _depthwise(trace, node, value, outputs // groups)
    if groups > 1:
        return None
    return _layer(trace, node, value, weight, bias, 1)


def _linear(trace: _Trace, node: Any, _: str) -> _Value | None:
    value, last = trace.value(node.args[0]), len(_shape(node.args[0])) - 1
    if value is not None and value.dim != last:
        return None
    return _layer(trace, node, value, node.args[1], _argument(node, 2, "bias"), last)


def _layer(trace: _Trace, node: Any, value: _Value | None, weight: Any, bias: Any, dim: int) -> _Value | None:
    """A layer that reads ``value`` on its weight's axis 1 and makes new channels, its weight's axis 0."""
    if weight.name not in trace.parameters or (bias is not None and bias.name not in trace.parameters):
        return None
    made = trace.elements.fresh(_shape(weight)[0])
    roles = trace.roles(node, np.zeros(len(made), np.int64))
    if value is not None:
        trace.place(weight, 1, value.elements, value.roles)
    trace.place(weight, 0, made, roles)
    if bias is not None:
        trace.place(bias, 0, made, roles)
    return _Value(dim, made, roles)


def _depthwise(trace: _Trace, node: Any, value: _Value, copies: int) -> _Value | None:
    """A convolution of every channel by itself, ``copies`` times over."""
    if (value.elements < 0).any():
        return None
    elements = np.repeat(value.elements, copies)
    roles = trace.roles(node, np.repeat(value.roles, copies), np.tile(np.arange(copies), len(value.elements)))
    return _Value(1, elements, roles) if _placed(trace, node.args[1:3], elements, roles) else None


def _placed(trace: _Trace, tensors: Sequence[Any], elements: Indices, roles: Indices) -> bool:
    """Place channels on axis 0 of each given parameter; constants would get a parameter of their own."""
    given = [tensor for tensor in tensors if tensor is not None]
    if (elements < 0).any() or any(tensor.name not in trace.parameters for tensor in given):
        return False
    return all([trace.place(tensor, 0, elements, roles) for tensor in given])


def _normalisation(trace: _Trace, node: Any, name: str) -> _Value | None:
    """Batch and instance norm (channels each), group norm of one group or as many as channels, layer norm over them."""
    value, size = trace.value(node.args[0]), len(_shape(node))
    if value is None:
        return None
    tensors, dim = node.args[1:5], 1
    if name == "layer_norm":
        tensors, dim = node.args[2:4], size - 1
        if len(node.args[1]) != 1:
            return None
    if name == "group_norm":
        tensors = node.args[2:4]
        if node.args[1] not in (1, len(value.elements)):
            return None
    roles = trace.roles(node, value.roles)
    if value.dim != dim or not _placed(trace, tensors, value.elements, roles):
        return None
    return _Value(dim, value.elements, roles)


def _pointwise(trace: _Trace, node: Any, _: str) -> _Value | None:
    """Tie the channels that meet; what is equal for all channels may join, and so may a parameter on their axis."""
    size, sources = len(_shape(node)), node.all_input_nodes
    values = [(source, value) for source in sources if (value := trace.value(source)) is not None]
    behind = {len(_shape(source)) - value.dim for source, value in values}
    if len(behind) != 1:
        return None
    dim = size - next(iter(behind))
    count = _shape(node)[dim]
    elements = np.full(count, -1)
    roles = [np.zeros(count, np.int64)]
    for source in sources:
        axis, value = dim - size + len(_shape(source)), trace.value(source)
        if axis < 0 or _shape(source)[axis] != count:
            continue  # the same for all channels
        if value is None:
            own = trace.elements.fresh(count)
            if not trace.place(source, axis, own, np.zeros(count, np.int64)):
                return None
            value = _Value(axis, own, np.zeros(count, np.int64))
        trace.elements.tie(elements, value.elements)
        elements = np.where(elements < 0, value.elements, elements)
        roles.append(value.roles)
    return _Value(dim, elements, trace.roles(node, *roles))


def _prelu(trace: _Trace, node: Any, name: str) -> _Value | None:
    value, weight = trace.value(node.args[0]), node.args[1]
    if value is None or _shape(weight)[0] == 1:
        return _passing(trace, node, name)
    return _passing(trace, node, name) if _placed(trace, [weight], value.elements, value.roles) else None


def _reduction(trace: _Trace, node: Any, name: str) -> _Value | None:
    value, over = trace.value(node.args[0]), _argument(node, 1, "dim")
    size = len(_shape(node.args[0]))
    gone = {axis % size for axis in ([over] if isinstance(over, int) else over or range(size))}
    if value is None or value.dim in gone:
        return None
    lost = 0 if len(_shape(node)) == size else sum(axis < value.dim for axis in gone)
    return _Value(value.dim - lost, value.elements, trace.roles(node, value.roles))


def _reshape(trace: _Trace, node: Any, _: str) -> _Value | None:
    """Keep channels whose axis stays, or is flattened with those behind it: neighbouring positions of one channel."""
    value, old, new = trace.value(node.args[0]), _shape(node.args[0]), _shape(node)
    if value is None:
        return None
    dim = value.dim
    if new[: dim + 1] == old[: dim + 1]:
        return value
    if dim == len(old) - 1 and new[-1:] == old[-1:]:
        return _Value(len(new) - 1, value.elements, value.roles)
    if new != (*old[:dim], int(np.prod(old[dim:]))):
        return None
    copies = int(np.prod(old[dim + 1 :]))
    roles = trace.roles(node, np.repeat(value.roles, copies), np.tile(np.arange(copies), len(value.elements)))
    return _Value(dim, np.repeat(value.elements, copies), roles)


def _permuted_axes(trace: _Trace, node: Any, name: str) -> _Value | None:
    value, size = trace.value(node.args[0]), len(_shape(node))
    if value is None:
        return None
    order = list(range(size))
    if name == "transpose":
        a, b = (axis % size for axis in node.args[1:3])
        order[a], order[b] = b, a
    else:
        order = [axis % size for axis in node.args[1]]
    return _Value(order.index(value.dim), value.elements, value.roles)


def _slice(trace: _Trace, node: Any, _: str) -> _Value | None:
    value = trace.value(node.args[0])
    axis, start, end, step = (_argument(node, i + 1, n, d) for i, (n, d) in enumerate(_SLICE))
    if value is None or axis % len(_shape(node)) != value.dim:
        return value
    chosen = slice(start, end, step)
    return _Value(value.dim, value.elements[chosen], value.roles[chosen])


_SLICE = (("dim", 0), ("start", None), ("end", None), ("step", 1))


def _unsqueeze(trace: _Trace, node: Any, _: str) -> _Value | None:
    value, axis = trace.value(node.args[0]), node.args[1] % len(_shape(node))
    return None if value is None else _Value(value.dim + (axis <= value.dim), value.elements, value.roles)


def _select(trace: _Trace, node: Any, _: str) -> _Value | None:
    value = trace.value(node.args[0])
    if value is None or (axis := node.args[1] % len(_shape(node.args[0]))) == value.dim:
        return None
    return _Value(value.dim - (axis < value.dim), value.elements, value.roles)


def _pad(trace: _Trace, node: Any, name: str) -> _Value | None:
    value, widths = trace.value(node.args[0]), cast(Sequence[int], node.args[1])
    if value is None:
        return None
    at = 2 * (len(_shape(node)) - 1 - value.dim)
    low, high = (widths[at], widths[at + 1]) if at < len(widths) else (0, 0)
    if (low or high) and (
        min(low, high) < 0 or (name == "pad" and _argument(node, 2, "mode", "constant") != "constant")
    ):
        return None
    around = [(low, high)]
    roles = np.pad(value.roles, around, constant_values=trace.role("constant"))
    return _Value(value.dim, np.pad(value.elements, around, constant_values=-1), trace.roles(node, roles))


def _concatenation(trace: _Trace, node: Any, _: str) -> _Value | None:
    values = [trace.value(source) for source in node.args[0]]
    if any(value is None for value in values):
        return None
    held = cast(list[_Value], values)
    dim = held[0].dim
    if any(value.dim != dim for value in held):
        return None
    if _argument(node, 1, "dim", 0) % len(_shape(node)) == dim:
        joined = [np.concatenate([getattr(value, part) for value in held]) for part in ("elements", "roles")]
        return _Value(dim, joined[0], joined[1])
    elements = held[0].elements
    for value in held[1:]:
        if ((value.elements < 0) != (elements < 0)).any():
            return None
        trace.elements.tie(elements, value.elements)
    return _Value(dim, elements, trace.roles(node, *(value.roles for value in held)))


def _rules() -> Iterator[tuple[str, _Rule]]:
    table: list[tuple[str, _Rule]] = [
        ("conv1d conv2d conv3d", _convolution),
        ("linear", _linear),
        ("batch_norm instance_norm group_norm layer_norm", _normalisation),
        ("prelu", _prelu),
        ("mean sum amax amin", _reduction),
        ("flatten view reshape _unsafe_view", _reshape),
        ("permute transpose", _permuted_axes),
        ("slice", _slice),
        ("unsqueeze", _unsqueeze),
        ("select", _select),
        ("pad constant_pad_nd", _pad),
        ("cat", _concatenation),
    ]
    for names, rule in table:
        for name in names.split():
            yield name, rule


_RULES = dict(_rules())
