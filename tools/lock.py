"""Resolve everything that set-up installs and write requirements.lock.

    python -m tools.lock [--torch VERSION]

The newest versions that pyproject.toml allows, with the hashes of all their files. torch stays at the locked version
unless another is asked for. The resolver runs in an environment of its own, which is thrown away; it asks its default
index (its own variables, such as UV_DEFAULT_INDEX, name another).
"""

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

from tools.lockfile import ACCELERATORS, BY_MACHINE, PATH, ROOT, Locked, parse, pin, read

RESOLVER = "uv==0.13.9"
RUN = "3.11"
RESOLVED = ("3.12", "3.13")
HEADER = f"""\
# The exact versions that `make setup` installs, with the hashes of their files. Written by `make lock`; do not edit.
#
# Run on Python {RUN}. Resolved for Python {" and ".join(RESOLVED)} as well, but not run there.
#
# {BY_MACHINE} is pinned by version and has no hash: which build of it is installed (CPU, CUDA, ...) differs by machine.
# What a build needs for its accelerator (nvidia-*, cuda-*, triton) is left free for the same reason.

"""


def _blocks(text: str) -> list[str]:
    """Cut the resolver's answer into packages: a line, its hashes, and a comment that says what needs it."""
    return [block for block in re.split(r"^(?=\S)", text, flags=re.MULTILINE) if block.strip()]


def lock_text(answer: str) -> str:
    """Return the lock that the resolver's ``answer`` makes: accelerators left out, torch without its hashes."""
    kept: list[str] = []
    for block in _blocks(answer):
        (package,) = parse(block)
        if ACCELERATORS.fullmatch(package.name):
            continue
        if package.name == BY_MACHINE:
            comment = [line for line in block.splitlines() if line.lstrip().startswith("#")]
            block = "\n".join([Locked(package.name, package.version, package.marker).line, *comment]) + "\n"
        kept.append(block)
    return HEADER + "".join(kept)


def changes(before: tuple[Locked, ...], after: tuple[Locked, ...]) -> list[str]:
    """Return a line for each package whose versions differ."""
    old: dict[str, set[str]] = {}
    new: dict[str, set[str]] = {}
    for packages, versions in ((before, old), (after, new)):
        for package in packages:
            versions.setdefault(package.name, set()).add(package.version)
    return [
        f"{name} {', '.join(sorted(old.get(name, {'-'})))} -> {', '.join(sorted(new.get(name, {'-'})))}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def _uv(uv: Path, *arguments: str, text: str = "") -> str:
    command = [str(uv), *arguments, "--no-config", "--system-certs", "--cache-dir", str(uv.parent.parent / "cache")]
    done = subprocess.run(command, cwd=ROOT, input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{done.stderr}lock: the versions could not be resolved (above); {PATH.name} is as it was")
    return done.stdout


def resolve(uv: Path, torch: str) -> str:
    """Return the lock of the newest versions that pyproject.toml allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    build: list[str] = project["build-system"]["requires"]
    command = ["pip", "compile", "pyproject.toml", "-", "--extra", "dev", "--upgrade"]
    command += ["--universal", "--python-version", RUN, "--fork-strategy", "fewest"]
    command += ["--generate-hashes", "--only-binary", ":all:", "--no-header", "--annotation-style", "line"]
    return lock_text(_uv(uv, *command, text="\n".join([*build, torch])))


def check_files(uv: Path, locked: tuple[Locked, ...], folder: Path) -> None:
    """End with an error unless each Python has a wheel of every package, under the locked hashes."""
    for version in (RUN, *RESOLVED):
        command = ["pip", "install", "--dry-run", "--no-deps", "--only-binary", ":all:"]
        command += ["--target", str(folder / "none"), "--python", sys.executable, "--python-version", version]
        for name, packages, options in (
            ("hashed.txt", [package for package in locked if package.hashes], ["--require-hashes"]),
            ("free.txt", [package for package in locked if not package.hashes], []),
        ):
            (folder / name).write_text("\n".join(package.line for package in packages), encoding="utf-8")
            _uv(uv, *command, *options, "--requirement", str(folder / name))


def main() -> None:
    """Resolve, check, write the lock, and say what changed."""
    parser = argparse.ArgumentParser(prog="python -m tools.lock")
    parser.add_argument("--torch", help="the version of torch; the locked one if left out")
    arguments = parser.parse_args()
    if not (arguments.torch or PATH.exists()):
        parser.error(f"there is no {PATH.name} to take torch's version from; pass --torch")
    before = read() if PATH.exists() else ()
    torch = f"{BY_MACHINE}=={arguments.torch}" if arguments.torch else pin(BY_MACHINE)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder, symlinks=True, with_pip=True)
        pip = [folder / "bin" / "python", "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        if subprocess.run([*pip, RESOLVER], check=False).returncode != 0:
            sys.exit(f"lock: {RESOLVER} could not be installed (above)")
        uv = folder / "bin" / "uv"
        text = resolve(uv, torch)
        after = parse(text)
        check_files(uv, after, folder)
    PATH.write_text(text, encoding="utf-8")
    for line in changes(before, after) if before else ():
        print(f"lock: {line}")
    print(f"lock: {PATH.name} has {len(after)} packages, with files for Python {', '.join((RUN, *RESOLVED))}")


if __name__ == "__main__":
    main()
