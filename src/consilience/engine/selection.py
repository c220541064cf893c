"""Which magnitudes survive a trim: exact ranks over tensors of any size, by counting.

Three passes find the k-th largest magnitude of each row: upper bits, lower bits, and (where work on a tensor is split)
how many entries of each piece equal it, so that ties are given out by index whatever the order of work.
"""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from consilience.errors import InputError
from consilience.experts.block import Loader, Marks
from consilience.kernels.select import HIGH, LOW, count_equal, count_high, count_low, pick_bin

Piece = tuple[int, int]


class Selection:
    """The trim of one tensor (or of all tensors together): ``keep[k]`` of ``numel`` entries for each row k.

    ``pieces`` are (tensor index, segment) in index order; each phase is called once per piece, from any thread.
    """

    def __init__(self, keep: Sequence[int], numel: int, pieces: list[Piece]) -> None:
        self.keep, self.numel = list(keep), numel
        self.pieces = pieces
        self.ranked = [k for k, count in enumerate(keep) if 0 < count < numel]
        self.high = np.zeros((len(keep), HIGH), np.int64)
        self.low = np.zeros((len(keep), LOW), np.int64)
        self.bins = [0] * len(keep)
        self.above = [0] * len(keep)
        # Every magnitude exceeds -1 and none exceeds infinity: all kept, none kept.
        self.threshold = [np.float32(-1.0) if count else np.float32(np.inf) for count in keep]
        self.total = [0] * len(keep)
        self.equal: dict[Piece, list[int]] = {}
        self._before: dict[Piece, list[int]] = {}
        self._lock = threading.Lock()

    def count_upper(self, loader: Loader, start: int, stop: int, marks: Marks | None = None) -> None:
        """First pass over one piece; ``marks`` collects its inputs' fingerprint sums."""
        local = loader.scratch.array("high", (len(self.keep), HIGH), np.int64)
        local[:] = 0
        for at in range(start, stop, loader.size):
            stack, _ = loader.load(at, min(stop, at + loader.size), marks)
            for k in self.ranked:
                count_high(stack[k], local[k])
        with self._lock:
            self.high += local

    def pick_upper(self) -> None:
        """Between the passes: the bin of upper bits that holds the k-th largest."""
        for k in self.ranked:
            self.bins[k], self.above[k] = pick_bin(self.high[k], self.keep[k])

    def count_lower(self, loader: Loader, start: int, stop: int) -> None:
        """Second pass over one piece."""
        local = loader.scratch.array("low", (len(self.keep), LOW + 8), np.int64)
        local[:] = 0
        for at in range(start, stop, loader.size):
            stack, _ = loader.load(at, min(stop, at + loader.size))
            for k in self.ranked:
                count_low(stack[k], np.uint32(self.bins[k]), local[k])
        with self._lock:
            self.low += local[:, :LOW]

    def pick_lower(self) -> None:
        """After the second pass: thresholds, and how many entries equal to them are kept.

        Raises:
            InputError: the second pass did not find the values that the first had counted.
        """
        for k in self.ranked:
            bits, above = pick_bin(self.low[k], self.keep[k] - self.above[k])
            if bits < 0:
                raise InputError(
                    "an input changed while it was being merged: a second pass found other values than the first; "
                    "leave the inputs alone and run the merge again"
                )
            self.threshold[k] = np.uint32((self.bins[k] << 15) | bits).view(np.float32)
            self.total[k] = self.keep[k] - self.above[k] - above

    def count_ties(self, piece: Piece, loader: Loader, start: int, stop: int) -> None:
        """Third pass over one piece, for selections of several pieces."""
        counts = [0] * len(self.keep)
        for at in range(start, stop, loader.size):
            stack, _ = loader.load(at, min(stop, at + loader.size))
            for k in self.ranked:
                counts[k] += int(count_equal(stack[k], self.threshold[k]))
        with self._lock:
            self.equal[piece] = counts

    def share_ties(self) -> None:
        """After the third pass: how many ties lie before each piece."""
        before = [0] * len(self.keep)
        for piece in self.pieces:
            self._before[piece] = list(before)
            before = [b + e for b, e in zip(before, self.equal[piece], strict=True)]

    def share(self, alias: int, tensor: int, segments: int) -> None:
        """Give the tensor of index ``alias`` the ties of ``tensor``, whose values it shares."""
        for segment in range(segments):
            self._before[(alias, segment)] = self._before[(tensor, segment)]

    def quota(self, piece: Piece) -> list[int]:
        """Return how many entries equal to the threshold each row of ``piece`` keeps at most."""
        before: Any = self._before.get(piece, [0] * len(self.keep))
        return [max(0, total - b) for total, b in zip(self.total, before, strict=True)]
