"""Which units of a module may be put in any order together, found from the graph of one forward pass."""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from consilience.errors import InputError
from consilience.mixing.symmetry import Axis, Group, Indices, Symmetry


def symmetry_of_module(module: nn.Module, example: Tensor) -> Symmetry:
    """Return the groups of hidden units of a module, from the graph of one forward pass.

    Every channel is followed through the graph: convolutions, linear layers and embeddings make new ones,
    normalisation, pointwise functions, pooling and flattening pass them on, sums tie them (residual streams, also where
    a shortcut pads with zero channels), concatenation joins them, a split into attention's heads ties each head's, and
    statistics over all channels are the same in any order. Channels that occur at the same places in the same roles
    form a group. What an operation that is not known here reads is fixed, so a symmetry may be missed, but none is
    invented: the order within an attention head, for one, stays as it is.

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
    (
        "dropout",
        "feature_dropout",
        "alpha_dropout",
        "clone",
        "contiguous",
        "detach",
        "alias",
        "to",
        "_to_copy",
        "type_as",
    )
) | {"softmax", "log_softmax", "hardswish", "log_sigmoid"}
#: What works on the axes behind [n, channels].
_SPATIAL = frozenset(
    f"{kind}{d}d" for kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "upsample_nearest") for d in (1, 2, 3)
) | {"upsample_bilinear2d", "upsample_bicubic2d"}
#: What shows part of another tensor: written to in place, the other changes unseen.
_VIEWS = frozenset(("slice", "select", "narrow", "split", "chunk", "getitem"))
#: What looks at a tensor and returns none.
_CHECKS = frozenset(("_assert_tensor_metadata", "sym_size"))
#: A result that is the same whatever order the channels have.
_NO_CHANNELS = _Value(-1, np.empty(0, np.int64), np.empty(0, np.int64))
#: Begins the keys under which ``_Trace.note`` keeps roles: no tensor's name.
_READ = "\0"
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
        if name in _CHECKS:
            return
        rule = None if name.endswith("_") and _operation(node.args[0]) in _VIEWS else self._rule(name.rstrip("_"), node)
        found = rule(self, node, name.rstrip("_")) if rule is not None else None
        if found is None:
            self.fix(node)
        self.values[node] = None if found is _NO_CHANNELS else found

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

    def note(self, node: Any, value: _Value) -> None:
        """Say that a node reads these channels in any order: those of one group must have one role there too."""
        self.axes[f"{_READ}{node.name}", 0] = [(value.elements, value.roles)]

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
    keys = [key for key in units[0] if not key[0].startswith(_READ)]
    places = {key: np.array([unit[key] for unit in units], np.int64) for key in keys}
    return Group(name, {(alias, axis): held for (first, axis), held in places.items() for alias in aliases[first]})


def _operation(node: Any) -> str:
    if node.target is operator.getitem:
        return "getitem"
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


def _transposed_linear(trace: _Trace, node: Any, _: str) -> _Value | None:
    """``addmm(bias, inputs, weight)`` with a weight [inputs, outputs], as GPT-2's Conv1D."""
    bias, source, weight = node.args[:3]
    value = trace.value(source)
    if node.kwargs or (value is not None and value.dim != 1):
        return None
    return _layer(trace, node, value, weight, bias, 1, outputs=1)


def _embedding(trace: _Trace, node: Any, _: str) -> _Value | None:
    return _layer(trace, node, None, node.args[0], None, len(_shape(node)) - 1, outputs=1)


def _layer(
    trace: _Trace, node: Any, value: _Value | None, weight: Any, bias: Any, dim: int, outputs: int = 0
) -> _Value | None:
    """A layer that makes new channels, its weight's axis ``outputs``, and reads ``value`` on the other one."""
    if weight.name not in trace.parameters or (bias is not None and bias.name not in trace.parameters):
        return None
    made = trace.elements.fresh(_shape(weight)[outputs])
    roles = trace.roles(node, np.zeros(len(made), np.int64))
    if value is not None:
        trace.place(weight, 1 - outputs, value.elements, value.roles)
    trace.place(weight, outputs, made, roles)
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
    if value is None:
        return None
    if value.dim in gone:
        trace.note(node, value)
        return _NO_CHANNELS
    lost = 0 if len(_shape(node)) == size else sum(axis < value.dim for axis in gone)
    return _Value(value.dim - lost, value.elements, trace.roles(node, value.roles))


def _reshape(trace: _Trace, node: Any, _: str) -> _Value | None:
    """Keep channels whose axis stays, is flattened with those behind it (neighbouring positions), or split in heads."""
    value, old, new = trace.value(node.args[0]), _shape(node.args[0]), _shape(node)
    if value is None:
        return None
    dim = value.dim
    if new[: dim + 1] == old[: dim + 1]:
        return value
    if dim == len(old) - 1 and new[-1:] == old[-1:]:
        return _Value(len(new) - 1, value.elements, value.roles)
    if dim == len(old) - 1 and new[:-2] == old[:-1] and new[-2] * new[-1] == old[-1]:
        return _heads(trace, node, value, new[-1])
    merged = len(old) - len(new) + 1
    if merged < 2 or new != (*old[:dim], int(np.prod(old[dim : dim + merged])), *old[dim + merged :]):
        return None
    copies = int(np.prod(old[dim + 1 : dim + merged]))
    roles = trace.roles(node, np.repeat(value.roles, copies), np.tile(np.arange(copies), len(value.elements)))
    return _Value(dim, np.repeat(value.elements, copies), roles)


def _heads(trace: _Trace, node: Any, value: _Value, width: int) -> _Value | None:
    """Split channels in blocks of ``width`` neighbours, which move together from here on."""
    if (value.elements < 0).any():
        return None
    blocks, roles = value.elements.reshape(-1, width), value.roles.reshape(-1, width)
    for position in range(1, width):
        trace.elements.tie(blocks[:, 0], blocks[:, position])
    return _Value(value.dim, blocks[:, 0], trace.roles(node, *roles.T))


def _attention(trace: _Trace, node: Any, _: str) -> _Value | None:
    """Attention whose heads [n, heads, tokens, width] go together; a key's head with all queries' that share it."""
    values = [trace.value(source) for source in node.args[:3]]
    mask, heads = _argument(node, 3, "attn_mask"), _shape(node)[1]
    if any(value is None or value.dim != 1 for value in values) or (mask is not None and _per_head(mask)):
        return None
    elements, roles = list[Indices](), list[Indices]()
    for value in cast(list[_Value], values):
        copies = heads // len(value.elements)
        elements.append(np.repeat(value.elements, copies))
        roles += [np.repeat(value.roles, copies), np.tile(np.arange(copies), len(value.elements))]
        trace.elements.tie(elements[0], elements[-1])
    if any((each < 0).any() for each in elements):
        return None
    return _Value(1, elements[0], trace.roles(node, *roles))


def _per_head(mask: Any) -> bool:
    return len(_shape(mask)) > 2 and _shape(mask)[-3] > 1


def _expand(trace: _Trace, node: Any, _: str) -> _Value | None:
    value, size = trace.value(node.args[0]), len(_shape(node))
    if value is None:
        return None
    dim = value.dim + size - len(_shape(node.args[0]))
    return _Value(dim, value.elements, value.roles) if _shape(node)[dim] == len(value.elements) else None


def _split(trace: _Trace, node: Any, _: str) -> _Value | None:
    return trace.value(node.args[0])  # whole: ``_part`` takes the parts apart


def _part(trace: _Trace, node: Any, _: str) -> _Value | None:
    """One part of a split."""
    whole, number = node.args
    value, source = trace.value(whole), whole.args[0]
    if value is None or not isinstance(whole.meta["val"], list | tuple):
        return None
    if _argument(whole, 2, "dim", 0) % len(_shape(source)) != value.dim:
        return value
    start = sum(part.shape[value.dim] for part in whole.meta["val"][:number])
    chosen = slice(start, start + _shape(node)[value.dim])
    return _Value(value.dim, value.elements[chosen], value.roles[chosen])


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
        ("addmm", _transposed_linear),
        ("embedding", _embedding),
        ("scaled_dot_product_attention", _attention),
        ("batch_norm instance_norm group_norm layer_norm", _normalisation),
        ("prelu", _prelu),
        ("mean sum amax amin", _reduction),
        ("flatten view reshape _unsafe_view", _reshape),
        ("expand", _expand),
        ("split split_with_sizes chunk", _split),
        ("getitem", _part),
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
