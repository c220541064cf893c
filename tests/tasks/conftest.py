"""Fixtures of the tasks' tests: one thread, a cache of their own, tiny models and files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_llama, make_tokenizer


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # two test processes share two cores, and spinning threads cost more than they bring
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CONSILIENCE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def plain_tokenizer() -> Any:
    return make_tokenizer(None, bos=True)


@pytest.fixture(scope="session")
def llama() -> Any:
    return make_llama()


@pytest.fixture(scope="session")
def other_llama() -> Any:
    return make_llama(1)


@pytest.fixture
def folder(tmp_path: Path, llama: Any, tokenizer: Any) -> Path:
    place = tmp_path / "model"
    llama.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture
def rows_file(tmp_path: Path) -> Callable[..., Path]:
    def write(*lines: str, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write
