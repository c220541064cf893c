"""Everything a merge will do, decided from headers alone: what is read, what runs, where each byte goes."""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from consilience import __version__
from consilience.checkpoints.dtypes import DTYPES, DType
from consilience.coefficients import Coefficients, Piece, fit, load_coefficients
from consilience.engine.chosen_files import check_choices
from consilience.engine.differences import Difference, differences
from consilience.engine.layout import Layout, plan_layout
from consilience.engine.opener import Opener
from consilience.engine.skeletons import Skeletons
from consilience.engine.slices import Section, Sliced, Stacking, open_sliced
from consilience.engine.tokenizer import check_own_rows, token_choice
from consilience.errors import InputError, option
from consilience.experts.align import Alignment, align
from consilience.experts.expert_set import comparable, expert_names
from consilience.experts.model import Model, Source, open_model
from consilience.experts.routers import merged_note, routers, spelled_out
from consilience.experts.stack import Stack
from consilience.experts.statistics import Statistics, check_of, open_statistics
from consilience.methods.program import Arithmetic, Elementwise, Matrix, Program, Ranks, Step
from consilience.methods.registry import load
from consilience.methods.signature import Method, TensorSpec
from consilience.methods.ties import elect
from consilience.methods.weighted_sum import PiecewiseSum, low_rank_weights, weighted
from consilience.name_filter import any_filter, name_filter
from consilience.recipe.resolve import Known, Settings, check_used, depths, without_effect
from consilience.recipe.schema import RECIPE_KEYS, Recipe
from consilience.recipe.unused_keys import with_averaged_base, without_unused

#: Elements of a tensor that one worker takes at a time. Part of the format of the journal, not of the result.
SEGMENT = 1 << 22
#: Buffers of running statistics (BatchNorm): averaged, never extrapolated, whatever the method.
_RUNNING = (".running_mean", ".running_var")
#: Name of the expert that a learned method makes beside its coefficients, and of its folder.
CORRECTION = "correction"
#: A merged checkpoint is cut into files of at most this many bytes unless told otherwise.
SHARD_SIZE = 5_000_000_000


def _segment(unit: int) -> int:
    return max(1, SEGMENT // unit) * unit


def segments(numel: int, unit: int = 1) -> int:
    """Return how many pieces workers take of a tensor of which ``unit`` elements stay together."""
    return -(-numel // _segment(unit))


def segments_of(elements: int, count: int) -> int:
    """Return how many segments make up so many elements; ``count``, that is all of them, if they do not fit."""
    return elements // SEGMENT if elements % SEGMENT == 0 else count


def span(numel: int, segment: int, unit: int = 1) -> tuple[int, int]:
    """Return the first and last-plus-one element of a segment."""
    size = _segment(unit)
    return segment * size, min(numel, (segment + 1) * size)


@dataclass(frozen=True)
class TensorPlan:
    """The treatment of one output tensor.

    ``program`` None means: copy ``base`` (converted to ``out_dtype``). ``rows`` are the stack's rows, named by
    ``row_names``. ``stream`` names the tensor for random numbers: tied tensors share one.
    """

    index: int
    name: str
    shape: tuple[int, ...]
    numel: int
    out_dtype: DType
    file: int
    offset: int
    wide: bool
    base: Source
    rows: tuple[Source, ...]
    row_names: tuple[str, ...]
    program: Program | None
    parameters: dict[str, Any]
    stream: str

    @cached_property
    def stack(self) -> Stack:
        """The rows on their base, as something to read."""
        return Stack(self.name, self.shape, self.base, self.rows, self.row_names, self.wide)

    @property
    def vectors(self) -> bool:
        """Whether the rows enter the arithmetic as task vectors, not as the experts' own values."""
        return self.program is None or self.program.space == "task_vectors"

    @property
    def segments(self) -> int:
        """Number of pieces workers take: one of what a method has to see whole."""
        return 1 if isinstance(self.program, Matrix) else segments(self.numel, self.unit)

    @property
    def unit(self) -> int:
        """Elements that stay together: whole rows of a matrix where a method needs them."""
        by_row = self.program.row_step if isinstance(self.program, Elementwise) else None
        return 1 if by_row is None else by_row.unit

    def span(self, segment: int) -> tuple[int, int]:
        """First and last-plus-one element of a segment."""
        return (0, self.numel) if isinstance(self.program, Matrix) else span(self.numel, segment, self.unit)

    @property
    def ranks(self) -> Ranks | None:
        """What is kept of the rows by magnitude; None: all of it."""
        keep = None if self.program is None else self.program.keep
        return keep if isinstance(keep, Ranks) else None

    @cached_property
    def reads_base(self) -> bool:
        """Whether the base's values enter the arithmetic."""
        return self.vectors or any(row.dense is None for row in self.rows)

    @cached_property
    def passes(self) -> int:
        """How often the inputs are read."""
        if self.program is None:
            return 1
        if isinstance(self.program, Matrix):
            return 2  # for the arithmetic, then for fingerprints and what is lost to rounding
        stages = self.program.stages if self.program.needs != "none" else 0
        return 1 + (self.program.keep is not None) + stages

    @property
    def bytes_read(self) -> int:
        """Bytes read over all passes."""
        rows = sum(row.nbytes for row in self.rows)
        return self.passes * (rows + (self.base.nbytes if self.reads_base else 0))

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        return self.numel * self.out_dtype.itemsize


@dataclass(frozen=True)
class Plan:
    """A whole merge, ready to run.

    ``recipe`` has every default that counts written out, which ``defaults`` lists; ``notes`` say what of the recipe has
    no effect. ``learning`` are a learned method's parameters; ``where`` and ``root`` say how errors name the recipe and
    where its relative paths start; ``numbers`` are the experts' places in ``recipe.models``; ``shard_size`` and
    ``single`` are as ``make_plan`` was given them. ``sliced`` has the sections of a recipe of slices or modules.
    ``stages`` are the plans of what other models are to be made by, whose ``skeletons`` lie in a folder meanwhile;
    ``made`` are the folders of those that were.
    """

    recipe: Recipe
    method: Method
    base: Model | None
    experts: tuple[Model, ...]
    alignment: Alignment
    tensors: tuple[TensorPlan, ...]
    layout: Layout
    stochastic: bool
    allow_nonfinite: bool
    coefficients: Coefficients | None = None
    learning: dict[str, Any] = field(default_factory=dict[str, Any])
    where: str = "recipe"
    root: Path | None = None
    numbers: tuple[int, ...] = ()
    shard_size: int = SHARD_SIZE
    single: str = "model.safetensors"
    defaults: dict[str, Any] = field(default_factory=dict[str, Any])
    notes: tuple[str, ...] = ()
    statistics: tuple[Statistics, ...] = ()
    sliced: Sliced | None = None
    stages: "Mapping[str, Plan]" = field(default_factory=dict[str, "Plan"])
    skeletons: Skeletons | None = None
    made: Mapping[str, Path] = field(default_factory=dict[str, Path])

    @property
    def stacking(self) -> Stacking | None:
        """How the output's layers are stacked of the models'; None: they are the models' own."""
        return self.sliced.stacking if self.sliced is not None else None

    @property
    def sections(self) -> list[tuple[Alignment, tuple[Model, ...]]]:
        """Tensors that are merged of the same models, as alignment and experts: all of them, or those of a slice."""
        if self.sliced is None:
            return [(self.alignment, self.experts)]
        return [(section.alignment, section.experts) for section in self.sliced.sections]

    @property
    def unlearned(self) -> bool:
        """Whether coefficients have to be learned, or statistics collected, before this plan is what was asked for."""
        if self.method.collect is not None:
            return not self.statistics
        return self.method.learn is not None and self.coefficients is None

    @property
    def merges(self) -> bool:
        """Whether values are merged; else tensors of several models are put together as they are."""
        return True

    @property
    def own_recipe(self) -> dict[str, Any] | None:
        """What was given, where that is no merge's recipe; None: ``recipe`` is."""
        return None

    @property
    def facts(self) -> dict[str, Any]:
        """What the lineage says beside what it says of every merge."""
        return {}

    @property
    def correction(self) -> Path | None:
        """The folder of the adapter that a learned method made beside its coefficients; None: it made none."""
        made = [e for e in self.experts if e.name == e.reference == CORRECTION] if self.method.learn else []
        return made[0].folder if made else None

    @property
    def models(self) -> list[Model]:
        """The base, if any, and the experts, each once."""
        return [*([self.base] if self.base else []), *(e for e in self.experts if e is not self.base)]

    def scales(self, expert: int) -> list[Any]:
        """Return what an expert's adapter config makes of its factors: no date or size of a weight file shows it."""
        pairs = [t.rows[expert].pair for t in self.tensors if t.rows]
        return [[pair.target, pair.scale, pair.transposed] for pair in pairs if pair is not None]

    @cached_property
    def differences(self) -> tuple[Difference, ...]:
        """How the experts differ from the output in what makes them usable."""
        return differences(self)

    @cached_property
    def digest(self) -> str:
        """Identity of the work: a run with another digest must not continue this one's partial output."""
        facts: dict[str, Any] = {
            "version": __version__,
            "segment": SEGMENT,
            "recipe": self.recipe.model_dump(mode="json"),
            "stochastic": self.stochastic,
            "allow_nonfinite": self.allow_nonfinite,
            "inputs": [self._identity(model) for model in self.models],
            "trained_rows": [
                [name, tokens.rows] for m in self.models if m.adapter for name, tokens in m.adapter.tokens.items()
            ],
            "tensors": [_facts(tensor) for tensor in self.tensors],
            "files": [(file.name, file.size, hashlib.blake2b(file.header).hexdigest()) for file in self.layout.files],
        }
        if self.stages:
            facts["stages"] = [[name, stage.digest] for name, stage in self.stages.items()]
        if self.statistics:
            facts["statistics"] = [one.identity() for one in self.statistics]
        if self.alignment.tokens is not None:
            facts["tokens"] = self.alignment.tokens.choice.digest
        if self.coefficients is not None:  # the same values, cut elsewhere or on trimmed task vectors, are other bytes
            facts["coefficients"] = [repr(self.coefficients.groups), repr(self.coefficients.trimmed)]
        return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()

    def _identity(self, model: Model) -> list[tuple[str, int, int]]:
        """Return a model's identity, without files that only stand for those of a stage: its plan is its identity."""
        return [entry for entry in model.identity() if self.skeletons is None or not self.skeletons.holds(entry[0])]

    def close(self) -> None:
        """Release the inputs."""
        for part in (*self.models, *self.statistics, *self.stages.values()):
            part.close()
        if self.stages and self.skeletons is not None:
            self.skeletons.close()


def _facts(tensor: TensorPlan) -> list[Any]:
    """Return what decides a tensor's bytes besides its inputs' bytes: values that come from configs and recipes."""
    stored = tensor.rows or (tensor.base,)
    sources = [(s.dense.name if s.dense else None, s.pair and (s.pair.scale, s.pair.transposed)) for s in stored]
    dense = [s.dense for s in (tensor.base, *tensor.rows) if s.dense is not None]
    codecs = [repr(info.codec) for info in dense if info.codec is not None]
    return [tensor.name, tensor.stream, tensor.out_dtype.name, tensor.parameters, sources, codecs]


def resolve_file(path: str, root: Path | None) -> Path:
    """Return a recipe's file or folder: as written from the current folder if it is there, else from the recipe's."""
    plain = Path(path).expanduser()
    return root / plain if root is not None and not plain.exists() and not plain.is_absolute() else plain


def open_models(
    recipe: Recipe, method: Method, where: str, opened: Opener
) -> tuple[Model | None, list[tuple[Model, int]]]:
    """Open the base and the experts; with each expert comes its entry's number in ``recipe.models``."""
    base = opened("base", recipe.base_model, base=True) if recipe.base_model is not None else None
    names = expert_names([(entry.model, entry.name) for entry in recipe.models], where)
    experts: list[tuple[Model, int]] = []
    for number, (entry, name) in enumerate(zip(recipe.models, names, strict=True)):
        if entry.model == recipe.base_model and method.base != "unused":
            continue  # mergekit's way of listing the base among the models: its task vector is zero
        experts.append((opened(name, entry.model), number))
    return base, experts


def check_count(method: Method, base: Model | None, experts: int, where: str) -> None:
    """Refuse too few or too many models for a method, or a base that is not there."""
    if method.base == "required" and base is None:
        raise InputError(
            f"{where}: method {method.name!r} needs a base_model; name the model the experts were tuned from"
        )
    count = experts + (1 if method.counts_base and base is not None else 0)
    if count < method.minimum or (method.maximum is not None and count > method.maximum):
        of = "models with the base" if method.counts_base else "expert" if method.maximum == 1 else "models"
        need = f"exactly {method.minimum}" if method.minimum == method.maximum else f"at least {method.minimum}"
        raise InputError(f"{where}: method {method.name!r} merges {need} {of}; the recipe names {count}")


def _running_average(spec: TensorSpec, parameters: dict[str, Any]) -> Program:
    """Average running statistics with the models' absolute weights (equal ones where a method has none)."""
    t = parameters.get("t")
    weights = (1.0 - t, t) if t is not None else parameters.get("weight", (1.0,) * len(spec.experts))
    total = sum(abs(w) for w in weights)
    share = tuple(abs(w) / total for w in weights) if total else (1.0 / len(weights),) * len(weights)
    return Elementwise("weights", weighted(share))


def _program(
    context: "_Context", spec: TensorSpec, parameters: dict[str, Any], running: bool
) -> tuple[Program | None, dict[str, Any]]:
    """Return what to do with a tensor, and its parameters as people should see them."""
    if running:
        return _running_average(spec, parameters), parameters
    coefficients = context.coefficients
    if coefficients is None:
        learned = context.method.learn is not None  # then the other parameters are of the learning, not of the tensor
        shown = {"alphabar": parameters["alphabar"]} if learned else parameters
        try:
            return context.method.plan(spec, **parameters), shown
        except InputError as error:
            raise InputError(f"{context.where}: {error}") from None
    pieces = coefficients.pieces.get(spec.name)
    if pieces is None:
        return None, {}
    trimmed = coefficients.trimmed
    ranks, step = None, None
    if trimmed is not None:
        count = len(spec.experts)
        ranks = Ranks((0,) * count, (trimmed.density,) * count, scope="model")
        step = Step(elect) if trimmed.elect else None
    merge = piecewise(coefficients, pieces)
    return Elementwise("task_vectors", merge, keep=ranks, step=step), {"alpha": _shown(coefficients, pieces)}


def piecewise(coefficients: Coefficients, pieces: tuple[Piece, ...]) -> Arithmetic | PiecewiseSum:
    """Return the weighted sum that a tensor's coefficients ask for."""
    weights = [tuple(map(float, coefficients.alpha[:, piece.index])) for piece in pieces]
    if len(set(weights)) == 1:
        return weighted(weights[0])
    return PiecewiseSum(tuple(piece.start for piece in pieces), tuple(weights))


def _shown(coefficients: Coefficients, pieces: tuple[Piece, ...]) -> Any:
    if len(pieces) == 1:
        return tuple(map(float, coefficients.alpha[:, pieces[0].index]))
    return [[float(a) for a in coefficients.alpha[:, piece.index]] for piece in pieces]


def _tensor_plan(context: "_Context", index: int, name: str) -> TensorPlan:
    alignment, donor = context.alignment, context.alignment.donor
    target = alignment.ties.get(name, name)
    info = alignment.tensors[name]
    base = alignment.source(donor, target)
    packed = name in alignment.packed.parts
    merged = info.dtype.mergeable and name not in context.private and not packed and bool(context.experts)
    rows: tuple[Source, ...] = ()
    program: Program | None = None
    parameters: dict[str, Any] = {}
    if merged:
        stack = ([donor] if context.counts_base else []) + context.experts
        rows = tuple(alignment.source(model, target) for model in stack)
        names = tuple(m.name for m in stack)
        spec = TensorSpec(target, info.shape, info.numel, names, context.statistics, context.base is not None)
        parameters = context.settings.at(target, context.depths.get(target, 0.0), context.own.get(target, ()))
        running = name.endswith(_RUNNING)
        program, parameters = _program(context, spec, parameters, running)
        alone = stack == [donor] and low_rank_weights(program) == (1.0,)
        if (
            program is None
            or (alone and program.space == "weights")
            or (program.space == "task_vectors" and all(row.untouched for row in rows))
        ):
            program, rows = None, ()  # its value is the donor's
    converted = context.out_dtype is not None and info.dtype.mergeable and not packed
    out_dtype = context.out_dtype if converted and context.out_dtype is not None else info.dtype
    dtypes = [s.dense.dtype for s in (base, *rows) if s.dense is not None]
    exact = isinstance(program, Elementwise)  # whole matrices have rounding of their own, of float32's size
    wide = out_dtype.bits > (16 if exact else 32) or any(dtype.bits > 32 for dtype in dtypes)
    return TensorPlan(
        index, name, info.shape, info.numel, out_dtype, -1, -1, wide, base, rows,
        tuple(m.name for m in (([donor] if context.counts_base else []) + context.experts)) if rows else (),
        program, parameters, target,
    )  # fmt: skip


@dataclass
class _Context:
    method: Method
    alignment: Alignment
    experts: list[Model]
    settings: Settings
    depths: Mapping[str, float]
    private: set[str]
    out_dtype: DType | None
    coefficients: Coefficients | None
    where: str
    statistics: tuple[Statistics, ...] = ()
    base: Model | None = None
    own: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])

    @property
    def counts_base(self) -> bool:
        """Whether the base is the stack's first row."""
        return self.method.counts_base and self.base is not None


def make_plan(
    recipe: Recipe,
    *,
    where: str = "recipe",
    root: Path | None = None,
    shard_size: int = SHARD_SIZE,
    stochastic: bool = False,
    allow_nonfinite: bool = False,
    models: tuple[Model | None, list[tuple[Model, int]]] | None = None,
    single: str = "model.safetensors",
    coefficients: Coefficients | None = None,
    statistics: Sequence[Path] = (),
    made: Mapping[str, Path] | None = None,
) -> Plan:
    """Plan a merge: from headers, and from values where a model may hold two of what another ties.

    Args:
        recipe: what to merge.
        where: how errors name the recipe.
        root: folder that relative paths start from.
        shard_size: greatest number of data bytes of an output file.
        stochastic: round stochastically instead of to nearest.
        allow_nonfinite: let NaN, Inf and overflow through.
        models: already opened models (state dicts); by default the recipe's references are opened.
        single: name of the weight file when there is only one.
        coefficients: what a learned method found; the recipe's own file, if it names one, by default. Without either a
            learned method is planned at its anchor.
        statistics: every expert's folder, where the method collects them itself.
        made: the folders (or files) of models that other merges made, by the names that the recipe has for them.

    Raises:
        InputError: anything in the recipe or the models does not fit; nothing has been written.
    """
    try:
        method = load(recipe.merge_method)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    recipe, mergekit_notes = without_unused(recipe, method, RECIPE_KEYS, where)
    if models is None:
        recipe, notes = with_averaged_base(recipe, method, where)
        mergekit_notes += notes
    if recipe.sliced:
        return _sliced_plan(
            recipe, method, where, root, made or {}, notes=mergekit_notes, shard_size=shard_size, stochastic=stochastic,
            allow_nonfinite=allow_nonfinite, single=single,
        )  # fmt: skip
    if models is None and method.base == "required" and recipe.base_model is None:
        check_count(method, None, len(recipe.models), where)
    base, numbered = models or open_models(recipe, method, where, Opener(root, made or {}))
    if not numbered:
        raise InputError(f"{where}: the only model it names is the base itself, {recipe.base_model}; name its experts")
    check_count(method, base, len(numbered), where)
    base, numbered = comparable(base, numbered)
    experts = [model for model, _ in numbered]
    named = base or experts[0]
    filters = spelled_out(recipe.private, {} if named.checkpoint is None else named.checkpoint.tensors)
    is_private = any_filter(filters, f"{where}: private")
    alignment = align(base, experts, filters, token_choice(recipe, base, experts, where))
    donor = alignment.donor
    check_choices(recipe, [donor, *(model for model in experts if model is not donor)], where, by_token=True)
    check_own_rows(alignment, method, where)
    names = list(alignment.tensors)
    settings = Settings(recipe, method, {model.name: number for model, number in numbered}, where)
    learning = settings.once() if method.learn is not None or method.collect is not None else {}
    private = {name for name in names if is_private(name) or name in alignment.heads.tensors}
    unused = [
        pattern
        for pattern in filters
        if not any(map(name_filter(pattern, f"{where}: private"), [*names, *chain(*alignment.private.values())]))
    ]
    if unused:
        raise InputError(f"{where}: private: {unused[0]!r} matches no tensor of any model")
    out_dtype = DTYPES[recipe.output_dtype] if recipe.output_dtype else None
    if recipe.coefficients is not None:
        if method.name != "coefficients" and method.learn is None:
            raise InputError(
                f"{where}: coefficients: method {method.name!r} has no use for a coefficients file; drop the key, or "
                "choose method 'coefficients'"
            )
        coefficients = load_coefficients(resolve_file(recipe.coefficients, root))
    if coefficients is not None:
        parts = alignment.packed.parts
        sizes = {n: info.numel for n, info in alignment.tensors.items() if info.dtype.mergeable and n not in parts}
        named = recipe.coefficients or "coefficients"
        coefficients = fit(coefficients, [m.name for m in experts], sizes, named, frozen=private)
    elif method.name == "coefficients":
        raise InputError(f"{where}: method 'coefficients' needs a coefficients file; name one as coefficients: PATH")
    opened = _statistics(recipe, method, numbered, where, root, statistics)
    context = _Context(
        method, alignment, experts, settings, depths(names), private, out_dtype, coefficients, where, opened, base
    )
    planned = [_tensor_plan(context, index, name) for index, name in enumerate(names)]
    settings.check_used(name for name in names if name not in private)
    merged = [t.name for t in planned if t.parameters or t.program is not None]
    notes = [*recipe.notes, *mergekit_notes, *(one.note for one in recipe.overrides)]
    notes += [*(settings.without_effect(names) if merged else []), *_unread(recipe, method, where)]
    notes += _without_statistics(method, planned, opened, where)
    taken = {t.name for t in planned if t.program is not None}
    notes += merged_note(name for name in routers(alignment.tensors) if name in taken)
    placed, layout, small = _placed(planned, alignment, shard_size, single)
    notes += small
    _check_model_trim(placed, where)
    return Plan(
        settings.spelled_out(recipe), method, base, tuple(experts), alignment, placed, layout, stochastic,
        allow_nonfinite, coefficients, learning, where, root, tuple(number for _, number in numbered), shard_size,
        single, settings.used_defaults, tuple(notes), opened,
    )  # fmt: skip


def _sliced_plan(
    recipe: Recipe,
    method: Method,
    where: str,
    root: Path | None,
    made: Mapping[str, Path],
    *,
    notes: list[str],
    shard_size: int,
    stochastic: bool,
    allow_nonfinite: bool,
    single: str,
) -> Plan:
    """Plan a merge of slices or modules: each section as a merge of its own, all in one output."""
    sliced = open_sliced(recipe, method, where, Opener(root, made))
    alignment, base, experts = sliced.alignment, sliced.base, sliced.experts
    check_choices(recipe, [alignment.donor, *(model for model in experts if model is not alignment.donor)], where)
    out_dtype = DTYPES[recipe.output_dtype] if recipe.output_dtype else None
    known, planned = Known(), dict[str, TensorPlan]()
    parts: list[tuple[Settings, list[str], dict[str, list[str]]]] = []
    order = {name: index for index, name in enumerate(alignment.tensors)}
    for section in sliced.sections:
        context, settings = _section_context(recipe, method, section, known, out_dtype, where)
        names = list(section.alignment.tensors)
        planned |= {name: _tensor_plan(context, order[name], name) for name in names}
        parts += [] if section.copied else [(settings, names, section.own_names())]
    check_used(parts)
    tensors = [planned[name] for name in alignment.tensors]
    told = [one.note for one in recipe.overrides]
    notes = [*recipe.notes, *notes, *told, *without_effect(parts), *_unread(recipe, method, where)]
    placed, layout, small = _placed(tensors, alignment, shard_size, single)
    _check_model_trim(placed, where)
    return Plan(
        parts[0][0].spelled_out(recipe), method, base, experts, alignment, placed, layout, stochastic, allow_nonfinite,
        where=where, root=root, shard_size=shard_size, single=single, defaults=known.used_defaults,
        notes=(*notes, *small), sliced=sliced,
    )  # fmt: skip


def _section_context(
    recipe: Recipe, method: Method, section: Section, known: Known, out_dtype: DType | None, where: str
) -> "tuple[_Context, Settings]":
    settings = Settings(recipe, method, section.given, where, nearer=section.nearer, known=known)
    context = _Context(
        method, section.alignment, list(section.experts), settings, section.depths,
        set(section.alignment.heads.tensors), out_dtype, None, where, base=section.base, own=section.own,
    )  # fmt: skip
    return context, settings


def _placed(
    planned: Sequence[TensorPlan], alignment: Alignment, shard_size: int, single: str
) -> tuple[tuple[TensorPlan, ...], Layout, list[str]]:
    """Lay the output out; return its tensors with their places, its files, and what to say of them."""
    donor = alignment.donor
    metadata = {"format": "pt"} | {
        k: v
        for k, v in (donor.checkpoint.metadata if donor.checkpoint else {}).items()
        if k == "format" or alignment.packed.weights  # some quantisers say there how they packed
    }
    largest = shard_size if donor.folder is not None else sys.maxsize  # a flat file has no index
    sizes = [(t.name, t.out_dtype, t.shape, t.nbytes) for t in planned]
    modules = donor.checkpoint.modules if donor.checkpoint else ()
    layout = plan_layout(sizes, largest, metadata, single, modules)
    placed = tuple(replace(t, file=layout.places[t.name][0], offset=layout.places[t.name][1]) for t in planned)
    return placed, layout, _too_small(shard_size, planned, alignment)


def _statistics(
    recipe: Recipe, method: Method, experts: list[tuple[Model, int]], where: str, root: Path | None,
    collected: Sequence[Path],
) -> tuple[Statistics, ...]:  # fmt: skip
    """Open every expert's statistics, if the method reads any; those that it collects itself, once they are there.

    Raises:
        InputError: an expert has none, or those of another model.
    """
    if method.statistics is None:
        return ()
    if method.collect is not None:
        return tuple(map(open_statistics, collected))
    found: list[Statistics] = []
    for model, number in experts:
        data = recipe.models[number].data
        if data is None or data.statistics is None:
            raise InputError(
                f"{where}: {model.name}: method {method.name!r} reads statistics; make them with consilience stats "
                f"--kind {method.statistics}, and give the expert data: {{statistics: FOLDER}} "
                f"({option('statistics', f'{model.name}=FOLDER')})"
            )
        found.append(open_statistics(resolve_file(data.statistics, root)))
        check_of(found[-1], model, method.statistics)
    return tuple(found)


def _without_statistics(
    method: Method, planned: list[TensorPlan], statistics: tuple[Statistics, ...], where: str
) -> list[str]:
    """Say which merged matrices have no statistics and are treated as other tensors.

    Raises:
        InputError: that is all of them.
    """
    if method.statistics is None or not statistics:
        return []
    matrices = [t for t in planned if t.rows and len(t.shape) == 2]
    without = [t.name for t in matrices if not isinstance(t.program, Matrix)]
    if matrices and len(without) == len(matrices):
        raise InputError(
            f"{where}: the statistics hold none of the matrices that method {method.name!r} merges ({without[0]!r} for "
            "one); were they made of models whose tensors have other names?"
        )
    if not without:
        return []
    how = next(t.parameters.get("others", "mean") for t in planned if t.name == without[0])
    return [f"{len(without)} of {len(matrices)} matrices have no statistics ({without[0]!r} for one): others={how}"]


def _unread(recipe: Recipe, method: Method, where: str) -> list[str]:
    """Say which files and settings the recipe names for a method that does not read them."""
    notes: list[str] = []
    if recipe.target is not None and not method.reads_target:
        notes.append(f"{where}: target: has no effect, since method {method.name!r} reads none")
    entries = [entry for entry in recipe.models if entry.data is not None and entry.data.calibration is not None]
    if entries and not method.reads_calibration:
        notes.append(f"{where}: data.calibration: has no effect, since method {method.name!r} reads none")
    reads = method.statistics is not None and method.collect is None
    if not reads and any(entry.data and entry.data.statistics for entry in recipe.models):
        notes.append(f"{where}: data.statistics: has no effect, since method {method.name!r} reads none")
    notes += [
        f"{where}: models.{number}.parameters: has no effect, since {entry.model} is the base"
        for number, entry in enumerate(recipe.models)
        if entry.model == recipe.base_model and method.base != "unused" and entry.parameters
    ]
    return notes


def _too_small(shard_size: int, tensors: Sequence[TensorPlan], alignment: Alignment) -> list[str]:
    """Say where a tensor, which is never cut, makes a file larger than was asked for."""
    larger = [t for t in tensors if t.nbytes > shard_size] if alignment.donor.folder is not None else []
    if not larger:
        return []
    largest = max(larger, key=lambda tensor: tensor.nbytes)
    return [
        f"the shard size of {shard_size} bytes is less than {len(larger)} tensors take, up to {largest.name} with "
        f"{largest.nbytes} bytes; they have a file each, as no tensor is cut"
    ]


def with_statistics(plan: Plan, folders: Sequence[Path]) -> Plan:
    """Return the plan of a method that collects statistics, with those of every expert; see ``with_coefficients``."""
    return make_plan(
        plan.recipe,
        where=plan.where,
        root=plan.root,
        shard_size=plan.shard_size,
        stochastic=plan.stochastic,
        allow_nonfinite=plan.allow_nonfinite,
        models=(plan.base, list(zip(plan.experts, plan.numbers, strict=True))),
        single=plan.single,
        statistics=folders,
    )


def with_coefficients(plan: Plan, coefficients: Coefficients, learned: Path | None = None) -> Plan:
    """Return a learned method's plan with the coefficients it found; the models stay open and are not read again.

    Args:
        plan: the plan that was learned from.
        coefficients: what was found.
        learned: the folder that the method left its correction in, if it made one: an adapter that is one more expert.
    """
    recipe, models = plan.recipe, list(zip(plan.experts, plan.numbers, strict=True))
    if CORRECTION in coefficients.experts and learned is not None:
        model = open_model(CORRECTION, str(learned / CORRECTION))
        models.append((replace(model, reference=CORRECTION), len(recipe.models)))
        entry = recipe.models[0].model_copy(
            update={"model": CORRECTION, "name": CORRECTION, "parameters": {}, "data": None}
        )
        recipe = recipe.model_copy(update={"models": [*recipe.models, entry]})
    return make_plan(
        recipe,
        where=plan.where,
        root=plan.root,
        shard_size=plan.shard_size,
        stochastic=plan.stochastic,
        allow_nonfinite=plan.allow_nonfinite,
        models=(plan.base, models),
        single=plan.single,
        coefficients=coefficients,
    )


def replanned(plan: Plan, made: Mapping[str, Path]) -> Plan:
    """Return a plan again, on models that other merges have made since: by the recipe's names for them."""
    again = make_plan(
        plan.recipe,
        where=plan.where,
        root=plan.root,
        shard_size=plan.shard_size,
        stochastic=plan.stochastic,
        allow_nonfinite=plan.allow_nonfinite,
        single=plan.single,
        coefficients=plan.coefficients,
        made=made,
    )
    return replace(again, defaults=plan.defaults, made=dict(made) if plan.stages else {})


def _check_model_trim(tensors: tuple[TensorPlan, ...], where: str) -> None:
    """A trim over the whole model needs one density per expert, and the same scope for every tensor."""
    ranks = [t.ranks for t in tensors if t.program is not None and not t.name.endswith(_RUNNING)]
    if any(one is not None and one.scope == "model" for one in ranks):
        distinct = {(one.scope, one.density) if one else None for one in ranks}
        if len(distinct) > 1:
            raise InputError(
                f"{where}: trim: model ranks all tensors together, so density must be one number per expert"
            )
