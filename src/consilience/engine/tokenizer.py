"""The output's vocabulary, as a recipe's ``tokenizer`` chooses it, and the files of a tokenizer that has it.

A union keeps the ids of the base's tokens. The other models' follow, in the order of the models and of their ids: first
tokens that are cut from text by rules, then added ones. All of them become added tokens: text is cut by the base's
rules, and a token of another model is met where it stands literally.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from consilience.checkpoints.json_files import read_object
from consilience.engine.chosen_files import check_choices, named_model
from consilience.engine.tokenizer_files import TokenizerFiles, without_tokenizer
from consilience.errors import InputError
from consilience.experts.align import Alignment
from consilience.experts.model import Model
from consilience.experts.model_files import ModelFiles
from consilience.experts.token_map import Ids, Rule, TokenChoice, vocabulary_names
from consilience.methods.signature import Method
from consilience.recipe.schema import Recipe
from consilience.recipe.tokens import UNION, TokenizerChoice, TokenSource

_JSON, _SETTINGS, _ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
#: How a plain token is added, as the tokenizers library does by default.
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
#: Files of a tokenizer that hold its vocabulary another time: after tokens were added they would contradict it.
_SLOW = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def token_choice(recipe: Recipe, base: Model | None, experts: Sequence[Model], where: str) -> TokenChoice | None:
    """Return the vocabulary that a recipe's ``tokenizer`` chooses; None: it chooses none, or all models have one.

    Raises:
        InputError: a model or token is not there, or a tokenizer that is needed is missing or cannot be read.
    """
    donor = base or experts[0]
    if recipe.tokenizer is None or donor.checkpoint is None:
        return None
    models = [donor, *(model for model in experts if model is not donor)]
    check_choices(recipe, models, where, by_token=True)
    choice = recipe.tokenizer if isinstance(recipe.tokenizer, TokenizerChoice) else TokenizerChoice(recipe.tokenizer)
    place = f"{where}: tokenizer"
    reference = named_model(models, str(recipe.tokenizer_model), place)
    files = {model.name: ModelFiles(model) for model in models}
    if _one_for_all(files, choice):
        return None
    found, notes = _tokenizers(models, files, place, choice.source)
    own = found[reference.name]
    vocabularies = {name: each.ids for name, each in found.items()}
    added: dict[str, dict[str, Any]] = {}
    if choice.source == UNION:
        added = _union(reference, models, found)
    unknown = [token for token in choice.tokens if token not in own.ids and token not in added]
    added |= {token: dict(_PLAIN) for token in unknown}
    ids, new = _numbered(own.ids, added)
    rules = {
        token: rule
        for token, source in choice.tokens.items()
        if (rule := _rule(token, source, models, vocabularies, f"{place}: tokens: {token!r}")) is not None
    }
    promoted = {token: flags for token, flags in added.items() if token in own.ids}
    written, left = ({}, frozenset[str]()) if not added else _files(own, {t: added[t] for t in (*new, *promoted)}, ids)
    plain = sum(not flags["special"] and flags["normalized"] for token, flags in added.items() if token in new)
    if plain - len(unknown) > 0:
        notes.append(
            f"{plain - len(unknown)} of the union's tokens are cut from text by rules of other models' tokenizers; the "
            f"output cuts by {reference.name}'s, and meets those tokens only where they stand literally"
        )
    return TokenChoice(
        label=choice.source if choice.source == UNION else reference.name,
        reference=reference.name,
        ids=ids,
        vocabularies=vocabularies,
        rules=rules,
        added=tuple(new),
        multiple=choice.pad_to_multiple_of,
        files=written,
        left=left,
        notes=tuple(notes),
        where=where,
    )


def check_own_rows(alignment: Alignment, method: Method, where: str) -> None:
    """Refuse a method that measures experts by the rows of their own vocabularies where these are aligned by token.

    Raises:
        InputError: names the method.
    """
    tokens = alignment.tokens
    if tokens is not None and tokens.changes and (method.statistics == "fisher" or method.collect is not None):
        raise InputError(
            f"{where}: tokenizer: {tokens.choice.label} gives models other rows than their own, by which method "
            f"{method.name!r} measures them; leave tokenizer out, or choose another method"
        )


def _one_for_all(files: Mapping[str, ModelFiles], choice: TokenizerChoice) -> bool:
    """Whether all tokenizers are the same to the byte, or not there, and nothing is asked for besides."""
    if choice.tokens or choice.pad_to_multiple_of is not None:
        return False
    held = [own for own in files.values() if own.tokenizer_folder is not None]
    rows = {own.config.get("vocab_size") for own in files.values() if own.config}
    return len(rows) <= 1 and all(own.same_tokenizer(held[0]) for own in held)


def _tokenizers(
    models: Sequence[Model], files: Mapping[str, ModelFiles], place: str, source: str
) -> tuple[dict[str, TokenizerFiles], list[str]]:
    """Return every model's tokenizer; an adapter or a model without one has the first model's."""
    known: dict[Any, TokenizerFiles] = {}
    found: dict[str, TokenizerFiles] = {}
    notes: list[str] = []
    for model in models:
        folder = files[model.name].tokenizer_folder
        if folder is not None:
            key = files[model.name].tokenizer_digest
            if key not in known:
                known[key] = TokenizerFiles(folder, model.reference)
            found[model.name] = known[key]
            continue
        first = models[0]
        if model is first:
            raise InputError(f"{place}: {source}: {without_tokenizer(model.reference)}")
        _check_same_rows(model, first, place)
        found[model.name] = found[first.name]
        if model.checkpoint is not None:
            notes.append(f"{model.name}: has no tokenizer, and is taken to have {first.name}'s")
    return found, notes


def _check_same_rows(model: Model, first: Model, place: str) -> None:
    """Refuse a model without a tokenizer whose number of rows says that it had another than the first model's."""
    if model.checkpoint is None:
        return
    counts: list[int] = []
    for one in (model, first):
        names = vocabulary_names(one)
        counts += [one.named[names[0]].shape[0]] if names else []
    if len(set(counts)) > 1:
        raise InputError(
            f"{place}: {without_tokenizer(model.reference)}; its {counts[0]} rows are not {first.name}'s {counts[1]}, "
            "so it cannot have had the same"
        )


def _union(reference: Model, models: Sequence[Model], found: Mapping[str, TokenizerFiles]) -> dict[str, dict[str, Any]]:
    """Return what the other models' tokenizers add to the base's, with how they add it, in the order of new ids."""
    own = found[reference.name]
    others = {id(found[m.name]): (found[m.name], m) for m in models if found[m.name] is not own}.values()
    plain: dict[str, dict[str, Any]] = {}
    special: dict[str, dict[str, Any]] = {}
    for other, model in others:
        names = vocabulary_names(model) if model.checkpoint is not None else []
        rows = model.named[names[0]].shape[0] if names else max(other.ids.values(), default=0) + 1
        for token, number in sorted(other.ids.items(), key=lambda entry: entry[1]):
            if number >= rows:
                continue  # no row: the model cannot have learned it
            if token in other.added:
                special.setdefault(token, other.added[token])
            elif token not in own.ids:
                plain.setdefault(token, dict(_PLAIN))
    special = {token: flags for token, flags in special.items() if token not in own.added}
    return {token: flags for token, flags in plain.items() if token not in special} | special


def _numbered(own: Ids, added: Mapping[str, Any]) -> tuple[dict[str, int], list[str]]:
    """Return the ids of the output and which tokens are new: their ids follow the highest."""
    ids = dict(own)
    following = max(ids.values(), default=-1) + 1
    new = [token for token in added if token not in ids]
    ids |= {token: following + number for number, token in enumerate(new)}
    return ids, new


def _rule(
    token: str, source: TokenSource, models: Sequence[Model], vocabularies: Mapping[str, Ids], place: str
) -> Rule | None:
    if source.kind == "default":
        return None
    if source.kind == "zero":
        return Rule(None, 0, source.force)
    model = named_model(models, source.model, place)
    ids = vocabularies[model.name]
    wanted = token if source.kind == "model" else source.token
    number = source.token_id if wanted is None else ids.get(wanted)
    if number is None:
        mend = "" if source.kind == "model_token" else "; name a token that it has: {kind: model_token, model, token}"
        raise InputError(f"{place}: {model.name} has no token {wanted!r}{mend}")
    return Rule(model.name, number, source.force)


def _files(
    own: TokenizerFiles, added: Mapping[str, Mapping[str, Any]], ids: Ids
) -> tuple[dict[str, Any], frozenset[str]]:
    """Return the tokenizer's files with tokens added, and those of its old files that would contradict them."""
    entries = [{"id": ids[token], "content": token} | dict(flags) for token, flags in added.items()]
    document = dict(own.document)
    listed = cast(list[dict[str, Any]], document.get("added_tokens") or [])
    document["added_tokens"] = sorted([*listed, *entries], key=lambda entry: cast(int, entry["id"]))
    files: dict[str, Any] = {_JSON: json.dumps(document, ensure_ascii=False, separators=(",", ":"))}
    settings = dict(own.settings)
    decoder: Any = settings.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        more = {str(entry["id"]): {key: value for key, value in entry.items() if key != "id"} for entry in entries}
        settings["added_tokens_decoder"] = cast(dict[str, Any], decoder) | more
    if settings:
        files[_SETTINGS] = settings
    beside = own.folder / _ADDED
    if beside.is_file():
        files[_ADDED] = read_object(beside) | {token: ids[token] for token in added}
    return files, frozenset(path.name for path in own.folder.iterdir() if path.name in _SLOW)
