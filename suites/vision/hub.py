"""CIFAR-10, SVHN and Imagenette through the ``datasets`` library, on a machine with a network."""

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from consilience.errors import InputError, MachineError
from suites.vision import cifar, imagenette, svhn
from suites.vision.images import DataSet, Images, images_of


@dataclass(frozen=True)
class Source:
    """Where a data set is on the hub: its name, configuration, parts and columns, and its size in pixels."""

    repository: str
    configuration: str | None
    test: str
    image: str
    label: str
    classes: tuple[str, ...]
    size: int


SOURCES = {
    "cifar10": Source("uoft-cs/cifar10", None, "test", "img", "label", cifar.CLASSES, 32),
    "svhn": Source("ufldl-stanford/svhn", "cropped_digits", "test", "image", "label", svhn.CLASSES, 32),
    "imagenette": Source(
        "frgfm/imagenette", "160px", "validation", "image", "label", imagenette.CLASSES, imagenette.SIZE
    ),
}


def load(name: str) -> DataSet:
    """Return a data set of the hub.

    Raises:
        InputError: the library is not installed.
        MachineError: the library cannot fetch it.
    """
    source = SOURCES[name]
    try:
        load_dataset: Any = importlib.import_module("datasets").load_dataset
    except ImportError:
        raise InputError(
            f"{name}: no package carries it; give the folder of its published files, or pip install datasets"
        ) from None
    return DataSet(name, source.classes, _part(load_dataset, source, "train"), _part(load_dataset, source, source.test))


def _part(load_dataset: Any, source: Source, part: str) -> Images:
    try:
        rows: Any = load_dataset(source.repository, source.configuration, split=part)
        pixels = np.stack([imagenette.square(row[source.image], source.size) for row in rows])
        labels = np.array([int(row[source.label]) for row in rows])
    except Exception as error:  # the library raises many kinds when the network or the hub fails
        raise MachineError(
            f"cannot fetch {source.repository} with datasets ({error}); check the network, or give a folder"
        ) from None
    return images_of(pixels, labels, source.repository, len(source.classes))
