"""What a data set of images is in memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from consilience.errors import InputError

#: Row numbers, int64 [n].
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Images:
    """Labelled images: ``images`` uint8 [N, C, H, W] (C is 1 or 3) and ``labels`` int64 [N], counted from 0."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Rows) -> "Images":
        """Return the images of these rows, in this order."""
        index = torch.from_numpy(np.ascontiguousarray(rows))
        return Images(self.images[index], self.labels[index])


@dataclass(frozen=True)
class DataSet:
    """A data set as published: its training and test images and the names of its classes."""

    name: str
    classes: tuple[str, ...]
    train: Images
    test: Images

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for coloured ones."""
        return int(self.train.images.shape[1])

    @property
    def size(self) -> int:
        """Height and width in pixels."""
        return int(self.train.images.shape[2])


@dataclass(frozen=True)
class Splits:
    """Disjoint images to train on, to tune on and to report on."""

    train: Images
    validation: Images
    test: Images


def images_of(images: npt.NDArray[np.uint8], labels: npt.NDArray[np.integer], where: str, classes: int) -> Images:
    """Make labelled images from arrays, [N, C, H, W] (or [N, H, W], grey) and [N].

    Raises:
        InputError: shapes disagree, or a label is not one of ``classes``; ``where`` names the file.
    """
    if images.ndim == 3:
        images = images[:, None]
    if images.ndim != 4 or labels.ndim != 1 or len(images) != len(labels) or not len(labels):
        shapes = f"images {list(images.shape)} and labels {list(labels.shape)}"
        raise InputError(f"{where}: {shapes} do not belong together; fetch the files of this data set again")
    numbers = labels.astype(np.int64)
    if int(numbers.min()) < 0 or int(numbers.max()) >= classes:
        wrong = int(numbers.min()) if int(numbers.min()) < 0 else int(numbers.max())
        raise InputError(f"{where}: label {wrong} is not one of {classes} classes; is it a file of another data set?")
    # A file read in one piece gives arrays that refuse writing, which torch warns about: those are copied.
    return Images(torch.from_numpy(np.require(images, requirements=("C", "W"))), torch.from_numpy(numbers))


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return float32 [N, C, H, W]: (x / 255 - mean) / std by channel, of uint8 ``images`` [N, C, H, W]."""
    shape = (1, -1, 1, 1)
    centre = torch.tensor(tuple(mean)).view(shape)
    scale = torch.tensor(tuple(std)).view(shape)
    return (images.float() / 255.0 - centre) / scale


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of uint8 ``images`` [N, C, H, W] by channel, on the scale 0 to 1.

    Four decimals are kept, and a channel of one colour alone gets a deviation of 0.001, so that it can be divided by.
    """
    levels = np.arange(256) / 255.0
    means: list[float] = []
    deviations: list[float] = []
    for channel in range(images.shape[1]):
        share = torch.bincount(images[:, channel].flatten(), minlength=256).double().numpy()
        share /= share.sum()
        mean = float(share @ levels)
        means.append(round(mean, 4))
        deviations.append(round(max(float(share @ (levels - mean) ** 2) ** 0.5, 1e-3), 4))
    return tuple(means), tuple(deviations)


def splits(data: DataSet, seed: int, *, validation: float = 0.1) -> Splits:
    """Split off a share of the training images by ``seed`` to tune on; the published test images stay as they are.

    Raises:
        InputError: the share leaves one of the two parts without images.
    """
    count = len(data.train)
    held = round(validation * count)
    if not 0 < held < count:
        raise InputError(f"validation={validation} of {count} training images leaves a part empty; choose 0 < x < 1")
    order = np.random.default_rng(seed).permutation(count)
    return Splits(data.train.take(order[held:]), data.train.take(order[:held]), data.test)
