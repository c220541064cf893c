"""A base and its experts checked against each other, from headers, before any work."""

import fnmatch
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Any, cast

from consilience.checkpoints.checkpoint import Checkpoint, MemoryStorage, TensorInfo
from consilience.checkpoints.packed import PackedWeight, Packing, packing
from consilience.errors import InputError
from consilience.experts.absent import why_extra, why_missing, why_untargeted
from consilience.experts.model import Model
from consilience.experts.quantised import packed_alike, packed_notes, refuse_packed_target

#: (tensor that may be an alias, names it may be tied to): what transformers ties when the config says so.
_TIES = (
    ("lm_head.weight", ("model.embed_tokens.weight", "embed_tokens.weight", "shared.weight", "transformer.wte.weight",
                        "language_model.model.embed_tokens.weight", "model.language_model.embed_tokens.weight",
                        "backbone.embeddings.weight", "model.decoder.embed_tokens.weight")),
    ("encoder.embed_tokens.weight", ("shared.weight",)),
    ("decoder.embed_tokens.weight", ("shared.weight",)),
)  # fmt: skip


@dataclass(frozen=True)
class Alignment:
    """The tensors a merge produces and how the models' names meet.

    ``tensors`` are the donor's (the base, or the first model where a method needs no base), ``ties`` maps an alias to
    the tensor whose value it must share, ``same_bytes`` lists (model, alias, tensor) whose equality must be read from
    the data before anything is merged, ``private`` maps expert name to its own unmerged tensors. ``packed`` are the
    donor's quantised weights, which are copied; ``same_parts`` lists (expert, weight) that must be the same in it.
    """

    donor: Model
    tensors: dict[str, TensorInfo]
    ties: dict[str, str]
    same_bytes: list[tuple[Model, str, str]]
    private: dict[str, list[str]]
    notes: list[str]
    packed: Packing
    same_parts: list[tuple[Model, PackedWeight]]


def says_tied(config: dict[str, Any] | None) -> bool:
    """Whether a config ties input and output embeddings (nested text configs included)."""
    config = config or {}
    nested = [config, *(v for k, v in config.items() if k in ("text_config", "llm_config") and isinstance(v, dict))]
    return any(cast(dict[str, Any], part).get("tie_word_embeddings") is True for part in nested)


def tie_of(name: str, names: Container[str]) -> str | None:
    """Return the tensor among ``names`` that ``name`` would be tied to."""
    for alias, targets in _TIES:
        if name == alias:
            return next((target for target in targets if target in names), None)
    return None


def private_filter(globs: Iterable[str]) -> Callable[[str], bool]:
    """Return whether a tensor name matches any of the ``private:`` globs."""
    patterns = list(globs)
    return lambda name: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _check_dense(
    model: Model, donor: Model, tensors: dict[str, TensorInfo], private: Callable[[str], bool], packed: Packing
) -> "_Dense":
    checkpoint = model.checkpoint
    assert checkpoint is not None
    found = _Dense([], [], [])
    for name in sorted(tensors.keys() - checkpoint.tensors.keys()):
        tied = tie_of(name, checkpoint.tensors)
        if tied is None or not says_tied(checkpoint.config) or checkpoint.tensors[tied].shape != tensors[name].shape:
            raise InputError(
                f"{model.reference}: tensor {name!r} of {donor.reference} is missing{why_missing(model, name, donor)}"
            )
        found.notes.append(f"{model.name}: {name} is tied to {tied} there and was taken from it")
    for name in sorted(checkpoint.tensors.keys() - tensors.keys() - packed.parts.keys()):
        tied = tie_of(name, tensors)
        if private(name):
            found.private.append(name)
        elif (
            tied is not None
            and tied in checkpoint.tensors
            and says_tied(donor.checkpoint.config if donor.checkpoint else None)
        ):
            found.same_bytes.append((model, name, tied))
        else:
            raise InputError(
                f"{model.reference}: tensor {name!r} is not in {donor.reference}{why_extra(model, name, donor)}"
            )
    for name in sorted(tensors.keys() & checkpoint.tensors.keys()):
        _check_shape(model, donor, name, checkpoint.tensors[name], tensors[name])
    return found


@dataclass
class _Dense:
    private: list[str]
    same_bytes: list[tuple[Model, str, str]]
    notes: list[str]


def _check_shape(model: Model, donor: Model, name: str, ours: TensorInfo, theirs: TensorInfo) -> None:
    if ours.dtype.mergeable != theirs.dtype.mergeable:
        raise InputError(
            f"{model.reference}: tensor {name!r} is {ours.dtype.name} but {theirs.dtype.name} in {donor.reference}; "
            "convert one"
        )
    if ours.shape == theirs.shape:
        return
    vocabulary = (
        len(ours.shape) == 2
        and ours.shape[1:] == theirs.shape[1:]
        and ("embed" in name or "lm_head" in name or "wte" in name)
    )
    hint = (
        "the vocabularies differ: resize both to one tokenizer first"
        if vocabulary
        else "experts must share the base's architecture"
    )
    raise InputError(
        f"{model.reference}: tensor {name!r} has shape {list(ours.shape)} but {list(theirs.shape)} in "
        f"{donor.reference}; {hint}"
    )


def _check_target(model: Model, donor: Model, name: str, ties: dict[str, str], info: TensorInfo) -> None:
    """Refuse an update that does not fit the tensor it is for, or one that a tied tensor could not take."""
    adapter = model.adapter
    assert adapter is not None
    if name in ties:
        raise InputError(
            f"{model.reference}: it adapts {name!r}, which {donor.reference} ties to {ties[name]!r}; untie the base "
            "(tie_word_embeddings: false), or adapt the other one"
        )
    target, pair, whole = info.shape, adapter.pairs.get(name), adapter.whole.get(name)
    flat = (target[0], info.numel // max(target[0], 1)) if target else (1, 1)
    shape = pair.delta_shape if pair is not None and pair.delta_shape != flat else None
    shape = whole.shape if whole is not None and whole.shape != target else shape
    if shape is not None:
        raise InputError(
            f"{model.reference}: its update of {name!r} has shape {list(shape)} but the tensor has {list(target)} in "
            f"{donor.reference}; the adapter belongs to another base"
        )
    # Counters of a saved module stay the base's, as those of any expert do.
    integers = whole is not None and pair is None and not whole.dtype.mergeable
    if info.dtype.mergeable == integers:
        found = info.dtype.name if whole is None else whole.dtype.name
        raise InputError(
            f"{model.reference}: its update of {name!r} is {found}, and {info.dtype.name} in {donor.reference}: not a "
            "weight that can be merged; train the adapter without it"
        )


def _check_adapter(
    model: Model, donor: Model, tensors: dict[str, TensorInfo], ties: dict[str, str], private: Callable[[str], bool]
) -> list[str]:
    """Check an adapter against its base and return the names of its own private tensors."""
    adapter = model.adapter
    assert adapter is not None
    own: list[str] = []
    for name in sorted(adapter.pairs.keys() | adapter.whole.keys()):
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
            _check_target(model, donor, name, ties, tensors[name])
    return own


def _reading_notes(model: Model) -> list[str]:
    """Return what to say of how a model was read: choices that its files left open, and tensors that were renamed."""
    said = [f"{model.name}: {note}" for note in model.adapter.notes] if model.adapter is not None else []
    if not model.names:
        return said
    new, old = next(iter(model.names.items()))
    return [*said, f"{model.name}: {len(model.names)} of its tensors go by the base's names, as {old} by {new}"]


def _donor_ties(donor: Checkpoint) -> dict[str, str]:
    """Return alias -> tensor for what the donor holds twice though its config, or one shared memory, ties the two."""
    shared = donor.storage.shared().items() if isinstance(donor.storage, MemoryStorage) else ()
    # The head follows the embeddings, whichever the file names first.
    pairs = [(t, a) if tie_of(t, donor.tensors) == a else (a, t) for a, t in shared]
    if says_tied(donor.config):
        pairs += [(name, target) for name in donor.tensors if (target := tie_of(name, donor.tensors)) is not None]
    held = donor.tensors
    return {a: t for a, t in pairs if (held[t].shape, held[t].dtype) == (held[a].shape, held[a].dtype)}


def align(base: Model | None, experts: list[Model], private: Iterable[str] = ()) -> Alignment:
    """Check that the models fit together and return what the merge produces.

    Raises:
        InputError: names, shapes, dtypes or ties do not meet; the message names model, tensor and mend.
    """
    donor = base or experts[0]
    if donor.checkpoint is None:
        raise InputError(f"{donor.reference}: is an adapter, and an adapter needs its base; name one as base_model")
    is_private = private_filter(private)
    tensors = donor.checkpoint.tensors
    packed = packing(donor.checkpoint)
    shared = {name: tensor for name, tensor in tensors.items() if not is_private(name) and name not in packed.parts}
    ties = _donor_ties(donor.checkpoint)
    same_bytes: list[tuple[Model, str, str]] = [(donor, alias, target) for alias, target in ties.items()]
    kept: dict[str, list[str]] = {}
    same_parts: list[tuple[Model, PackedWeight]] = []
    notes: list[str] = []
    for model in [donor, *(e for e in experts if e is not donor)]:
        own: list[str] = []
        if model.checkpoint is not None and model is not donor:
            alike = packed_alike(model, donor, packed, is_private)
            same_parts += [(model, weight) for weight in alike.weights.values()]
            found = _check_dense(model, donor, shared, is_private, alike)
            own += found.private
            held = model.checkpoint.tensors
            same_bytes += found.same_bytes
            same_bytes += [(model, a, t) for a, t in ties.items() if a in held and t in held]
            notes += found.notes
        if model.checkpoint is not None and model is not base:
            own += [name for name in model.checkpoint.tensors if is_private(name) and name in tensors]
        if model.adapter is not None:
            if model.checkpoint is None and base is None:
                raise InputError(
                    f"{model.reference}: is an adapter, and an adapter needs its base; name one as base_model"
                )
            refuse_packed_target(model, donor, packed)
            own += _check_adapter(model, donor, shared, ties, is_private)
        notes += _reading_notes(model)
        if own and model is not base:
            kept[model.name] = sorted(set(own))
    notes += packed_notes(donor, packed)
    return Alignment(donor, tensors, ties, same_bytes, kept, notes, packed, same_parts)
