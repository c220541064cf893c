"""The lock covers whatever pyproject.toml asks for, on every Python it speaks of, and set-up notices what differs."""

import importlib.metadata
import re
import tomllib
from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

from tools import lock, verify
from tools.lockfile import ACCELERATORS, BY_MACHINE, PATH, ROOT, Locked, canonical, parse, pin, read

PYTHONS = (lock.RUN, *lock.RESOLVED)
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TEXT = PATH.read_text(encoding="utf-8")
INSTALLED = verify.installed()


def environment(python: str) -> dict[str, str]:
    here = {key: str(value) for key, value in default_environment().items()}
    return here | {"python_version": python, "python_full_version": f"{python}.1"}


@cache
def requirements_of(name: str, version: str) -> list[str]:
    """What a package needs, from its own metadata; only known where the locked version is the installed one."""
    if name == "consilience":
        project = PROJECT["project"]
        extras = [(extra, each) for extra, all_ in project["optional-dependencies"].items() for each in all_]
        return [*project["dependencies"], *(f"{each} ; extra == '{extra}'" for extra, each in extras)]
    if INSTALLED.get(name, "").partition("+")[0] != version:
        return []
    return importlib.metadata.requires(name) or []


def gaps(locked: Iterable[Locked], python: str) -> tuple[list[str], set[str]]:
    """Follow what development and the build need: what the lock does not give, and the packages that it gives."""
    markers = environment(python)
    pins = [package for package in locked if verify.applies(package, markers)]
    wanted = [Requirement("consilience[dev]"), *map(Requirement, PROJECT["build-system"]["requires"])]
    seen: set[str] = set()
    reached: set[str] = set()
    missing: list[str] = []
    while wanted:
        requirement = wanted.pop()
        name = canonical(requirement.name)
        if str(requirement) in seen or ACCELERATORS.fullmatch(name):
            continue
        seen.add(str(requirement))
        versions = [package.version for package in pins if package.name == name]
        if name != "consilience":
            if len(versions) != 1 or not requirement.specifier.contains(versions[0], prereleases=True):
                missing.append(f"{requirement}: locked at {versions}")
                continue
            reached.add(name)
        for text in requirements_of(name, versions[0] if versions else ""):
            each = Requirement(text)
            extras = ["", *requirement.extras]
            if each.marker is None or any(each.marker.evaluate({**markers, "extra": extra}) for extra in extras):
                wanted.append(each)
    return missing, reached


@pytest.mark.parametrize("python", PYTHONS)
def test_all_that_is_needed_is_locked_at_one_version(python: str) -> None:
    missing, reached = gaps(read(), python)
    assert missing == []
    if not verify.problems(read(), INSTALLED):
        assert reached == {package.name for package in read() if verify.applies(package, environment(python))}


@pytest.mark.parametrize("name", ["numpy", "setuptools", "torch", "ruff", "accelerate"])
def test_a_package_that_is_not_locked_is_noticed(name: str) -> None:
    without = [package for package in read() if package.name != name]
    assert any(line.startswith(name) for line in gaps(without, lock.RUN)[0])
    older = [Locked(p.name, "0.0.1", p.marker, p.hashes) if p.name == name else p for p in read()]
    assert any(line.startswith(name) for line in gaps(older, lock.RUN)[0])


def test_every_package_has_hashes_but_torch() -> None:
    assert {package.name for package in read() if not package.hashes} == {BY_MACHINE}
    for package in read():
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", value) for value in package.hashes)
        assert not ACCELERATORS.fullmatch(package.name)


def test_the_lock_names_no_place_and_says_what_it_is() -> None:
    assert "://" not in TEXT
    assert not re.search(r"^\s*-(?!-hash=)", TEXT, re.MULTILINE)
    assert TEXT.startswith(lock.HEADER)
    for statement in (
        "Run on Python 3.11.",
        "Python 3.12 and 3.13",
        "not run there",
        "has no hash",
        "nvidia-*, cuda-*",
    ):
        assert statement in lock.HEADER


def test_lines_of_a_lock() -> None:
    text = "# a comment\nNum_Py==1.0 ; python_version < '4' and sys_platform == 'linux' \\\n    --hash=sha256:aa \\\n"
    text += "    --hash=sha256:bb\n    # via x\ntorch==2.0\n"
    numpy, torch = parse(text)
    assert numpy == Locked(
        "num-py", "1.0", "python_version < '4' and sys_platform == 'linux'", ("sha256:aa", "sha256:bb")
    )
    assert torch == Locked("torch", "2.0")
    assert numpy.line.endswith("'linux' --hash=sha256:aa --hash=sha256:bb")
    assert parse(numpy.line) == (numpy,)


@pytest.mark.parametrize(
    "line", ["numpy>=1", "numpy", "--index-url x", "numpy @ file:///x", "numpy==1 --no-binary :all:"]
)
def test_a_line_that_locks_nothing_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="no package at one version"):
        parse(line)


def test_what_the_resolver_answers_becomes_the_lock() -> None:
    answer = "numpy==1.0 \\\n    --hash=sha256:aa\n    # via torch\nnvidia-cublas==1 ; sys_platform == 'linux' \\\n"
    answer += "    --hash=sha256:bb\n    # via torch\ntorch==2.0 \\\n    --hash=sha256:cc\n    # via consilience\n"
    answer += "triton==3.0 \\\n    --hash=sha256:dd\n    # via torch\n"
    text = lock.lock_text(answer)
    assert parse(text) == (Locked("numpy", "1.0", "", ("sha256:aa",)), Locked("torch", "2.0"))
    assert "# via consilience" in text
    assert lock.changes(parse("a==1\nb==1\n"), parse("b==2\nc==1\n")) == ["a 1 -> -", "b 1 -> 2", "c - -> 1"]


def test_what_differs_from_the_lock_is_said() -> None:
    locked = parse("torch==2.0\nnumpy==1.0\nyaml==3.0\ncolorama==1.0 ; sys_platform == 'nowhere'\n")
    versions = {
        "torch": "2.0+cpu",
        "numpy": "1.1",
        "pip": "9",
        "consilience": "0",
        "nvidia-cublas": "1",
        "ipython": "8",
    }
    assert verify.problems(locked, versions) == ["numpy is 1.1, locked at 1.0", "yaml is absent, locked at 3.0"]
    assert verify.unlocked(locked, versions) == ["ipython==8"]


def test_a_pin_is_the_locked_version() -> None:
    assert pin("torch") in TEXT.splitlines()
    with pytest.raises(KeyError, match="nothing-like-it"):
        pin("nothing-like-it")
