"""A recipe with values replaced: what options beside a recipe do on the command line, and arguments in Python.

A value for all models replaces the recipe's and every model's own, so that what was asked for counts everywhere; a
value for one model (``math.weight``) replaces that model's alone. Each replacement is told once, with what it replaced
(``Recipe.overrides``), and one that changes nothing or names nothing is an error.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from consilience.checkpoints.dtypes import ALIASES
from consilience.errors import InputError, nearest, option
from consilience.experts.expert_set import expert_names
from consilience.methods.registry import load
from consilience.methods.signature import Method, Parameter
from consilience.recipe.resolve import default_values
from consilience.recipe.schema import DataPaths, Filtered, ModelEntry, Override, Recipe, parse_recipe

#: Keys of a recipe that are no parameters, and the option that gives each.
_OPTIONS = {
    "method": "method", "merge_method": "method", "dtype": "dtype", "out_dtype": "dtype", "seed": "seed",
    "private": "private", "config": "config", "tokenizer": "tokenizer", "chat_template": "chat_template",
    "coefficients": "coefficients", "target": "target",
}  # fmt: skip
#: Parts of a recipe that have parameters of their own, which a value for all would have to replace.
_LAYERED = ("slices", "modules", "stages")


@dataclass(frozen=True)
class _Assignment:
    """A parameter's value for all models, or for one."""

    option: str
    expert: str | None
    key: str
    value: Any


def split_key(key: str) -> tuple[str | None, str]:
    """Return the expert (None: all) and the parameter of ``density``, ``math.density`` or ``experts.math.density``.

    Raises:
        InputError: it has another form.
    """
    if not isinstance(cast(Any, key), str):
        raise InputError(f"the key {key!r} is a {type(key).__name__}; write a parameter's key as text")
    *before, parameter = key.split(".")
    if len(before) == 2 and before[0] == "experts":
        before = before[1:]
    if len(before) > 1 or not all((*before, parameter)):
        raise InputError(f"{_given(key)}: write a parameter's key, or EXPERT.KEY for one expert")
    return (before[0] if before else None), parameter


def override(
    recipe: Recipe,
    parameters: Mapping[str, Any],
    *,
    method: str | None = None,
    data: Mapping[str, Mapping[str, str]] | None = None,
    keys: Mapping[str, Any] | None = None,
    swept: bool = False,
) -> Recipe:
    """Return a recipe with values replaced.

    Args:
        recipe: where the values are replaced; it stays as it is.
        parameters: the method's, by key (``density``, ``math.density``); a mapping as value has one per expert.
        method: another method, with its own defaults; parameters that it does not have are left out, which a note says.
        data: files by expert and key (``{"math": {"calibration": FILE}}``).
        keys: other keys of the recipe (``out_dtype``, ``seed``, ``private``, ``config``, ...).
        swept: the values are a sweep's, of which one may be what the recipe has: that is taken in silence.

    Raises:
        InputError: a key, expert or value is wrong, or changes nothing.
    """
    _check_replaceable(recipe, parameters, method, data, keys, swept)
    if method is not None:
        recipe = _with_method(recipe, method, swept)
    assignments = list(_assignments(parameters, swept))
    for each in sorted(assignments, key=lambda one: one.expert is not None):  # what is for all comes first
        recipe = _with_parameter(recipe, each, swept)
    for name, files in (data or {}).items():
        for key, path in files.items():
            recipe = _with_file(recipe, name, key, path)
    for key, value in (keys or {}).items():
        recipe = _with_key(recipe, key, value, swept)
    return recipe


def _check_replaceable(
    recipe: Recipe,
    parameters: Mapping[str, Any],
    method: str | None,
    data: Mapping[str, Mapping[str, str]] | None,
    keys: Mapping[str, Any] | None,
    swept: bool,
) -> None:
    """Refuse values whose place is not the recipe's alone: each slice, module and stage may have its own.

    Raises:
        InputError: names the first value given, and what the recipe is made of.
    """
    layered = next((key for key in _LAYERED if getattr(recipe, key, None)), None)
    if layered is None:
        return
    asked = [each.option for each in _assignments(parameters, swept)]
    if method is not None:
        asked.append(_given("method", method, swept=True) if swept else option("method", method))
    asked += [option(key, f"{name}={path}") for name, files in (data or {}).items() for key, path in files.items()]
    if layered == "stages":  # keys of the recipe count for all slices and modules, but each stage has its own
        asked += [
            _given(_OPTIONS[key], value, swept=True) if swept else option(_OPTIONS[key], text_of(value))
            for key, value in (keys or {}).items()
        ]
    if asked:
        each = "documents, and each" if layered == "stages" else f"{layered}, and each"
        raise InputError(f"{asked[0]}: {recipe.where} has {each} may have its own; write the value in the recipe")


def _given(key: str, value: Any = None, *, swept: bool = False) -> str:
    """Return how a user gave a parameter: ``--set density=0.3``, or ``density=0.3`` in Python."""
    text = key if value is None else f"{key}={text_of(value)}"
    return option("sweep" if swept else "set", text).removeprefix("set=").removeprefix("sweep=")


def _assignments(parameters: Mapping[str, Any], swept: bool) -> Iterable[_Assignment]:
    if not isinstance(cast(Any, parameters), Mapping):
        raise InputError(f"parameters: is a {type(parameters).__name__}; give a mapping of values by key")
    for key, value in parameters.items():
        if isinstance(value, Mapping):
            for expert, own in cast(Mapping[str, Any], value).items():
                yield _Assignment(_given(f"{expert}.{key}", own, swept=swept), str(expert), key.rstrip("_"), own)
        else:
            expert, parameter = split_key(key)
            yield _Assignment(_given(key, value, swept=swept), expert, parameter.rstrip("_"), value)


def text_of(value: Any) -> str:
    """Return a value in a few words: as YAML has it on one line."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, int | float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)  # two values are never told as one
    if isinstance(value, list | tuple | dict):
        text = json.dumps(plain(value), ensure_ascii=False)
        return text if len(text) <= 80 else f"{text[:77]}..."
    return str(value)


def plain(value: Any) -> Any:
    """Return a recipe's value as JSON has it."""
    if isinstance(value, Filtered):
        return value.model_dump(mode="json")
    if isinstance(value, list | tuple):
        return [plain(each) for each in cast(Iterable[Any], value)]
    return value.model_dump(mode="json", exclude_none=True) if hasattr(value, "model_dump") else value


def _validated(given: str, field: str, value: Any) -> Any:
    """Return a value as a recipe's schema reads it.

    Raises:
        InputError: it is wrong there.
    """
    raw = {"method": "linear", "models": [{"model": "model"}], field: value}
    return getattr(parse_recipe(raw, given), "tokenizer" if field == "tokenizer_source" else field)


def _names(recipe: Recipe) -> list[str]:
    return expert_names([(entry.model, entry.name) for entry in recipe.models], recipe.where)


def _position(recipe: Recipe, expert: str, given: str) -> int:
    names = _names(recipe)
    if expert not in names:
        hint = nearest(expert, names) or f" (they are: {', '.join(names)})"
        raise InputError(f"{given}: there is no expert {expert!r}{hint}")
    return names.index(expert)


def _parameter(method: Method, each: _Assignment) -> Parameter:
    found = method.parameters.get(each.key)
    if found is None and each.expert is None and each.key in _OPTIONS:
        raise InputError(
            f"{each.option}: is no parameter of a method; use {option(_OPTIONS[each.key], text_of(each.value))}"
        )
    if found is None:
        known = list(method.parameters)
        hint = nearest(each.key, known) or f" (it has: {', '.join(known)})"
        raise InputError(f"{each.option}: method {method.name!r} has no parameter {each.key!r}{hint}")
    if each.expert is not None and not found.per_expert:
        raise InputError(f"{each.option}: {each.key} is shared by all experts; leave the expert's name out")
    return found


def _same(one: Any, other: Any) -> bool:
    other = list(cast(tuple[Any, ...], other)) if isinstance(other, tuple) else other
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def _checked(each: _Assignment, parameter: Parameter) -> Any:
    """Return the value as a recipe's schema reads it; values per tensor are checked as the merge is planned.

    Raises:
        InputError: it is none that the parameter takes.
    """
    value = _validated(each.option, "parameters", {each.key: each.value})[each.key]
    problem = None if isinstance(value, list) or parameter.kind == "texts" else parameter.check(value)
    if problem:
        raise InputError(f"{each.option}: {problem}")
    return value


@dataclass(frozen=True)
class _Replacement:
    """What a parameter's new value changes of a recipe: the values that counted before, and those it replaces."""

    changes: dict[str, Any]
    key: str
    before: list[Any]
    replaced: dict[str, Any]
    what: str


def _with_parameter(recipe: Recipe, each: _Assignment, swept: bool) -> Recipe:
    method = load(recipe.merge_method)
    parameter = _parameter(method, each)
    if not parameter.effective:
        raise InputError(f"{each.option}: changes nothing, since {each.key} has no effect in method {method.name!r}")
    value = _checked(each, parameter)
    default = default_values(recipe, method)[each.key]
    entries = zip(_names(recipe), recipe.models, strict=True)
    own = {name: entry.parameters[each.key] for name, entry in entries if each.key in entry.parameters}
    if each.expert is None:
        stays = _given_before(recipe, each.key) if swept else set[str]()
        if own and stays.issuperset(_names(recipe)):
            raise InputError(f"{each.option}: changes nothing, since every expert has a value of its own by --set")
        found = _for_all(recipe, each.key, value, default, own, parameter.per_expert, stays)
    else:
        found = _for_one(recipe, each, each.expert, value, default, own)
    told: list[Override] = []
    if not all(_same(value, one) for one in found.before):
        note = f"{each.option}: replaces {found.what}"
        told.append(Override(each.option, found.key, plain(value), found.replaced, note))
    elif not swept:
        raise InputError(f"{each.option}: changes nothing, since {recipe.where} has that value already; leave it out")
    return recipe.overridden(found.changes, told, mergekit=recipe.mergekit)


def _for_all(
    recipe: Recipe,
    key: str,
    value: Any,
    default: Any,
    own: Mapping[str, Any],
    per_expert: bool,
    stays: Collection[str],
) -> _Replacement:
    """Return a value for all in place of the recipe's and the models' own, but for the models in ``stays``."""
    names = _names(recipe)
    own = {name: each for name, each in own.items() if name not in stays}
    shared = recipe.parameters.get(key, default)
    place = f"parameters.{key}"
    replaced = {place: plain(shared)} if key in recipe.parameters else {}
    replaced |= {f"models.{name}.{place}": plain(each) for name, each in own.items()}
    what = _shared_text(recipe, key, default)
    what += (
        f", and the models' own: {', '.join(f'{name} {text_of(each)}' for name, each in own.items())}" if own else ""
    )
    changes = {
        "parameters": dict(recipe.parameters) | {key: value},
        "models": [
            entry if name in stays else _with_own(entry, key, None)
            for name, entry in zip(names, recipe.models, strict=True)
        ],
    }
    before = [own.get(name, shared) for name in names if name not in stays] if per_expert else [shared]
    return _Replacement(changes, place, before, replaced, what)


def _given_before(recipe: Recipe, key: str) -> set[str]:
    """Return the experts that an earlier option gave a value of their own: it wins over one for all that is swept."""
    if recipe.where == "arguments":  # no file: all that is in it was given by options
        return {name for name, entry in zip(_names(recipe), recipe.models, strict=True) if key in entry.parameters}
    places = {override.key for override in recipe.overrides}
    return {name for name in _names(recipe) if f"models.{name}.parameters.{key}" in places}


def _for_one(
    recipe: Recipe, each: _Assignment, expert: str, value: Any, default: Any, own: Mapping[str, Any]
) -> _Replacement:
    position = _position(recipe, expert, each.option)
    models = list(recipe.models)
    models[position] = _with_own(models[position], each.key, value)
    place = f"models.{expert}.parameters.{each.key}"
    if expert in own:
        before, what = own[expert], f"its own {text_of(own[expert])}"
    else:
        before, what = recipe.parameters.get(each.key, default), _shared_text(recipe, each.key, default)
    replaced = {place: plain(before)} if expert in own else {}
    return _Replacement({"models": models}, place, [before], replaced, what)


def _shared_text(recipe: Recipe, key: str, default: Any) -> str:
    if key in recipe.parameters:
        return f"the recipe's {text_of(recipe.parameters[key])}"
    return f"the default {text_of(default)}"


def _with_own(entry: ModelEntry, key: str, value: Any) -> ModelEntry:
    parameters = {other: old for other, old in entry.parameters.items() if other != key}
    return entry.model_copy(update={"parameters": parameters | ({} if value is None else {key: value})})


def _with_method(recipe: Recipe, name: str, swept: bool) -> Recipe:
    given = _given("method", name, swept=True) if swept else option("method", name)
    try:
        method = load(name)
    except InputError as error:
        raise InputError(f"{given}: {error}") from None
    before = recipe.merge_method
    if name == before:
        if swept:
            return recipe
        raise InputError(f"{given}: changes nothing, since it is the method of {recipe.where}; leave it out")
    unknown = [key for part in (recipe, *recipe.models) for key in part.parameters if key not in method.parameters]
    unknown = list(dict.fromkeys(unknown))
    changes: dict[str, Any] = {"merge_method": name, "parameters": _known(recipe.parameters, method)}
    changes["models"] = [
        entry.model_copy(update={"parameters": _known(entry.parameters, method)}) for entry in recipe.models
    ]
    note = f"{given}: replaces {before}"
    note += ", and takes Consilience's defaults, not mergekit's" if recipe.mergekit and method.mergekit else ""
    note += f"; left out, since {name} has no such parameter: {', '.join(unknown)}" if unknown else ""
    replaced = {"merge_method": before} | {
        f"parameters.{key}": plain(value) for key, value in recipe.parameters.items() if key in unknown
    }
    for model, entry in zip(_names(recipe), recipe.models, strict=True):
        replaced |= {
            f"models.{model}.parameters.{key}": plain(value)
            for key, value in entry.parameters.items()
            if key in unknown
        }
    return recipe.overridden(changes, [Override(given, "merge_method", name, replaced, note)], mergekit=False)


def _known(parameters: Mapping[str, Any], method: Method) -> dict[str, Any]:
    return {key: value for key, value in parameters.items() if key in method.parameters}


def _with_file(recipe: Recipe, expert: str, key: str, path: str) -> Recipe:
    given = option(key, f"{expert}={path}")
    position = _position(recipe, expert, given)
    entry = recipe.models[position]
    before = getattr(entry.data, key) if entry.data is not None else None
    if before == path:
        raise InputError(f"{given}: changes nothing, since {recipe.where} names that file already; leave it out")
    data = (entry.data or DataPaths()).model_copy(update={key: path})
    models = list(recipe.models)
    models[position] = entry.model_copy(update={"data": data})
    place = f"models.{expert}.data.{key}"
    note = f"{given}: replaces {before}" if before is not None else f"{given}: the recipe names none"
    replaced = {place: before} if before is not None else {}
    told = [Override(given, place, path, replaced, note)]
    return recipe.overridden({"models": models}, told, mergekit=recipe.mergekit)


def _with_key(recipe: Recipe, key: str, value: Any, swept: bool) -> Recipe:
    given = _given(_OPTIONS[key], value, swept=True) if swept else option(_OPTIONS[key], text_of(value))
    value = _validated(given, key, value)
    before = recipe.output_dtype if key == "out_dtype" else getattr(recipe, key)
    same = ALIASES[value] == before if key == "out_dtype" and value is not None else _same(value, before)
    if same:
        if swept:
            return recipe
        raise InputError(f"{given}: changes nothing, since {recipe.where} has that value already; leave it out")
    written = (recipe.out_dtype or recipe.dtype) if key == "out_dtype" else before
    stated = key == "seed" or written not in (None, [])
    note = f"{given}: replaces {text_of(plain(written))}" if stated else f"{given}: the recipe leaves {key} out"
    replaced = {key: plain(written)} if stated else {}
    told = [Override(given, key, plain(value), replaced, note)]
    return recipe.overridden({key: value}, told, mergekit=recipe.mergekit)
