"""A recipe of slices or modules taken apart into *sections*: tensors of the output that are merged of the same models.

A section is a merge like any other, of *views* of its sources: models whose tensors are those of a few layers, called
as the output will call them. Tensors outside layers are of the first slice if they act before the layers (embeddings),
of the last if they act after them (norm, head), as in mergekit; the two are the same section where they have the same
sources and parameters. Tensors of modules that a recipe does not name are copied from the base.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, TypeVar

from consilience.checkpoints.checkpoint import TensorInfo, same_bytes
from consilience.checkpoints.packed import packing
from consilience.engine.opener import Opener
from consilience.errors import InputError, nearest
from consilience.experts.align import Alignment, align
from consilience.experts.config_parts import expanded
from consilience.experts.expert_set import comparable, expert_names
from consilience.experts.heads import Heads
from consilience.experts.layer_config import SourceLayer, as_in, check_patterns, restacked
from consilience.experts.layers import LayerStack, Modules, comes_first, modules_of
from consilience.experts.loose_factors import needs_base
from consilience.experts.model import Model
from consilience.experts.ties import keeps_flag, says_tied
from consilience.methods.signature import Method
from consilience.recipe.resolve import Given
from consilience.recipe.schema import Recipe
from consilience.recipe.slices import Part, SliceOfPart, SourceOfSlice, mentions, parts_of

T = TypeVar("T")
#: What a tensor of the output is called in a model, or None: it is of another section.
Renaming = Callable[[str], str | None]


@dataclass(frozen=True)
class SourceLayers:
    """Layers ``start`` to before ``stop`` of a model."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class StackedSlice:
    """Layers of the output from number ``start`` on, and what they are merged from; ``base`` is the base's name."""

    module: str
    start: int
    sources: tuple[SourceLayers, ...]
    base: str | None

    @property
    def length(self) -> int:
        """Number of layers."""
        return self.sources[0].stop - self.sources[0].start

    @property
    def text(self) -> str:
        """The slice in words."""
        where = "" if self.module == "default" else f"{self.module} "
        sources = ", ".join(f"{source.name} {_span(source.start, source.stop)}" for source in self.sources)
        return f"{where}layers {_span(self.start, self.start + self.length)}: {sources}"


def _span(start: int, stop: int) -> str:
    return f"{start}-{stop - 1}" if stop - start > 1 else f"{start}"


@dataclass(frozen=True)
class Stacking:
    """How the layers of an output are stacked: its slices in order, and what makes its config true of them."""

    slices: tuple[StackedSlice, ...]
    stacks: Mapping[str, LayerStack]
    layers: Mapping[str, tuple[SourceLayer, ...]]

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return a model's config.json with the output's layers."""
        for module, layers in self.layers.items():
            config = restacked(config, self.stacks[module], layers)
        return config

    def own_config(self, config: dict[str, Any], output: dict[str, Any]) -> dict[str, Any]:
        """Return a model's config with all that is said of layers as the output has it: that is no difference."""
        for module, layers in self.layers.items():
            config = as_in(config, output, self.stacks[module], len(layers))
        return config


@dataclass(frozen=True)
class Section:
    """Tensors of the output that are merged of the same models.

    Attributes:
        place: of the slice in the recipe.
        base: the base's view; None: the method has no base here.
        experts: the other sources' views.
        given: each expert's own parameters.
        nearer: the slice's and the module's, which count before the recipe's.
        alignment: how the views' tensors meet.
        depths: each tensor's relative depth.
        own: what each expert calls a tensor, by the tensor's name.
        copied: the section is of a module that the recipe does not name.
    """

    place: str
    base: Model | None
    experts: tuple[Model, ...]
    given: Mapping[str, Given]
    nearer: tuple[Given, ...]
    alignment: Alignment
    depths: Mapping[str, float]
    own: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    copied: bool = False

    def own_names(self) -> dict[str, list[str]]:
        """Return what each expert calls all tensors of the section."""
        count = len(self.experts)
        each = [self.own.get(name, (name,) * count) for name in self.alignment.tensors]
        return {expert.name: [names[k] for names in each] for k, expert in enumerate(self.experts)}


@dataclass(frozen=True)
class Sliced:
    """A recipe of slices, opened: the base, if it names one, the other models, and the output's sections."""

    base: Model | None
    experts: tuple[Model, ...]
    alignment: Alignment
    sections: tuple[Section, ...]
    stacking: Stacking


@dataclass(frozen=True)
class _Opened:
    """The models of a recipe by reference, called alike, and their stacks of layers."""

    recipe: Recipe
    method: Method
    where: str
    base: Model | None
    models: Mapping[str, Model]
    donor: Model
    modules: Modules

    def model(self, reference: str) -> Model:
        """Return a model by its reference."""
        if self.base is not None and reference == self.recipe.base_model and reference not in self.models:
            return self.base
        return self.models[reference]

    def whole(self, model: Model) -> Model:
        """Return a model with its own values of every tensor: an adapter on the recipe's base."""
        if model.checkpoint is not None:
            return model
        base = self.base
        if base is None:
            raise InputError(f"{self.where}: {needs_base(model, list(self.models.values()))}")
        if base.adapter is not None:
            raise InputError(
                f"{self.where}: {model.reference}: is an adapter, and so is the base {base.reference}; merge that into "
                "its model first"
            )
        return replace(model, checkpoint=base.checkpoint, assembled=dict(base.assembled) | model.assembled)

    def stack(self, model: Model, module: str) -> LayerStack:
        """Return a model's own stack of a module's layers: as long as its names say.

        Raises:
            InputError: it has none.
        """
        stack, checkpoint = self.modules.stacks[module], self.whole(model).checkpoint
        assert checkpoint is not None
        numbers = {number for name in checkpoint.tensors if (number := stack.layer(name)) is not None}
        if not numbers:
            raise InputError(
                f"{self.where}: {model.reference}: has no layers {stack.prefix}0, ..., as {self.donor.reference} has; "
                "slices take layers of models of one architecture"
            )
        return replace(stack, count=max(numbers) + 1)


def open_sliced(recipe: Recipe, method: Method, where: str, opener: Opener) -> Sliced:
    """Open the models of a recipe of slices or modules and check every slice, from headers.

    Raises:
        InputError: a slice names layers that are not there, as many of one source as of no other, no base, or models
            that do not fit; the message names the slice.
    """
    _check_keys(recipe, method, where)
    opened = _open(recipe, method, where, opener)
    parts = parts_of(recipe)
    owners = [_module(opened, part) for part in parts]
    sections: list[Section] = []
    slices: list[StackedSlice] = []
    layers: dict[str, tuple[SourceLayer, ...]] = {}
    untied: dict[str, str] = {}
    for part, module in zip(parts, owners, strict=True):
        stacked = _stacked(opened, part, module)
        slices += stacked
        if module in opened.modules.stacks:
            layers[module] = tuple(chain(*(_source_layers(opened, each) for each in stacked)))
            changes = expanded(recipe.config) if isinstance(recipe.config, Mapping) else {}
            part_key = opened.modules.stacks[module].part
            try:
                check_patterns(layers[module], changes.get(part_key, {}) if part_key else changes)
            except InputError as error:
                raise InputError(f"{where}: {part.place}: {error}") from None
        found, broken = _sections(opened, part, module, stacked)
        sections += found
        untied |= broken
    rest = _rest(opened, owners)
    sections += [rest] if rest is not None else []
    stacking = Stacking(tuple(s for s in slices if s.module in opened.modules.stacks), opened.modules.stacks, layers)
    alignment = _composed(opened, sections, untied, rest)
    used = [model for model in opened.models.values() if model is not opened.base]
    return Sliced(opened.base, tuple(used), alignment, tuple(sections), stacking)


def _check_keys(recipe: Recipe, method: Method, where: str) -> None:
    form = "slices" if recipe.slices else "modules"
    whole = (method.learn, method.statistics, method.collect)
    if any(one is not None for one in whole) or method.name == "coefficients":
        raise InputError(
            f"{where}: {form}: method {method.name!r} needs whole models; name them as models, or choose another method"
        )
    for key in ("private", "coefficients", "target"):
        if getattr(recipe, key):
            raise InputError(f"{where}: {key} goes with models, not with {form}; leave it out")


def _open(recipe: Recipe, method: Method, where: str, opener: Opener) -> _Opened:
    base = opener("base", recipe.base_model, base=True) if recipe.base_model is not None else None
    named = [each for each in mentions(recipe) if each.reference != recipe.base_model or method.base == "unused"]
    names = expert_names([(each.reference, each.name) for each in named], where)
    opened: list[Model] = []
    for name, mention in zip(names, named, strict=True):
        try:
            opened.append(opener(name, mention.reference))
        except InputError as error:
            raise InputError(f"{where}: {mention.place}.model: {error}") from None
    donor = base or next((model for model in opened if model.checkpoint is not None), None)
    if donor is None or donor.checkpoint is None:
        raise InputError(f"{where}: {needs_base(opened[0] if donor is None else donor, opened)}")
    modules = modules_of(donor.checkpoint.tensors, donor.checkpoint.config)
    deepest, phantoms = _deepened(donor, modules, opened)
    followed, numbered = comparable(deepest, [(model, i) for i, model in enumerate(opened) if model is not donor])
    assert followed is not None
    assert followed.checkpoint is not None
    tensors = {name: info for name, info in followed.checkpoint.tensors.items() if name not in phantoms}
    donor = replace(followed, checkpoint=replace(followed.checkpoint, tensors=tensors))
    others = {number: model for model, number in numbered}
    models = {each.reference: others.get(i, donor) for i, each in enumerate(named)}
    for model in (donor, *models.values()):
        packed = packing(model.checkpoint) if model.checkpoint is not None else None
        if packed is not None and packed.weights:
            raise InputError(
                f"{where}: {model.reference}: {next(iter(packed.weights))!r} is stored as {packed.formats}, and layers "
                "of quantised models are not stacked; dequantise the model first"
            )
    return _Opened(recipe, method, where, donor if base is not None else None, models, donor, modules)


def _deepened(donor: Model, modules: Modules, models: Sequence[Model]) -> tuple[Model, set[str]]:
    """Return the donor with as many layers as the deepest model, for names to be compared with, and what was added."""
    assert donor.checkpoint is not None
    tensors = dict(donor.checkpoint.tensors)
    for module, stack in modules.stacks.items():
        counts = [stack.count]
        for model in models:
            if model.checkpoint is not None:
                own = modules_of(model.checkpoint.tensors, model.checkpoint.config).stacks
                counts += [own[module].count] if module in own else []
        kinds: dict[str, TensorInfo] = {}
        for name, info in donor.checkpoint.tensors.items():
            if stack.layer(name) is not None:
                kinds[stack.renumbered(name, 0)] = info
        for layer in range(stack.count, max(counts)):
            tensors |= {stack.renumbered(name, layer): info for name, info in kinds.items()}
    added = tensors.keys() - donor.checkpoint.tensors.keys()
    return replace(donor, checkpoint=replace(donor.checkpoint, tensors=tensors)), added


def _module(opened: _Opened, part: Part) -> str:
    """Return the module that a part of the recipe stands for."""
    modules, donor = opened.modules, opened.donor.reference
    if part.name is None and len(modules.stacks) == 1:
        return "default"
    known = [*modules.stacks, *modules.further]
    if part.name is None:
        listed = ", ".join(f"{name} ({stack.prefix}0-{stack.count - 1})" for name, stack in modules.stacks.items())
        why = (
            f"{donor} has several stacks of layers, {listed}; write modules: {{{known[0]}: {{slices: ...}}}}"
            if modules.stacks
            else f"the layers of {donor} cannot be told: no numbered list of tensors is as long as config.json says"
        )
        raise InputError(f"{opened.where}: {part.place}: {why}")
    found = modules.names.get(part.name, part.name)
    if found not in known:
        raise InputError(
            f"{opened.where}: {part.place}: {donor} has no module {part.name!r}"
            f"{nearest(part.name, known) or '; it has ' + ', '.join(known)}"
        )
    return found


def _stacked(opened: _Opened, part: Part, module: str) -> list[StackedSlice]:
    """Return a part's slices with the layers they take, checked against the models."""
    found: list[StackedSlice] = []
    start = 0
    for piece in part.slices:
        _check_sources(opened, piece)
        sources = tuple(_layers(opened, source, module) for source in piece.sources)
        lengths = {source.stop - source.start for source in sources}
        if len(lengths) > 1:
            said = ", ".join(f"{source.name} {source.stop - source.start}" for source in sources)
            raise InputError(
                f"{opened.where}: {piece.place}: its sources are of different numbers of layers ({said}); give all as "
                "many" + ("" if piece.sources[0].layers else " by slices")
            )
        base = opened.model(piece.base).name if piece.base is not None and opened.method.base != "unused" else None
        found.append(StackedSlice(module, start, sources, base))
        start += found[-1].length
    return found


def _check_sources(opened: _Opened, piece: SliceOfPart) -> None:
    """Refuse sources that are named twice, no base, and too few or too many for the method."""
    method, where = opened.method, f"{opened.where}: {piece.place}"
    names = [source.model for source in piece.sources]
    twice = next((k for k, name in enumerate(names) if name in names[:k]), None)
    if twice is not None:
        raise InputError(f"{where}: names {names[twice]} twice; put the layers into slices of their own")
    based = piece.base is not None and method.base != "unused"
    if method.base == "required" and piece.base is None:
        raise InputError(f"{where}: method {method.name!r} needs a base_model; name one of the sources")
    if based and piece.base not in names:
        raise InputError(
            f"{where}: sources lack the base, {piece.base}, whose layers method {method.name!r} compares the others "
            "with; add it with its layer_range"
        )
    count = len(names) - (1 if based and not method.counts_base else 0)
    if count < method.minimum or (method.maximum is not None and count > method.maximum):
        of = "sources with the base" if method.counts_base else "sources" + (" besides the base" if based else "")
        of = of.replace("sources", "source") if method.maximum == 1 else of
        need = f"exactly {method.minimum}" if method.minimum == method.maximum else f"at least {method.minimum}"
        raise InputError(f"{where}: method {method.name!r} merges {need} {of}; the slice names {count}")


def _layers(opened: _Opened, source: SourceOfSlice, module: str) -> SourceLayers:
    model = opened.model(source.model)
    if module not in opened.modules.stacks:
        return SourceLayers(model.name, 0, 0)
    stack = opened.stack(model, module)
    start, stop = source.layers or (0, stack.count)
    if stop > stack.count:
        raise InputError(
            f"{opened.where}: {source.place}.layer_range: [{start}, {stop}] ends after the last layer of "
            f"{source.model}, which has {stack.count}"
        )
    return SourceLayers(model.name, start, stop)


def _source_layers(opened: _Opened, piece: StackedSlice) -> list[SourceLayer]:
    """Return what the config of every layer of a slice is taken from: the base's layers, else the first source's."""
    source = next((source for source in piece.sources if source.name == piece.base), piece.sources[0])
    model = next(model for model in _all(opened) if model.name == source.name)
    config = opened.whole(model).checkpoint
    assert config is not None
    stack = opened.stack(model, piece.module)
    return [SourceLayer(model.name, config.config or {}, i, stack) for i in range(source.start, source.stop)]


def _all(opened: _Opened) -> list[Model]:
    return [*([opened.base] if opened.base is not None else []), *opened.models.values()]


# ----------------------------------------------------------------------------------------------------------------------
# Sections.


def _sections(
    opened: _Opened, part: Part, module: str, stacked: Sequence[StackedSlice]
) -> tuple[list[Section], dict[str, str]]:
    """Return a part's sections, and which names of tied tensors the output has apart."""
    pieces = list(zip(part.slices, stacked, strict=True))
    last = len(pieces) - 1
    together = last == 0 or _alike(part.slices[0], part.slices[-1])
    broken = {} if together else _broken_ties(opened, part, module)
    names = broken | _other_ties(opened, part, module, broken)
    found: list[Section] = []
    for number, (piece, layers) in enumerate(pieces):

        def loose(name: str, number: int = number) -> bool:
            if together:
                return number == 0
            return number == (0 if _first(opened, part, name) else last)

        found.append(_section(opened, piece, layers, loose, names))
    return found, broken


def _alike(one: SliceOfPart, other: SliceOfPart) -> bool:
    """Whether what lies outside layers is merged in the same way by two slices."""
    own = [
        ([(s.model, s.given.parameters) for s in piece.sources], piece.base, [g.parameters for g in piece.nearer])
        for piece in (one, other)
    ]
    return own[0] == own[1]


def _first(opened: _Opened, part: Part, name: str) -> bool:
    first = comes_first(name)
    if first is None:
        raise InputError(
            f"{opened.where}: {part.place}: whether {name!r}, outside of layers, belongs to the first or the last "
            "slice cannot be told from its name; give both slices the same models and parameters"
        )
    return first


def _broken_ties(opened: _Opened, part: Part, module: str) -> dict[str, str]:
    """Return the names after the layers that stand in models for a tensor before them, and do not in the output.

    They stay one tensor where all models of the first and last slice have the same values there, and nothing is scaled.
    """
    first, last = (
        [opened.whole(opened.model(source.model)) for source in piece.sources]
        for piece in (part.slices[0], part.slices[-1])
    )
    crossing = {
        alias: target
        for model in (*first, *last)
        for alias, target in model.ties.items()
        if opened.modules.owner(alias) == module and comes_first(target) and comes_first(alias) is False
    }
    given = [each for piece in part.slices for each in (*piece.nearer, *(source.given for source in piece.sources))]
    values = [*opened.recipe.parameters.values(), *chain(*(each.parameters.values() for each in given))]
    plain = opened.method.name == "passthrough" and all(value == 1 for value in values)
    return {
        alias: target for alias, target in crossing.items()
        if not plain or not _same_values(first[0], target, [(m, alias) for m in last] + [(m, target) for m in first])
    }  # fmt: skip


def _other_ties(opened: _Opened, part: Part, module: str, broken: Mapping[str, str]) -> dict[str, str]:
    """Return the module's other ties where the output's config stops tying: then the file has every name of them."""
    assert opened.donor.checkpoint is not None
    config = opened.donor.checkpoint.config
    if not broken or not says_tied(config) or keeps_flag(config):
        return {}
    models = [opened.whole(opened.model(source.model)) for piece in part.slices for source in piece.sources]
    ties = {alias: target for model in models for alias, target in model.ties.items() if alias not in broken}
    return {alias: target for alias, target in ties.items() if opened.modules.owner(alias) == module}


def _same_values(model: Model, name: str, others: Sequence[tuple[Model, str]]) -> bool:
    ours = model.source(name)
    for other, other_name in others:
        theirs = other.source(other_name)
        if ours.pair is not None or theirs.pair is not None or None in (ours.dense, theirs.dense):
            return False
        assert ours.dense is not None
        assert theirs.dense is not None
        assert ours.storage is not None
        assert theirs.storage is not None
        if (ours.dense.shape, ours.dense.dtype) != (theirs.dense.shape, theirs.dense.dtype):
            return False
        if not same_bytes((ours.storage, ours.dense), (theirs.storage, theirs.dense)):
            return False
    return True


def _section(
    opened: _Opened,
    piece: SliceOfPart,
    layers: StackedSlice,
    loose: Callable[[str], bool],
    names: Mapping[str, str],
) -> Section:
    """Return the section of one slice: views of its sources, aligned."""
    modules, module = opened.modules, layers.module
    stack = modules.stacks.get(module)
    spans = {source.name: source for source in layers.sources}
    of_base = spans.get(layers.base) if layers.base is not None else None

    def view(model: Model) -> Model:
        span = spans[model.name]
        if model.checkpoint is None and (of_base is None or (of_base.start, of_base.stop) != (span.start, span.stop)):
            model = opened.whole(model)
        model = _with_names(model, names)
        return _viewed(model, lambda name: _output_name(modules, module, stack, span, layers.start, name, loose))

    models = [opened.model(source.model) for source in piece.sources]
    base = next((view(model) for model in models if model.name == layers.base), None)
    experts = [view(model) for model in models if model.name != layers.base]
    given = {
        model.name: source.given for model, source in zip(models, piece.sources, strict=True)
        if model.name != layers.base
    }  # fmt: skip
    try:
        alignment = align(base, experts)
    except InputError as error:
        raise InputError(f"{opened.where}: {piece.place}: {error}") from None
    inside = [name for name in alignment.tensors if stack is not None and stack.layer(name) is not None]
    depths, own = {}, {}
    for name in inside:
        assert stack is not None
        offset = (stack.layer(name) or 0) - layers.start
        depths[name] = offset / (layers.length - 1) if layers.length > 1 else 1.0
        own[name] = tuple(stack.renumbered(name, spans[model.name].start + offset) for model in experts)
    return Section(piece.place, base, tuple(experts), given, piece.nearer, alignment, depths, own)


def _output_name(
    modules: Modules,
    module: str,
    stack: LayerStack | None,
    span: SourceLayers,
    start: int,
    name: str,
    loose: Callable[[str], bool],
) -> str | None:
    """Return what a section calls a tensor of one of its sources; None: it is of another section."""
    if modules.owner(name) != module:
        return None
    layer = stack.layer(name) if stack is not None else None
    if stack is None or layer is None:
        return name if loose(name) else None
    return stack.renumbered(name, start + layer - span.start) if span.start <= layer < span.stop else None


def _with_names(model: Model, names: Mapping[str, str]) -> Model:
    """Return a model with tied tensors under further names of theirs (alias -> the tensor that is stored)."""
    ties = {alias: target for alias, target in model.ties.items() if alias in names}
    if model.checkpoint is None:
        ties = dict(names)
    if not ties:
        return model

    def added(values: Mapping[str, T]) -> dict[str, T]:
        more = {alias: values[target] for alias, target in ties.items() if target in values and alias not in values}
        return dict(values) | more

    checkpoint = model.checkpoint and replace(model.checkpoint, tensors=added(model.checkpoint.tensors))
    adapter = model.adapter
    if adapter is not None:
        adapter = replace(adapter, pairs=added(adapter.pairs), whole=added(adapter.whole), tokens=added(adapter.tokens))
    return replace(model, checkpoint=checkpoint, adapter=adapter, assembled=added(model.assembled))


def _viewed(model: Model, renaming: Renaming) -> Model:
    """Return a model with the tensors, and updates, that a renaming keeps, by their new names."""

    def renamed(values: Mapping[str, T]) -> dict[str, T]:
        pairs = ((renaming(name), value) for name, value in values.items())
        return {new: value for new, value in pairs if new is not None}

    checkpoint = model.checkpoint and replace(model.checkpoint, tensors=renamed(model.checkpoint.tensors))
    adapter = model.adapter
    if adapter is not None:
        pairs = {new: replace(pair, target=new) for new, pair in renamed(adapter.pairs).items()}
        adapter = replace(adapter, pairs=pairs, whole=renamed(adapter.whole), tokens=renamed(adapter.tokens))
    return replace(model, checkpoint=checkpoint, adapter=adapter, assembled=renamed(model.assembled))


def _rest(opened: _Opened, modules: Sequence[str]) -> Section | None:
    """Return what is copied: the tensors of modules that the recipe does not name."""
    checkpoint = opened.donor.checkpoint
    assert checkpoint is not None
    names = {name for name in checkpoint.tensors if opened.modules.owner(name) not in modules}
    if not names:
        return None
    donor = _viewed(opened.donor, lambda name: name if name in names else None)
    return Section("modules", donor, (), {}, (), align(donor, []), {}, copied=True)


def natural(name: str) -> list[tuple[int, int, str]]:
    """Return a key that sorts layer 10 behind layer 9."""
    return [
        (1, int(part), "") if part.isdecimal() else (0, 0, part) for part in re.split(r"(?<!\d)(\d{1,9})(?!\d)", name)
    ]


def _composed(
    opened: _Opened, sections: Sequence[Section], broken: Mapping[str, str], rest: Section | None
) -> Alignment:
    """Return the sections' alignments as that of the output."""
    alignments = [section.alignment for section in sections]
    tensors: dict[str, TensorInfo] = dict(chain(*(one.tensors.items() for one in alignments)))
    tensors = {name: tensors[name] for name in sorted(tensors, key=natural)}
    assert opened.donor.checkpoint is not None
    config = opened.donor.checkpoint.config
    apart = {alias: target for alias, target in broken.items() if alias in tensors}
    notes = list(dict.fromkeys(chain(*(one.notes for one in alignments))))
    notes += [
        f"{alias} is untied from {target}, which it is one tensor with in the models: the last slice is of other "
        "sources, or has other parameters, than the first"
        for alias, target in apart.items()
    ]
    if rest is not None:
        left = sorted({opened.modules.owner(name) for name in rest.alignment.tensors})
        notes.append(f"{', '.join(left)}: not named under modules, and copied from {opened.donor.name}")
    untied_config = bool(apart) and says_tied(config) and not keeps_flag(config)
    return Alignment(
        donor=opened.donor,
        tensors=tensors,
        ties=dict(chain(*(one.ties.items() for one in alignments))),
        untied=dict(chain(*(one.untied.items() for one in alignments))) | apart,
        untied_config=untied_config or any(one.untied_config for one in alignments),
        private={},
        notes=notes,
        packed=alignments[0].packed,
        same_parts=[],
        vocabulary=next((one.vocabulary for one in alignments if one.vocabulary.tensors), alignments[0].vocabulary),
        heads=next((one.heads for one in alignments if one.heads.tensors), Heads()),
        owners={name: one.donor.name for one in alignments for name in one.tensors},
    )
