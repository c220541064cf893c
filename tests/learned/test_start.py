"""Learning from another merge: that merge as the base, and coefficients from 0 on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_experts import recipe_of

import consilience as cs


@pytest.fixture(scope="module")
def start(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("start") / "merged"
    cs.merge(zoo / "base", {name: zoo / name for name in "ab"}, out, method="actmat")
    return out


def learned(zoo: Path, start: Path, out: Path, experts: dict[str, Any], **parameters: Any) -> Any:
    settings = {"alphabar": 0.0, "precision": "float32", "learning_rate": 0.05} | parameters
    cs.merge_recipe(recipe_of(zoo, experts, base=start, parameters=settings), out)
    return cs.load_coefficients(out / "consilience")


def test_without_steps_the_result_is_the_merge_that_it_starts_from(zoo: Path, start: Path, tmp_path: Path) -> None:
    found = learned(zoo, start, tmp_path / "out", {name: zoo / name for name in "ab"}, steps=0)
    assert not found.alpha.any()
    expected = load_file(start / "model.safetensors")
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(value, expected[name]), name


def test_steps_lead_from_it_to_less_loss_and_an_anchor_holds_it_there(zoo: Path, start: Path, tmp_path: Path) -> None:
    experts = {name: zoo / name for name in "ab"}
    found = learned(zoo, start, tmp_path / "free", experts, steps=30, batch=0, gamma=0.0)
    history = found.facts["history"]
    assert history[-1]["loss"] < 0.95 * history[0]["loss"]
    held = learned(zoo, start, tmp_path / "held", experts, steps=30, batch=0, gamma=1e6)
    assert not held.alpha.any()
    weights, base = (load_file(path / "model.safetensors") for path in (tmp_path / "free", start))
    tuned = [load_file(zoo / name / "model.safetensors") for name in "ab"]
    for name, value in weights.items():
        alpha = found.of(name)[:, 0]
        expected = base[name] + sum(float(a) * (t[name] - base[name]) for a, t in zip(alpha, tuned, strict=True))
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)


def test_adapters_are_experts_of_it_on_the_base_that_they_were_trained_on(
    zoo: Path, start: Path, tmp_path: Path
) -> None:
    experts = {"a": zoo / "a", "lora": f"{zoo / 'base'}+{zoo / 'lora'}"}
    found = learned(zoo, start, tmp_path / "out", experts, steps=20, batch=0)
    history = found.facts["history"]
    assert history[-1]["loss"] < history[0]["loss"]
