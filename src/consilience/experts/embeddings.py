"""Vocabularies that experts have changed: rows trained alone, rows added, padding cut off.

PEFT trains single rows of an embedding as an adapter's ``trainable_tokens_delta`` (their new values, despite the name),
and saves embedding and head whole when a model was resized. In the merge a resized tensor has the experts' number of
rows. The base has no row for a token that it does not know: there its row is the mean of the experts' rows, so that the
row of one expert alone is taken as it is, whatever its weight.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from consilience.checkpoints.checkpoint import TensorInfo
from consilience.checkpoints.peft_names import trained_whole
from consilience.checkpoints.rows import Matrix, Rows, RowStorage
from consilience.errors import InputError
from consilience.experts.model import Model, Source

#: Names of embeddings, heads and their biases, for what shapes alone leave open.
_VOCABULARY = re.compile(
    r"(^|\.)(\w*embed\w*|wte|shared|lm_head|embed_out|output_layer|proj_out|cls\.predictions(\.decoder)?|\w*decoder)\."
    r"(weight|bias)$|predictions\.bias$"
)


@dataclass(frozen=True)
class Resized:
    """The base's tensors at another number of rows, and where their values come from."""

    tensors: dict[str, TensorInfo]
    sources: dict[str, Source]
    before: int = 0
    after: int = 0

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return a config with the new vocabulary size where it, or a part of it, has the old one."""

        def part(value: Any) -> Any:
            known = isinstance(value, dict) and cast(dict[str, Any], value).get("vocab_size") == self.before
            return cast(dict[str, Any], value) | {"vocab_size": self.after} if known else value

        return part({key: part(value) for key, value in config.items()}) if self.tensors else config


def with_trained_rows(model: Model, donor: Model) -> Model:
    """Return the model with the rows that its adapter trained alone put into the matrices they belong to.

    Raises:
        InputError: a row is not in the matrix, or the rows have another length.
    """
    adapter = model.adapter
    if adapter is None or not adapter.tokens:
        return model
    assembled: dict[str, Matrix] = {}
    for name, tokens in adapter.tokens.items():
        base = model if model.stored(name) is not None else donor
        if base is donor and name not in donor.named:
            continue  # to be refused by whoever checks the names
        source = base.source(name)
        if source.pair is not None or source.dense is None or source.storage is None:
            raise InputError(
                f"{model.reference}: trains rows of {name!r}, which {base.reference} adapts too; merge that adapter "
                "into its base first"
            )
        info, values = source.dense, tokens.values
        if values.shape != (len(tokens.rows), *info.shape[1:]):
            raise InputError(
                f"{model.reference}: tensor {values.name!r} has shape {list(values.shape)}, but {len(tokens.rows)} "
                f"rows of {name!r} ({list(info.shape)}) are trained; restore the adapter"
            )
        if not 0 <= min(tokens.rows) <= max(tokens.rows) < info.shape[0]:
            raise InputError(
                f"{model.reference}: trains row {max(tokens.rows)} of {name!r}, which has {info.shape[0]} rows in "
                f"{base.reference}; resize the base as in training, or save the adapter with save_embedding_layers=True"
            )
        order = np.argsort(tokens.rows, kind="stable")
        rows = Rows(np.asarray(tokens.rows)[order], order, ((adapter.checkpoint.storage, values),))
        storage = RowStorage((source.storage, info), info.shape, rows)
        assembled[name] = (storage, storage.info)
    for alias, target in donor.ties.items():  # a tie goes on, unless the other side has rows of its own
        if target in assembled and alias not in assembled and model.stored(alias) is None:
            assembled[alias] = assembled[target]
    return replace(model, assembled=assembled)


def with_own_size(model: Model) -> Model:
    """Return a model with an adapter that resized its vocabulary (BASE+ADAPTER) at the adapter's number of rows.

    Raises:
        InputError: as ``resized``.
    """
    checkpoint, adapter = model.checkpoint, model.adapter
    if checkpoint is None or adapter is None:
        return model
    found = resized(replace(model, adapter=None), [replace(model, checkpoint=None)])
    if not found.tensors:
        return model
    tensors = {name: found.tensors.get(name, info) for name, info in checkpoint.tensors.items()}
    rows = {n: (s.storage, s.dense) for n, s in found.sources.items() if s.storage and s.dense}
    config = None if checkpoint.config is None else found.config(checkpoint.config)
    return replace(
        model,
        checkpoint=replace(checkpoint, tensors=tensors, config=config),
        assembled=model.assembled | {name: matrix for name, matrix in rows.items() if name not in adapter.whole},
    )


def resized(donor: Model, experts: Iterable[Model]) -> Resized:
    """Return the base's vocabulary, by every name of it, at the size that experts have given it; empty: none has.

    Raises:
        InputError: experts disagree about the size, or one resized the embedding and not the head.
    """
    checkpoint = donor.checkpoint
    assert checkpoint is not None
    size, named = config_size(checkpoint.config), donor.named
    holders: dict[str, list[Model]] = {}
    for model in experts:
        for name, base in named.items() if model is not donor else ():
            own = _stored(model, name)
            if own is not None and own.shape != base.shape and _is_vocabulary(name, base, size, own):
                holders.setdefault(name, []).append(model)
    if not holders:
        return Resized({}, {})
    first = next(iter(holders))
    before, after = named[first].shape[0], _rows(holders[first][0], first)
    # The other names of a resized tensor are resized with it.
    roots = {name: donor.ties.get(name, name) for name in named}
    models = {roots[name]: found for name, found in holders.items()}
    names = {name: holders.get(name) or models[root] for name, root in roots.items() if root in models}
    _check_sizes(donor, experts, holders, after)
    _check_complete(donor, holders, names, before)
    tensors = {name: replace(named[name], shape=(after, *named[name].shape[1:])) for name in names}
    sources = {name: _extended(donor, name, found, after) for name, found in names.items()}
    return Resized(tensors, sources, before, after)


def _stored(model: Model, name: str) -> TensorInfo | None:
    found = model.stored(name)
    return found[1] if found is not None else None


def _rows(model: Model, name: str) -> int:
    found = model.stored(name)
    assert found is not None
    return found[1].shape[0]


def config_size(config: dict[str, Any] | None) -> int | None:
    """Return a config's vocabulary size, a text model's in a larger one."""
    for part in (config or {}, *(v for v in (config or {}).values() if isinstance(v, dict))):
        size = cast(dict[str, Any], part).get("vocab_size")
        if isinstance(size, int):
            return size
    return None


def is_vocabulary(name: str, info: TensorInfo, config: dict[str, Any] | None) -> bool:
    """Whether a tensor of a model with this config has a row for every token."""
    return _is_vocabulary(name, info, config_size(config))


def _is_vocabulary(name: str, base: TensorInfo, size: int | None, own: TensorInfo | None = None) -> bool:
    if not 1 <= len(base.shape) <= 2 or (own is not None and own.shape[1:] != base.shape[1:]):
        return False
    return (size is None or base.shape[0] == size) and _VOCABULARY.search(name) is not None


def _check_sizes(donor: Model, experts: Iterable[Model], holders: Mapping[str, list[Model]], after: int) -> None:
    for model in experts:
        for name in holders:
            own = _stored(model, name)
            if own is not None and model is not donor and own.shape[0] != after:
                other = next(m for m in holders[name] if _rows(m, name) == after)
                raise InputError(
                    f"{model.reference}: {name!r} has {own.shape[0]} rows and {after} in {other.reference}: their "
                    "vocabularies differ in size; align them by token (tokenizer: union), or resize both to one"
                )


def _check_complete(donor: Model, holders: Mapping[str, list[Model]], names: Iterable[str], before: int) -> None:
    assert donor.checkpoint is not None
    model = next(iter(holders.values()))[0]
    for name, info in donor.checkpoint.tensors.items():
        if name not in names and info.shape[:1] == (before,) and _is_vocabulary(name, info, None):
            raise _incomplete(model, donor, next(iter(holders)), name, before)


def _extended(donor: Model, name: str, holders: list[Model], after: int) -> Source:
    """Return the base's tensor with ``after`` rows; those it lacks are the mean of the experts'."""
    source = donor.source(name)
    info = source.dense
    assert info is not None
    assert source.storage is not None
    if after <= info.shape[0]:
        return replace(source, dense=replace(info, shape=(after, *info.shape[1:])))
    rows = np.arange(info.shape[0], after)
    found = [
        model.source(name if model.stored(name) is not None else other_name(donor, model, name)) for model in holders
    ]
    matrices = tuple((s.storage, s.dense) for s in found if s.storage is not None and s.dense is not None)
    storage = RowStorage((source.storage, info), (after, *info.shape[1:]), Rows(rows, rows, matrices))
    return Source(storage, storage.info)


def other_name(donor: Model, model: Model, name: str) -> str:
    """Return the name of the same tie under which a model holds a tensor of the base.

    Raises:
        InputError: what it holds was trained apart from the tensor.
    """
    root, adapter = donor.ties.get(name, name), model.adapter
    names = [root, *(alias for alias, target in donor.ties.items() if target == root)]
    held = [other for other in names if model.stored(other) is not None]
    alike = [n for n in held if adapter is None or not trained_whole(adapter.config, adapter.names.get(n, n))]
    if not alike:
        raise _incomplete(model, donor, held[0], name, donor.named[name].shape[0])
    return alike[0]


def _incomplete(model: Model, donor: Model, one: str, other: str, rows: int) -> InputError:
    return InputError(
        f"{model.reference}: resizes {one!r} but not {other!r}, which {donor.reference} has at {rows} rows: its other "
        "rows are in no file; give the resized base that it was trained on"
    )


def notes(found: Resized) -> list[str]:
    """Return what a user is told of a vocabulary that changed."""
    if not found.tensors:
        return []
    what = "whose new rows are the experts' own" if found.after > found.before else "and the last rows are left out"
    names = ", ".join(sorted(found.tensors))
    return [f"{names}: {found.after} rows, as the experts have them, for the base's {found.before}, {what}"]
