"""What to merge, as data. A mergekit recipe is a valid recipe, whichever form it has."""

import json
import math
import operator
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PlainSerializer,
    PlainValidator,
    PrivateAttr,
    Strict,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from consilience.checkpoints.dtypes import ALIASES
from consilience.errors import InputError, nearest
from consilience.recipe.tokens import BASE, UNION, TokenizerChoice, read_choice, written_choice
from consilience.recipe.unused_keys import without_unknown

Scalar = bool | float | str


def _path_text(value: Any) -> Any:
    """Return a path object as text."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _visible(name: str) -> str:
    if name != name.strip():
        raise ValueError(f"{name!r} begins or ends with a space; rename it")
    return name


def _stage_name(name: str) -> str:
    if name[0] == "." or any(character in "/\\+" or not character.isprintable() for character in name):
        raise ValueError(f"{name!r} must not begin with '.' or hold '/', '\\', '+' or control characters; rename it")
    return _visible(name)


def _whole(value: Any) -> Any:
    """Return an integer of any library as Python's."""
    return operator.index(value) if hasattr(value, "__index__") and not isinstance(value, bool) else value


def _listed(value: Any) -> Any:
    """Return one glob as a list of it."""
    return [value] if isinstance(value, str) else value


#: The dtypes that a merge writes.
WRITTEN = ("float32", "float16", "bfloat16", "float64")


def _dtype(value: Any) -> str | None:
    """Return the name of a dtype given as text or as torch's or numpy's."""
    if value is None:
        return None
    name = value if isinstance(value, str) else getattr(value, "__name__", None) or getattr(value, "name", None)
    text = str(name or value).removeprefix("torch.")
    if text not in ALIASES:
        raise ValueError(f"{text!r} is not one of {', '.join(WRITTEN)}{nearest(text, WRITTEN, cutoff=0.8)}")
    return text


#: Besides what would be misread in a path or a parameter, no control characters nor what YAML takes for a line break.
Name = Annotated[
    str,
    Field(max_length=100, pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff/\\.=]+$"),
    AfterValidator(_visible),
]
#: What is made of one document of several.
StageName = Annotated[str, Field(min_length=1, max_length=100), AfterValidator(_stage_name)]
PathText = Annotated[str, Field(min_length=1), BeforeValidator(_path_text)]
DtypeName = Annotated[str | None, PlainValidator(_dtype)]


def _name_or_values(value: Any) -> Any:
    if not isinstance(value, str | dict | None):
        raise ValueError("must be base, a model's name, or a mapping of config.json's keys: write it as key: value")
    return value


def _json(value: Any) -> Any:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"must hold what JSON can ({error}); quote dates") from None
    return value


#: A model of the merge by its name or reference, or ``base``.
Choice = Annotated[str, Strict(), Field(min_length=1)]


class Closed(BaseModel):
    """A mapping without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Filtered(Closed):
    """A value for the tensors whose name matches ``filter`` (substring, glob with ``*`` or ``?``, or ``re:`` regex)."""

    filter: str | None = None
    value: Scalar | list[float]


def _plain(value: Any) -> Any:
    """Return numbers and arrays of numpy and torch as Python's, and a tuple as a list."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return list(cast(tuple[Any, ...], value)) if isinstance(value, tuple) else value


def _scalar(value: Any) -> Scalar:
    value = _plain(value)
    if isinstance(value, bool | str):
        return value
    try:
        number = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"must be {_KINDS}")
    return number


def _filtered(value: Any, number: int) -> Filtered:
    if isinstance(value, Filtered):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"entry {number} is no filter/value mapping, as others are; write all of them so")
    entry = cast(dict[Any, Any], value)
    for key in entry:
        if key not in Filtered.model_fields:
            raise ValueError(f"entry {number}: unknown key {key!r}{nearest(str(key), list(Filtered.model_fields))}")
    pattern, given = entry.get("filter"), _plain(entry.get("value"))
    if "value" not in entry:
        raise ValueError(f"entry {number}: value is missing; add it")
    if not isinstance(pattern, str | None):
        raise ValueError(f"entry {number}: filter {pattern!r} must be text; quote it")
    if pattern in ("", "re:"):
        raise ValueError(f"entry {number}: filter {pattern!r} is empty; leave filter out to mean all other tensors")
    return Filtered(filter=pattern, value=_numbers(given) if isinstance(given, list) else _scalar(given))


def _numbers(values: list[Any]) -> list[float]:
    scalars = [_scalar(each) for each in values]
    if not scalars or any(isinstance(each, bool | str) for each in scalars):
        raise ValueError(f"must be {_KINDS}")
    return cast(list[float], scalars)


def _setting(value: Any) -> Any:
    """Return a parameter's value as it is kept; the words of its errors follow the parameter's place."""
    value = _plain(value)
    if isinstance(value, dict) and "filter" in value:
        value = [value]
    if not isinstance(value, list):
        return _scalar(value)
    values = cast(list[Any], value)
    if any(isinstance(each, dict | Filtered) for each in values):
        return [_filtered(each, number) for number, each in enumerate(values)]
    if values and all(isinstance(each, str) for each in values):
        return values
    return _numbers(values)


def _written(value: Any) -> Any:
    """Return a parameter's value as plain values, the way a recipe has it."""
    if not isinstance(value, list):
        return value
    entries = cast(list[Any], value)
    return [each.model_dump(exclude_defaults=True) if isinstance(each, Filtered) else each for each in entries]


#: What a parameter may be.
_KINDS = "a finite number, true/false, a word, a list of numbers, or a list of filter/value"
Setting = Annotated[
    Scalar | list[float] | list[str] | list[Filtered], PlainValidator(_setting), PlainSerializer(_written)
]


class DataPaths(Closed):
    """Files that belong to one expert; learned methods read them."""

    calibration: PathText | None = None
    train: PathText | None = None
    validation: PathText | None = None
    probe: PathText | None = None
    logs: PathText | None = None
    statistics: PathText | None = None


class Target(Closed):
    """The labelled target data of methods that minimise a loss."""

    train: PathText | None = None
    validation: PathText | None = None


class ModelEntry(Closed):
    """One model of the merge."""

    model: PathText
    name: Name | None = None
    parameters: dict[str, Setting] = {}
    data: DataPaths | None = None


@dataclass(frozen=True, slots=True)
class Override:
    """A value of a recipe that was replaced after it was read.

    Attributes:
        option: how it was asked for (``--set density=0.3``).
        key: the place of the new value (``parameters.density``, ``models.math.parameters.weight``, ``out_dtype``).
        value: the new value.
        replaced: the values that no longer count, by their places.
        note: all this in words.
    """

    option: str
    key: str
    value: Any
    replaced: dict[str, Any]
    note: str


def _layer_range(value: Any) -> tuple[int, int]:
    numbers = [_whole(each) for each in cast(list[Any], _plain(value))] if isinstance(value, list | tuple) else []
    if len(numbers) != 2 or any(not isinstance(each, int) or isinstance(each, bool) for each in numbers):
        raise ValueError("must be two whole numbers, the first layer and the last + 1: write it as [0, 8]")
    first, stop = numbers
    if not 0 <= first < stop:
        raise ValueError(f"[{first}, {stop}] holds no layer; the first counts from 0 and lies before the last + 1")
    return first, stop


class SliceSource(Closed):
    """Layers of one model that a slice is made of: from the first of ``layer_range`` to before the second."""

    model: PathText
    layer_range: Annotated[tuple[int, int], PlainValidator(_layer_range), PlainSerializer(list)]
    parameters: dict[str, Setting] = {}


class Slice(Closed):
    """Layers of the output: the merge of as many layers of each source; ``base_model`` in place of the recipe's."""

    sources: list[SliceSource] = Field(min_length=1, max_length=1000)
    base_model: PathText | None = None
    parameters: dict[str, Setting] = {}


def _one_form(recipe: "Recipe | Module", forms: tuple[str, ...]) -> None:
    """Refuse no form, and several, of saying what to merge."""
    given = [form for form in forms if getattr(recipe, form)]
    if len(given) > 1:
        raise ValueError(f"has {given[0]} and {given[1]}, which both say what to merge; keep one")
    if not given:
        raise ValueError(
            f"names no model: {forms[0]} is missing; add it{', or ' if len(forms) > 1 else ''}"
            + (" or ".join(forms[1:]))
        )


class Module(Closed):
    """What one part of the models, such as ``text_decoder``, is merged from: whole models, or slices of its layers."""

    slices: list[Slice] = Field(default=[], min_length=1, max_length=10_000)
    models: list[ModelEntry] = Field(default=[], min_length=1, max_length=1000)
    parameters: dict[str, Setting] = {}

    @model_validator(mode="after")
    def _either(self) -> Self:
        _one_form(self, ("models", "slices"))
        return self


class Recipe(Closed):
    """A merge: method, base, models, parameters, output dtype, seed; whose config, tokenizer and template it has.

    What is merged is said by one of ``models`` (whole models), ``slices`` (of their layers) and ``modules`` (parts).
    """

    merge_method: str = Field(alias="method", default="")
    name: StageName | None = None
    base_model: PathText | None = None
    models: list[ModelEntry] = Field(default=[], min_length=1, max_length=1000)
    slices: list[Slice] = Field(default=[], min_length=1, max_length=10_000)
    modules: dict[Annotated[str, Strict()], Module] = Field(default={}, min_length=1)
    parameters: dict[str, Setting] = {}
    dtype: DtypeName = None
    out_dtype: DtypeName = None
    seed: Annotated[int, Strict(), Field(ge=0, lt=1 << 63), BeforeValidator(_whole)] = 0
    private: Annotated[list[str], BeforeValidator(_listed)] = []
    target: Target | None = None
    coefficients: Annotated[str, Strict(), Field(min_length=1), BeforeValidator(_path_text)] | None = None
    tokenizer: Annotated[str | TokenizerChoice | None, PlainValidator(read_choice), PlainSerializer(written_choice)] = (
        Field(alias="tokenizer_source", default=None)
    )
    chat_template: Choice | None = None
    config: Annotated[
        Choice | dict[Annotated[str, Strict()], Any] | None, BeforeValidator(_name_or_values), AfterValidator(_json)
    ] = None
    _mergekit: bool = PrivateAttr(default=False)
    _where: str = PrivateAttr(default="recipe")
    _file: Path | None = PrivateAttr(default=None)
    _overrides: tuple["Override", ...] = PrivateAttr(default=())
    _stages: "dict[str, Recipe]" = PrivateAttr(default_factory=dict)
    _notes: tuple[str, ...] = PrivateAttr(default=())

    @model_validator(mode="wrap")
    @classmethod
    def _spelled(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        given: dict[Any, Any] = cast(dict[Any, Any], value) if isinstance(value, dict) else {}
        for one, other in (("merge_method", "method"), ("tokenizer", "tokenizer_source")):
            if one in given and other in given:
                raise ValueError(f"{one} and {other} say the same thing; keep one")
        recipe = handler(value)
        if given:
            recipe._mergekit = "merge_method" in given
        _one_form(recipe, ("models", "slices", "modules"))
        return recipe

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.__dict__ == other.__dict__  # wherever it was read

    @property
    def sliced(self) -> bool:
        """Whether layers or parts of models are merged, not whole models: ``slices`` or ``modules``."""
        return bool(self.slices or self.modules)

    @property
    def mergekit(self) -> bool:
        """Whether the method is spelled ``merge_method``, as mergekit does: then mergekit's defaults count."""
        return self._mergekit

    @property
    def tokenizer_source(self) -> str | None:
        """What ``tokenizer`` takes its tokens from: union, base, a model's name; None: nothing is chosen."""
        return self.tokenizer.source if isinstance(self.tokenizer, TokenizerChoice) else self.tokenizer

    @property
    def tokenizer_model(self) -> str | None:
        """The model whose tokenizer files the output has, with whatever is added to them; None: not chosen."""
        return BASE if self.tokenizer_source == UNION else self.tokenizer_source

    @property
    def where(self) -> str:
        """What errors call it: its file, "arguments", or "recipe"."""
        return self._where

    @property
    def file(self) -> Path | None:
        """The file it was read from: relative paths may start from its folder."""
        return self._file

    @property
    def overrides(self) -> tuple["Override", ...]:
        """What was replaced in it after it was read (``override_recipe``)."""
        return self._overrides

    def overridden(self, changes: Mapping[str, Any], overrides: Iterable["Override"], *, mergekit: bool) -> "Recipe":
        """Return the recipe with ``changes``, of which ``overrides`` tell; ``mergekit`` as the property."""
        recipe = self.model_copy(update=dict(changes))
        recipe._mergekit, recipe._overrides = mergekit, (*self._overrides, *overrides)
        return recipe

    @property
    def stages(self) -> "dict[str, Recipe]":
        """The merges that this one starts from, by name, each behind those that it starts from itself."""
        return self._stages

    def with_stages(self, stages: "dict[str, Recipe]", where: str) -> "Recipe":
        """Return the recipe with the merges that it starts from."""
        recipe = self.model_copy()
        recipe._stages, recipe._where = stages, where
        return recipe

    def with_file(self, path: Path) -> "Recipe":
        """Return the recipe with the file that it was read from."""
        recipe = self.model_copy()
        recipe._file = path
        return recipe

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out as it was read: keys that nothing reads, in a recipe of mergekit's form."""
        return self._notes

    def with_method(self, method: str, parameters: dict[str, Any], models: list[ModelEntry]) -> "Recipe":
        """Return a merge of ``models`` onto the same base by another method, which takes our defaults."""
        changes = {"merge_method": method, "parameters": parameters, "models": models, "coefficients": None}
        recipe = self.model_copy(update=changes)
        recipe._mergekit = False
        return recipe

    @property
    def output_dtype(self) -> str | None:
        """The output's dtype by the table's name, or None to keep each tensor's own."""
        wanted = self.out_dtype or self.dtype
        return ALIASES[wanted] if wanted else None


def _place(location: tuple[int | str, ...]) -> str:
    """Return the keys of a place, less what pydantic says there of types (``constrained-str``, ``dict[...]``)."""
    return ".".join(str(part) for part in location if not str(part).startswith(("[key]", "constrained-", "dict[")))


def _known_keys(location: tuple[int | str, ...], parts: Mapping[str, type[Closed]]) -> list[str]:
    inside = next((str(key) for key in reversed(location[:-1]) if key in parts), "")
    return [name for field, info in parts[inside].model_fields.items() for name in (field, info.alias) if name]


#: The mappings inside a merge's recipe, by the key that holds them.
_PARTS: Mapping[str, type[Closed]] = {
    "": Recipe, "models": ModelEntry, "data": DataPaths, "target": Target, "slices": Slice, "sources": SliceSource,
    "modules": Module,
}  # fmt: skip

#: The keys of those that mergekit's recipes have too.
_KEYS = {
    kind: tuple(name for field, info in part.model_fields.items() for name in (field, info.alias) if name)
    for kind, part in _PARTS.items()
    if kind not in ("data", "target")
}
#: The keys of a recipe.
RECIPE_KEYS = _KEYS[""]

#: Pydantic's kinds of error in a user's words.
_SAID = {
    "missing": "is missing; add it",
    "string_type": "must be text; quote it",
    "string_unicode": "must be text; quote it",
    "string_too_short": "must not be empty; name a model",
    "string_too_long": "is too long; use at most 100 characters",
    "string_pattern_mismatch": "must not be empty or hold '/', '\\', '.', '=' or control characters; rename it",
    "list_type": "must be a list; write it as [a, b] or as lines that start with '- '",
    "dict_type": "must be a mapping; write it as key: value",
    "model_type": "must be a mapping; write it as key: value",
    "too_short": "must name at least one",
    "too_long": "holds too many entries; shorten it",
    "invalid_key": "is not a text key; quote it",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
}


def _said(error: ErrorDetails) -> str:
    """Return what is wrong in a user's words, else in pydantic's."""
    said = _SAID.get(error["type"], error["msg"].removeprefix("Value error, ").replace("Input should", "should"))
    given: Any = error.get("input")
    return f"{given!r} {said}" if error["type"].startswith("string_") and isinstance(given, str) and given else said


def explain(error: ValidationError, where: str, parts: Mapping[str, type[Closed]] | None = None) -> InputError:
    """Turn pydantic's report into one line that names the key and the mend.

    ``parts`` has the model of each mapping inside the recipe by the key that holds it, the recipe's own under "".
    """
    parts = parts or _PARTS
    errors = error.errors(include_url=False)
    unknown = [e for e in errors if e["type"] == "extra_forbidden" and "parameters" not in e["loc"]]
    first = (unknown or errors)[0]
    location = first["loc"]
    place = _place(location) or "the recipe"
    if first["type"] == "extra_forbidden":
        key = str(location[-1])
        known = _known_keys(location, parts)
        return InputError(
            f"{where}: unknown key {place!r}{nearest(key, known) or '; remove it, or use one of ' + ', '.join(known)}"
        )
    colon = " " if first["type"] == "value_error" else ": "
    return InputError(f"{where}: {place}{colon}{_said(first)}")


def parse_recipe(value: Any, where: str) -> Recipe:
    """Validate a recipe given as plain values.

    Raises:
        InputError: names the first key that is wrong, and the nearest known one.
    """
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise InputError(f"{where}: a recipe is a mapping with merge_method and models, not a {kind}; is it a recipe?")
    if "experts" in value and "models" not in value:
        raise InputError(f"{where}: is the recipe of a mixture of experts, which 'consilience merge' and 'check' take")
    value, notes = without_unknown(cast(dict[Any, Any], value), _KEYS, where)
    try:
        recipe = Recipe.model_validate(value)
    except ValidationError as error:
        raise explain(error, where) from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply; write it plainer") from None
    if not recipe.merge_method:
        raise InputError(f"{where}: merge_method is missing; name one of those 'consilience methods' lists")
    recipe._where, recipe._notes = where, notes  # pyright: ignore[reportPrivateUsage] - set here alone
    return recipe
