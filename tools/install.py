"""Make an environment and install the project into it, with all that developing it needs.

    python -m tools.install .venv                                   # exactly what requirements.lock says
    python -m tools.install .venv-newest --newest [--torch VERSION] # the newest versions that pyproject.toml allows

In the locked environment nothing is built from source and nothing is fetched that the lock does not name, save what
torch's build for this machine brings for its accelerator. pip's own settings (an index, folders of wheels) decide which
build of torch that is.
"""

import argparse
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from tools.lockfile import BY_MACHINE, ROOT, pin, read

OLDEST = (3, 11)


def _say(text: str) -> None:
    print(f"set-up: {text}", flush=True)


@contextmanager
def _step(what: str) -> Generator[None]:
    began = time.perf_counter()
    print(f"set-up: {what} ...", end=" ", flush=True)
    yield
    print(f"{time.perf_counter() - began:.0f} s", flush=True)


def _run(python: Path, *arguments: str) -> None:
    if subprocess.run([python, *arguments], cwd=ROOT, check=False).returncode != 0:
        sys.exit("\nset-up: failed (above); fix this and rerun the same command")


def _pip(python: Path, *arguments: str) -> None:
    _run(python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", *arguments)


def _environment(folder: Path) -> Path:
    python = folder / "bin" / "python"
    if not (folder / "bin" / "pip").exists():
        with _step(f"{folder.name} with Python {sys.version.split()[0]}"):
            try:
                venv.create(folder, symlinks=True, with_pip=True)
            except (subprocess.CalledProcessError, OSError) as error:
                sys.exit(f"\nset-up: {folder.name} cannot be created ({error}); does this Python have venv and pip?")
    old = subprocess.run([python, "-c", f"import sys; sys.exit(sys.version_info < {OLDEST})"], check=False).returncode
    if old:
        sys.exit(f"set-up: {folder} has a Python older than {OLDEST[0]}.{OLDEST[1]}, or a broken one; remove it")
    return python


def install_locked(folder: Path) -> None:
    """Install what the lock says, each step without anything of the next: locked files, torch, the project."""
    python = _environment(folder)
    packages = read()
    hashed = [package.line for package in packages if package.hashes]
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write("\n".join(hashed))
        file.flush()
        with _step(f"packages of requirements.lock ({len(hashed)} with hashes)"):
            _pip(python, "--require-hashes", "--no-deps", "--only-binary", ":all:", "--requirement", file.name)
    with _step(pin(BY_MACHINE)):
        _pip(python, pin(BY_MACHINE))
    with _step("consilience itself"):
        _pip(python, "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    _run(python, "-m", "tools.verify")


def install_newest(folder: Path, torch: str | None) -> None:
    """Install the newest of everything but torch, which stays at the locked version unless ``torch`` names another."""
    python = _environment(folder)
    wanted = f"{BY_MACHINE}=={torch}" if torch else pin(BY_MACHINE)
    with _step(wanted if torch else f"{wanted}, as locked (TORCH=VERSION for another)"):
        _pip(python, wanted)
    with _step("the newest of all other packages that pyproject.toml allows"):
        _pip(python, "--upgrade", "--upgrade-strategy", "eager", "--editable", f"{ROOT}[dev]", wanted)


def main() -> None:
    """Read the command line, install, and say how long that took."""
    began = time.perf_counter()
    parser = argparse.ArgumentParser(prog="python -m tools.install")
    parser.add_argument("folder", type=Path, help="the environment's folder")
    parser.add_argument("--newest", action="store_true", help="the newest versions instead of the locked ones")
    parser.add_argument("--torch", help="with --newest: the version of torch")
    arguments = parser.parse_args()
    if arguments.newest:
        install_newest(arguments.folder.resolve(), arguments.torch)
    else:
        install_locked(arguments.folder.resolve())
    _say(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
