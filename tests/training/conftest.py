"""Fixtures of the training tests: one thread, a cache of their own, a tiny base and two tasks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_base import save_base


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CONSILIENCE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def rows_file(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, *lines: str) -> Path:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def tasks(rows_file: Callable[..., Path]) -> list[Path]:
    """One task of five rows with short and long answers, and one of three rows with choices."""
    copy = [f'{{"prompt": "say {word}", "response": "{word * 3}"}}' for word in ("a", "be", "cat", "dogs", "mouse")]
    judge = [f'{{"prompt": "{text}?", "choices": ["no", "yes"], "label": {i % 2}}}' for i, text in enumerate("xyz")]
    return [rows_file("copy", *copy), rows_file("judge", *judge)]
