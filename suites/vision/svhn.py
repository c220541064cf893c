"""SVHN's cropped digits from a folder of its published files, ``train_32x32.mat`` and ``test_32x32.mat``."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from consilience.errors import InputError
from suites.vision.images import DataSet, Images, images_of

CLASSES = tuple("0123456789")


def _loadmat() -> Any:
    try:
        return importlib.import_module("scipy.io").loadmat
    except ImportError:
        raise InputError("svhn: its .mat files need scipy; pip install scipy") from None


def read_mat(path: Path) -> Images:
    """Read one file: ``X`` uint8 [32, 32, 3, n] and ``y`` [n, 1], where the digit 0 has the label 10.

    Raises:
        InputError: scipy is missing, or the file is damaged or no such file.
    """
    loadmat = _loadmat()
    try:
        found: dict[str, Any] = loadmat(str(path), variable_names=["X", "y"])
        pixels, labels = np.asarray(found["X"]), np.asarray(found["y"]).ravel()
    except Exception as error:  # scipy raises many kinds for a damaged file
        said = str(error) or type(error).__name__
        raise InputError(f"{path}: is no SVHN file of cropped digits ({said}); fetch it again") from None
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[2] != 3 or labels.dtype.kind not in "iu":
        raise InputError(f"{path}: X is not uint8 [32, 32, 3, n] or y not whole numbers; fetch the file again")
    return images_of(pixels.transpose(3, 2, 0, 1), np.where(labels == 10, 0, labels), str(path), len(CLASSES))


def load(folder: Path) -> DataSet:
    """Return SVHN's cropped digits from ``folder`` (its extra images are left out).

    Raises:
        InputError: a file is missing or damaged, or scipy is missing.
    """
    for name in ("train_32x32.mat", "test_32x32.mat"):
        if not (folder / name).is_file():
            raise InputError(f"{folder}: has no {name}; give the folder of SVHN's cropped digits")
    return DataSet("svhn", CLASSES, read_mat(folder / "train_32x32.mat"), read_mat(folder / "test_32x32.mat"))
