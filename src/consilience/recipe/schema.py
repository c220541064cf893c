"""What to merge, as data. A mergekit ``models:`` recipe is a valid recipe."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError, model_validator
from pydantic_core import ErrorDetails

from consilience.checkpoints.dtypes import ALIASES
from consilience.errors import InputError, nearest
from consilience.recipe.yaml_file import read_yaml

Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Numbers = Annotated[list[Number], Strict(), Field(min_length=1)]
Scalar = Annotated[bool, Strict()] | Number | Annotated[str, Strict()]
#: Besides what would be misread in a path or a parameter, no control characters nor what YAML takes for a line break.
Name = Annotated[str, Field(max_length=100, pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff/\\.=]+$")]
Reference = Annotated[str, Field(min_length=1)]

#: mergekit keys that a later version will understand.
_LATER = ("slices", "modules", "tokenizer", "chat_template")


class Closed(BaseModel):
    """A mapping without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Filtered(Closed):
    """A value for the tensors whose name matches ``filter`` (substring, glob with ``*`` or ``?``, or ``re:`` regex)."""

    filter: str | None = None
    value: Scalar | Numbers


Texts = Annotated[list[Annotated[str, Strict()]], Strict(), Field(min_length=1)]
Setting = Scalar | Numbers | Texts | Annotated[list[Filtered], Strict(), Field(min_length=1)]


class DataPaths(Closed):
    """Files that belong to one expert; learned methods read them."""

    calibration: str | None = None
    train: str | None = None
    validation: str | None = None
    probe: str | None = None
    logs: str | None = None


class Target(Closed):
    """The labelled target data of methods that minimise a loss."""

    train: str | None = None
    validation: str | None = None


class ModelEntry(Closed):
    """One model of the merge."""

    model: Reference
    name: Name | None = None
    parameters: dict[str, Setting] = {}
    data: DataPaths | None = None


class Recipe(Closed):
    """A merge: method, base, models, parameters, output dtype, seed."""

    merge_method: str = Field(alias="method", default="")
    base_model: Reference | None = None
    models: list[ModelEntry] = Field(min_length=1, max_length=1000)
    parameters: dict[str, Setting] = {}
    dtype: str | None = None
    out_dtype: str | None = None
    seed: Annotated[int, Strict(), Field(ge=0, lt=1 << 63)] = 0
    private: list[str] = []
    target: Target | None = None
    coefficients: Annotated[str, Strict(), Field(min_length=1)] | None = None
    tokenizer_source: Literal["base"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_spelling(cls, value: Any) -> Any:
        if isinstance(value, dict) and "merge_method" in value and "method" in value:
            raise ValueError("merge_method and method say the same thing; keep one")
        return cast(Any, value)

    @property
    def output_dtype(self) -> str | None:
        """The output's dtype by the table's name, or None to keep each tensor's own."""
        wanted = self.out_dtype or self.dtype
        return ALIASES[wanted] if wanted else None


def _place(location: tuple[int | str, ...]) -> str:
    shown = [str(part) for part in location if not (isinstance(part, str) and ("[" in part or part[:1].isupper()))]
    return ".".join(part for part in shown if part not in ("bool", "float", "str", "constrained-float"))


def _known_keys(location: tuple[int | str, ...], parts: Mapping[str, type[Closed]]) -> list[str]:
    inside = next((str(key) for key in reversed(location[:-1]) if key in parts), "")
    return [name for field, info in parts[inside].model_fields.items() for name in (field, info.alias) if name]


#: The mappings inside a merge's recipe, by the key that holds them.
_PARTS: Mapping[str, type[Closed]] = {"": Recipe, "models": ModelEntry, "data": DataPaths, "target": Target}

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
    if first["type"] == "extra_forbidden" and "value" not in location:
        key = str(location[-1])
        if len(location) == 1 and key in _LATER:
            return InputError(f"{where}: {key!r} is not supported yet; use the 'models:' form")
        known = _known_keys(location, parts)
        return InputError(
            f"{where}: unknown key {place!r}{nearest(key, known) or '; remove it, or use one of ' + ', '.join(known)}"
        )
    if "parameters" in location[:-1]:
        place = ".".join(str(p) for p in location[: location.index("parameters") + 2])
        kinds = "a finite number, true/false, a word, a list of numbers, or a list of filter/value"
        return InputError(f"{where}: {place} must be {kinds}")
    return InputError(f"{where}: {place}: {_said(first)}")


def parse_recipe(value: Any, where: str) -> Recipe:
    """Validate a recipe given as plain values.

    Raises:
        InputError: names the first key that is wrong, and the nearest known one.
    """
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise InputError(f"{where}: a recipe is a mapping with merge_method and models, not a {kind}; is it a recipe?")
    try:
        recipe = Recipe.model_validate(value)
    except ValidationError as error:
        raise explain(error, where) from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply; write it plainer") from None
    if not recipe.merge_method:
        raise InputError(f"{where}: merge_method is missing; name one of those 'consilience methods' lists")
    for key in ("dtype", "out_dtype"):
        wanted = cast(str | None, getattr(recipe, key))
        if wanted is not None and wanted not in ALIASES:
            known = ("float32", "float16", "bfloat16", "float64")
            raise InputError(f"{where}: {key} {wanted!r} is not one of {', '.join(known)}{nearest(wanted, known)}")
    return recipe


def read_recipe(path: Path) -> Recipe:
    """Read a recipe from a YAML file."""
    return parse_recipe(read_yaml(path), str(path))
