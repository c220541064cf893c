"""Compare the environment that runs this with requirements.lock: ``.venv/bin/python -m tools.verify``."""

import importlib.metadata
import sys
from collections.abc import Iterable, Mapping

from tools.lockfile import ACCELERATORS, Locked, canonical, read

#: Not installed by set-up from the lock: the environment's own installer, and the project itself.
OWN = frozenset({"pip", "consilience"})


def installed() -> dict[str, str]:
    """Return the versions of this environment's packages."""
    return {canonical(each.metadata["Name"]): each.version for each in importlib.metadata.distributions()}


def applies(package: Locked, environment: Mapping[str, str] | None = None) -> bool:
    """Return whether a package is wanted in ``environment``: values of markers that differ from this machine's."""
    from packaging.markers import Marker

    return not package.marker or Marker(package.marker).evaluate(dict(environment or {}))


def problems(locked: Iterable[Locked], versions: Mapping[str, str]) -> list[str]:
    """Return what differs from the lock; a build's own suffix, such as ``+cpu``, is no difference."""
    wanted = [package for package in locked if applies(package)]
    found = {package.name: versions.get(package.name, "absent").partition("+")[0] for package in wanted}
    return [
        f"{package.name} is {found[package.name]}, locked at {package.version}"
        for package in wanted
        if found[package.name] != package.version.partition("+")[0]
    ]


def unlocked(locked: Iterable[Locked], versions: Mapping[str, str]) -> list[str]:
    """Return what is installed beside the lock and is no part of an accelerator's support."""
    names = OWN | {package.name for package in locked}
    return sorted(
        f"{name}=={version}"
        for name, version in versions.items()
        if name not in names and not ACCELERATORS.fullmatch(name)
    )


def main() -> None:
    """Say how many packages are as locked; end with status 1 if one is not, or if the package cannot be imported."""
    import consilience as consilience

    locked, versions = read(), installed()
    wrong = problems(locked, versions)
    if wrong:
        sys.exit(
            "\n".join([*(f"set-up: {line}" for line in wrong), "set-up: remove .venv, then run 'make setup' again"])
        )
    print(f"set-up: {sum(applies(package) for package in locked)} packages are at their locked versions")
    extra = unlocked(locked, versions)
    if extra:
        print(f"set-up: installed, and not locked: {', '.join(extra)}")


if __name__ == "__main__":
    main()
