"""How experts differ from the base in what makes them usable: the table of facts applied to a plan, and token rows.

A difference is an *error* where a row of the vocabulary would be the mean of two tokens, a *warning* where it changes
what the model computes and nobody has chosen, else a *note*. docs/differences.md lists them all.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

from consilience.checkpoints.checkpoint import raw
from consilience.engine.chosen_files import files_of_output, translated
from consilience.engine.origin import compare_base
from consilience.errors import InputError, nearest
from consilience.experts import rope
from consilience.experts.config_parts import expanded, place
from consilience.experts.facts import FACTS, Fact, Level
from consilience.experts.model import Model, Source
from consilience.experts.model_files import ModelFiles
from consilience.experts.token_map import TokenChoice
from consilience.experts.vocabulary import is_unused

if TYPE_CHECKING:
    from consilience.engine.plan import Plan, TensorPlan

#: Parts of the names of tensors whose rows are tokens, and of those that look alike and are not.
_EMBEDDINGS = ("embed", "wte", "shared", "lm_head", "output.weight", "word_embedding", "predictions.decoder")
_NO_TOKENS = ("position", "wpe", "token_type", "patch", "pixel", "rotary", "norm", "proj")
#: Values of a difference that are shown; of tokens whose rows are looked at.
_SHOWN, _LOOKED_AT = 3, 4096
#: Differences that no row of the table has: (kind, level, what is compared, what it means).
FURTHER: tuple[tuple[str, Level, str, str], ...] = (
    (
        "token-rows",
        "error",
        "the token of a row of the vocabulary that the merge mixes: of base and expert, or of two experts that both "
        "changed it",
        "the row would be the mean of two tokens: align rows by token with a `tokenizer`, or keep embeddings and head "
        "apart with `private`",
    ),
    (
        "other-base",
        "warning",
        "`base_model_name_or_path` of an adapter (and `revision`, a commit) with the base that it is put on: folders "
        "by lineage fingerprint or samples of every tensor, hub names by snapshot folder or `_name_or_path` (Unsloth's "
        "copies are not told apart)",
        "the update was learned on other weights: name that base, or merge the adapter into it first",
    ),
    (
        "token-rows",
        "error",
        "the largest id of a chosen `tokenizer` with the rows of the output's embeddings",
        "the token has no row: choose another tokenizer, or resize the base's embeddings before merging",
    ),
    (
        "stacked-rows",
        "error",
        "rows of embeddings and head, where slices take them from two models",
        "transformers cannot open it: let the first and the last slice be of models with one vocabulary",
    ),
    (
        "stacked-tokens",
        "warning",
        "the tokens of embeddings and head, where slices take them from two models",
        "the output reads ids as one model does and writes them as another: let the first and the last slice be of "
        "models with one vocabulary",
    ),
    (
        "config-key",
        "note",
        "keys of the recipe's `config` with those of all models",
        "it is written, and nothing may read it: check its spelling",
    ),
    ("base-name", "note", "the same, where neither can be found out", "check that the two are the same weights"),
)


@dataclass(frozen=True)
class Difference:
    """One difference of one expert (or two) from the output.

    Attributes:
        kind: short name, as in the table of facts.
        level: "error", "warning" or "note".
        models: whom it concerns.
        what: what differs, with both values.
        mend: what can be done, by a key that exists; "" if nothing need be.
    """

    kind: str
    level: Level
    models: tuple[str, ...]
    what: str
    mend: str

    @property
    def text(self) -> str:
        """All of it in one line."""
        if not self.mend:
            return self.what
        return f"{self.what}; {self.mend}" if self.level == "error" else f"{self.what} ({self.mend})"


def differences(plan: "Plan") -> tuple[Difference, ...]:
    """Return how a plan's models differ from what its output will be, errors first."""
    donor = plan.alignment.donor
    if donor.folder is None:
        return ()
    output = files_of_output(plan)
    files = [ModelFiles(expert) for expert in plan.experts]
    if plan.stacking is not None:  # layers that are put in another order are no difference
        for own in files:
            own.config = plan.stacking.own_config(own.config, output.config)
    others = [own for expert, own in zip(plan.experts, files, strict=True) if expert is not donor]
    base = output if plan.recipe.tokenizer_model in (None, "base") else ModelFiles(donor)
    by_token = plan.alignment.tokens is not None
    found = [
        *([] if by_token else _token_rows(plan, base, others)),
        *_stacked_rows(plan),
        *_without_rows(plan, output),
        *_unknown_keys(plan, [ModelFiles(donor), *files]),
    ]
    for own in files:
        found += [one for fact in FACTS if (one := _of_fact(plan, fact, own, output)) is not None]
    if plan.base is not None:
        found += [one for expert in plan.experts if (one := _other_base(expert, plan.base)) is not None]
    order = ("error", "warning", "note")
    return tuple(sorted(found, key=lambda one: order.index(one.level)))


def check_differences(found: Iterable[Difference], where: str, *, strict: bool) -> None:
    """Refuse a merge of different tokens, and (when strict) any difference that changes what the model computes.

    Raises:
        InputError: the first of them.
    """
    for one in found:
        if one.level == "error" or (strict and one.level == "warning"):
            raise InputError(f"{where}: {one.text}")


def by_level(found: Iterable[Difference], level: Level) -> list[str]:
    """Return the lines of one level."""
    return [one.text for one in found if one.level == level]


def _of_fact(plan: "Plan", fact: Fact, own: ModelFiles, output: ModelFiles) -> Difference | None:
    tokens = plan.alignment.tokens
    if tokens is not None and fact.kind == "vocabulary":
        return _left_behind(tokens.choice, own)
    if tokens is not None and fact.kind == "token-ids":
        own = own.with_configs(*(translated(part, tokens.choice, own.name) for part in (own.config, own.generation)))
    found = fact.compare(own, output)
    if not found:
        return None
    chosen = _is_chosen(plan, fact, found, output.config)
    level = "note" if chosen else fact.level
    other = "the output" if chosen else "the base" if plan.base is not None else plan.alignment.donor.name
    if fact.kind == "vocabulary":
        what = _tokens(own.name, found, other)
    elif fact.kind == "chat-template":
        what = f"{own.name} has a chat template of its own" if own.templates else f"{own.name} has no chat template"
    elif fact.kind == "tokenizer":
        what = f"{own.name}'s tokenizer cuts text by other rules than {other}'s ({next(iter(found))})"
    else:
        pairs = [f"{key} {_shown(a)}, in {other} {_shown(b)}" for key, (a, b) in list(found.items())[:_SHOWN]]
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        what = f"{own.name}: {fact.title} ({fact.files.partition(',')[0].partition(';')[0]}): {'; '.join(pairs)}{more}"
    what += _outcome(fact, found, other, chosen)
    return Difference(
        fact.kind, level, (own.name,), what, "" if chosen else _mend(fact, found, own.name, output.config)
    )


def _left_behind(choice: TokenChoice, own: ModelFiles) -> Difference | None:
    """Name the tokens of an expert that the output's vocabulary lacks, where rows are aligned by token."""
    left = {number: token for token, number in choice.vocabularies[own.name].items() if token not in choice.ids}
    if not left or own.tokenizer_folder is None:
        return None
    listed = ", ".join(f"{token!r} ({number})" for number, token in list(sorted(left.items()))[:4])
    more = ", ..." if len(left) > 4 else ""
    what = (
        f"{own.name} has {len(left)} token{'s' * (len(left) != 1)} that the output lacks: {listed}{more}, as tokenizer "
        f"chooses ({choice.label}); tokenizer: union keeps them"
    )
    return Difference("vocabulary", "note", (own.name,), what, "")


def _is_chosen(plan: "Plan", fact: Fact, found: dict[str, tuple[Any, Any]], config: dict[str, Any]) -> bool:
    """Whether the recipe says whose values count."""
    choice = getattr(plan.recipe, fact.option) if fact.option else None
    if fact.option == "chat_template" and choice is None:
        choice = plan.recipe.tokenizer
    if not isinstance(choice, dict):
        return choice is not None
    changes = expanded(cast(dict[str, Any], choice))
    return all(_is_set(changes, fact, *place(config, key).split(".")) for key in found)


def _is_set(changes: Any, fact: Fact, *path: str) -> bool:
    """Whether changes of a config set what lies at a path."""
    for part in path[:-1]:
        changes = cast(dict[str, Any], changes).get(part) if isinstance(changes, dict) else None
    wanted = rope.spellings(path[-1]) if fact.kind == "rope" else (path[-1],)
    return isinstance(changes, dict) and any(key in changes for key in wanted)


def _outcome(fact: Fact, found: dict[str, tuple[Any, Any]], other: str, chosen: bool) -> str:
    """Say what becomes of an expert's own."""
    if not fact.option:
        return ""
    if chosen:
        return f", as {fact.option} chooses"
    if fact.kind in ("vocabulary", "chat-template") and all(base is None for _, base in found.values()):
        return ", left behind"
    return f"; the merge computes with {other}'s" if fact.level == "warning" else f"; the output has {other}'s"


def _mend(fact: Fact, found: dict[str, tuple[Any, Any]], name: str, config: dict[str, Any]) -> str:
    """Say which key of the recipe takes an expert's own along."""
    if fact.option != "config":
        return f"{fact.option}: {name} takes {name}'s along" if fact.option else ""
    by_value = fact.kind not in ("preprocessor", "generation", "labels", "one-sided", "architecture")
    single = f", config: {{{_setting(fact, next(iter(found)), config)}}} sets it" if by_value else ""
    return f"config: {name} takes {name}'s{single}, config: base says that this is meant"


def _setting(fact: Fact, key: str, config: dict[str, Any]) -> str:
    """Return how a recipe's ``config`` sets a compared key."""
    where = place(config, key)
    outer, dot, leaf = where.rpartition(".")
    if fact.kind == "rope" and "sliding_attention." in key and leaf == "rope_theta":
        leaf = "rope_local_base_freq"
    if fact.kind == "rope" and leaf not in (*rope.KEYS,):
        return f"{outer}{dot}rope_scaling: {{{leaf}: VALUE, ...}}"
    return f"{outer}{dot}{leaf}: VALUE"


def _shown(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, float):
        return f"{value:g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _tokens(name: str, found: dict[str, tuple[Any, Any]], other: str) -> str:
    """Say which tokens an expert adds, has otherwise, or does not have."""
    added = [f"{own!r} ({i})" for i, (own, base) in found.items() if base is None]
    changed = [f"{i} is {own!r}, in {other} {base!r}" for i, (own, base) in found.items() if None not in (own, base)]
    missing = [f"{base!r} ({i})" for i, (own, base) in found.items() if own is None]
    parts: list[str] = []
    for verb, tokens in (("adds", added), ("has otherwise", changed), ("lacks", missing)):
        listed = ", ".join(tokens[:4]) + (", ..." if len(tokens) > 4 else "")
        parts += [f"{verb} {len(tokens)} token{'s' * (len(tokens) != 1)}: {listed}"] if tokens else []
    return f"{name} {'; '.join(parts)}"


def _other_base(expert: Model, base: Model) -> Difference | None:
    comparison, named = compare_base(expert, base)
    shown = expert.reference.partition("+")[0] if expert.checkpoint is not None else base.reference
    if comparison == "same" or not named:
        return None
    if comparison == "other":
        what = f"{expert.name} was trained on {named}, and {shown}, on which it is put, is another model"
        mend = "name that base, or merge the adapter into it first"
        return Difference("other-base", "warning", (expert.name,), what, mend)
    what = f"{expert.name} was trained on {named}, and whether {shown} is the same cannot be told from here"
    return Difference("base-name", "note", (expert.name,), what, "check that the two are the same weights")


def _token_rows(plan: "Plan", base: ModelFiles, experts: list[ModelFiles]) -> list[Difference]:
    """Find rows of the vocabulary that stand for one token here and for another there, and that the merge mixes."""
    tensors = [t for t in plan.tensors if t.program is not None and len(t.shape) == 2 and _holds_tokens(t.name)]
    pairs = [(own, base) for own in experts]
    pairs += [(other, own) for k, own in enumerate(experts) for other in experts[:k]]
    return [found for pair in pairs if (found := _conflict(tensors, *pair, base.name)) is not None]


def _stacked_rows(plan: "Plan") -> list[Difference]:
    """Find embeddings and a head that slices take from models whose rows are other tokens, or of another number."""
    if not plan.recipe.slices:
        return []
    tensors = [t for t in plan.tensors if len(t.shape) == 2 and _holds_tokens(t.name)]
    models = {model.name: model for model in (plan.alignment.donor, plan.base, *plan.experts) if model is not None}
    mend = "let the first and the last slice be of models with one vocabulary"
    for first, last in pairwise(tensors):
        owners = tuple(plan.alignment.owner(tensor.name) for tensor in (first, last))
        if owners[0] == owners[1]:
            continue
        what = f"{last.name!r} is of {owners[1]}, and {first.name!r} of {owners[0]}"
        if first.shape[0] != last.shape[0]:
            what = f"{what}, which have {last.shape[0]} and {first.shape[0]} rows: the vocabularies differ"
            return [Difference("stacked-rows", "error", owners, what, mend)]
        known = [ModelFiles(models[owner]) for owner in owners if owner in models]
        differing = _differing(*known) if len(known) == len(owners) else []
        if differing:
            what += f", and {len(differing)} of their token ids mean two tokens, {differing[0]} the first"
            return [Difference("stacked-tokens", "warning", owners, what, mend)]
    return []


def _without_rows(plan: "Plan", output: ModelFiles) -> list[Difference]:
    """Find tokens of a chosen tokenizer that the output has no row for: a text that holds one would be an error."""
    choice = plan.recipe.tokenizer_model
    rows = [t.shape[0] for t in plan.tensors if len(t.shape) == 2 and _holds_tokens(t.name)]
    if choice in (None, "base") or not rows or output.vocabulary is None:
        return []
    beyond = {i: token for i, token in output.vocabulary.tokens.items() if i >= max(rows)}
    if not beyond:
        return []
    last = max(beyond)
    what = f"tokenizer: {choice} has tokens up to {beyond[last]!r} ({last}), and the output has {max(rows)} rows"
    mend = "choose base, or resize the base's embeddings before merging"
    return [Difference("token-rows", "error", (str(choice),), what, mend)]


def _unknown_keys(plan: "Plan", files: list[ModelFiles]) -> list[Difference]:
    """Find keys of the recipe's ``config`` that no model's config has: mistyped, or of a class that reads them."""
    choice = plan.recipe.config
    if not isinstance(choice, dict):
        return []
    known = sorted({*rope.KEYS, *(key for own in files for key in own.config)})
    what = "config: key {!r} is in no model's config.json{}"
    absent = [key for key in expanded(choice) if key not in known]
    return [Difference("config-key", "note", (), what.format(key, nearest(key, known)), "") for key in absent]


def _holds_tokens(name: str) -> bool:
    return any(part in name for part in _EMBEDDINGS) and not any(part in name for part in _NO_TOKENS)


def _conflict(tensors: "list[TensorPlan]", one: ModelFiles, other: ModelFiles, donor: str) -> Difference | None:
    """Find the first row that two models mean otherwise and both change; the donor's own is in every merge."""
    differing = _differing(one, other)
    if not differing:
        return None
    assert one.vocabulary is not None
    assert other.vocabulary is not None
    first, second = one.vocabulary, other.vocabulary
    names = tuple(name for name in (one.name, other.name) if name != donor)
    for i in differing[:_LOOKED_AT]:
        mixed = [t for t in tensors if i < t.shape[0] and all(_changes(t, name, i) for name in names)]
        if mixed:
            more = f" ({len(differing)} such ids)" if len(differing) > 1 else ""
            what = (
                f"token id {i} is {first.tokens[i]!r} in {one.name} and {second.tokens[i]!r} in {other.name}, and row "
                f"{i} of {mixed[0].name!r} would mix them{more}"
            )
            apart = ", ".join(f"{t.name!r}" for t in tensors)
            mend = f"align rows by token with tokenizer: union, or keep these tensors apart with private: [{apart}]"
            return Difference("token-rows", "error", names, what, mend)
    return None


def _differing(one: ModelFiles, other: ModelFiles) -> list[int]:
    """Return the ids that stand for one token in a model and for another in the other, as far as that can be told."""
    if one.same_tokenizer(other) or one.vocabulary is None or other.vocabulary is None:
        return []
    first, second = one.vocabulary, other.vocabulary
    ids = first.tokens.keys() if first.kind == second.kind else first.added & second.added
    return [
        i for i in sorted(ids)
        if i in first.tokens and i in second.tokens and first.tokens[i] != second.tokens[i]
        and not is_unused(first.tokens[i]) and not is_unused(second.tokens[i])
    ]  # fmt: skip


def _changes(tensor: "TensorPlan", name: str, row: int) -> bool:
    """Whether an expert's row is not the base's."""
    if name not in tensor.row_names:
        return False
    source = tensor.rows[tensor.row_names.index(name)]
    if source.untouched or source.pair is not None or source.dense is None or tensor.base.dense is None:
        return not source.untouched
    rows = [dense.shape[0] if dense.shape else 0 for dense in (source.dense, tensor.base.dense)]
    if row >= rows[0]:
        return False
    if row >= rows[1] or source.dense.dtype != tensor.base.dense.dtype:
        return True
    return _row(source, row) != _row(tensor.base, row)


def _row(source: Source, row: int) -> bytes:
    assert source.dense is not None
    assert source.storage is not None
    width = source.dense.numel // source.dense.shape[0]
    return raw(source.storage, source.dense, row * width, (row + 1) * width).tobytes()
