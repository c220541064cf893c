"""Where the coefficients of a flat tensor begin and end."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from consilience.coefficients import Group, pieces_of


@dataclass(frozen=True)
class Extent:
    """One tensor's pieces as numbers: piece p covers ``starts[p] ... stops[p]`` and has coefficient ``indices[p]``."""

    starts: tuple[int, ...]
    stops: tuple[int, ...]
    indices: npt.NDArray[np.int64]


def extents_of(groups: Sequence[Group]) -> dict[str, Extent]:
    """Return the extent of every tensor of the groups."""
    held = {name: pieces for group in groups for name, pieces in pieces_of(group).items()}
    return {
        name: Extent(
            tuple(p.start for p in pieces), tuple(p.stop for p in pieces), np.array([p.index for p in pieces], np.int64)
        )
        for name, pieces in held.items()
    }


def cuts_by_piece(extent: Extent, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield (first, last + 1, piece number) of the pieces that meet a block, counted from its start."""
    for piece in range(bisect_right(extent.starts, start) - 1, len(extent.starts)):
        if extent.starts[piece] >= stop:
            return
        yield max(extent.starts[piece], start) - start, min(extent.stops[piece], stop) - start, piece


def cuts(extent: Extent, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield (first, last + 1, coefficient index) of the pieces that meet a block."""
    for low, high, piece in cuts_by_piece(extent, start, stop):
        yield low, high, int(extent.indices[piece])
