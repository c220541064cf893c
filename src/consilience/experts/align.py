"""A base and its experts checked against each other, before any work: from headers, and from values where they tie."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from consilience.checkpoints.checkpoint import Storage, TensorInfo, same_bytes
from consilience.checkpoints.modules import module_of
from consilience.checkpoints.open import EMPTY
from consilience.checkpoints.packed import PackedWeight, Packing, packing
from consilience.errors import InputError
from consilience.experts.absent import why_extra, why_missing, why_unfit, why_untargeted
from consilience.experts.embeddings import Resized, resized
from consilience.experts.embeddings import notes as resizing_notes
from consilience.experts.heads import Heads, heads_of
from consilience.experts.loose_factors import needs_base, refuse_factors
from consilience.experts.model import Model, Source
from consilience.experts.quantised import packed_alike, packed_notes, refuse_packed_target
from consilience.experts.ties import keeps_flag, same_update, says_tied
from consilience.experts.token_map import Aligned, TokenChoice, aligned
from consilience.name_filter import any_filter

_Filter = Callable[[str], bool]


@dataclass(frozen=True)
class Alignment:
    """The tensors a merge produces and how the models' names meet.

    ``tensors`` are the donor's (the base, or the first model where a method needs no base) and those that untying adds,
    ``ties`` maps an alias to the tensor whose value it shares in the output, ``untied`` an alias to the tensor that it
    shared its value with in the donor, and no longer does because some model changes one without the other;
    ``untied_config`` says that the output's config must stop tying. ``private`` maps expert name to its own unmerged
    tensors. ``packed`` are the donor's quantised weights, which are copied; ``same_parts`` lists (expert, weight) that
    must be the same in it. ``tokens`` has the vocabulary that the recipe chooses, if it does, and the models' rows in
    its order. ``owners`` names, for tensors that are not the donor's, the model whose they are.
    """

    donor: Model
    tensors: dict[str, TensorInfo]
    ties: dict[str, str]
    untied: dict[str, str]
    untied_config: bool
    private: dict[str, list[str]]
    notes: list[str]
    packed: Packing
    same_parts: list[tuple[Model, PackedWeight]]
    vocabulary: Resized = field(default_factory=lambda: Resized({}, {}))
    heads: Heads = field(default_factory=Heads)
    tokens: Aligned | None = None
    owners: dict[str, str] = field(default_factory=dict[str, str])

    def source(self, model: Model, name: str) -> Source:
        """Return where a tensor of the output comes from in one of the models."""
        if model is self.donor and name in self.heads.tensors and self.heads.expert is not None:
            return self.heads.expert.source(name)
        view = self.tokens.source(model, name) if self.tokens is not None else None
        if view is not None:
            return view
        if model is self.donor and name in self.vocabulary.sources:
            return self.vocabulary.sources[name]
        return model.source(name, self.untied.get(name))

    def owner(self, name: str) -> str:
        """Return the name of the model whose value a tensor has where nothing is merged."""
        expert = self.heads.expert
        if expert is not None and name in self.heads.tensors:
            return expert.name
        return self.owners.get(name, self.donor.name)


def _check_dense(
    model: Model,
    donor: Model,
    tensors: dict[str, TensorInfo],
    known: dict[str, TensorInfo],
    private: _Filter,
    packed: Packing,
) -> tuple[list[str], list[str]]:
    """Check a full model against the donor's ``tensors`` and return its own private ones, and notes.

    ``known`` has the donor's tensors by every name that ties give them.
    """
    checkpoint = model.checkpoint
    assert checkpoint is not None
    refuse_factors(model, checkpoint, private)
    own: list[str] = []
    modules = donor.checkpoint.modules if donor.checkpoint is not None else ()
    absent = [module for module in modules if module not in checkpoint.modules]
    notes = [f"{model.name}: has no weights in {module}, and takes {donor.name}'s" for module in absent]
    for name in sorted(tensors.keys() - checkpoint.tensors.keys()):
        tied = model.ties.get(name)
        if module_of(name, absent) is not None:
            continue
        if tied is None:
            raise InputError(
                f"{model.reference}: tensor {name!r} of {donor.reference} is missing{why_missing(model, name, donor)}"
            )
        _check_shape(model, donor, name, checkpoint.tensors[tied], tensors[name])
        notes.append(f"{model.name}: {name} is tied to {tied} there and was taken from it")
    for name in sorted(checkpoint.tensors.keys() - tensors.keys() - packed.parts.keys()):
        if private(name):
            own.append(name)
        elif name not in known:
            raise InputError(
                f"{model.reference}: tensor {name!r} is not in {donor.reference}{why_extra(model, name, donor)}"
            )
    for name in sorted(known.keys() & checkpoint.tensors.keys()):
        _check_shape(model, donor, name, checkpoint.tensors[name], known[name])
    return own, notes


def _check_shape(model: Model, donor: Model, name: str, ours: TensorInfo, theirs: TensorInfo) -> None:
    if ours.dtype.mergeable != theirs.dtype.mergeable:
        raise InputError(
            f"{model.reference}: tensor {name!r} is {ours.dtype.name} but {theirs.dtype.name} in {donor.reference}; "
            "convert one"
        )
    if ours.shape == theirs.shape:
        return
    for info, who in ((ours, model), (theirs, donor)):
        if info.numel == 0:
            raise InputError(f"{who.reference}: tensor {name!r} has shape {list(info.shape)}: {EMPTY}")
    vocabulary = (
        len(ours.shape) == 2
        and ours.shape[1:] == theirs.shape[1:]
        and ("embed" in name or "lm_head" in name or "wte" in name)
    )
    hint = (
        "the vocabularies differ: align them by token (tokenizer: union), or resize both to one tokenizer"
        if vocabulary
        else "experts must share the base's architecture"
    )
    raise InputError(
        f"{model.reference}: tensor {name!r} has shape {list(ours.shape)} but {list(theirs.shape)} in "
        f"{donor.reference}; {hint}"
    )


def _check_target(model: Model, donor: Model, name: str, info: TensorInfo) -> None:
    """Refuse an update that does not fit the tensor it is for."""
    adapter = model.adapter
    assert adapter is not None
    target, pair, whole = info.shape, adapter.pairs.get(name), adapter.whole.get(name)
    flat = (target[0], info.numel // max(target[0], 1)) if target else (1, 1)
    shape = pair.delta_shape if pair is not None and pair.delta_shape != flat else None
    shape = whole.shape if whole is not None and whole.shape != target else shape
    if shape is not None:
        raise InputError(
            f"{model.reference}: its update of {name!r} has shape {list(shape)} but the tensor has {list(target)} in "
            f"{donor.reference}; {why_unfit(model, name, shape, donor)}"
        )
    # Counters of a saved module stay the base's, as those of any expert do.
    integers = whole is not None and pair is None and not whole.dtype.mergeable
    if info.dtype.mergeable == integers:
        found = info.dtype.name if whole is None else whole.dtype.name
        raise InputError(
            f"{model.reference}: its update of {name!r} is {found}, and {info.dtype.name} in {donor.reference}: not a "
            "weight that can be merged; train the adapter without it"
        )


def _check_adapter(model: Model, donor: Model, tensors: dict[str, TensorInfo], private: _Filter) -> list[str]:
    """Check an adapter against its base's tensors, by every name of theirs; return its own private tensors' names."""
    adapter = model.adapter
    assert adapter is not None
    own: list[str] = []
    for name in sorted(adapter.pairs.keys() | adapter.whole.keys() | adapter.tokens.keys()):
        if private(name) and name in adapter.pairs:
            raise InputError(
                f"{model.reference}: it adapts {name!r}, which is private, by factors that a head file cannot hold; "
                "merge the adapter into its base with PEFT and pass the model"
            )
        if private(name):
            own.append(name)
        elif name not in tensors:
            raise InputError(
                f"{model.reference}: it adapts {name!r}, which {donor.reference} does not have"
                f"{why_untargeted(model, name, donor)}"
            )
        else:
            _check_target(model, donor, name, tensors[name])
    return own


def _reading_notes(model: Model) -> list[str]:
    """Return what to say of how a model was read: choices that its files left open, and tensors that were renamed."""
    parts = (model.checkpoint, model.adapter)
    said = [f"{model.name}: {note}" for part in parts if part is not None for note in part.notes]
    if not model.names:
        return said
    new, old = next(iter(model.names.items()))
    return [*said, f"{model.name}: {len(model.names)} of its tensors go by the base's names, as {old} by {new}"]


def _separates(model: Model, donor: Model, alias: str, target: str) -> bool:
    """Whether a model has, or makes, two values of what ties make one tensor in the donor."""
    one, other = model.source(alias, target), model.source(target)
    if (one.pair is None) != (other.pair is None):
        return True
    if one.pair is not None and other.pair is not None and one.pair is not other.pair:
        assert one.pair_storage is not None
        assert other.pair_storage is not None
        if not same_update((one.pair_storage, one.pair), (other.pair_storage, other.pair)):
            return True
    if one.dense is None and other.dense is None:
        return False
    values: list[tuple[Storage, TensorInfo]] = []
    for source in (one, other):
        held = donor.source(target) if source.dense is None else source
        assert held.storage is not None
        assert held.dense is not None
        values.append((held.storage, held.dense))
    return not same_bytes(*values)


@dataclass(frozen=True)
class _Ties:
    """What of the donor's ties the output keeps (among what it holds), and which the models' values undo."""

    kept: dict[str, str]
    untied: dict[str, str]
    notes: list[str]


def _resolved_ties(donor: Model, models: list[Model], private: _Filter) -> _Ties:
    """Compare the models' values on both sides of every tie of the donor."""
    assert donor.checkpoint is not None
    held, said = donor.checkpoint.tensors, says_tied(donor.checkpoint.config)
    found = _Ties({}, {}, [])
    for alias, target in donor.ties.items():
        own = _separates(donor, donor, alias, target)
        if own and (not said or keeps_flag(donor.checkpoint.config)):
            continue  # tied in name only, as the heads of T5 v1.1 are: two tensors like any others
        compared = [] if private(alias) or private(target) else models
        names = [model.name for model in compared if _separates(model, donor, alias, target)]
        if own or names:
            found.untied[alias] = target
            size = "" if alias in held else f"; the output has one more tensor of {held[target].nbytes:,} bytes"
            found.notes.append(
                f"{alias} is untied from {target}, which it is one tensor with in {donor.name}: the two differ in "
                f"{', '.join(names or [donor.name])}{size}"
            )
        elif alias in held:
            found.kept[alias] = target
    return found


def align(
    base: Model | None, experts: list[Model], private: Iterable[str] = (), tokens: TokenChoice | None = None
) -> Alignment:
    """Check that the models fit together and return what the merge produces.

    Names, shapes and dtypes are compared from headers; values are read where a model may have two of a tied tensor.
    Vocabularies are one, row by row, unless ``tokens`` says what each model's rows are.

    Raises:
        InputError: names, shapes or dtypes do not meet; the message names model, tensor and mend.
    """
    donor = base or experts[0]
    if donor.checkpoint is None:
        raise InputError(needs_base(donor, experts))
    if base is None:
        refuse_factors(donor, donor.checkpoint, any_filter(private, "private"))
    is_private = any_filter(private, "private")
    models = [donor, *(e for e in experts if e is not donor)]
    by_token = aligned(tokens, base, models, is_private) if tokens is not None else None
    realigned = by_token is not None and by_token.changes
    vocabulary = by_token.resized if by_token and realigned else resized(donor, experts if base is not None else [])
    named = donor.named | vocabulary.tensors
    tensors = {name: named[name] for name in donor.checkpoint.tensors}
    packed = packing(donor.checkpoint)
    known = {name: info for name, info in named.items() if not is_private(name) and name not in packed.parts}
    shared = {name: tensor for name, tensor in known.items() if name in tensors}
    kept: dict[str, list[str]] = {}
    same_parts: list[tuple[Model, PackedWeight]] = []
    heads = heads_of(donor, experts, is_private)
    notes = [
        *(by_token.notes() if by_token else []),
        *([] if realigned else resizing_notes(vocabulary)),
        *heads.notes(),
    ]
    for model in models:
        own: list[str] = []
        fitted = by_token.fitted[model.name] if by_token and realigned else {}
        here = {name: fitted.get(name, info) for name, info in known.items()}
        if model.checkpoint is not None and model is not donor:
            alike = packed_alike(model, donor, packed, is_private)
            same_parts += [(model, weight) for weight in alike.weights.values()]
            meant = {name: here[name] for name in shared}
            found, said = _check_dense(model, donor, meant, here, is_private, alike)
            own += found
            notes += said
        if model.checkpoint is not None and model is not base:
            own += [name for name in model.checkpoint.tensors if is_private(name) and name in tensors]
        if model.adapter is not None:
            if model.checkpoint is None and base is None:
                raise InputError(needs_base(model, experts))
            refuse_packed_target(model, donor, packed)
            own += _check_adapter(model, donor, here | heads.tensors, is_private)
        notes += _reading_notes(model)
        if own and model is not base:
            kept[model.name] = sorted(set(own))
    ties = _resolved_ties(donor, models, is_private)
    config = donor.checkpoint.config
    untied_config = bool(ties.untied) and says_tied(config) and not keeps_flag(config)
    # A config that stops tying stops all of its ties: what is still tied must be in the file under every name.
    names = donor.ties.keys() - ties.untied.keys() if untied_config else ()
    written = {alias: donor.ties[alias] for alias in donor.ties if alias in names}
    added = {name: named[name] for name in [*ties.untied, *written] if name not in tensors}
    return Alignment(
        donor=donor,
        tensors=tensors | added | heads.tensors,
        ties=written | ties.kept,
        untied=ties.untied,
        untied_config=untied_config,
        private=kept,
        notes=[*notes, *packed_notes(donor, packed), *ties.notes],
        packed=packed,
        same_parts=same_parts,
        vocabulary=vocabulary,
        heads=heads,
        tokens=by_token,
    )
