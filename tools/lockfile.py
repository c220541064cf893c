"""requirements.lock as values, by the standard library alone: set-up reads it before anything is installed."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATH = ROOT / "requirements.lock"
#: Its build differs by machine, so it is pinned without a hash; and what a build brings for its accelerator is free.
BY_MACHINE = "torch"
ACCELERATORS = re.compile(r"(nvidia|cuda)-.*|(pytorch-)?triton(-.*)?")

_LINE = re.compile(r"(?P<name>[\w.-]+)==(?P<version>[^\s;]+)(?: ; (?P<marker>.+?))?(?P<hashes>(?: --hash=\S+)*)")


@dataclass(frozen=True)
class Locked:
    """One package of the lock: its version, where it applies, and the hashes of its files."""

    name: str
    version: str
    marker: str = ""
    hashes: tuple[str, ...] = ()

    @property
    def requirement(self) -> str:
        """The package as a requirement, without its hashes."""
        return f"{self.name}=={self.version}" + (f" ; {self.marker}" if self.marker else "")

    @property
    def line(self) -> str:
        """The package as a line of a requirements file."""
        return " ".join([self.requirement, *(f"--hash={value}" for value in self.hashes)])


def canonical(name: str) -> str:
    """Return the form in which names of packages are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def parse(text: str) -> tuple[Locked, ...]:
    """Read the text of a lock.

    Raises:
        ValueError: a line is something else than one package at one version.
    """
    packages: list[Locked] = []
    bare = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    for line in re.sub(r" *\\\n *", " ", bare).splitlines():
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise ValueError(f"{PATH.name}: {line.strip()[:100]!r} is no package at one version; run 'make lock'")
        hashes = tuple(option.removeprefix("--hash=") for option in match["hashes"].split())
        packages.append(Locked(canonical(match["name"]), match["version"], match["marker"] or "", hashes))
    return tuple(packages)


def read() -> tuple[Locked, ...]:
    """Return the packages of requirements.lock."""
    return parse(PATH.read_text(encoding="utf-8"))


def pin(name: str) -> str:
    """Return ``name==version`` as it is locked.

    Raises:
        KeyError: the package is not locked, or at several versions.
    """
    found = [package for package in read() if package.name == name]
    if len(found) != 1:
        raise KeyError(f"{PATH.name}: {name} has {len(found)} versions")
    return f"{name}=={found[0].version}"
