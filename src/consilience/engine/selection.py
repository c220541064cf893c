"""Which magnitudes survive a ranking: exact ranks over tensors of any size, from one pass and a sample.

A sample of every piece gives bounds between which the threshold nearly surely lies. One pass counts what is above them
and collects what is between; from that the threshold, and how many entries equal to it are kept, follow exactly. Where
the bounds missed, the pass is done again with wider ones. Ties are given out by index, whatever the order of work.
"""

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from consilience.errors import InputError
from consilience.experts.block import Loader, Marks
from consilience.kernels.select import LARGEST, collect, magnitudes, shave, trim

Piece = tuple[int, int]
#: Magnitude bits, and how often each occurs (None: once for every time it is there).
_Held = tuple[Any, Any]
#: One of so many tiles of ``TILE`` elements is sampled; rankings of no more elements than ``SMALL`` are not.
SHARE, TILE, SMALL = 50, 4096, 1 << 17
#: Bounds are so many standard deviations of a sampled rank away from it; after a miss, and at last there are none.
MARGINS = (6.0, 40.0, math.inf)
#: A piece that collects more than this share of its elements holds them as distinct values and counts.
DENSE = 0.125


@dataclass
class _Cut:
    """The ``count``-th largest magnitude of a row, ``threshold``, and how many equal to it are within the count.

    ``low`` and ``high`` bound its bits; ``held`` maps a piece to what it has between them, bits and counts.
    """

    row: int
    count: int
    low: int = 0
    high: int = LARGEST
    above: int = 0
    sample: list[Any] = field(default_factory=list[Any])
    held: dict[Piece, _Held] = field(default_factory=dict[Piece, _Held])
    threshold: Any = None
    total: int = 0

    def bound(self, numel: int, margin: float) -> None:
        """Set the bounds from the sample."""
        sample = np.sort(np.concatenate(self.sample)) if self.sample else np.empty(0, np.uint32)
        share, size = self.count / numel, len(sample)
        slack = margin * math.sqrt(share * (1.0 - share) * size) + margin
        first, last = (size * (1.0 - share) + sign * slack for sign in (-1, 1))
        self.low = int(sample[math.floor(first)]) if first >= 0 else 0
        self.high = int(sample[math.ceil(last)]) if last < size - 1 else LARGEST
        self.above, self.held = 0, {}

    def settle(self, numel: int) -> bool:
        """Find the threshold in what was collected; False if it is not there."""
        found = sum(len(bits) if counts is None else int(counts.sum()) for bits, counts in self.held.values())
        wanted = self.count - self.above
        if not 0 < wanted <= found:
            if self.low == 0 and self.high == LARGEST:
                raise InputError(
                    "an input changed while it was being merged: a second pass found other values than the first; "
                    "leave the inputs alone and run the merge again"
                )
            return False
        bits, counts = _joined(list(self.held.values()), math.inf)
        if counts is None:
            place = len(bits) - wanted
            chosen = np.partition(bits, place)[place]
            larger = np.count_nonzero(bits > chosen)
        else:
            order = np.argsort(bits)[::-1]
            chosen = bits[order[np.searchsorted(np.cumsum(counts[order]), wanted)]]
            larger = counts[bits > chosen].sum()
        self.threshold, self.total = chosen.view(np.float32), wanted - int(larger)
        return True

    def equal(self, piece: Piece) -> int:
        """Return how many entries of a piece equal the threshold."""
        bits, counts = self.held[piece]
        same = bits == self.threshold.view(np.uint32)
        return int(np.count_nonzero(same) if counts is None else counts[same].sum())


class Selection:
    """The ranks ``first[k] ... last[k] - 1`` of each row k, over one tensor or over all tensors together.

    ``pieces`` are (tensor index, segment) in index order, ``numel`` elements in all. ``find`` has to be called first;
    ``missed`` says how often its bounds did not hold and cost one more pass.
    """

    def __init__(self, last: Sequence[int], numel: int, pieces: list[Piece], first: Sequence[int] = ()) -> None:
        self.numel, self.pieces, self.missed = numel, pieces, 0
        first = first or [0] * len(last)
        self._last = [self._cut(row, count) for row, count in enumerate(last)]
        self._first = [self._cut(row, count) for row, count in enumerate(first)]
        self._before: dict[tuple[int, Piece], int] = {}
        self._lock = threading.Lock()

    def _cut(self, row: int, count: int) -> _Cut:
        cut = _Cut(row, count)
        if not 0 < count < self.numel:  # every magnitude exceeds -1 and none exceeds infinity: all, or none
            cut.threshold = np.float32(-1.0) if count else np.float32(np.inf)
        return cut

    @property
    def _open(self) -> list[_Cut]:
        return [cut for cut in (*self._last, *self._first) if 0 < cut.count < self.numel]

    def find(
        self,
        sample: Callable[[Callable[[Loader, int, int], None]], None],
        scan: Callable[[Callable[[Piece, Loader, int, int, Marks | None], None]], None],
    ) -> None:
        """Find all thresholds.

        Args:
            sample: calls what it is given for every piece.
            scan: likewise, with a loader that looks for NaN, if nobody has.

        Raises:
            InputError: a pass found other values than the one before.
        """
        if self.numel > SMALL:
            sample(self._sample)
        for margin in MARGINS:
            missing = [cut for cut in self._open if cut.threshold is None]
            if self.numel > SMALL:
                for cut in missing:
                    cut.bound(self.numel, margin)
            scan(lambda *place, missing=missing: self._collect(missing, *place))
            if all([cut.settle(self.numel) for cut in missing]):
                break
            self.missed += 1
        self._share_ties()

    def _sample(self, loader: Loader, start: int, stop: int) -> None:
        found: dict[int, list[Any]] = {cut.row: [] for cut in self._open}
        for at in range(start, stop, SHARE * TILE):
            rows, _ = loader.load(at, min(stop, at + TILE))
            for row, parts in found.items():
                bits = np.empty(rows.shape[1], np.uint32)
                magnitudes(rows[row], bits)
                parts.append(bits)
        with self._lock:
            for cut in self._open:
                cut.sample += found[cut.row]

    def _collect(
        self, cuts: Sequence[_Cut], piece: Piece, loader: Loader, start: int, stop: int, marks: Marks | None
    ) -> None:
        parts: list[list[_Held]] = [[] for _ in cuts]
        above = [0] * len(cuts)
        for at in range(start, stop, loader.size):
            rows, _ = loader.load(at, min(stop, at + loader.size), marks)
            bits = loader.scratch.array("bits", (rows.shape[1] + 1,), np.uint32)
            for number, cut in enumerate(cuts):
                count, over = collect(rows[cut.row], np.uint32(cut.low), np.uint32(cut.high), bits)
                parts[number].append(_joined([(bits[:count].copy(), None)], rows.shape[1]))
                above[number] += over
        held = [_joined(found, stop - start) for found in parts]
        with self._lock:
            for cut, own, over in zip(cuts, held, above, strict=True):
                cut.held[piece] = own
                cut.above += over

    def _share_ties(self) -> None:
        for number, cut in enumerate((*self._last, *self._first)):
            if cut.held:
                before = 0
                for piece in self.pieces:
                    self._before[(number, piece)] = before
                    before += cut.equal(piece)
                cut.held, cut.sample = {}, []

    def share(self, alias: int, tensor: int, segments: int) -> None:
        """Give the tensor of index ``alias`` the ties of ``tensor``, whose values it shares."""
        for number in range(2 * len(self._last)):
            for segment in range(segments):
                self._before[(number, (alias, segment))] = self._before.get((number, (tensor, segment)), 0)

    def quota(self, piece: Piece) -> list[int]:
        """Return how many entries equal to each threshold ``mask`` lets pass in ``piece``."""
        return [
            max(0, cut.total - self._before.get((number, piece), 0))
            for number, cut in enumerate((*self._last, *self._first))
        ]

    def mask(self, rows: Any, quota: list[int]) -> None:
        """Zero what is outside the ranks, in place; ``quota`` is the piece's, and counts down from block to block."""
        count = len(self._last)
        for number, cut in enumerate(self._last):
            if cut.count < self.numel:
                quota[number] = int(trim(rows[cut.row], cut.threshold, quota[number]))
        for number, cut in enumerate(self._first, count):
            if cut.count:
                quota[number] = int(shave(rows[cut.row], cut.threshold, quota[number]))


def _joined(parts: list[_Held], of: float) -> _Held:
    """Return several parts as one; what is more than a share of ``of`` elements is held as distinct values."""
    bits = np.concatenate([bits for bits, _ in parts])
    many = len(bits) > DENSE * of
    if not many and all(counts is None for _, counts in parts):
        return bits, None
    counts = np.concatenate([np.ones(len(bits), np.int64) if counts is None else counts for bits, counts in parts])
    if not many:
        return bits, counts
    values, where = np.unique(bits, return_inverse=True)
    return values, np.bincount(where, counts, len(values)).astype(np.int64)
