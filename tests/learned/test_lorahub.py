"""LoraHub: coefficients searched on a target's rows, without gradients, within bounds, and to the same end twice."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from consilience.api import build_recipe, learn, plan_recipe
from consilience.errors import InputError
from consilience.learned.learn import learn_state
from tests.learned.tiny_experts import sentences, write_adapter, write_base, write_rows


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("hub")
    base = write_base(place / "base")
    for seed, name in enumerate(("a", "b")):
        write_adapter(place / name, base, seed)
    rows = [{"prompt": text, "response": f" {text.split()[0]} w5"} for text in sentences(3, 5)]
    write_rows(place / "train.jsonl", rows)
    return place


def recipe(zoo: Path, **parameters: Any) -> Any:
    experts = {name: str(zoo / name) for name in ("a", "b")}
    values = {"precision": "float64"} | parameters
    return build_recipe("lorahub", str(zoo / "base"), experts, values, target={"train": str(zoo / "train.jsonl")})


@pytest.mark.parametrize("optimizer", [pytest.param("ngopt", marks=pytest.mark.slow), "cma"])
def test_the_search_ends_no_worse_than_it_starts(zoo: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a backward pass")

    monkeypatch.setattr(torch.autograd, "backward", refuse)
    found = learn(recipe(zoo, optimizer=optimizer, steps=30, penalty=0.0))
    assert found.alpha.shape == (2, 1)
    assert (np.abs(found.alpha) <= 1.5 + 1e-9).all()
    history = [line["target"] for line in found.facts["history"]]
    start = learn(recipe(zoo, optimizer="cma", steps=1, penalty=0.0)).facts["history"][0]["target"]
    here = {"a": float(found.alpha[0, 0]), "b": float(found.alpha[1, 0])}
    end = learn(recipe(zoo, optimizer="cma", steps=1, penalty=0.0, alphabar=here)).facts["history"][0]["target"]
    assert end < start
    assert end <= min(history) + 1e-6


def test_a_search_that_was_stopped_goes_on(zoo: Path, tmp_path: Path) -> None:
    whole = learn(recipe(zoo, steps=12))
    plan = plan_recipe(recipe(zoo, steps=12))
    from consilience.learned.problem import Problem

    calls, evaluate = 0, Problem.evaluate

    def stopping(self: Problem, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyboardInterrupt
        return evaluate(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Problem, "evaluate", stopping)
        with pytest.raises(KeyboardInterrupt):
            learn_state(plan, tmp_path / "state")
    found = learn_state(plan, tmp_path / "state")
    plan.close()
    np.testing.assert_array_equal(found.alpha, whole.alpha)
    assert [line["target"] for line in found.facts["history"]] == [line["target"] for line in whole.facts["history"]]


def test_a_start_outside_the_bounds_is_refused(zoo: Path) -> None:
    with pytest.raises(InputError, match=r"alphabar: the search starts outside \[-1.5, 1.5\]"):
        learn(recipe(zoo, alphabar=2.0))
