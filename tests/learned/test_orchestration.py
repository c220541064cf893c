"""Plan, learn, merge and deliver: one way for the command line and the library, and models are opened once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import consilience as cs
from consilience.__main__ import run
from consilience.engine import opener
from consilience.engine import plan as planning
from tests.kills.commands import write_adapters, write_learnable


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The references of all models that are opened, in order."""
    references: list[str] = []
    real: Any = opener.open_model

    def counting(name: str, reference: str, *rest: Any, **named: Any) -> Any:
        references.append(reference)
        return real(name, reference, *rest, **named)

    for module in (planning, opener):
        monkeypatch.setattr(module, "open_model", counting)
    return references


def by_command() -> None:
    assert run(["merge", "recipe.yaml", "out", "-q"]) == 0


def by_library() -> None:
    cs.merge_recipe("recipe.yaml", "out")


@pytest.mark.parametrize("merge", [by_command, by_library])
def test_a_learned_merge_opens_every_model_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str], merge: Callable[[], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_learnable()
    merge()
    assert sorted(opened) == ["a", "b", "base"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "base", "out", "recipe.yaml", "rows"]


@pytest.mark.parametrize("merge", [by_command, by_library])
def test_both_ways_write_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merge: Callable[[], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_learnable()
    merge()
    found = cs.learn("recipe.yaml")
    cs.merge_recipe("recipe.yaml", "applied", coefficients=found)
    for name in ("model.safetensors", "consilience/coefficients.safetensors", "consilience/recipe.yaml"):
        assert Path("out", name).read_bytes() == Path("applied", name).read_bytes()


def test_an_adapter_is_written_by_command_and_library_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_adapters()
    arguments = ["merge", "base", "one", "-e", "x=x", "-e", "y=y", "--as-adapter", "svd", "--rank", "3", "-q"]
    assert run(arguments) == 0
    summary = cs.merge("base", {"x": "x", "y": "y"}, "two", as_adapter="svd", rank=3)
    assert not isinstance(summary, dict)
    assert summary.out == "two"
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes()


def test_an_adapter_may_be_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was learned for an adapter is kept in OUT.partial, too."""
    monkeypatch.chdir(tmp_path)
    write_learnable()
    with pytest.raises(cs.InputError, match="not a plain LoRA adapter"):
        cs.merge_recipe("recipe.yaml", "out", as_adapter="cat")
    assert not Path("out.partial").exists()
