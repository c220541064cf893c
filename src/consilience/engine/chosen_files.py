"""The files beside the weights that a recipe takes from another model than the base, and what it writes into them.

``config`` chooses config.json, the generation config and the preprocessor; ``tokenizer`` the tokenizer's files and
the ids of its special tokens in both configs; ``chat_template`` the template. Each names a model, by default ``base``;
a template follows its tokenizer unless it is chosen itself.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from consilience.checkpoints.json_files import read_object
from consilience.engine.templates import AUTO, NAMES, is_literal, resolved_template
from consilience.errors import InputError, nearest
from consilience.experts import rope
from consilience.experts.config_parts import expanded, language_part, nested_like
from consilience.experts.model import Model
from consilience.experts.model_files import PROCESSOR_FILES, SPECIAL_IDS, ModelFiles, special_ids
from consilience.experts.ties import SCALED_OUTPUTS, scales_outputs
from consilience.experts.token_map import TokenChoice
from consilience.experts.vocabulary import TEMPLATES, is_tokenizer_file
from consilience.recipe.schema import Recipe
from consilience.recipe.tokens import UNION, TokenizerChoice

if TYPE_CHECKING:
    from consilience.engine.plan import Plan

#: Keys of config.json that describe the output's tensors and storage, or code that comes along: always the base's.
_THE_BASE_S = (
    "dtype", "torch_dtype", "tie_word_embeddings", "vocab_size", "auto_map",
    "quantization_config", "compression_config", "architectures",
    "_name_or_path", *SPECIAL_IDS,
)  # fmt: skip
_ROLE_IDS = {f"{role}_token_id": f"{role}_token" for role in ("bos", "eos", "pad", "sep")}
#: Keys whose values are ids of tokens, or lists of them.
_IDS = re.compile(r"_token_ids?$|_token_index$|^(begin_)?suppress_tokens$|^bad_words_ids$")
_GENERATION, _TOKENIZER = "generation_config.json", "tokenizer_config.json"


@dataclass
class ChosenFiles:
    """What of the base's files does not come along, and what comes instead: files of other models, and new content.

    Names are relative to the output's folder; those in ``left`` may be folders.
    """

    left: set[str] = field(default_factory=set[str])
    copied: dict[str, Path] = field(default_factory=dict[str, Path])
    written: dict[str, dict[str, Any] | str] = field(default_factory=dict[str, dict[str, Any] | str])

    def replaces(self, name: Path) -> bool:
        """Whether a file of the base does not come along as it is."""
        return name.parts[0] in self.left or str(name) in self.copied or str(name) in self.written

    def replace(self, names: set[str], folder: Path | None) -> None:
        """Leave files behind, and copy those of a folder that have the same purpose."""
        self.left |= names
        for name in sorted(names):
            place = None if folder is None else folder / name
            files = sorted(place.rglob("*")) if place is not None and place.is_dir() else [place] if place else []
            self.copied |= {str(p.relative_to(cast(Path, folder))): p for p in files if p.is_file()}


def check_choices(recipe: Recipe, models: list[Model], where: str, *, by_token: bool = False) -> None:
    """Refuse choices of models that are not there or that have nothing to choose.

    Args:
        recipe: what was chosen.
        models: all models, the base first.
        where: how errors name the recipe.
        by_token: whether whoever merges aligns rows by token, as a union and single tokens need.

    Raises:
        InputError: names the key.
    """
    if not by_token and (recipe.tokenizer_source == UNION or isinstance(recipe.tokenizer, TokenizerChoice)):
        raise InputError(
            f"{where}: tokenizer: rows are aligned by token where whole models are merged ('models:'); here name base, "
            "or a model whose ids the others share"
        )
    for key in ("config", "tokenizer", "chat_template"):
        value: Any = recipe.tokenizer_model if key == "tokenizer" else getattr(recipe, key)
        value = resolved_template(recipe.chat_template, models, where) if key == "chat_template" else value
        if value is None:
            continue
        if models[0].folder is None:
            raise InputError(
                f"{where}: {key}: {models[0].reference} is a file without a config or tokenizer; name a folder"
            )
        if isinstance(value, str) and not (key == "chat_template" and is_literal(value)):
            files = ModelFiles(named_model(models, value, f"{where}: {key}"))
            _check_holds(files, key, f"{where}: {key}: {value!r}")
        elif key == "config" and not (models[0].folder / "config.json").is_file():
            raise InputError(f"{where}: config: the base {models[0].reference} has no config.json; add it")
        elif key == "config":
            _check_places(expanded(cast(Mapping[str, Any], value)), ModelFiles(models[0]).config, f"{where}: config")


def _check_places(changes: dict[str, Any], config: dict[str, Any], where: str) -> None:
    """Refuse a key beside the config of the language model that reads it: it would have no effect."""
    part = language_part(config)
    if part is None:
        return
    rotary = rope.KEYS if rope.rope(config) is None and rope.rope(config[part]) is not None else ()
    for key in changes:
        if key not in config and key != "model_type" and (key in config[part] or key in rotary):
            raise InputError(
                f"{where}: the base's config.json has {key!r} inside {part}, and it has no effect beside it; "
                f"write {part}.{key}"
            )


def _check_holds(files: ModelFiles, key: str, where: str) -> None:
    if key == "config" and not files.config:
        raise InputError(f"{where} has no config.json to take; name a full model, or write the values as key: value")
    if key == "tokenizer" and files.tokenizer_folder is None:
        raise InputError(f"{where} has no tokenizer to take; name a model whose folder has one")
    if key == "chat_template" and not files.templates:
        raise InputError(f"{where} has no chat template to take; name a model whose folder has one")


def named_model(models: Sequence[Model], name: str, where: str) -> Model:
    """Return the model that a recipe calls by its name or reference, or ``base``, which is the first.

    Raises:
        InputError: there is none; ``where`` names the key.
    """
    if name == "base":
        return models[0]
    for model in models:
        if name in (model.name, model.reference):
            return model
    known = ["base", *(model.name for model in models[1:])]
    close = [*known, *((AUTO, *NAMES) if where.endswith("chat_template") else ())]
    formats = f", or a format: {AUTO}, {', '.join(NAMES)}; or write the template itself"
    own = formats if where.endswith("chat_template") else ", or union" if where.endswith("tokenizer") else ""
    hint = nearest(name, close) or f"; name one of {', '.join(known)}{own}"
    raise InputError(f"{where}: there is no model {name!r}{hint}")


def _models(plan: "Plan") -> list[Model]:
    donor = plan.alignment.donor
    return [donor, *(model for model in plan.models if model is not donor)]


def _template(plan: "Plan") -> str | None:
    return resolved_template(plan.recipe.chat_template, _models(plan), plan.where)


def _choice(plan: "Plan", name: object) -> ModelFiles | None:
    """Return the files of the model that a key names; None for the base's own."""
    if not isinstance(name, str):
        return None
    model = named_model(_models(plan), name, plan.where)
    return None if model is plan.alignment.donor else ModelFiles(model)


def files_of_output(plan: "Plan") -> ModelFiles:
    """Return the facts of the output: the base's, as far as the recipe chooses no other model's."""
    files = ModelFiles(plan.alignment.donor)
    config, tokenizer = _choice(plan, plan.recipe.config), _choice(plan, plan.recipe.tokenizer_model)
    template = _template(plan)
    chosen_config, chosen_generation = output_configs(plan)
    if config is not None:
        files.processor = config.processor
    if tokenizer is not None:
        files.tokenizer_folder, files.template_folder = tokenizer.tokenizer_folder, tokenizer.template_folder
    if template is not None and not is_literal(template):
        named = _choice(plan, template) or ModelFiles(plan.alignment.donor)
        files.template_folder = named.template_folder
    elif template is not None:
        files.templates = {"default": template.strip()}
    files.config, files.generation = chosen_config, chosen_generation
    return files


def output_configs(plan: "Plan") -> tuple[dict[str, Any], dict[str, Any]]:
    """Return config.json and generation_config.json as the recipe chooses them, {} for one that is not there."""
    base, recipe = ModelFiles(plan.alignment.donor), plan.recipe
    config, generation = _stacked(plan, base), _in_output(plan, base.name, base.generation)
    chosen = _choice(plan, recipe.config)
    if chosen is not None:
        config = _taken(config, _as_stacked(plan, _in_output(plan, chosen.name, chosen.config), config))
        own = {key: generation[key] for key in SPECIAL_IDS if key in generation}
        theirs = _in_output(plan, chosen.name, chosen.generation)
        generation = {key: v for key, v in theirs.items() if key not in SPECIAL_IDS} | own
    elif isinstance(recipe.config, Mapping):
        config = _changed(config, recipe.config)
    tokens = _choice(plan, recipe.tokenizer_model)
    if tokens is not None:
        ids = _token_ids(tokens, base)
        config = _with_ids(config, ids)
        if generation or any(len(value) > 1 for value in ids.values()):
            generation |= {key: value if len(value) > 1 else value[0] for key, value in ids.items()}
    return config, generation


def _in_output(plan: "Plan", name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a model's config whose token ids are the output's: of the same tokens."""
    tokens = plan.alignment.tokens
    return copy.deepcopy(config) if tokens is None else translated(config, tokens.choice, name)


def _stacked(plan: "Plan", base: ModelFiles) -> dict[str, Any]:
    """Return the base's config, with the output's layers where these are stacked of several models'."""
    config = _in_output(plan, base.name, base.config)
    if plan.stacking is None or not config:
        return config
    try:
        return plan.stacking.config(config)
    except InputError as error:
        raise InputError(f"{plan.where}: {error}") from None


def _as_stacked(plan: "Plan", config: dict[str, Any], stacked: dict[str, Any]) -> dict[str, Any]:
    return config if plan.stacking is None else plan.stacking.own_config(config, stacked)


def _taken(base: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    """Return another model's config with what describes the base's tensors."""
    base, chosen = nested_like(base, chosen), nested_like(chosen, base)
    inner = language_part(base), language_part(chosen)
    if inner[0] is not None and inner[1] is None:
        return base | {inner[0]: _taken(base[inner[0]], {k: v for k, v in chosen.items() if k != "model_type"})}
    if inner[1] is not None and inner[0] is None:
        return _taken(base, {k: v for k, v in chosen[inner[1]].items() if k != "model_type"})
    kept = {key: base[key] for key in _THE_BASE_S if key in base}
    found = {key: copy.deepcopy(value) for key, value in chosen.items() if key not in _THE_BASE_S} | kept
    for key, value in found.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict) and key.endswith("_config"):
            found[key] = _taken(base[key], cast(dict[str, Any], value))
    found = {"model_type": base["model_type"], **found} if "model_type" in base else found
    scaled = scales_outputs(chosen)  # T5's flag of ties is the base's, and says this too
    return found if scaled in (None, scales_outputs(found)) else found | {SCALED_OUTPUTS: scaled}


def _changed(config: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with some values replaced; mappings are followed inside."""
    found = dict(config)
    for key, value in rope.spelled_like(expanded(changes), config).items():
        inside = found.get(key)
        both = isinstance(value, Mapping) and isinstance(inside, dict)
        found[key] = _changed(cast(dict[str, Any], inside), cast(Mapping[str, Any], value)) if both else value
    return found


def translated(config: Mapping[str, Any], choice: TokenChoice, name: str) -> dict[str, Any]:
    """Return a model's config with the output's ids of its tokens; an id whose token the output lacks is left out."""
    own = {number: token for token, number in choice.vocabularies[name].items()}

    def ids(value: Any) -> Any:
        if isinstance(value, list):
            return [each for each in map(ids, cast(list[Any], value)) if each is not None]
        if type(value) is not int or value not in own:
            return value  # a marker such as -1, or a row without a token
        return choice.ids.get(own[value])

    def part(values: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in values.items():
            inner = part(cast(dict[str, Any], value)) if isinstance(value, dict) else copy.deepcopy(value)
            found[key] = ids(value) if _IDS.search(key) and not isinstance(value, dict) else inner
        return found

    return part(config)


def _token_ids(files: ModelFiles, base: ModelFiles) -> dict[str, list[int]]:
    """Return the ids of a model's special tokens; an adapter has no config, so its tokenizer's roles tell."""
    stated = special_ids(files) if files.config else {}
    own, other = files.vocabulary, base.vocabulary
    if files.config or own is None:
        return stated
    for key, role in _ROLE_IDS.items():
        token = own.roles.get(role)
        if isinstance(token, str) and (other is None or token != other.roles.get(role)):
            number = own.id_of(token)
            stated |= {} if number is None else {key: [number]}
    return stated


def _with_ids(config: dict[str, Any], ids: dict[str, list[int]]) -> dict[str, Any]:
    """Return a config with token ids: those that it has, in the language model's config where it is inside."""
    first = {key: value[0] for key, value in ids.items()}
    inner = {
        name: cast(dict[str, Any], part) | {key: value for key, value in first.items() if key in part}
        for name in ("text_config", "llm_config")
        if isinstance(part := config.get(name), dict)
    }
    return config | {key: value for key, value in first.items() if key in config or not inner} | inner


def chosen_files(plan: "Plan") -> ChosenFiles:
    """Return what of the base's files a recipe replaces; config.json is ``output_configs``'."""
    recipe, found = plan.recipe, ChosenFiles()
    config, generation = _choice(plan, recipe.config), output_configs(plan)[1]
    if config is not None:
        found.replace(set(PROCESSOR_FILES), config.config_folder if config.processor else None)
        if not config.processor:
            found.left -= set(PROCESSOR_FILES)
    if generation != ModelFiles(plan.alignment.donor).generation:
        found.left.add(_GENERATION)
        found.written |= {_GENERATION: generation} if generation else {}
    choose_tokens(plan, found)
    _add_made(plan, found)
    return found


def _add_made(plan: "Plan", found: ChosenFiles) -> None:
    """Add the files of a tokenizer that is in no model's folder: a union, or one with tokens of the recipe's."""
    tokens = plan.alignment.tokens
    if tokens is None or not tokens.choice.files:
        return
    for name in tokens.choice.left:
        found.left.add(name)
        found.copied.pop(name, None)
    for name, content in tokens.choice.files.items():
        found.copied.pop(name, None)
        chosen = found.written.get(name)
        if isinstance(chosen, dict):  # the settings, with the template that was chosen
            own = {key: value for key, value in content.items() if key != "chat_template"}
            content = own | ({"chat_template": chosen["chat_template"]} if "chat_template" in chosen else {})
        found.written[name] = content


def adapter_files(plan: "Plan") -> ChosenFiles:
    """Return the files that an adapter gets: the tokenizer that a recipe chooses, or a chat template alone."""
    found = ChosenFiles()
    if plan.recipe.tokenizer_model not in (None, "base"):
        choose_tokens(plan, found)
    elif _template(plan) not in (None, "base", plan.alignment.donor.name):
        found.written["chat_template.jinja"] = (files_of_output(plan).templates or {}).get("default", "")
    return found


def choose_tokens(plan: "Plan", found: ChosenFiles) -> None:
    """Add what a recipe's ``tokenizer`` and ``chat_template`` take from other models."""
    recipe, donor = plan.recipe, ModelFiles(plan.alignment.donor)
    tokens = _choice(plan, recipe.tokenizer_model)
    template = _template(plan)
    if tokens is None and (template is None or template == "base"):
        return
    source = (tokens or donor).tokenizer_folder or plan.alignment.donor.folder
    assert source is not None
    settings = _settings(source)
    if tokens is not None:
        names = {path.name for folder in (donor.tokenizer_folder, source) if folder for path in folder.iterdir()}
        found.replace({name for name in names if is_tokenizer_file(name)}, source)
    literal = template is not None and is_literal(template)
    named = None if literal else (tokens or donor) if template is None else (_choice(plan, template) or donor)
    folder = None if named is None else named.template_folder
    found.replace(set(TEMPLATES), folder)
    settings.pop("chat_template", None)
    if template is not None and literal:
        found.written["chat_template.jinja"] = template
    elif folder is not None and "chat_template" in (own := _settings(folder)):
        settings["chat_template"] = own["chat_template"]
    if settings:
        found.copied.pop(_TOKENIZER, None)
        found.written[_TOKENIZER] = settings


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / _TOKENIZER
    return read_object(path) if path.is_file() else {}
