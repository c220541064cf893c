"""CIFAR-10 from a folder of its published files: the Python pickles, or the binary version.

A pickle is a program, and these come from strangers: nothing of it is run. The reader knows the three names that a
pickled array consists of, gives each a stand-in that only notes what it is told, and refuses every other name.
"""

import math
import pickle
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from consilience.errors import InputError
from suites.vision.images import DataSet, Images, images_of

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_PARTS = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
_PIXELS = 3 * 32 * 32


class _Dtype:
    """What a pickle says of an array's type."""

    def __init__(self, code: Any = "", *_: Any) -> None:
        self.code = code.decode("latin-1") if isinstance(code, bytes) else str(code)

    def __setstate__(self, state: Any) -> None:
        """Ignore: byte order means nothing for bytes."""


class _Array:
    """What a pickle says of an array: shape, type and bytes."""

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.code = ""
        self.fortran = False
        self.raw = b""

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, fortran, raw = state
        if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes):
            raise pickle.UnpicklingError("an array that is not of bytes")
        self.shape, self.code, self.raw = tuple(int(n) for n in shape), dtype.code, raw
        self.fortran = bool(fortran)

    def value(self) -> npt.NDArray[np.uint8]:
        """Return the array.

        Raises:
            ValueError: type, shape and bytes do not agree.
        """
        if self.code not in ("u1", "|u1") or len(self.raw) != math.prod(self.shape):
            raise ValueError("not an array of unsigned bytes")
        return np.frombuffer(self.raw, np.uint8).reshape(self.shape, order="F" if self.fortran else "C")


class _ArrayType:
    """Stands for the name numpy.ndarray, which a pickle passes on and never calls."""


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("bytes in an unknown encoding")
    return text.encode("latin-1")


_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _ArrayType,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}


class _Reader(pickle.Unpickler):
    """Reads containers, numbers, texts and arrays of bytes; every other name is refused."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """Return the stand-in of a name."""
        try:
            return _KNOWN[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(f"the name {module_name}.{global_name}") from None

    def persistent_load(self, pid: Any) -> Any:
        """Refuse: the published files hold no references outward."""
        raise pickle.UnpicklingError("a reference to something outside the file")


def read_pickle(path: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Read one pickled batch: images uint8 [n, 3, 32, 32] and labels int64 [n].

    The file is a dictionary with ``data``, uint8 [n, 3072] (red, green and blue planes), and ``labels``, a list.

    Raises:
        InputError: the file cannot be read, is damaged, or holds anything but numbers, texts and arrays of bytes.
    """
    try:
        with path.open("rb") as file:
            found: Any = _Reader(file, encoding="bytes").load()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); fetch the file again") from None
    except Exception as error:  # a damaged pickle raises anything at all
        raise InputError(f"{path}: is no CIFAR-10 batch, it holds {error}; fetch the published file again") from None
    try:
        entries = cast(dict[Any, Any], found)
        batch = {key.decode("latin-1") if isinstance(key, bytes) else key: value for key, value in entries.items()}
        pixels = cast(_Array, batch["data"]).value().reshape(-1, 3, 32, 32)
        return pixels, np.array([int(label) for label in batch["labels"]], np.int64)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"{path}: lacks data [n, 3072] or labels; fetch the published file again") from None


def read_binary(path: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Read one batch of the binary version, records of a label byte and 3,072 pixels, as ``read_pickle`` does.

    Raises:
        InputError: the file cannot be read or is no whole number of records.
    """
    try:
        raw = np.fromfile(path, np.uint8)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); fetch the file again") from None
    if not len(raw) or len(raw) % (_PIXELS + 1):
        raise InputError(f"{path}: {len(raw)} bytes are no records of 3,073; fetch the published file again")
    records = raw.reshape(-1, _PIXELS + 1)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].astype(np.int64)


def _part(folder: Path, part: str) -> Images:
    pickles = [folder / name for name in _PARTS[part]]
    binaries = [folder / f"{name}.bin" for name in _PARTS[part]]
    if all(path.is_file() for path in pickles):
        batches = [read_pickle(path) for path in pickles]
    elif all(path.is_file() for path in binaries):
        batches = [read_binary(path) for path in binaries]
    else:
        missing = next(path.name for path in pickles if not path.is_file())
        raise InputError(f"{folder}: has no {missing}(.bin); give the folder of CIFAR-10's unpacked batches")
    pixels = np.concatenate([batch[0] for batch in batches])
    return images_of(pixels, np.concatenate([batch[1] for batch in batches]), str(folder), len(CLASSES))


def load(folder: Path) -> DataSet:
    """Return CIFAR-10 from ``folder``, or from the ``cifar-10-batches-py`` or ``-bin`` in it.

    Raises:
        InputError: a batch is missing or damaged, or holds what no published batch does.
    """
    for name in ("cifar-10-batches-py", "cifar-10-batches-bin"):
        if (folder / name).is_dir():
            return load(folder / name)
    return DataSet("cifar10", CLASSES, _part(folder, "train"), _part(folder, "test"))
