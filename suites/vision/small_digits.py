"""The 8 x 8 digits that scikit-learn carries (UCI's optical recognition of handwritten digits, its test part)."""

import importlib
from typing import Any

import numpy as np

from consilience.errors import InputError
from suites.vision.images import DataSet, images_of

CLASSES = tuple("0123456789")
TEST_SHARE = 0.25


def load() -> DataSet:
    """Return the 1,797 digits, pixels brought from 0..16 to 0..255; a seeded quarter of them are the test images.

    Raises:
        InputError: scikit-learn is not installed.
    """
    try:
        load_digits: Any = importlib.import_module("sklearn.datasets").load_digits
    except ImportError:
        raise InputError("digits: come with scikit-learn; pip install scikit-learn") from None
    found = load_digits()
    pixels = np.rint(np.asarray(found.images) * (255.0 / 16.0)).astype(np.uint8)
    whole = images_of(pixels, np.asarray(found.target), "digits", len(CLASSES))
    order = np.random.default_rng(0).permutation(len(whole))
    held = round(TEST_SHARE * len(whole))
    return DataSet("digits", CLASSES, whole.take(order[held:]), whole.take(order[:held]))
