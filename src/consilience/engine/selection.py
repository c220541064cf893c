"""Which magnitudes survive a ranking: exact ranks over tensors of any size, from one pass and a sample.

A sample of every piece gives bounds between which the threshold nearly surely lies. One pass counts what is above them
and collects what is between; from that the threshold, and how many entries equal to it are kept, follow exactly. Where
the bounds missed, the pass is done again with wider ones. Ties are given out by index, whatever the order of work.
"""

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from consilience.errors import InputError
from consilience.experts.block import Loader, Marks
from consilience.kernels.fused import Scored, scan, scan_scores
from consilience.kernels.select import LARGEST, Kept, magnitudes
from consilience.methods.program import Quantiles, Score

Piece = tuple[int, int]
#: One of so many tiles of ``TILE`` elements is sampled; rankings of no more elements than ``SMALL`` are not.
SHARE, TILE, SMALL = 50, 4096, 1 << 17
#: Bounds are so many standard deviations of a sampled rank away from it; after a miss, and at last there are none.
MARGINS = (6.0, 40.0, math.inf)


class _Part(NamedTuple):
    """What a piece has: bits between the bounds; how many are above, at the upper, at the lower one, and are 0."""

    between: Any
    above: int
    high: int
    low: int
    zeros: int


@dataclass
class _Cut:
    """The ``count``-th largest magnitude of a row, ``threshold``, and how many equal to it are within the count.

    ``low`` and ``high`` bound its bits. With a ``density`` the count is that share of what is not 0, rounded down.
    """

    row: int
    count: int
    density: float | None = None
    low: int = 0
    high: int = LARGEST
    sample: list[Any] = field(default_factory=list[Any])
    parts: dict[Piece, _Part] = field(default_factory=dict[Piece, _Part])
    threshold: Any = None
    total: int = 0

    def bound(self, numel: int, margin: float) -> None:
        """Set the bounds from the sample."""
        sample = np.sort(np.concatenate(self.sample)) if self.sample else np.empty(0, np.uint32)
        share, size = self.count / numel, len(sample)
        if self.density is not None:
            sample = sample[np.searchsorted(sample, 1) :]
            share, size = self.density, len(sample)
        slack = margin * math.sqrt(share * (1.0 - share) * size) + margin
        first, last = (size * (1.0 - share) + sign * slack for sign in (-1, 1))
        self.low = int(sample[math.floor(first)]) if first >= 0 else 0
        self.high = int(sample[math.ceil(last)]) if last < size - 1 else LARGEST
        self.parts = {}

    def settle(self, numel: int) -> bool:
        """Find the threshold between the bounds, of ``numel`` elements; False if it is not there."""
        above, high, low, zeros = (sum(part[i] for part in self.parts.values()) for i in (1, 2, 3, 4))
        between = np.concatenate([part.between for part in self.parts.values()])
        if self.density is not None:
            self.count = int(self.density * (numel - zeros))
            if self.count == 0:
                self.threshold, self.parts = np.float32(np.inf), {}
                return True
        wanted = self.count - above
        if 0 < wanted <= high:
            bits, self.total = self.high, wanted
        elif high < wanted <= high + len(between):
            place = len(between) - (wanted - high)
            bits = int(np.partition(between, place)[place])
            self.total = wanted - high - int(np.count_nonzero(between > bits))
        elif high + len(between) < wanted <= high + len(between) + low:
            bits, self.total = self.low, wanted - high - len(between)
        elif (self.low, self.high) == (0, LARGEST):
            raise InputError(
                "an input changed while it was being merged: a second pass found other values than the first; leave "
                "the inputs alone and run the merge again"
            )
        else:
            return False
        self.threshold = np.uint32(bits).view(np.float32)
        return True

    def equal(self, piece: Piece) -> int:
        """Return how many entries of a piece equal the threshold."""
        part, bits = self.parts[piece], int(self.threshold.view(np.uint32))
        ends = part.high if bits == self.high else part.low if bits == self.low else None
        return int(np.count_nonzero(part.between == bits)) if ends is None else ends


class Selection:
    """The ranks ``first[k] ... last[k] - 1`` of each row k, over one tensor or over all tensors together.

    ``pieces`` are (tensor index, segment) in index order, ``numel`` elements in all. ``find`` has to be called first;
    ``missed`` says how often its bounds did not hold and cost one more pass.

    With a ``score`` that is ranked instead.
    """

    def __init__(
        self,
        last: Sequence[int],
        numel: int,
        pieces: list[Piece],
        first: Sequence[int] = (),
        score: Score | None = None,
    ) -> None:
        self.numel, self.pieces, self.missed, self.score = numel, pieces, 0, score
        first = first or [0] * len(last)
        self._last = [self._cut(row, count) for row, count in enumerate(last)]
        self._first = [self._cut(row, count) for row, count in enumerate(first)]
        self._before: dict[tuple[int, Piece], int] = {}
        self._lock = threading.Lock()

    @classmethod
    def top(cls, score: Score, density: float, numel: int, pieces: list[Piece]) -> "Selection":
        """Return the selection of a share of the scores that are not 0."""
        found = cls([0], numel, pieces, score=score)
        found._last = [_Cut(0, -1, density)]
        return found

    @classmethod
    def quantiles(cls, wanted: Quantiles, numel: int, pieces: list[Piece]) -> "Selection":
        """Return the selection that finds the ``counts[q]``-th largest scores; see ``thresholds``."""
        found = cls([0] * len(wanted.counts), numel, pieces, score=wanted.score)
        found._last = [_Cut(row, count) for row, count in zip(wanted.rows, wanted.counts, strict=True)]
        return found

    @property
    def thresholds(self) -> Any:
        """The magnitude, or score, of the last rank of each row that is kept, [K] float32."""
        return np.array([cut.threshold for cut in self._last], np.float32)

    def _cut(self, row: int, count: int) -> _Cut:
        cut = _Cut(row, count)
        if not 0 < count < self.numel:  # every magnitude exceeds -1 and none exceeds infinity: all, or none
            cut.threshold = np.float32(-1.0) if count else np.float32(np.inf)
        return cut

    @property
    def _open(self) -> list[_Cut]:
        return [cut for cut in (*self._last, *self._first) if cut.threshold is None]

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
            missing = self._open
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
            rows, base = loader.load(at, min(stop, at + TILE))
            if self.score is not None:
                scores = np.empty((self.score.count, rows.shape[1]), np.float32)
                self.score.function(rows, loader.nothing if base is None else base, at, scores, *self.score.args)
                rows = scores
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
        count = len(cuts)
        chosen = np.array([cut.row for cut in cuts], np.int64)
        low, high = (np.array([getattr(cut, side) for cut in cuts], np.uint32) for side in ("low", "high"))
        between: list[list[Any]] = [[] for _ in cuts]
        counts = np.zeros((count, 4), np.int64)
        scored = (
            None
            if self.score is None
            else (scan_scores(self.score.function), Scored(self.score.count, self.score.args))
        )
        for at in range(start, stop, loader.size):
            end = min(stop, at + loader.size)
            taken = loader.take(at, end, marked=marks is not None)
            bits = loader.scratch.array("bits", (count, end - at + 1), np.uint32)
            found = np.zeros(count, np.int64)
            if scored is None:
                scan(taken, end - at, chosen, low, high, bits, found, counts, loader.like)
            else:
                run, score = scored
                run(taken, score, end - at, at, chosen, low, high, bits, found, counts, loader.like)
            loader.finish(taken, marks)
            for parts, row, number in zip(between, bits, found, strict=True):
                parts.append(row[:number].copy())
        counts[:, 2] *= low < high  # bounds that meet are counted once
        with self._lock:
            for cut, parts, numbers in zip(cuts, between, counts.tolist(), strict=True):
                cut.parts[piece] = _Part(np.concatenate(parts), *numbers)

    def _share_ties(self) -> None:
        for number, cut in enumerate((*self._last, *self._first)):
            if cut.parts:
                before = 0
                for piece in self.pieces:
                    self._before[(number, piece)] = before
                    before += cut.equal(piece)
                cut.parts, cut.sample = {}, []

    def share(self, alias: int, tensor: int, segments: int) -> None:
        """Give the tensor of index ``alias`` the ties of ``tensor``, whose values it shares."""
        for number in range(2 * len(self._last)):
            for segment in range(segments):
                self._before[(number, (alias, segment))] = self._before.get((number, (tensor, segment)), 0)

    def kept(self, piece: Piece) -> Kept:
        """Return what of ``piece`` is kept; its quota counts down from block to block."""
        cuts = list(enumerate((*self._last, *self._first)))
        quota = [max(0, cut.total - self._before.get((number, piece), 0)) for number, cut in cuts]
        last = np.array([cut.threshold for cut in self._last], np.float32)
        first = np.array([cut.threshold for cut in self._first], np.float32)
        return Kept(last, first, np.array(quota, np.int64).reshape(2, -1))
