"""Imagenette from a folder as published: ``train`` and ``val``, each with a folder of JPEG files per class."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from consilience.errors import InputError
from suites.vision.images import DataSet, Images, images_of

#: The WordNet names of the ten folders, and what they show, in the order of the labels.
FOLDERS = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
CLASSES = tuple(FOLDERS.values())
SIZE = 64
"""Height and width to which images are brought."""


def square(image: Any, size: int) -> npt.NDArray[np.uint8]:
    """Return a PIL image as uint8 [3, size, size]: its central square, resized (bilinear, antialiased)."""
    from PIL import Image

    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    small = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(small).transpose(2, 0, 1)


def _read(path: Path, size: int) -> npt.NDArray[np.uint8]:
    from PIL import Image

    try:
        with Image.open(path, formats=("JPEG",)) as image:
            return square(image, size)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: is no whole JPEG image ({error}); fetch the file again") from None


def _part(folder: Path, size: int) -> Images:
    pixels: list[npt.NDArray[np.uint8]] = []
    labels: list[int] = []
    for label, name in enumerate(FOLDERS):
        files = sorted(path for path in (folder / name).glob("*") if path.suffix.lower() in (".jpeg", ".jpg"))
        if not files:
            raise InputError(f"{folder / name}: holds no JPEG files; give Imagenette's folder with train and val")
        pixels += [_read(path, size) for path in files]
        labels += [label] * len(files)
    return images_of(np.stack(pixels), np.array(labels), str(folder), len(CLASSES))


def load(folder: Path, size: int = SIZE) -> DataSet:
    """Return Imagenette from ``folder``, every image's central square brought to ``size`` pixels.

    Raises:
        InputError: a class has no images, or an image is damaged.
    """
    return DataSet("imagenette", CLASSES, _part(folder / "train", size), _part(folder / "val", size))
