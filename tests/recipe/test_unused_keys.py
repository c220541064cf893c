"""Keys that nothing reads: noted once in mergekit's recipes, errors in ours, and typos are errors in both."""

from typing import Any

import pytest

from consilience.errors import InputError
from consilience.methods.mergekit import PARAMETERS, REQUIRED
from consilience.methods.registry import MERGEKIT_METHODS, load
from consilience.recipe import Recipe, parse_recipe
from consilience.recipe.schema import RECIPE_KEYS
from consilience.recipe.unused_keys import without_unused


def read(method: str, key: str = "merge_method", **keys: Any) -> tuple[Recipe, str]:
    """Return a recipe of two models without what is not read, and its notes, one a line."""
    value = {key: method, "base_model": "base", "models": [{"model": "a"}, {"model": "b"}]} | keys
    recipe = parse_recipe(value, "r.yaml")
    kept, notes = without_unused(recipe, load(method), RECIPE_KEYS, "r.yaml")
    return kept, "\n".join((*recipe.notes, *notes))


def own(**parameters: Any) -> list[dict[str, Any]]:
    """Return two models with these parameters each."""
    return [{"model": name, "parameters": parameters} for name in ("a", "b")]


def test_parameters_of_other_methods_are_named_once() -> None:
    shared = {"normalize": True, "int8_mask": True, "rescale": False}
    recipe, notes = read("linear", models=own(weight=0.5, density=0.3), parameters=shared)
    assert notes == "r.yaml: density, int8_mask, rescale: no effect, since method 'linear' does not use them"
    assert recipe.parameters == {"normalize": True}
    assert [entry.parameters for entry in recipe.models] == [{"weight": 0.5}] * 2


def test_weights_under_slerp() -> None:
    recipe, notes = read("slerp", models=own(weight=0.5), parameters={"t": 0.3})
    assert notes == "r.yaml: weight: no effect, since method 'slerp' does not use it"
    assert recipe.parameters == {"t": 0.3}


def test_a_switch_that_changes_nothing_is_noted_only_where_it_would_change_something() -> None:
    assert read("ties", parameters={"int8_mask": False})[1] == ""
    assert "int8_mask: no effect" in read("ties", parameters={"int8_mask": True})[1]


def test_keys_that_no_recipe_has() -> None:
    recipe, notes = read("ties", license="mit", tags=["merge"], models=[{"model": "a", "layer_range": [0, 4]}])
    assert notes == "r.yaml: layer_range, license, tags: no effect, as in mergekit: nothing is called so"
    assert len(recipe.models) == 1


def test_parameters_at_the_top_level() -> None:
    recipe, notes = read("ties", normalize=False, int8_mask=True)
    assert notes.startswith("r.yaml: int8_mask, normalize at the top level: no effect, as in mergekit, but under")
    assert recipe.parameters == {}


def test_keys_of_recipes_under_parameters() -> None:
    recipe, notes = read("ties", parameters={"dtype": "float16", "tokenizer_source": "base"})
    assert "dtype, tokenizer_source under parameters: no effect, as in mergekit" in notes
    assert recipe.output_dtype is None


def test_a_models_own_value_of_what_all_share() -> None:
    recipe, notes = read("ties", models=own(normalize=False, weight=1.0))
    assert notes.startswith("r.yaml: normalize under a model: no effect, as in mergekit")
    assert "normalize" not in recipe.models[0].parameters


@pytest.mark.parametrize(
    ("method", "keys", "says"),
    [
        ("ties", {"models": own(densty=0.3)}, "models.0.parameters.densty: .*did you mean 'density'"),
        ("linear", {"models": own(densty=0.3)}, "models.0.parameters.densty: .*did you mean 'density'"),
        ("ties", {"parameters": {"normalise": True}}, "parameters.normalise: .*did you mean 'normalize'"),
        ("ties", {"parameters": {"lamda": 1}}, "parameters.lamda: .*did you mean 'lambda'"),
        ("ties", {"parameters": {"out_dtpye": "float16"}}, "parameters.out_dtpye: .*did you mean 'out_dtype'"),
        ("ties", {"parameters": {"wieght": 1}}, "parameters.wieght: .*did you mean 'weight'"),
        ("ties", {"tokenzier_source": "base"}, "unknown key 'tokenzier_source'; did you mean 'tokenizer_source'"),
        ("ties", {"base_modle": "b"}, "unknown key 'base_modle'; did you mean 'base_model'"),
        ("ties", {"out_dtpye": "float16"}, "unknown key 'out_dtpye'; did you mean 'out_dtype'"),
        ("ties", {"models": [{"modle": "a"}]}, "unknown key 'models.0.modle'; did you mean 'model'"),
        ("ties", {"models": [{"model": "a", "density": 0.3}]}, "models.0.density: .*under the model's parameters"),
        ("linear", {"weight": 0.3}, "r.yaml: weight: .*write it under parameters"),
        ("slerp", {"t": 0.3}, "r.yaml: t: .*write it under parameters"),
    ],
)
def test_what_looks_like_a_typo_or_would_be_missed_is_refused(method: str, keys: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        read(method, **keys)


@pytest.mark.parametrize("keys", [{"tags": ["a"]}, {"normalize": True}])
def test_our_own_form_has_no_unknown_keys(keys: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="unknown key"):
        read("ties", key="method", **keys)


def test_our_own_methods_have_mergekits_leftovers_alone() -> None:
    """A card's ``merge_method`` may have been replaced by a method that mergekit does not have."""
    _, notes = read("tsv_m", models=own(weight=0.5, density=0.3))
    assert notes == "r.yaml: density, weight: no effect, since method 'tsv_m' does not use them"
    with pytest.raises(InputError, match=r"parameters.zzz: method 'tsv_m' has no such parameter \(it has: "):
        read("tsv_m", parameters={"zzz": 1})
    with pytest.raises(InputError, match="unknown key 'tags'"):
        read("tsv_m", tags=[])


def test_the_table_of_mergekits_parameters_is_that_of_its_methods_here() -> None:
    of_methods = {key for name in MERGEKIT_METHODS for key in load(name).parameters}
    assert PARAMETERS - of_methods == {"embed_slerp"}  # of earlier versions
    assert REQUIRED <= PARAMETERS


def test_a_key_without_a_value() -> None:
    recipe, notes = read("ties", parameters=None, tokenizer_source=None)
    assert (recipe.parameters, notes) == ({}, "")


def test_one_filter_that_is_no_list() -> None:
    recipe, _ = read("ties", parameters={"weight": {"filter": "mlp", "value": 0.5}})
    assert recipe == read("ties", parameters={"weight": [{"filter": "mlp", "value": 0.5}]})[0]
