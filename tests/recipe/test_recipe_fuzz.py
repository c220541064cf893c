"""Any text is YAML or an ``InputError``, any value a recipe or an ``InputError``; gradients interpolate linearly."""

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from consilience.errors import InputError
from consilience.methods.registry import load, names
from consilience.recipe import ModelEntry, Recipe, Settings, parse_recipe
from consilience.recipe.resolve import gradient
from consilience.recipe.yaml_file import parse_yaml

#: Pieces of YAML: structure, anchors, tags, and scalars that its resolvers treat specially.
PIECES = [
    *"[]{}:,-?&*!|>'\"%@#`~<\n\t ",
    *["\n  ", "- ", ": ", "&a ", "*a", "a", "merge_method", "models", "<<: ", "---\n", "...\n"],
    *["!!int ", "!!float ", "!!timestamp ", "!!binary ", "!!set ", "!!omap ", "!!bool ", "!!python/name:os.system "],
    *["0x1F", "1:30:00", "2001-12-14t21:59:43.10-05:00", ".inf", ".nan", "1e999", "~", "yes", "9" * 400],
    *['"\\ud800"', "\ufeff", "\x00", "\x85"],
]
WHERE = "recipe.yaml"


def attempt(function: Callable[..., Any], *arguments: Any) -> tuple[bool, Any]:
    """Return whether ``function`` accepts its arguments, and its result; only an ``InputError`` counts as refusal."""
    try:
        return True, function(*arguments, WHERE)
    except InputError as error:
        message = str(error)
    assert message.startswith(f"{WHERE}: ")
    assert len(message) < 2000
    return False, None


@settings(max_examples=200, deadline=None)
@given(text=st.text() | st.lists(st.sampled_from(PIECES), max_size=25).map("".join))
@example("!!int ''")
@example("a: !!timestamp x")
@example("- " * 10_000)
@example("{a: " * 10_000)
@example("1" + ":1" * 100_000)
def test_any_text_as_yaml(text: str) -> None:
    attempt(parse_yaml, text)


#: Ways to open a level; some parsers scan ahead in the first three, and none can in the others.
OPENINGS = {"[": "]", "{": "}", "{a: [": "]}", "- ": "", "[\n": "]", "? ": ""}


@pytest.mark.parametrize("loader", [yaml.SafeLoader, getattr(yaml, "CSafeLoader", yaml.SafeLoader)])
@pytest.mark.parametrize("levels", [101, 999, 1001, 20_000])
@pytest.mark.parametrize("opening", OPENINGS)
def test_deep_nesting_is_refused_in_our_words(
    opening: str, levels: int, loader: type[yaml.SafeLoader], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consilience.recipe.yaml_file._Loader", loader)
    for text in (opening * levels, "a: 1\nb:\n  " + opening * levels + "c" + OPENINGS[opening] * levels):
        with pytest.raises(InputError, match=r"^recipe\.yaml: line \d+: nested more than 100 levels deep; write it"):
            parse_yaml(text, WHERE)


@pytest.mark.parametrize("levels", [1, 99, 100])
def test_nesting_up_to_the_limit_is_read(levels: int) -> None:
    value = parse_yaml("[" * levels + "]" * levels, WHERE)
    for _ in range(levels - 1):
        (value,) = value
    assert value == []


@pytest.mark.parametrize("text", ["a: [1, 2\nb: 3", "a: 'b", "%x", "a: b: c", "[" * 50])
def test_broken_text_that_is_not_deep_is_called_broken(text: str) -> None:
    with pytest.raises(InputError, match=r"^recipe\.yaml: line \d+: not valid YAML"):
        parse_yaml(text, WHERE)


@pytest.mark.parametrize("text", ["1e-3", "-2E+5", "1.5e3", ".5e1", "1.e2", "1.0e+3", "0.25"])
def test_numbers_with_an_exponent_are_numbers(text: str) -> None:
    assert parse_yaml(text, WHERE) == float(text)


@pytest.mark.parametrize("text", ["1e", "e5", "1e5x", "v1e5", "1e-", "--1e5"])
def test_words_that_look_like_numbers_stay_words(text: str) -> None:
    assert parse_yaml(text, WHERE) == text


def words(longest: int | None = None) -> st.SearchStrategy[str]:
    """Text, but no number with an exponent: PyYAML writes the word 1e5 without quotes, and we read a number."""
    return st.text(max_size=longest).filter(lambda text: not re.fullmatch(r"[-+]?[0-9._]+[eE][-+]?[0-9]+", text))


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words(20) | st.dates()


@settings(max_examples=100, deadline=None)
@given(value=st.recursive(plain, lambda v: st.lists(v, max_size=4) | st.dictionaries(words(), v, max_size=4)))
@example(value={"0E": "1e+", "e5": "0E0x"})
def test_what_yaml_writes_is_read(value: Any) -> None:
    assert parse_yaml(yaml.safe_dump(value), WHERE) == value


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**4000)
    | st.floats()
    | st.dates()
    | st.binary(max_size=3)
    | st.text(max_size=6)
    | st.sampled_from(["ties", "linear", "bfloat16", "mlp", "re:(", "*", "base", "a"])
)
KEYS = [*Recipe.model_fields, *ModelEntry.model_fields, "method", "filter", "value", "slices", "weight", "density"]
keys = st.sampled_from(KEYS) | scalars.filter(lambda key: not isinstance(key, float))
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4), max_leaves=15
)
numbers = st.floats(-2, 2) | st.integers(-2, 2)
setting = (
    numbers
    | st.lists(numbers, max_size=3)
    | st.booleans()
    | st.lists(st.fixed_dictionaries({"value": numbers | st.lists(numbers, max_size=2)}, optional={"filter": scalars}))
    | values
)
parameters = st.dictionaries(
    st.sampled_from(["weight", "density", "lambda", "normalize", "trim", "t", "rescale", "densty"]), setting, max_size=3
)
models = st.lists(
    st.fixed_dictionaries(
        {"model": st.sampled_from(["a", "b", "base"])}, optional={"parameters": parameters, "name": st.text(max_size=3)}
    ),
    min_size=1,
    max_size=3,
)
recipes = st.fixed_dictionaries(
    {"merge_method": st.sampled_from(names()), "models": models},
    optional={"parameters": parameters, "base_model": scalars, "seed": scalars, "dtype": scalars, "private": values},
)


@settings(max_examples=200, deadline=None)
@given(value=values | st.dictionaries(keys, values, max_size=6) | recipes)
def test_any_value_as_a_recipe(value: Any) -> None:
    attempt(parse_recipe, value)


@pytest.mark.parametrize("place", ["key", "value", "weight", "seed"])
def test_a_number_too_long_to_print(place: str) -> None:
    huge = 10**5000
    recipe: dict[Any, Any] = {"merge_method": "ties", "base_model": "base", "models": [{"model": "a"}]}
    spoilt = {"key": {huge: 1}, "value": {"merge_method": huge}, "weight": {"parameters": {"weight": huge}}}
    assert not attempt(parse_recipe, recipe | spoilt.get(place, {"seed": huge}))[0]


@settings(max_examples=200, deadline=None)
@given(value=recipes, depth=st.floats(0, 1))
def test_any_recipe_resolves_or_says_why_not(value: dict[str, Any], depth: float) -> None:
    names = ["model.layers.0.mlp.weight", "model.norm.weight"]

    def resolved(recipe: Recipe, where: str) -> dict[str, Any]:
        found = Settings(recipe, load(recipe.merge_method), {f"e{i}": i for i in range(len(recipe.models))}, where)
        arguments = found.at(names[0], depth)
        found.check_used(names)
        return arguments

    arguments: dict[str, Any] = {}
    accepted, recipe = attempt(parse_recipe, value)
    if accepted:
        accepted, arguments = attempt(resolved, recipe)
    if not accepted:
        return
    for key, parameter in load(recipe.merge_method).parameters.items():
        argument = arguments[key if key != "lambda" else "lambda_"]
        each = argument if parameter.per_expert else [argument]
        assert len(each) == (len(recipe.models) if parameter.per_expert else 1)
        assert all(parameter.check(one) is None for one in each)


@settings(max_examples=100, deadline=None)
@given(value=recipes.filter(lambda recipe: "seed" not in recipe))
@example({"merge_method": "linear", "models": [{"model": "a", "name": "\x85"}]})
@example({"merge_method": "linear", "models": [{"model": "a", "name": "a\u2028b"}]})
@example({"merge_method": "linear", "models": [{"model": "a", "name": "\ufeff"}]})
def test_an_accepted_recipe_survives_a_round_trip(value: dict[str, Any]) -> None:
    accepted, recipe = attempt(parse_recipe, value)
    if not accepted:
        return
    text = yaml.safe_dump(recipe.model_dump(mode="json", exclude_defaults=True), allow_unicode=True)
    assert parse_recipe(parse_yaml(text, "again"), "again") == recipe
    assert parse_recipe(json.loads(recipe.model_dump_json(exclude_defaults=True)), "again") == recipe


@settings(max_examples=300, deadline=None)
@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8), depth=st.floats(0, 1))
def test_a_gradient_is_linear_interpolation(values: list[float], depth: float) -> None:
    wanted = np.interp(depth * (len(values) - 1), np.arange(len(values)), values)
    assert gradient(values, depth) == pytest.approx(wanted, rel=1e-9, abs=1e-6)


@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8))
def test_a_gradient_meets_its_ends(values: list[float]) -> None:
    assert gradient(values, 0.0) == values[0]
    assert gradient(values, 1.0) == values[-1]
