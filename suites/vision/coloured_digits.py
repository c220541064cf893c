"""Coloured, cluttered digits, drawn: one distorted digit on a coloured ground, with dots and an arc (after SVHN).

The package captcha draws them. It draws from the system's entropy, so a private copy of its module gets a seeded
stand-in instead: the same numbers give the same images on every machine with the same Pillow and FreeType.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

from consilience.errors import InputError
from suites.packages import fetched
from suites.vision import CACHE, fetch
from suites.vision.images import DataSet, Images, images_of

CLASSES = tuple("0123456789")
TRAIN, TEST = 40_000, 10_000
SIZE = 32
_SEEDS = {"train": 0, "test": 1}
_LEAST_CONTRAST = 90.0


class SeededSecrets:
    """The three functions of ``secrets`` that the package calls, drawn from a seeded generator."""

    def __init__(self, generator: np.random.Generator) -> None:
        self._generator = generator

    def randbelow(self, limit: int) -> int:
        """Return a whole number from 0 to ``limit`` - 1."""
        return int(self._generator.integers(limit))

    def randbits(self, bits: int) -> int:
        """Return a whole number of ``bits`` bits."""
        return int(self._generator.integers(1 << bits))

    def choice(self, options: Any) -> Any:
        """Return one of ``options``."""
        return options[self.randbelow(len(options))]


def _module(folder: Path) -> ModuleType:
    """Import the package's drawing module under a name of our own, so that nobody else's copy is changed."""
    path = folder / "captcha" / "image.py"
    spec = importlib.util.spec_from_file_location("suites.vision._captcha_image", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise InputError(f"{folder}: has no captcha/image.py; delete the folder, it is fetched again")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _colours(generator: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Draw two colours that differ enough to be told apart."""
    while True:
        ground, ink = generator.integers(0, 256, (2, 3))
        if np.linalg.norm(ground - ink) >= _LEAST_CONTRAST:
            return tuple(int(x) for x in ground), (*(int(x) for x in ink), 255)


def draw(count: int, seed: int, folder: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Draw ``count`` digits: images uint8 [count, 3, 32, 32] and labels int64 [count], a function of ``seed``.

    ``folder`` holds the package captcha.
    """
    module: Any = _module(folder)
    generator = np.random.default_rng(seed)
    module.secrets = SeededSecrets(generator)
    painter = module.ImageCaptcha(SIZE, SIZE, font_sizes=(22, 26, 30))
    labels = generator.permutation(np.arange(count) % len(CLASSES))
    pixels = np.empty((count, 3, SIZE, SIZE), np.uint8)
    for row, label in enumerate(labels):
        ground, ink = _colours(generator)
        image = painter.create_captcha_image(str(label), ink, ground)
        painter.create_noise_dots(image, _colours(generator)[1], width=1, number=20)
        painter.create_noise_curve(image, _colours(generator)[1])
        pixels[row] = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    return pixels, labels


def _write(count: int, seed: int, folder: Path, out: Path) -> None:
    pixels, labels = draw(count, seed, folder)
    save_file({"images": torch.from_numpy(pixels), "labels": torch.from_numpy(labels)}, out)


def _read(path: Path) -> Images:
    stored = load_file(path)
    return images_of(stored["images"].numpy(), stored["labels"].numpy(), str(path), len(CLASSES))


def load(train: int = TRAIN, test: int = TEST, cache: Path | None = None) -> DataSet:
    """Return the digits, drawn on first use (a minute) and kept in the cache.

    Raises:
        MachineError: the package captcha cannot be fetched.
    """
    place = fetched(f"coloured-digits-{train}-{test}", lambda work: _draw_all(work, train, test, cache), cache or CACHE)
    return DataSet("coloured-digits", CLASSES, _read(place / "train.safetensors"), _read(place / "test.safetensors"))


def _draw_all(work: Path, train: int, test: int, cache: Path | None) -> Path:
    folder = fetch.captcha(cache or CACHE)
    out = work / "drawn"
    out.mkdir()
    _write(train, _SEEDS["train"], folder, out / "train.safetensors")
    _write(test, _SEEDS["test"], folder, out / "test.safetensors")
    return out
