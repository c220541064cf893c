"""Why a tensor of one model has no counterpart in another: the cause that an error names."""

from collections.abc import Iterable, Sequence
from typing import Any

from consilience.errors import nearest_tensor
from consilience.experts.conversions import rules_for
from consilience.experts.embeddings import is_vocabulary
from consilience.experts.model import Model
from consilience.experts.names import adapter_fits, alike, same_shape


def why_missing(model: Model, name: str, donor: Model) -> str:
    """Return why a model lacks tensor ``name`` of the base, and what to do."""
    base = donor.checkpoint
    assert model.checkpoint is not None
    assert base is not None
    extra = sorted(model.checkpoint.tensors.keys() - base.tensors.keys())
    return (
        _architectures(model.checkpoint.config, base.config)
        or _form(name, model.checkpoint.config, base.config, extra)
        or f"{nearest_tensor(name, extra)}; pass the complete model, or name it under 'private:'"
    )


def why_extra(model: Model, name: str, donor: Model) -> str:
    """Return why tensor ``name`` of a model is not among the base's, and what to do."""
    base = donor.checkpoint
    assert model.checkpoint is not None
    assert base is not None
    tensors = model.checkpoint.tensors
    free = {other: info for other, info in base.tensors.items() if other not in tensors}
    return (
        _architectures(model.checkpoint.config, base.config)
        or _form(name, model.checkpoint.config, base.config, free)
        or _several(alike(name, same_shape(tensors[name]), free))
        or f"{nearest_tensor(name, free)}; nothing is dropped silently: name it under 'private:' to keep it with "
        "its expert"
    )


def why_untargeted(model: Model, name: str, donor: Model) -> str:
    """Return why the base does not have what an adapter adapts, and what to do."""
    base = donor.checkpoint
    assert model.adapter is not None
    assert base is not None
    fits = adapter_fits(model.adapter)
    found = sum(other in base.tensors for other in fits)
    there = (
        f"{found} of the adapter's {len(fits)} tensors are there" if found else "the adapter belongs to another base"
    )
    return (
        _form(name, None, base.config, base.tensors, adapter=True)
        or _several(alike(name, fits[name], {n: i for n, i in base.tensors.items() if n not in fits}))
        or f"{nearest_tensor(name, base.tensors)} ({there}); give the base it was trained on"
    )


def why_unfit(model: Model, name: str, shape: Sequence[int], donor: Model) -> str:
    """Return why an adapter's update has another shape than what it is for, and what to do."""
    base = donor.checkpoint
    assert model.adapter is not None
    assert base is not None
    if is_vocabulary(name, donor.named[name], base.config) and tuple(shape[1:]) == donor.named[name].shape[1:]:
        return (
            f"it was trained on a vocabulary of {shape[0]} rows: give the base resized as in training, or save the "
            "adapter with save_embedding_layers=True"
        )
    known = model.adapter.config.get("base_model_name_or_path")
    named = f"; its adapter_config.json names {known!r}" if isinstance(known, str) and known else ""
    return f"it was trained on another base, of other sizes: give that one{named}"


def _architectures(ours: dict[str, Any] | None, theirs: dict[str, Any] | None) -> str:
    one, other = ((config or {}).get("model_type") for config in (ours, theirs))
    if not one or not other or one == other:
        return ""
    return f": it is of the architecture {one!r} and the base of {other!r}; merge models of one architecture"


def _form(
    name: str,
    ours: dict[str, Any] | None,
    theirs: dict[str, Any] | None,
    others: Iterable[str],
    *,
    adapter: bool = False,
) -> str:
    """Say so where transformers joins, splits or turns the tensor as it loads it, and the other side has that form."""
    for rules in rules_for(ours, theirs):
        form = rules.converted(name)
        if form is not None and any(rules.converted(other) == form for other in others):
            advice = (
                "merge the adapter into its base with PEFT and pass the model that save_pretrained writes"
                if adapter
                else "load both with transformers and save_pretrained them anew, which writes one form"
            )
            return f" in this form: transformers converts it as it loads a file ({form}); {advice}"
    return ""


def _several(names: list[str]) -> str:
    if len(names) < 2:
        return ""
    return f" under this name: it may be {' or '.join(map(repr, names[:3]))}; rename it to the one that is meant"
