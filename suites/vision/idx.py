"""The IDX format of MNIST and its relatives: a big-endian header, then bytes."""

import gzip
import math
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import numpy.typing as npt

from consilience.errors import InputError
from suites.vision.images import Images, images_of

#: The names under which the four files of such a data set are published; some copies write a dot for the last hyphen.
NAMES = {"train": "train", "test": "t10k"}
_UNSIGNED_BYTE = 8
_PIECE = 1 << 24


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """Read one IDX file of unsigned bytes, gzipped or not.

    Two zero bytes, the type (8: unsigned byte), the number of dimensions, the dimensions as 32-bit big-endian numbers,
    then the elements, the last dimension fastest.

    Raises:
        InputError: the file cannot be read, is cut short or is no such file.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return _parse(cast(BinaryIO, file), path)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise InputError(f"{path}: the gzip stream is damaged; fetch the file again") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); fetch the file again") from None


def _parse(file: BinaryIO, path: Path) -> npt.NDArray[np.uint8]:
    head = file.read(4)
    if len(head) != 4 or head[:2] != b"\0\0" or head[2] != _UNSIGNED_BYTE or not 1 <= head[3] <= 4:
        raise InputError(f"{path}: is no IDX file of unsigned bytes; give the files of the data set as published")
    dimensions = file.read(4 * head[3])
    shape = tuple(int(n) for n in np.frombuffer(dimensions, ">u4")) if len(dimensions) == 4 * head[3] else (-1,)
    count = math.prod(shape)
    body = _read(file, count)
    if len(body) != count or file.read(1):
        raise InputError(f"{path}: holds not the {list(shape)} bytes its header tells; fetch the file again")
    return np.frombuffer(body, np.uint8).reshape(shape)


def _read(file: BinaryIO, count: int) -> bytes:
    """Read ``count`` bytes, or what there is: asked for all at once, a false header would take memory for nothing."""
    parts: list[bytes] = []
    while count > 0 and (part := file.read(min(count, _PIECE))):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _find(folder: Path, part: str, kind: str, dimensions: int) -> Path:
    stem = f"{NAMES[part]}-{kind}"
    for name in (f"{stem}-idx{dimensions}-ubyte", f"{stem}.idx{dimensions}-ubyte"):
        for suffix in ("", ".gz"):
            if (folder / f"{name}{suffix}").is_file():
                return folder / f"{name}{suffix}"
    raise InputError(f"{folder}: has no {stem}-idx{dimensions}-ubyte(.gz); give the folder of the four IDX files")


def read_part(folder: Path, part: str, classes: int) -> Images:
    """Read the ``train`` or ``test`` images and labels of a folder of four IDX files.

    Raises:
        InputError: a file is missing or damaged, or images and labels do not belong together.
    """
    pictures = _find(folder, part, "images", 3)
    labels = _find(folder, part, "labels", 1)
    return images_of(read_idx(pictures), read_idx(labels), str(pictures), classes)
