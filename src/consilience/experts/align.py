"""A base and its experts checked against each other, from headers, before any work."""

import fnmatch
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Any, cast

from consilience.checkpoints.checkpoint import Checkpoint, TensorInfo
from consilience.errors import InputError, nearest
from consilience.experts.model import Model

#: (tensor that may be an alias, names it may be tied to): what transformers ties when the config says so.
_TIES = (
    ("lm_head.weight", ("model.embed_tokens.weight", "embed_tokens.weight", "shared.weight", "transformer.wte.weight",
                        "language_model.model.embed_tokens.weight", "model.language_model.embed_tokens.weight",
                        "backbone.embeddings.weight", "model.decoder.embed_tokens.weight")),
    ("encoder.embed_tokens.weight", ("shared.weight",)),
    ("decoder.embed_tokens.weight", ("shared.weight",)),
)  # fmt: skip
_QUANTISED = (".qweight", ".qzeros", ".weight_scale", ".weight_scale_inv", ".SCB", ".absmax", ".quant_state")


@dataclass(frozen=True)
class Alignment:
    """The tensors a merge produces and how the models' names meet.

    ``tensors`` are the donor's (the base, or the first model where a method needs no base), ``ties`` maps an alias to
    the tensor whose value it must share, ``same_bytes`` lists (model, alias, tensor) whose equality must be read from
    the data before anything is merged, ``private`` maps expert name to its own unmerged tensors.
    """

    donor: Model
    tensors: dict[str, TensorInfo]
    ties: dict[str, str]
    same_bytes: list[tuple[Model, str, str]]
    private: dict[str, list[str]]
    notes: list[str]


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


def _refuse_quantised(model: Model, checkpoint: Checkpoint) -> None:
    for name, tensor in checkpoint.tensors.items():
        if (tensor.dtype.floating and not tensor.dtype.mergeable) or name.endswith(_QUANTISED):
            raise InputError(
                f"{model.reference}: tensor {name!r} ({tensor.dtype.name}) is quantised; pass the unquantised model"
            )


def _check_dense(
    model: Model, donor: Model, tensors: dict[str, TensorInfo], private: Callable[[str], bool]
) -> "_Dense":
    checkpoint = model.checkpoint
    assert checkpoint is not None
    _refuse_quantised(model, checkpoint)
    found = _Dense([], [], [])
    for name in tensors.keys() - checkpoint.tensors.keys():
        tied = tie_of(name, checkpoint.tensors)
        if tied is None or not says_tied(checkpoint.config) or checkpoint.tensors[tied].shape != tensors[name].shape:
            raise InputError(
                f"{model.reference}: tensor {name!r} of {donor.reference} is missing{nearest(name, list(checkpoint.tensors))}; "
                "pass the complete model, or name it under 'private:'"
            )
        found.notes.append(f"{model.name}: {name} is tied to {tied} there and was taken from it")
    for name in sorted(checkpoint.tensors.keys() - tensors.keys()):
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
                f"{model.reference}: tensor {name!r} is not in {donor.reference}{nearest(name, list(tensors))}; "
                "nothing is dropped silently: name it under 'private:' to keep it with its expert"
            )
    for name in tensors.keys() & checkpoint.tensors.keys():
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
            f"{model.reference}: tensor {name!r} is {ours.dtype.name} but {theirs.dtype.name} in {donor.reference}; convert one"
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
        f"{model.reference}: tensor {name!r} has shape {list(ours.shape)} but {list(theirs.shape)} in {donor.reference}; {hint}"
    )


def _check_adapter(
    model: Model, donor: Model, tensors: dict[str, TensorInfo], private: Callable[[str], bool]
) -> list[str]:
    adapter = model.adapter
    assert adapter is not None
    own: list[str] = []
    shapes = {name: pair.delta_shape for name, pair in adapter.pairs.items()} | {
        n: t.shape for n, t in adapter.whole.items()
    }
    for name, shape in shapes.items():
        if name not in tensors:
            if private(name):
                own.append(name)
                continue
            raise InputError(
                f"{model.reference}: it adapts {name!r}, which is not in {donor.reference}{nearest(name, list(tensors))}; "
                "the adapter belongs to another base, or its layer is tied there"
            )
        target = tensors[name].shape
        flat = (target[0] if target else 1, tensors[name].numel // max(target[0], 1) if target else 1)
        if (name in adapter.pairs and shape != flat) or (name in adapter.whole and shape != target):
            raise InputError(
                f"{model.reference}: its update of {name!r} has shape {list(shape)} but the tensor has {list(target)} in "
                f"{donor.reference}; the adapter belongs to another base"
            )
        if not tensors[name].dtype.mergeable:
            raise InputError(
                f"{model.reference}: {name!r} is {tensors[name].dtype.name} in {donor.reference}: not a weight"
            )
    return own


def align(base: Model | None, experts: list[Model], private: Iterable[str] = ()) -> Alignment:
    """Check that the models fit together and return what the merge produces.

    Raises:
        InputError: names, shapes, dtypes or ties do not meet; the message names model, tensor and mend.
    """
    donor = base or experts[0]
    if donor.checkpoint is None:
        raise InputError(f"{donor.reference}: is an adapter, and an adapter needs its base; name one as base_model")
    _refuse_quantised(donor, donor.checkpoint)
    is_private = private_filter(private)
    tensors = donor.checkpoint.tensors
    shared = {name: tensor for name, tensor in tensors.items() if not is_private(name)}
    same_bytes: list[tuple[Model, str, str]] = []
    kept: dict[str, list[str]] = {}
    notes: list[str] = []
    ties: dict[str, str] = {}
    if says_tied(donor.checkpoint.config):
        for name in tensors:
            target = tie_of(name, tensors)
            if target is not None and tensors[target].shape == tensors[name].shape:
                ties[name] = target
                same_bytes.append((donor, name, target))
    for model in experts:
        if model is donor:
            continue
        own: list[str] = []
        if model.checkpoint is not None:
            found = _check_dense(model, donor, shared, is_private)
            own += [n for n in found.private] + [n for n in model.checkpoint.tensors if is_private(n) and n in tensors]
            same_bytes += found.same_bytes
            same_bytes += [
                (model, a, t)
                for a, t in ties.items()
                if a in model.checkpoint.tensors and t in model.checkpoint.tensors
            ]
            notes += found.notes
        if model.adapter is not None:
            if model.checkpoint is None and base is None:
                raise InputError(
                    f"{model.reference}: is an adapter, and an adapter needs its base; name one as base_model"
                )
            own += _check_adapter(model, donor, shared, is_private)
        if own:
            kept[model.name] = sorted(set(own))
    return Alignment(donor, tensors, ties, same_bytes, kept, notes)
