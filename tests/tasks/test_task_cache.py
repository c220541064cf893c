import json
import os
from pathlib import Path

import pytest

from consilience.errors import InputError
from consilience.tasks.cache import (
    cache_folder,
    file_digest,
    fingerprint,
    key_of,
    recall,
    remember,
)
from consilience.workdir import write_file

OLD = 1_600_000_000_000_000_000


def aged(path: Path, data: bytes) -> Path:
    """A file whose time stamps are long past, so that its digest is remembered (its change time cannot be faked)."""
    path.write_bytes(data)
    os.utime(path, ns=(OLD, OLD))
    return path


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("consilience.tasks.cache._SETTLED_NS", -1)


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert cache_folder() == tmp_path / "cache" / "evaluate"
    monkeypatch.delenv("CONSILIENCE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "consilience" / "evaluate"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification says to ignore it
    assert cache_folder() == Path.home() / ".cache" / "consilience" / "evaluate"


def test_what_is_remembered_is_recalled():
    key = key_of({"a": [1, None]})
    assert recall("results", key) is None
    remember("results", key, {"x": 1.5})
    assert recall("results", key) == {"x": 1.5}
    assert key_of({"a": [1, None]}) == key != key_of({"a": [1, 0]})


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_a_damaged_file_is_ignored_and_rewritten(damage: bytes):
    key = key_of({})
    remember("results", key, {"x": 1})
    (file,) = (cache_folder() / "results").rglob("*.json")
    file.write_bytes(damage)
    assert recall("results", key) is None
    remember("results", key, {"x": 2})
    assert recall("results", key) == {"x": 2}


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CONSILIENCE_CACHE", str(tmp_path / "file" / "below"))
    remember("results", key_of({}), {"x": 1})
    assert recall("results", key_of({})) is None


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "a.json"
    write_file(target, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_file(target, b"new")
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_digest_is_of_the_whole_content(tmp_path: Path):
    size = 5 << 20  # more than one block of reading
    a = aged(tmp_path / "a", bytes(size))
    b = aged(tmp_path / "b", bytes(size - 1) + b"\x01")
    assert file_digest(a) != file_digest(b)
    assert file_digest(a) == file_digest(aged(tmp_path / "c", bytes(size)))


@pytest.mark.usefixtures("settled")
def test_a_digest_is_computed_once_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = aged(tmp_path / "a", b"one")
    first = file_digest(path)
    opened: list[str] = []
    plain_open = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: (opened.append(self.name), plain_open(self, *a, **k))[1])  # pyright: ignore
    assert file_digest(path) == first
    assert "a" not in opened
    # The same size and modification time: the change time still tells.
    aged(path, b"two")
    assert file_digest(path) != first
    assert "a" in opened


def test_a_file_just_written_is_not_trusted_yet(tmp_path: Path):
    path = tmp_path / "a"
    path.write_bytes(b"one")
    first = file_digest(path)
    assert not list(cache_folder().rglob("*.json"))
    path.write_bytes(b"two")
    assert file_digest(path) != first


def test_a_fingerprint_covers_every_file_but_cards(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    first = fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("card")
    (tmp_path / ".lock").write_text("x")
    (tmp_path / "sub" / "a.json").write_text("x")
    assert fingerprint(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"abd")
    changed = fingerprint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    assert len({first, changed, fingerprint(tmp_path)}) == 3
    with pytest.raises(InputError, match="cannot be read"):
        fingerprint(tmp_path / "absent")


def test_cache_files_are_json(tmp_path: Path):
    remember("results", key_of({}), {"x": [1, 2]})
    (file,) = (cache_folder() / "results").rglob("*.json")
    assert json.loads(file.read_text()) == {"x": [1, 2]}
    assert file.name == f"{key_of({})}.json"
