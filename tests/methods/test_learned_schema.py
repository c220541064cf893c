"""What users see of the learned methods' parameters is pinned: names, order, defaults, bounds, texts, presets, errors.

``learned_schema.json`` is what ``consilience methods --json`` says of them, with each number's bounds and each method's
presets beside it. A change there is a change for everybody who wrote a recipe.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from consilience.cli.listing import method_facts
from consilience.errors import InputError
from consilience.learned.adamerging import AdaMerging
from consilience.learned.expert_merging import ExpertMerging
from consilience.methods.registry import load
from consilience.methods.signature import Method, settings_of
from consilience.objectives import registry
from consilience.recipe.resolve import Settings
from consilience.recipe.schema import parse_recipe

PINNED: list[dict[str, Any]] = json.loads(Path(__file__).with_name("learned_schema.json").read_text("utf-8"))
NAMES = [facts["name"] for facts in PINNED]


def described(facts: dict[str, Any]) -> dict[str, Any]:
    method = load(facts["name"])
    ranges = {name: asdict(parameter.range) for name, parameter in method.parameters.items()}
    return facts | {"ranges": ranges, "presets": method.presets}


def test_the_schema_of_every_learned_method_is_pinned() -> None:
    learned = [described(facts) for facts in method_facts() if load(facts["name"]).learn is not None]
    for found, pinned in zip(learned, PINNED, strict=True):
        assert json.dumps(found, indent=1) == json.dumps(pinned, indent=1)


def settings(method: Method, parameters: dict[str, Any]) -> dict[str, Any]:
    recipe = parse_recipe(
        {"merge_method": method.name, "base_model": "b", "models": [{"model": "x"}], "parameters": parameters}, "r.yaml"
    )
    return Settings(recipe, method, {"x": 0}, "r.yaml").once()


@pytest.mark.parametrize("name", NAMES)
def test_what_a_recipe_leaves_out_takes_the_default(name: str) -> None:
    method, pinned = load(name), PINNED[NAMES.index(name)]
    for preset, values in {"": {}, **pinned["presets"]}.items():
        found = settings(method, {"preset": preset} if preset else {})
        assert list(found) == list(pinned["parameters"])
        for key, facts in pinned["parameters"].items():
            expected = preset if preset and key == "preset" else values.get(key, facts["default"])
            expected = tuple(expected) if isinstance(expected, list) else expected
            assert found[key] == ((expected,) if facts["per_expert"] else expected), (preset, key)


@pytest.mark.parametrize(
    ("name", "parameters", "words"),
    [
        (
            "expert_merging",
            {"gama": 1},
            "r.yaml: parameters.gama: method 'expert_merging' has no such parameter; did you mean 'gamma'?",
        ),
        (
            "least_squares",
            {"zzz": 1},
            "r.yaml: parameters.zzz: method 'least_squares' has no such parameter (it has: alphabar, grouping, "
            "exclude, beta, ridge, samples, responses, response_tokens, precision, batch_tokens)",
        ),
        ("expert_merging_pp", {"gamma": -1}, "r.yaml: parameters.gamma: -1.0 for tensor '': must lie in [0, inf]"),
        (
            "adamerging",
            {"optimizer": "ngopt"},
            "r.yaml: parameters.optimizer: 'ngopt' for tensor '': must be one of adam, adamw, sgd, spsa, cma",
        ),
        ("glue", {"steps": 1.5}, "r.yaml: parameters.steps: 1.5 for tensor '': must be a whole number"),
    ],
)
def test_what_is_wrong_is_said_in_the_same_words(name: str, parameters: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as error:
        settings(load(name), parameters)
    assert str(error.value) == words


def test_settings_made_in_python_have_the_same_defaults() -> None:
    shown = {name: p.default for name, p in load("expert_merging").parameters.items()} | {"beta": (1.0,)}
    own, plain = settings_of(ExpertMerging, shown), ExpertMerging()
    for part in ("space", "anchor", "data", "optimizer", "descent", "loop", "compute", "score"):
        assert getattr(own, part) == getattr(plain, part)
    assert replace(own.objective, terms=(), beta=()) == replace(plain.objective, terms=())
    assert own.objective.terms == tuple(term() for term in registry.terms())
    shown = {name: p.default for name, p in load("adamerging").parameters.items()}
    own = settings_of(AdaMerging, shown | {"alphabar": (0.3, 0.4), "beta": (1.0, 2.0)})
    assert own == AdaMerging(alphabar=(0.3, 0.4), beta=(1.0, 2.0))
