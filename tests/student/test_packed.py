"""Stored bfloat16 straight into the sums: the general path's bytes."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from consilience.api import build_recipe, plan_recipe
from consilience.coefficients import make_groups
from consilience.errors import InputError
from consilience.student import packed
from consilience.student.bank import Bank, mergeable


@pytest.mark.parametrize("experts", [1, 3])
def test_both_passes_are_those_of_the_general_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experts: int
) -> None:
    monkeypatch.setattr(packed, "BLOCK", 4096)
    generator = torch.Generator().manual_seed(0)
    base = {"a.weight": torch.randn(91, 101, generator=generator).bfloat16(), "b": torch.randn(5).bfloat16()}
    save_file(base, tmp_path / "base.safetensors")
    for k in range(experts):
        moved = {n: (v.float() + 0.1 * torch.randn(v.shape, generator=generator)).bfloat16() for n, v in base.items()}
        save_file(moved, tmp_path / f"e{k}.safetensors")
    paths = {f"e{k}": str(tmp_path / f"e{k}.safetensors") for k in range(experts)}
    plan = plan_recipe(build_recipe("task_arithmetic", str(tmp_path / "base.safetensors"), paths, {}))
    bank = Bank(plan, make_groups(mergeable(plan, lambda name: False), "tensor", lambda name: 4), threads=1)
    assert all(packed.suits(tensor) for tensor in bank.tensors.values())
    numbers = np.random.default_rng(0)
    alpha = numbers.normal(size=(experts, bank.count))
    sizes = {name: tensor.numel for name, tensor in bank.tensors.items()}
    first, again = ({name: torch.empty(size) for name, size in sizes.items()} for _ in range(2))
    bank.blend(alpha, first)  # the first pass looks for NaN, in the general path
    bank.blend(alpha, again)
    for name in sizes:
        assert torch.equal(first[name], again[name]), name
    gradients = {name: torch.from_numpy(numbers.normal(size=size)).float() for name, size in sizes.items()}
    slopes = bank.products(gradients)
    monkeypatch.setattr(packed, "suits", lambda tensor: False)
    np.testing.assert_allclose(slopes, bank.products(gradients), rtol=1e-5, atol=1e-5)
    plan.close()


def test_a_file_that_becomes_shorter_is_one_line(tmp_path: Path) -> None:
    state = {"a": torch.ones(64, 64).bfloat16()}
    for name in ("base", "e"):
        save_file(state, tmp_path / f"{name}.safetensors")
    save_file({"a": 2 * state["a"]}, tmp_path / "e.safetensors")
    plan = plan_recipe(
        build_recipe("task_arithmetic", str(tmp_path / "base.safetensors"), {"e": str(tmp_path / "e.safetensors")}, {})
    )
    bank = Bank(plan, make_groups(mergeable(plan, lambda name: False), "tensor"), threads=1)
    assert bank.products({"a": torch.ones(64 * 64)}).tolist() == [[4096.0]]
    os.truncate(tmp_path / "e.safetensors", 1000)
    with pytest.raises(InputError, match=r"e\.safetensors: tensor 'a': file ended while it was read"):
        bank.products({"a": torch.ones(64 * 64)})
    plan.close()
