"""Which value reaches which tensor: filters, gradients, precedence, and what is refused."""

from typing import Any

import pytest

from consilience.errors import InputError
from consilience.methods.registry import load
from consilience.recipe import Settings, depths, parse_recipe

NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{part}.weight" for i in range(5) for part in ("self_attn.q_proj", "mlp.up_proj")),
    "model.norm.weight",
    "lm_head.weight",
]


def resolve(
    parameters: Any = None, own: Any = None, other: Any = None, method: str = "ties", names: list[str] = NAMES
) -> dict[str, dict[str, Any]]:
    """Return every tensor's keyword arguments for two experts, ``a`` (with ``own``) and ``b`` (with ``other``)."""
    value: dict[str, Any] = {"merge_method": method, "base_model": "base", "parameters": parameters or {}}
    value["models"] = [{"model": "a", "parameters": own or {}}, {"model": "b", "parameters": other or {}}]
    settings = Settings(parse_recipe(value, "r.yaml"), load(method), {"a": 0, "b": 1}, "r.yaml")
    depth = depths(names)
    found = {name: settings.at(name, depth.get(name, 0.0)) for name in names}
    settings.check_used(names)
    return found


def weights(*arguments: Any, **more: Any) -> dict[str, tuple[float, float]]:
    return {name: given["weight"] for name, given in resolve(*arguments, **more).items()}


# ----------------------------------------------------------------------------------------------------------------------
# Filters.


def test_the_first_filter_that_matches_counts() -> None:
    setting = [{"filter": "layers.2.mlp", "value": 3}, {"filter": "mlp", "value": 2}, {"value": 1}]
    for name, (a, b) in weights({"weight": setting}).items():
        assert a == b == (3 if "layers.2.mlp" in name else 2 if "mlp" in name else 1)


def test_a_tensor_no_filter_matches_falls_through_to_the_default() -> None:
    found = weights({"weight": [{"filter": "mlp", "value": 2}]})
    assert found["model.layers.0.mlp.up_proj.weight"] == (2, 2)
    assert found["model.norm.weight"] == (1, 1)


def test_a_filter_that_only_shadowed_tensors_match_is_no_typo() -> None:
    assert weights({"weight": [{"filter": "*", "value": 2}, {"filter": "mlp", "value": 3}]})[NAMES[0]] == (2, 2)


@pytest.mark.parametrize(
    ("pattern", "hint"), [("mpl", "did you mean 'mlp'"), ("*.q_porj.*", "matches no tensor"), ("re:xyz", "matches no")]
)
def test_a_filter_that_matches_nothing_is_a_typo(pattern: str, hint: str) -> None:
    with pytest.raises(InputError, match=hint):
        resolve({"weight": [{"filter": pattern, "value": 1}, {"value": 2}]})
    with pytest.raises(InputError, match=r"models\.1\.parameters\.weight"):
        resolve(other={"weight": [{"filter": pattern, "value": 1}, {"value": 2}]})


# ----------------------------------------------------------------------------------------------------------------------
# Gradients.


def test_a_gradient_runs_over_the_layers() -> None:
    found = weights({"weight": [0, 1]})
    for layer in range(5):
        assert found[f"model.layers.{layer}.mlp.up_proj.weight"] == pytest.approx((layer / 4, layer / 4))
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert found[name] == (0, 0)


def test_a_gradient_of_three_meets_its_middle() -> None:
    found = weights({"weight": [0, 1, 0.5]})
    assert [found[f"model.layers.{i}.mlp.up_proj.weight"][0] for i in range(5)] == pytest.approx([0, 0.5, 1, 0.75, 0.5])


def test_a_gradient_of_one_is_a_constant() -> None:
    assert set(weights({"weight": [0.3]}).values()) == {(0.3, 0.3)}


def test_a_gradient_inside_a_filter() -> None:
    found = weights({"weight": [{"filter": "mlp", "value": [0, 1]}, {"value": 7}]})
    assert found["model.layers.4.mlp.up_proj.weight"] == (1, 1)
    assert found["model.layers.4.self_attn.q_proj.weight"] == (7, 7)


def test_a_gradient_of_a_shared_number() -> None:
    found = resolve({"t": [0, 1]}, method="slerp")
    assert found["model.layers.2.mlp.up_proj.weight"]["t"] == 0.5


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["x.0.w", "x.1.w", "x.2.w"], [0, 0.5, 1]),
        (["x.0.w", "y.0.w", "y.2.w"], [0, 0, 1]),
        (["h.1.mlp.experts.5.w", "h.2.mlp.experts.9.w"], [0.5, 1]),
        (["0.weight", "2.weight", "4.weight"], [0, 0.5, 1]),
        (["encoder.block.3.layer.0.w", "decoder.block.6.layer.1.w", "decoder.block.3.layer.0.w"], [1, 1, 0.5]),
    ],
)
def test_depth_is_the_first_number_over_the_last_layer(names: list[str], wanted: list[float]) -> None:
    found = depths(names)
    assert [found[name] for name in names] == wanted


def test_names_without_a_layer_have_no_depth() -> None:
    assert depths(["model.norm.weight", "lm_head.weight", "conv1.weight", f"x.{'9' * 5000}.w", ""]) == {}


# ----------------------------------------------------------------------------------------------------------------------
# Precedence.


def test_own_before_shared_before_default() -> None:
    assert weights()[NAMES[0]] == (1, 1)
    assert weights({"weight": 2})[NAMES[0]] == (2, 2)
    assert weights({"weight": 2}, {"weight": 3})[NAMES[0]] == (3, 2)
    assert weights({"weight": 2}, {"weight": 3}, {"weight": 0})[NAMES[0]] == (3, 0)


def test_an_own_filter_that_does_not_match_leaves_the_shared_value() -> None:
    found = weights({"weight": 2}, {"weight": [{"filter": "mlp", "value": 3}]})
    assert found["model.layers.0.mlp.up_proj.weight"] == (3, 2)
    assert found["model.norm.weight"] == (2, 2)


def test_lambda_reaches_the_method_under_a_name_python_allows() -> None:
    assert resolve({"lambda": 0.3})[NAMES[0]]["lambda_"] == 0.3


def test_whole_numbers_become_floats_and_flags_stay_flags() -> None:
    given = resolve({"weight": 2, "normalize": False, "trim": "model"})[NAMES[0]]
    assert [type(given[key]) for key in ("normalize", "trim")] == [bool, str]
    assert all(type(value) is float for value in given["weight"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (({"densty": 1},), "parameters.densty: method 'ties' has no such parameter; did you mean 'density'"),
        ((None, {"wait": 1}), "models.0.parameters.wait"),
        ((None, None, {"normalize": True}), "models.1.parameters.normalize is shared by all models; move it"),
        (({"density": 1.5},), "parameters.density: 1.5 .*must lie in"),
        (({"density": [0.5, 1.5]},), "parameters.density: 1.25 for tensor 'model.layers.3"),
        ((None, None, {"density": -0.1}), "models.1.parameters.density: -0.1"),
        (({"weight": "abc"},), "parameters.weight: 'abc' .*must be a finite number"),
        (({"normalize": 1},), "parameters.normalize: 1.0 .*must be true or false"),
        (({"normalize": [0, 1]},), "parameters.normalize: 0.0 .*must be true or false"),
        (({"trim": "layer"},), "parameters.trim: 'layer' .*must be one of tensor, model"),
        (({"weight": [{"filter": "re:(", "value": 1}]},), "parameters.weight: filter: 're:\\('"),
    ],
)
def test_what_is_refused_names_its_place(arguments: tuple[Any, ...], says: str) -> None:
    with pytest.raises(InputError, match=says):
        resolve(*arguments)
