"""Factors that stay in their file until they are asked for, and vectors that are pages of theirs."""

import gc
import os
import weakref
from pathlib import Path

import pytest
import torch
from routed_models import make_experts, write_adapter
from safetensors.torch import load_file, save_file
from tiny_models import make_llama
from torch import Tensor

from consilience.checkpoints.checkpoint import FileStorage
from consilience.errors import InputError
from consilience.routing.expert import read_factors
from consilience.routing.folder import store
from consilience.routing.layer import Experts
from consilience.routing.router import Router
from consilience.routing.settings import Settings

FILE = "adapter_model.safetensors"
MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    """Return the adapters of a tiny Llama's experts."""
    experts = make_experts(make_llama())
    return [write_adapter(one, tmp_path / one.name) for one in experts]


def test_a_layer_holds_the_files_factors_under_each_other(adapters: list[Path]) -> None:
    factors = [read_factors(place)[MODULE] for place in adapters]
    layer = Experts(MODULE, factors, torch.zeros(3, 32), torch.zeros(1), Router(("a", "b", "c"), Settings("none")))
    files = [load_file(place / FILE) for place in adapters]
    prefix = f"base_model.model.{MODULE}"
    a = torch.cat([file[f"{prefix}.lora_A.weight"] for file in files])
    b = torch.cat([file[f"{prefix}.lora_B.weight"] for file in files], 1)
    assert torch.equal(layer.into, torch.cat([a, torch.zeros(3, 32)]))
    assert torch.equal(layer.out_of, b.t())
    assert [one.rank for one in factors] == [2, 3, 4]
    assert [one.shape for one in factors] == [(32, 32)] * 3


class Counted:
    """Factors that are made whenever they are asked for; ``counts`` has how many were alive then."""

    rank, shape = 2, (5, 7)

    def __init__(self, alive: list["weakref.ref[Tensor]"], counts: list[int]) -> None:
        self.alive, self.counts = alive, counts

    @property
    def a(self) -> Tensor:
        """A."""
        return self._made(2, 7)

    @property
    def b(self) -> Tensor:
        """B."""
        return self._made(5, 2)

    def _made(self, *shape: int) -> Tensor:
        made = torch.ones(shape)
        self.alive.append(weakref.ref(made))
        self.counts.append(sum(one() is not None for one in self.alive))
        return made


def test_one_experts_factors_are_in_memory_beside_the_stack() -> None:
    names, alive, counts = tuple("abcdefgh"), list["weakref.ref[Tensor]"](), list[int]()
    factors = [Counted(alive, counts) for _ in names]
    layer = Experts("m", factors, torch.zeros(8, 7), torch.zeros(1), Router(names, Settings("none")))
    assert layer.into.shape == (24, 7)
    assert len(counts) == 16
    assert max(counts) <= 2


def test_a_file_that_has_become_shorter_is_named(adapters: list[Path]) -> None:
    factors = read_factors(adapters[0])
    os.truncate(adapters[0] / FILE, (adapters[0] / FILE).stat().st_size // 2)
    last = max((one for one in factors.values()), key=lambda one: max(one.pair.a.offset, one.pair.b.offset))
    with pytest.raises(InputError, match=r"adapter_model\.safetensors: tensor .* file ended"):
        last.check()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_found_at_once(adapters: list[Path], value: float) -> None:
    held = load_file(adapters[0] / FILE)
    held[f"base_model.model.{MODULE}.lora_B.weight"][0, 0] = value
    save_file(held, adapters[0] / FILE)
    with pytest.raises(InputError, match="holds NaN or Inf"):
        read_factors(adapters[0])


def test_files_are_closed_when_nothing_refers_to_them(adapters: list[Path]) -> None:
    factors = read_factors(adapters[0])
    storage = next(iter(factors.values())).adapter.checkpoint.storage
    assert isinstance(storage, FileStorage)
    open_files = set(os.listdir("/proc/self/fd"))
    del factors, storage
    gc.collect()
    assert len(set(os.listdir("/proc/self/fd"))) < len(open_files)


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_vectors_are_their_files(tmp_path: Path, shift: int) -> None:
    values = {"a": torch.arange(4.0), "b": torch.arange(3.0).bfloat16()}
    store.write_vectors(tmp_path, {"average": values})
    path = tmp_path / store.VECTORS
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path.write_bytes((length + shift).to_bytes(8, "little") + data[8 : 8 + length] + b" " * shift + data[8 + length :])
    found = store.read_vectors(tmp_path)["average"]
    assert {name: one.dtype for name, one in found.items()} == {"a": torch.float32, "b": torch.bfloat16}
    assert all(torch.equal(found[name], value) for name, value in values.items())
    path.unlink()
    assert torch.equal(found["a"], values["a"])
