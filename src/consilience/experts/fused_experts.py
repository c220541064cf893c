"""Experts of a mixture, one by one or as one tensor: which tensors of a base hold a loaded model's parameter.

transformers 5 keeps the experts of a layer as one parameter [experts, out, in], gate and up as the halves of its rows;
files have them one by one, or as one tensor, some of them turned. An adapter trained on a loaded model speaks of the
parameter (``checkpoints/adapter_parameters.py``): here it becomes an ordinary LoRA update of each tensor that the base
stores, so that every reader of updates can read it. A model whose files have another form is read in the base's.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from consilience.checkpoints.adapter import Adapter, LoraPair
from consilience.checkpoints.adapter_parameters import ParameterFactors
from consilience.checkpoints.assembled import AssembledStorage, Column, Piece, named, rows_of
from consilience.checkpoints.checkpoint import Checkpoint, TensorInfo
from consilience.errors import InputError
from consilience.experts.conv1d import model_types as known_types
from consilience.experts.conversions import Conversion, Rules, model_types, name_pattern, rules_for
from consilience.experts.model import Model
from consilience.experts.names import Fits, renamed

#: The order in which transformers' modules declare what PEFT adapts; wrappers are nested in it, the last outermost.
_DECLARED = (
    "gate_up_proj", "gate_up_proj_bias", "gate_proj", "up_proj", "w1", "v1", "down_proj", "down_proj_bias", "w2",
)  # fmt: skip
#: Architectures whose module keeps its experts [experts, in, out] (``is_transposed`` in transformers).
_TRANSPOSED = frozenset({"gpt_oss", "openai_privacy_filter", "aria", "aria_text"})
#: Operations after which rows of the parameter are rows of stored tensors, in the order of their names.
_ROWS = (("MergeModulelist",), ("MergeModulelist", "Concatenate"), ("Concatenate",))
Parts = tuple[Piece, ...] | Column


@dataclass(frozen=True, slots=True)
class Part:
    """Rows ``start ... stop`` of one expert (None: of each) of a parameter, which ``tensor`` holds."""

    tensor: TensorInfo
    expert: int | None
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Parameter:
    """A loaded model's parameter [experts, out, in], or a matrix [out, in], and the stored tensors that hold it.

    ``turned``: they store [experts, in, out]; None: as the module itself does, which their shape may not show.
    """

    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    turned: bool | None = False


def parameters(base: Checkpoint, rules: Rules) -> dict[str, Parameter]:
    """Return by loaded name the parameters that a base's files hold in another form, and its own matrices."""
    found: dict[str, dict[tuple[int, int | None], TensorInfo]] = {}
    forms: dict[str, Conversion] = {}
    plain: dict[str, Parameter] = {}
    for name, info in base.tensors.items():
        loaded = rules(name)
        matched = _converted(loaded, rules)
        if matched is None:
            if len(info.shape) in (2, 3):
                rows = info.shape[-2]
                plain[loaded] = Parameter(info.shape, (Part(info, None, 0, rows),), None)
            continue
        form, part, expert, parameter = matched
        forms[parameter] = form
        found.setdefault(parameter, {})[part, expert] = info
    joined = {name: _parameter(tensors, forms[name]) for name, tensors in found.items()}
    return plain | {name: parameter for name, parameter in joined.items() if parameter is not None}


def _converted(name: str, rules: Rules) -> tuple[Conversion, int, int | None, str] | None:
    """Return the form, the place in it, the expert and the parameter's name of a stored tensor."""
    for form in rules.conversions:
        for part, pattern in enumerate(form.stored):
            match = name_pattern(pattern).search(name)
            if match is not None and match.end() == len(name) and len(form.loaded) == 1:
                expert = int(match[1]) if "*" in pattern else None
                return form, part, expert, name[: match.start()] + form.loaded[0].replace("\\", "")
    return None


def _parameter(tensors: Mapping[tuple[int, int | None], TensorInfo], form: Conversion) -> Parameter | None:
    """Return the parameter that stored tensors make; None: some are missing, or it is made in a way of its own."""
    if form.operations == ("Transpose",) and len(tensors) == 1:
        (info,) = tensors.values()
        if len(info.shape) != 3:
            return None
        experts, into, out = info.shape
        return Parameter((experts, out, into), (Part(info, None, 0, out),), turned=True)
    if form.operations not in _ROWS:
        return None
    numbers = sorted({expert for _, expert in tensors if expert is not None})
    each: list[int | None] = [*numbers] if numbers else [None]
    places = [(part, expert) for part in range(len(form.stored)) for expert in each]
    if set(tensors) != set(places) or (numbers and numbers != list(range(len(numbers)))):
        return None
    parts: list[Part] = []
    start = 0
    for part in range(len(form.stored)):
        infos = [tensors[part, expert] for expert in each]
        shape = infos[0].shape
        if any(info.shape != shape for info in infos) or len(shape) != (2 if numbers else 3):
            return None
        parts += [Part(i, e, start, start + shape[-2]) for i, e in zip(infos, each, strict=True)]
        start += shape[-2]
    first = parts[0].tensor.shape
    if any(part.tensor.shape[-1] != first[-1] for part in parts):
        return None
    return Parameter((len(numbers) if numbers else first[0], start, first[-1]), tuple(parts))


def in_form_of(model: Model, base: Checkpoint) -> Model:
    """Return a model whose files hold experts in another form than the base's, with these as the base stores them."""
    checkpoint = model.checkpoint
    if checkpoint is None or checkpoint is base or checkpoint.tensors.keys() == base.tensors.keys():
        return model
    for rules in rules_for(base.config, checkpoint.config):
        if not rules.conversions:
            continue
        ours, theirs = parameters(checkpoint, rules), parameters(base, rules)
        tensors, parts = dict(checkpoint.tensors), dict[str, Parts]()
        for name in sorted(ours.keys() & theirs.keys()):
            one, other = ours[name], theirs[name]
            if _names(one) == _names(other) or one.shape != other.shape or one.turned or other.turned:
                continue
            if len({part.tensor.dtype.name for part in one.parts}) > 1:
                continue
            for part in one.parts:
                del tensors[part.tensor.name]
            for part in other.parts:
                parts[part.tensor.name] = tuple(_rows(one, part))
                tensors[part.tensor.name] = replace(part.tensor, dtype=one.parts[0].tensor.dtype, offset=0, codec=None)
        if parts:
            note = f"{len(parts)} tensors of the base are read from experts that it stores in another form"
            storage = AssembledStorage(checkpoint.storage, parts)
            notes = (*checkpoint.notes, note)
            return replace(model, checkpoint=replace(checkpoint, tensors=tensors, storage=storage, notes=notes))
    return model


def _names(parameter: Parameter) -> set[str]:
    return {part.tensor.name for part in parameter.parts}


def _rows(parameter: Parameter, wanted: Part) -> Iterator[Piece]:
    """Yield the bytes of what ``wanted`` holds, in its order, from a parameter that is stored in other parts."""
    experts = range(parameter.shape[0]) if wanted.expert is None else (wanted.expert,)
    for expert in experts:
        for part in parameter.parts:
            start, stop = max(part.start, wanted.start), min(part.stop, wanted.stop)
            if start < stop and part.expert in (None, expert):
                skipped = expert * (part.stop - part.start) if part.expert is None else 0
                row = part.tensor.nbytes // (part.tensor.numel // part.tensor.shape[-1])
                first = skipped + start - part.start
                yield Piece(part.tensor, first * row, (stop - start) * row)


def place_parameters(adapter: Adapter, base: Checkpoint) -> Adapter:
    """Return the adapter with its factors of parameters as updates of the base's stored tensors.

    Raises:
        InputError: the base has no such parameter, or its files and the adapter's do not say which way it is stored.
    """
    if not adapter.parameters:
        return adapter
    wanted = {name: one for one in adapter.parameters for name in one.options}
    fits = {name: _fits(one, name) for name, one in wanted.items()}
    best: tuple[dict[str, str], dict[str, Parameter]] = ({}, {})
    rules = rules_for(base.config)
    for rule in rules:
        held = parameters(base, rule)
        shapes = {n: TensorInfo(n, p.parts[0].tensor.dtype, p.shape) for n, p in held.items()}
        renames = {name: name for name in wanted if name in held} | renamed(fits, shapes, [rule])
        if len(renames) > len(best[0]):
            best = renames, held
        if all(any(name in renames for name in one.options) for one in adapter.parameters):
            break
    pairs, parts = dict(adapter.pairs), dict[str, Parts]()
    for one, name in _assigned(adapter, best[0], best[1]):
        for pair in _pairs(adapter, one, name, best[1][best[0][name]], base, parts):
            if pair.target in pairs:
                raise InputError(f"{adapter.path}: {pair.target!r} is adapted twice; save one adapter a folder")
            pairs[pair.target] = pair
    count = len(pairs) - len(adapter.pairs)
    note = f"{len(adapter.parameters)} parameters that it adapts as a whole are {count} tensors of the base"
    storage = AssembledStorage(adapter.checkpoint.storage, parts) if parts else adapter.checkpoint.storage
    checkpoint = replace(adapter.checkpoint, storage=storage)
    return replace(
        adapter, checkpoint=checkpoint, pairs=pairs, parameters=(), assembled=True, notes=(*adapter.notes, note)
    )


def _fits(one: ParameterFactors, name: str) -> Fits:
    def fits(info: TensorInfo) -> bool:
        return bool(_orientations(one, name, info.shape))

    return fits


def _orientations(one: ParameterFactors, name: str, shape: tuple[int, ...]) -> list[bool]:
    """Return in which ways, as stored [out, in] or turned, factors fit a parameter's shape."""
    experts = one.a.shape[0] // one.options[name][0]
    update = (one.b.shape[0], one.a.shape[1])
    if len(shape) == 2:
        return [False] if experts == 1 and shape == update else []
    return [turned for turned in (False, True) if shape == (experts, *(update[::-1] if turned else update))]


def _assigned(
    adapter: Adapter, renames: Mapping[str, str], held: Mapping[str, Parameter]
) -> Iterator[tuple[ParameterFactors, str]]:
    """Yield each factors' parameter: of several on a module, by the order of declaration and by what fits."""
    modules = sorted({one.module for one in adapter.parameters})
    for module in modules:
        factors = sorted((one for one in adapter.parameters if one.module == module), key=lambda one: -one.depth)
        names = sorted({name for one in factors for name in one.options if name in renames})
        if len(names) != len(factors):
            listed = ", ".join(repr(name.rpartition(".")[2]) for one in factors[:1] for name in one.options)
            raise InputError(
                f"{adapter.path}: {module}: has factors of {len(factors)} parameters (of {listed}), and the base "
                f"has {len(names)} of that name, shape and form; give the base it was trained on, or merge the adapter "
                "with PEFT and pass the model"
            )
        shapes = {name: held[renames[name]].shape for name in names}
        orders = [
            order
            for order in itertools.permutations(names)
            if _is_declared(order) and all(_meets(one, name, shapes) for one, name in zip(factors, order, strict=True))
        ]
        if not orders:
            updates = " and ".join(f"A {list(one.a.shape)} with B {list(one.b.shape)}" for one in factors)
            listed = ", ".join(f"{name.rpartition('.')[2]} {list(shape)}" for name, shape in shapes.items())
            raise InputError(
                f"{adapter.path}: {module}: its factors, {updates}, do not fit the base's {listed}; give the base it "
                "was trained on"
            )
        if len(orders) > 1:
            raise InputError(
                f"{adapter.path}: {module}: which factors are of which parameter ({', '.join(names)}) its files do not "
                "say; merge the adapter into its base with PEFT and pass the model"
            )
        yield from zip(factors, orders[0], strict=True)


def _meets(one: ParameterFactors, name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return name in one.options and bool(_orientations(one, name, shapes[name]))


def _is_declared(names: tuple[str, ...]) -> bool:
    """Whether parameters are in the order in which their module declares them, as far as that is known."""
    known = [_DECLARED.index(end) for name in names if (end := name.rpartition(".")[2]) in _DECLARED]
    return known == sorted(known)


def _pairs(
    adapter: Adapter, one: ParameterFactors, name: str, parameter: Parameter, base: Checkpoint, parts: dict[str, Parts]
) -> Iterator[LoraPair]:
    """Yield the updates of the tensors that hold a parameter; ``parts`` gets what their factors are assembled of."""
    rank, scale = one.options[name]
    experts, out = one.a.shape[0] // rank, one.b.shape[0]
    turned = parameter.turned
    if turned is None:
        ways = _orientations(one, name, parameter.shape)
        turned = ways[0] if len(ways) == 1 else _is_transposed(adapter, name, base)
    for part in parameter.parts:
        b, a, count = one.b, one.a, experts if len(part.tensor.shape) == 3 else 1
        if part.expert is not None:
            e = part.expert
            a = named(one.a, f"{one.a.name}[{e}]", (rank, one.a.shape[1]))
            b = named(one.b, f"{one.b.name}[{e}, {part.start}:{part.stop}]", (part.stop - part.start, rank))
            parts[a.name] = (rows_of(one.a, e * rank, (e + 1) * rank),)
            parts[b.name] = Column(one.b, experts, e, part.start, part.stop)
        elif (part.start, part.stop) != (0, out) and not turned:
            b = named(one.b, f"{one.b.name}[{part.start}:{part.stop}]", (part.stop - part.start, one.b.shape[1]))
            parts[b.name] = (rows_of(one.b, part.start, part.stop),)
        yield LoraPair(part.tensor.name, a, b, scale, turned, experts=count)


def _is_transposed(adapter: Adapter, name: str, base: Checkpoint) -> bool:
    """Return whether the module of a parameter with square matrices keeps them [in, out]."""
    types = model_types(base.config)
    if not types or not types <= known_types() or "auto_map" in (base.config or {}):
        raise InputError(
            f"{adapter.path}: {name}: its experts are square matrices of an unknown architecture: whether they are "
            "[out, in] or [in, out] is not in the files; merge the adapter into its base with PEFT and pass the model"
        )
    return bool(types & _TRANSPOSED)
