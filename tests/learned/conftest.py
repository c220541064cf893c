"""Fixtures of the learned methods' tests: one thread, and models that are made once."""

from pathlib import Path

import pytest
import torch
from tiny_experts import sentences, write_adapter, write_base, write_expert, write_rows


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 base, the full experts ``a`` and ``b``, the adapter ``lora``, and five rows of each."""
    place = tmp_path_factory.mktemp("zoo")
    base = write_base(place / "base")
    write_expert(place / "a", base, 1)
    write_expert(place / "b", base, 2)
    write_adapter(place / "lora", base, 3)
    for seed, name in enumerate(("a", "b", "lora")):
        write_rows(place / "rows" / f"{name}.jsonl", sentences(seed, 5))
    return place
