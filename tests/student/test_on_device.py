"""The passes on an accelerator, run on this machine's CPU against the compiled ones."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from consilience.api import build_recipe, plan_recipe
from consilience.coefficients import make_groups
from consilience.student import bank as bank_module
from consilience.student.bank import Bank, mergeable


@pytest.fixture
def bank(tmp_path: Path) -> Any:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (7, 5), "b.weight": (3, 4, 2), "c.bias": (11,)}
    base = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    save_file(base, tmp_path / "base.safetensors")
    for k in range(3):
        moved = {n: (v.float() + 0.1 * torch.randn(v.shape, generator=generator)).bfloat16() for n, v in base.items()}
        save_file(moved, tmp_path / f"e{k}.safetensors")
    experts = {f"e{k}": str(tmp_path / f"e{k}.safetensors") for k in range(3)}
    plan = plan_recipe(build_recipe("task_arithmetic", str(tmp_path / "base.safetensors"), experts, {}))
    groups = make_groups(mergeable(plan, lambda name: False), "tensor", lambda name: 3)
    yield Bank(plan, groups, threads=1)
    plan.close()


def test_both_passes_agree_with_the_compiled_ones(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    alpha = generator.normal(size=(3, bank.count))
    sizes = {name: tensor.numel for name, tensor in bank.tensors.items()}
    expected = {name: torch.empty(size) for name, size in sizes.items()}
    bank.blend(alpha, expected)
    gradients = {name: torch.from_numpy(generator.normal(size=size)).float() for name, size in sizes.items()}
    slopes = bank.products(gradients)
    monkeypatch.setattr(bank_module.on_device, "suits", lambda out: True)
    found = {name: torch.empty(size) for name, size in sizes.items()}
    bank.blend(alpha, found)
    for name in sizes:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(bank.products(gradients), slopes, rtol=1e-5, atol=1e-6)
