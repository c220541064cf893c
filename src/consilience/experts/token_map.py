"""Vocabularies that differ, aligned by token: which row of which model each row of the output's vocabulary is.

A model's own row stands for a token that it has. For one that it lacks, it takes the row of the only model that has it,
else the base's, else the mean of those that do; zero where no model has it. So a token of one model alone has that row
in the base and in every expert, no task vector, and in the output the same row. A recipe's ``tokens`` chooses otherwise
for single tokens. Rows without a token (a base's padding) stay each model's own; rows beyond these are the mean of all
tokens' rows.

Source: mergekit 0.1.5, ``tokenizer/embed.py``, whose rule this is; it drops rows without a token, unless they are asked
for, and makes all of those means.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from consilience.checkpoints.checkpoint import TensorInfo
from consilience.checkpoints.packed import packing
from consilience.errors import InputError
from consilience.experts.embeddings import Resized, config_size, is_vocabulary, other_name
from consilience.experts.model import Model, Source
from consilience.experts.token_rows import AVERAGED, MEAN, ZERO, RowMap, TokenRows

#: Names of embeddings whose rows are no tokens.
_NO_TOKENS = re.compile(r"position|token_type|wpe")
#: Tokens that a note lists.
_LISTED = 5
Ids = Mapping[str, int]


@dataclass(frozen=True)
class Rule:
    """What a recipe says of one token: ``model`` and its row ``at`` (None: zero), for all models if ``force``."""

    model: str | None
    at: int
    force: bool


@dataclass(frozen=True)
class TokenChoice:
    """The output's vocabulary, and what every model means by its rows.

    Attributes:
        label: how the recipe calls it: union, base, or a model's name.
        reference: the model that its rows without tokens are counted by.
        ids: id by token.
        vocabularies: every model's own ids, by its name.
        rules: what the recipe says of single tokens.
        added: tokens that the reference's tokenizer does not have.
        multiple: what the number of rows is a multiple of; None: as many as the reference has, or more if needed.
        files: files of the tokenizer that are made for it, by name, and those of the reference that go.
        left: files of the reference's tokenizer that would contradict them.
        notes: what is to be said of how vocabularies were found.
        where: how errors name the recipe.
    """

    label: str
    reference: str
    ids: Ids
    vocabularies: Mapping[str, Ids]
    rules: Mapping[str, Rule] = field(default_factory=dict[str, Rule])
    added: tuple[str, ...] = ()
    multiple: int | None = None
    files: Mapping[str, Any] = field(default_factory=dict[str, Any])
    left: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    where: str = "recipe"

    @property
    def digest(self) -> str:
        """What tells these vocabularies from others."""
        known = {id(ids): _digest(ids) for ids in {id(ids): ids for ids in self.vocabularies.values()}.values()}
        rules = sorted((token, repr(rule)) for token, rule in self.rules.items())
        own = [[name, known[id(ids)]] for name, ids in self.vocabularies.items()]
        return hashlib.blake2b(
            repr([_digest(self.ids), self.multiple, rules, own]).encode(), digest_size=16
        ).hexdigest()


@dataclass(frozen=True)
class Share:
    """Where one model's rows of the output's tokens come from: how many from whom, and what no model has.

    Attributes:
        own: tokens that it has a row for itself.
        taken: how many of the others come from each model.
        averaged: how many are the mean of several models'.
        zero: how many are zero.
    """

    own: int
    taken: dict[str, int]
    averaged: int
    zero: int


@dataclass(frozen=True)
class Aligned:
    """Models' vocabulary matrices in the output's order.

    Attributes:
        choice: the output's vocabulary.
        resized: the output's vocabulary tensors, by every name of them, and the number of rows before and after.
        sources: where such a tensor comes from in a model, by (model's name, tensor's name); one that is missing is the
            model's own as it is.
        fitted: for each model its own shapes of those tensors, as far as they are not the base's.
        shares: by model's name.
        made: tokens whose row no model has as it is, and how it was made: "zero", "mean of A and B", "'x' of A".
        unplaced: tokens of models for which they have no row.
        donor: name of the model that the tensors are called after.
    """

    choice: TokenChoice
    resized: Resized
    sources: dict[tuple[str, str], Source]
    fitted: dict[str, dict[str, TensorInfo]]
    shares: dict[str, Share]
    made: dict[str, str]
    unplaced: dict[str, tuple[str, ...]]
    donor: str = "base"

    @property
    def changes(self) -> bool:
        """Whether any model's rows are not as they are stored, or the output has another number of them."""
        return bool(self.sources) or self.resized.before != self.resized.after

    def source(self, model: Model, name: str) -> Source | None:
        """Return where a tensor comes from in a model; None: as if vocabularies were one."""
        return self.sources.get((model.name, name))

    def notes(self) -> list[str]:
        """Say how many rows came from whom, and which were made up."""
        choice, ids = self.choice, self.choice.ids
        said = list(choice.notes)
        for name, tokens in self.unplaced.items():
            said.append(f"{name}: its tokenizer has {_count(tokens, 'token')} without a row in its weights: "
                        f"{_listed(tokens)}; they count as absent there")  # fmt: skip
        if not self.changes:
            return said
        padding = self.resized.after - len(ids)
        rest = f", {padding} without a token" if padding > 0 else ""
        said.append(
            f"vocabulary ({choice.label}): {len(ids)} tokens in {self.resized.after} rows{rest}; {self.donor} has "
            f"{self.resized.before}; embeddings and head are aligned by token"
        )
        for name, share in self.shares.items():
            parts = [f"{share.own} of the output's tokens are its own"]
            parts += [
                f"{n} taken from {'other rows of it' if other == name else other}" for other, n in share.taken.items()
            ]
            parts += [f"{share.averaged} the mean of those who have them"] if share.averaged else []
            parts += [f"{share.zero} zero"] if share.zero else []
            said.append(f"vocabulary of {name}: {', '.join(parts)}")
        if self.made:
            listed = [f"{token!r} ({how})" for token, how in list(self.made.items())[:_LISTED]]
            more = f" and {len(self.made) - _LISTED} more" if len(self.made) > _LISTED else ""
            said.append(f"vocabulary: rows that no model has as they are: {', '.join(listed)}{more}")
        return said

    def facts(self) -> dict[str, Any]:
        """Return what the lineage says of it."""
        return {
            "source": self.choice.label,
            "tokens": len(self.choice.ids),
            "rows": self.resized.after,
            "rows_before": self.resized.before,
            "added": len(self.choice.added),
            "models": {
                name: {"own": s.own, "taken": s.taken, "averaged": s.averaged, "zero": s.zero}
                for name, s in self.shares.items()
            },
            "made": self.made,
            "digest": self.choice.digest,
        }


def _digest(ids: Ids) -> str:
    return hashlib.blake2b(repr(sorted(ids.items())).encode(), digest_size=16).hexdigest()


def _count(tokens: Sequence[str], word: str) -> str:
    return f"{len(tokens)} {word}{'s' * (len(tokens) != 1)}"


def _listed(tokens: Sequence[str]) -> str:
    return ", ".join(map(repr, tokens[:_LISTED])) + (", ..." if len(tokens) > _LISTED else "")


def vocabulary_names(model: Model) -> list[str]:
    """Return the names, by every tie, of a model's tensors that have a row for every token."""
    assert model.checkpoint is not None
    config, named = model.checkpoint.config, model.named
    found = [n for n, info in named.items() if is_vocabulary(n, info, config) and not _NO_TOKENS.search(n)]
    size = config_size(config)
    for name, info in named.items():  # a head of another name, such as InternLM's output.weight
        outside = not any(part.isdecimal() for part in name.split("."))
        like = any(info.shape == named[known].shape and len(info.shape) == 2 for known in found)
        if name not in found and outside and like and size == info.shape[0] and not _NO_TOKENS.search(name):
            found.append(name)
    return found


def aligned(
    choice: TokenChoice, base: Model | None, models: Sequence[Model], private: Callable[[str], bool]
) -> Aligned:
    """Return the models' vocabulary matrices in the output's order, as views that are read like any tensor.

    Args:
        choice: the output's vocabulary and the models'.
        base: the base, if there is one.
        models: all models of the merge, the base, or whichever gives the tensors' names, first.
        private: whether a tensor of this name is not merged.

    Raises:
        InputError: a model has embeddings and a head of different sizes, or a tensor cannot be realigned.
    """
    donor = models[0]
    names = vocabulary_names(donor)
    if not names:
        raise InputError(
            f"{donor.reference}: has no tensor that looks like embeddings of its vocabulary, so tokens cannot be "
            "aligned; leave tokenizer out"
        )
    matrices = {(m.name, n): _matrix(m, donor, n) for m in models for n in names}
    rows = {model.name: _rows(model, names, matrices) for model in models}
    own, unplaced = _own_rows(choice, models, rows)
    maps, shares, made = _maps(choice, models, rows, own, has_base=base is not None)
    sources: dict[tuple[str, str], Source] = {}
    for name in names:
        held = [matrices[model.name, name] for model in models]
        views = _views([maps[model.name] for model in models], held, models, name)
        sources |= {(model.name, name): view for model, view in zip(models, views, strict=True) if view is not None}
    before, after = rows[donor.name], maps[donor.name].part.size
    tensors = {name: _at(donor.named[name], after) for name in names}
    fitted = {m.name: {n: _at(donor.named[n], rows[m.name]) for n in names} for m in models}
    found = Aligned(choice, Resized(tensors, {}, before, after), sources, fitted, shares, made, unplaced, donor.name)
    if found.changes:
        _check_alignable(choice, donor, names, before, private)
    return found


def _at(info: TensorInfo, rows: int) -> TensorInfo:
    return replace(info, shape=(rows, *info.shape[1:]))


def _matrix(model: Model, donor: Model, name: str) -> Source:
    """Return a model's own matrix, with its updates: the base's, or one of another name of the tie, if it has none."""
    source = model.source(name, donor.ties.get(name))
    if source.dense is None:
        root = donor.ties.get(name, name)
        held = [n for n in (root, *(a for a, t in donor.ties.items() if t == root)) if model.stored(n) is not None]
        base = donor.source(name, donor.ties.get(name))
        if any(_stored_rows(model, n) != donor.named[name].shape[0] for n in held):
            base = model.source(other_name(donor, model, name))  # saved since it was resized: the new rows are there
        if source.pair is not None and base.pair is not None:
            base = _folded(base)
        pair = source if source.pair is not None else base
        source = Source(base.storage, base.dense, pair.pair_storage, pair.pair)
    if source.dense is None or source.storage is None:
        raise InputError(f"{model.reference}: tensor {name!r} is missing, so its tokens cannot be aligned; add it")
    return source


def _folded(source: Source) -> Source:
    """Return a matrix with its update as one that has none."""
    assert source.dense is not None
    rows = source.dense.shape[0]
    same = RowMap(np.zeros(rows, np.int64), np.arange(rows), np.ones(rows, bool), {})
    storage = TokenRows([source], same)
    return Source(storage, storage.info)


def _stored_rows(model: Model, name: str) -> int:
    found = model.stored(name)
    assert found is not None
    return found[1].shape[0]


def _rows(model: Model, names: Sequence[str], matrices: Mapping[tuple[str, str], Source]) -> int:
    """Return a model's number of rows.

    Raises:
        InputError: its embeddings and head differ in it, or a row has another length than the base's.
    """
    counts: dict[str, int] = {}
    for name in names:
        dense = matrices[model.name, name].dense
        assert dense is not None
        counts[name] = dense.shape[0]
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name!r} has {count} rows" for name, count in counts.items())
        raise InputError(
            f"{model.reference}: {listed}: its vocabulary is resized in part; resize embeddings and head alike, or "
            "give the resized base that it was trained on"
        )
    return next(iter(counts.values()))


def _own_rows(
    choice: TokenChoice, models: Sequence[Model], rows: Mapping[str, int]
) -> tuple[npt.NDArray[np.int64], dict[str, tuple[str, ...]]]:
    """Return the models' rows of the output's tokens, -1 for none, [models, tokens]; and tokens without rows."""
    found = np.full((len(models), len(choice.ids)), -1, np.int64)
    unplaced: dict[str, tuple[str, ...]] = {}
    known: dict[int, npt.NDArray[np.int64]] = {}  # most models have one vocabulary
    for k, model in enumerate(models):
        ids = choice.vocabularies[model.name]
        if id(ids) not in known:
            known[id(ids)] = np.array([ids.get(token, -1) for token in choice.ids], np.int64)
        found[k] = known[id(ids)]
        beyond = found[k] >= rows[model.name]
        if beyond.any():
            found[k][beyond] = -1
            unplaced[model.name] = tuple(token for token, out in zip(choice.ids, beyond, strict=True) if out)
    return found, unplaced


def _maps(
    choice: TokenChoice,
    models: Sequence[Model],
    rows: Mapping[str, int],
    own: npt.NDArray[np.int64],
    *,
    has_base: bool,
) -> tuple[dict[str, RowMap], dict[str, Share], dict[str, str]]:
    """Return every model's map, where its rows come from, and which tokens were made up."""
    tokens, names = list(choice.ids), [model.name for model in models]
    out = np.fromiter(choice.ids.values(), np.int64, len(tokens))
    count = _row_count(choice, rows[choice.reference], out)
    placed = out < count  # a base's own tokens beyond its rows have none in the output either
    giver, at = _givers(own, has_base=has_base)
    forced = np.zeros(len(tokens), bool)
    numbers = {token: i for i, token in enumerate(tokens)} if choice.rules else {}
    for token, rule in choice.rules.items():
        i = numbers[token]
        if rule.model is not None and rule.at >= rows[rule.model]:
            raise InputError(
                f"{choice.where}: tokenizer: tokens: {token!r}: id {rule.at} is beyond the {rows[rule.model]} rows of "
                f"{rule.model}; name a token that it has a row for"
            )
        giver[i], at[i] = (ZERO, 0) if rule.model is None else (names.index(rule.model), rule.at)
        forced[i] = rule.force
    averaged = {int(out[i]): tuple((k, int(own[k, i])) for k in np.flatnonzero(own[:, i] >= 0).tolist())
                for i in np.flatnonzero((giver == AVERAGED) & placed)}  # fmt: skip
    is_token = np.zeros(count, bool)
    is_token[out[placed]] = True
    maps: dict[str, RowMap] = {}
    shares: dict[str, Share] = {}
    for k, name in enumerate(names):
        part, places = _padding(choice, k, count, rows, names)
        has = (own[k] >= 0) & ~forced
        chosen, row = np.where(has, k, giver), np.where(has, own[k], at)
        part[out[placed]], places[out[placed]] = chosen[placed], row[placed]
        maps[name] = RowMap(part, places, is_token, {r: p for r, p in averaged.items() if part[r] == AVERAGED})
        lacking = chosen[placed & ~has]
        taken = {names[j]: n for j in range(len(names)) if (n := int((lacking == j).sum()))}
        zero, mean = (int((lacking == kind).sum()) for kind in (ZERO, AVERAGED))
        shares[name] = Share(int((has & placed).sum()), taken, mean, zero)
    return maps, shares, _made(choice, tokens, giver, own, forced, placed, names)


def _row_count(choice: TokenChoice, held: int, out: npt.NDArray[np.int64]) -> int:
    """Return the output's number of rows: the reference's and what added tokens need, or the multiple asked for."""
    added = [choice.ids[token] for token in choice.added]
    inside = out[out < held]
    needed = max([*(int(i) + 1 for i in added), int(inside.max()) + 1 if inside.size else 1])
    if choice.multiple is not None:
        return -(-needed // choice.multiple) * choice.multiple
    return max(held, needed)


def _givers(own: npt.NDArray[np.int64], *, has_base: bool) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return whose row stands for a token in models that lack it: a model's number and row, or a kind."""
    has = own >= 0
    total = has.sum(axis=0)
    several = np.where(has[0], 0, AVERAGED) if has_base else AVERAGED
    giver = np.where(total == 1, has.argmax(axis=0), np.where(total == 0, ZERO, several)).astype(np.int64)
    at = np.where(giver >= 0, own[np.maximum(giver, 0), np.arange(own.shape[1])], 0)
    return giver, at


def _padding(
    choice: TokenChoice, model: int, count: int, rows: Mapping[str, int], names: Sequence[str]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return where a model's rows without a token come from: its own, the reference's, or the mean of its tokens'."""
    part, places = np.full(count, MEAN, np.int64), np.arange(count)
    part[: rows[choice.reference]] = names.index(choice.reference)
    used = np.zeros(count, bool)
    ids = np.fromiter(choice.vocabularies[names[model]].values(), np.int64)
    used[ids[ids < count]] = True
    spare = np.arange(count) < min(rows[names[model]], rows[choice.reference])
    part[spare & ~used] = model
    return part, places


def _made(
    choice: TokenChoice,
    tokens: Sequence[str],
    giver: npt.NDArray[np.int64],
    own: npt.NDArray[np.int64],
    forced: npt.NDArray[np.bool_],
    placed: npt.NDArray[np.bool_],
    names: Sequence[str],
) -> dict[str, str]:
    """Return the tokens whose rows were made up, and how."""
    found: dict[str, str] = {}
    lacking = (own < 0).any(axis=0) | forced
    for i in np.flatnonzero(placed & lacking).tolist():
        token, rule = tokens[i], choice.rules.get(tokens[i])
        if giver[i] == ZERO:
            found[token] = "zero"
        elif giver[i] == AVERAGED:
            found[token] = "mean of " + " and ".join(names[k] for k in np.flatnonzero(own[:, i] >= 0).tolist())
        elif rule is not None and rule.model is not None and own[names.index(rule.model), i] != rule.at:
            other = next((t for t, n in choice.vocabularies[rule.model].items() if n == rule.at), None)
            found[token] = f"{rule.model}'s {other!r}" if other is not None else f"{rule.model}'s row {rule.at}"
    return found


def _views(maps: Sequence[RowMap], held: Sequence[Source], models: Sequence[Model], name: str) -> list[Source | None]:
    """Return each model's matrix in the output's order; None: what is stored, or the base's, is that already."""
    distinct: list[Source] = []
    numbers = [_place(source, distinct) for source in held]
    found = [rows.of(numbers) for rows in maps]
    as_stored = [one.is_identity(n, _height(distinct[n])) for one, n in zip(found, numbers, strict=True)]
    views: list[Source | None] = []
    for k, model in enumerate(models):
        own = model.source(name, models[0].ties.get(name))
        if k and own.untouched and found[k] == found[0]:
            views.append(None)  # the base's, however that is read
        elif not as_stored[k]:
            views.append(_gathered(found[k], distinct, numbers[k], model, name))
        else:
            views.append(held[k] if own.dense is None and not as_stored[0] else None)
    return views


def _height(source: Source) -> int:
    assert source.dense is not None
    return source.dense.shape[0]


def _gathered(rows: RowMap, distinct: Sequence[Source], number: int, model: Model, name: str) -> Source:
    """Return a view of those matrices that its rows come from."""
    used = sorted({*np.unique(rows.part[rows.part >= 0]).tolist(), *(k for p in rows.averaged.values() for k, _ in p)})
    used = used or [number]
    for source in (distinct[k] for k in used):
        if source.dense is not None and not source.dense.dtype.mergeable:
            raise InputError(
                f"{model.reference}: tensor {name!r} is {source.dense.dtype.name}, whose rows cannot be aligned by "
                "token; give an unquantised model, or leave tokenizer out"
            )
    storage = TokenRows(
        [distinct[k] for k in used], rows.of([used.index(k) if k in used else 0 for k in range(len(distinct))])
    )
    return Source(storage, storage.info)


def _place(source: Source, distinct: list[Source]) -> int:
    """Return the number of a matrix among those that differ: adapters on one base share its own."""
    for number, other in enumerate(distinct):
        same = source.storage is other.storage and source.dense == other.dense
        if same and source.pair == other.pair and source.pair_storage is other.pair_storage:
            return number
    distinct.append(source)
    return len(distinct) - 1


def _check_alignable(
    choice: TokenChoice, donor: Model, names: Sequence[str], before: int, private: Callable[[str], bool]
) -> None:
    """Refuse what cannot be realigned: private and quantised matrices, and tensors with a column for every token."""
    packed = packing(donor.checkpoint).parts
    for name in names:
        if private(name):
            raise InputError(
                f"{choice.where}: private: {name!r} is aligned by token (tokenizer: {choice.label}), and what is "
                "private is not merged; drop one of the two"
            )
        if name in packed:
            raise InputError(
                f"{donor.reference}: tensor {name!r} is quantised, so its rows cannot be aligned by token; give an "
                "unquantised model, or leave tokenizer out"
            )
    for name, info in donor.named.items():
        if name not in names and name.endswith("logits_bias") and before in info.shape:
            raise InputError(
                f"{donor.reference}: tensor {name!r} has an entry for each of {before} tokens in a shape that cannot "
                "be aligned by token; leave tokenizer out"
            )
