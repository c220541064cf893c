"""Floors: what no merge can beat (raw I/O), and what a plain one costs (the bare loop in floor_torch.py).

    python -m benchmarks.floors OUT FOLDER FOLDER ...           # read all, write the size of the first
    python -m benchmarks.floors --fsync OUT FOLDER FOLDER ...

The raw floor reads every weight file through one reused 16 MB buffer and writes one output of the first folder's size
from the same buffer, so it pays for no fresh memory. Only the standard library is imported: start-up is a few
hundredths of a second and stays inside the measured time, as it does for every program measured.
"""

import os
import sys
from pathlib import Path

BUFFER = 16 << 20


def read_files(files: list[Path], buffer: memoryview) -> int:
    """Read the files through ``buffer`` and return the number of bytes."""
    total = 0
    for path in files:
        file = os.open(path, os.O_RDONLY)
        try:
            while count := os.readv(file, [buffer]):
                total += count
        finally:
            os.close(file)
    return total


def write_file(path: Path, length: int, buffer: memoryview, *, fsync: bool) -> None:
    """Write ``length`` bytes out of ``buffer`` to ``path``."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        done = 0
        while done < length:
            done += os.write(file, buffer[: min(len(buffer), length - done)])
        if fsync:
            os.fsync(file)
    finally:
        os.close(file)


def warm(folders: list[Path]) -> None:
    """Bring the weight files of ``folders`` into the page cache."""
    buffer = memoryview(bytearray(BUFFER))
    for folder in folders:
        read_files(sorted(folder.glob("*.safetensors")), buffer)


def main(arguments: list[str]) -> None:
    """Read the folders' weights and write one output."""
    fsync = "--fsync" in arguments
    out, *folders = (Path(argument) for argument in arguments if argument != "--fsync")
    buffer = memoryview(bytearray(BUFFER))
    files = [sorted(folder.glob("*.safetensors")) for folder in folders]
    for group in files:
        read_files(group, buffer)
    write_file(out, sum(file.stat().st_size for file in files[0]), buffer, fsync=fsync)


if __name__ == "__main__":
    main(sys.argv[1:])
