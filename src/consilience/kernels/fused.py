"""The fused pass: a tile at a time from stored values to stored values, with a method's arithmetic in the middle."""

from typing import Any, NamedTuple

import numpy as np

from consilience.jit import kernel, specialised
from consilience.kernels.encode import below_unit
from consilience.kernels.ingest import TILE, take
from consilience.kernels.select import collect, count_zeros, keep, keep_scored
from consilience.kernels.settle import scale_add, settle_tile
from consilience.kernels.vectors import spread


class Below(NamedTuple):
    """What is measured of rows against a unit in the last place of the base.

    ``starts`` [P] are the first elements, in the tensor, of stretches with multipliers ``table`` [P, K]; or, with
    ``inner`` > 0, multipliers are ``factors`` [K, G], as ``kernels.vectors.spread`` has them. ``per_unit`` is
    2^-(significand bits) of the output, 0 where nothing is measured; ``counts`` [K, 4] is added to.
    """

    starts: Any
    table: Any
    inner: int
    factors: Any
    per_unit: Any
    counts: Any


class Change(NamedTuple):
    """A step's arguments: seeds of each row's random numbers, and whatever it takes."""

    keys: Any
    args: Any


@kernel
def no_step(rows: Any, start: int, keys: Any) -> None:
    """Leave the rows as they are."""


@kernel
def no_score(rows: Any, base: Any, start: int, out: Any) -> None:
    """Rank elements by nothing but each row's magnitude."""


class Scored(NamedTuple):
    """A score's arguments; ``rows`` is how many it gives, 0 where rows are ranked by their own magnitudes."""

    rows: int
    args: Any


@kernel
def _measure_vectors(rows: Any, base: Any, start: int, below: Any) -> None:
    scaled = np.empty(rows.shape[1], rows.dtype)
    for k in range(rows.shape[0]):
        spread(below.factors[k], start, below.inner, scaled)
        row = rows[k]
        for i in range(scaled.size):
            scaled[i] *= row[i]
        below_unit(scaled, rows.dtype.type(1), base, below.per_unit, below.counts[k])


@kernel
def _measure(rows: Any, base: Any, start: int, below: Any) -> None:
    if below.inner > 0:
        _measure_vectors(rows, base, start, below)
        return
    stop = start + rows.shape[1]
    for p in range(below.starts.size):
        low = max(below.starts[p], start)
        high = min(below.starts[p + 1], stop) if p + 1 < below.starts.size else stop
        if low < high:
            for k in range(rows.shape[0]):
                stretch = rows[k, low - start : high - start]
                below_unit(
                    stretch, below.table[p, k], base[low - start : high - start], below.per_unit, below.counts[k]
                )


@kernel
def measure(rows: Any, base: Any, start: int, below: Any) -> None:
    """``Below`` for a whole block."""
    for at in range(0, rows.shape[1], TILE):
        end = min(rows.shape[1], at + TILE)
        _measure(rows[:, at:end], base[at:end], start + at, below)


_step: Any = no_step
_merge: Any = None
_score: Any = no_score
_tally: Any = None


def _fused(
    taken: Any, below: Any, kept: Any, scored: Any, change: Any, weights: Any, args: Any, size: int, start: int,
    scale: Any, vectors: bool, settled: Any,
) -> None:  # fmt: skip
    real, count = settled.exact.dtype, len(weights)
    all_rows, all_base = np.empty((count, TILE), real), np.empty(TILE, real)
    room, rounded = np.empty(TILE, real), np.empty(TILE, real)
    all_scores = np.empty((scored.rows, TILE), np.float32)
    based = taken.subtract or taken.base.size > 0
    for at in range(0, size, TILE):
        end = min(size, at + TILE)
        rows = all_rows if end - at == TILE else np.empty((count, end - at), real)
        base = all_base[: end - at] if based else all_base[:0]
        take(taken, at, end, rows, base, 0)
        if below.per_unit > 0:
            _measure(rows, base, start + at, below)
        if scored.rows:
            scores = all_scores if end - at == TILE else np.empty((scored.rows, end - at), np.float32)
            _score(rows, base, start + at, scores, *scored.args)
            keep_scored(rows, scores, kept)
        else:
            keep(rows, kept)
        _step(rows, start + at, change.keys, *change.args)
        merged = room[: end - at] if settled.encode else settled.exact[at:end]
        _merge(rows, base, start + at, weights, merged, *args)
        less = base if vectors else base[:0]
        scale_add(merged, scale, less)
        if settled.encode:
            settle_tile(merged, merged, less, at, rounded, settled)


def fused(merge: Any, step: Any, score: Any = no_score) -> Any:
    """Return the pass with a merge's function, a step's (``no_step``) and a score's compiled into it."""
    return specialised(_fused, _merge=merge, _step=step, _score=score)


def _tallied(
    taken: Any, kept: Any, scored: Any, args: Any, size: int, start: int, like: Any, out: Any
) -> None:  # fmt: skip
    all_rows, all_base = np.empty((like.size, TILE), like.dtype), np.empty(TILE, like.dtype)
    all_scores = np.empty((scored.rows, TILE), np.float32)
    based = taken.subtract or taken.base.size > 0
    for at in range(0, size, TILE):
        end = min(size, at + TILE)
        rows = all_rows if end - at == TILE else np.empty((like.size, end - at), like.dtype)
        base = all_base[: end - at] if based else all_base[:0]
        take(taken, at, end, rows, base, 0)
        if scored.rows:
            scores = all_scores if end - at == TILE else np.empty((scored.rows, end - at), np.float32)
            _score(rows, base, start + at, scores, *scored.args)
            keep_scored(rows, scores, kept)
        else:
            keep(rows, kept)
        _tally(rows, base, start + at, out[at // TILE], *args)


def tallied(tally: Any, score: Any = no_score) -> Any:
    """Return the pass that writes what a tally's function says of every tile to ``out`` [tiles, count]."""
    return specialised(_tallied, _tally=tally, _score=score)


def _scan_scores(
    taken: Any, scored: Any, size: int, start: int, chosen: Any, low: Any, high: Any, out: Any, found: Any,
    counts: Any, like: Any,
) -> None:  # fmt: skip
    all_rows, all_base = np.empty((like.size, TILE), like.dtype), np.empty(TILE, like.dtype)
    all_scores = np.empty((scored.rows, TILE), np.float32)
    based = taken.subtract or taken.base.size > 0
    for at in range(0, size, TILE):
        end = min(size, at + TILE)
        rows = all_rows if end - at == TILE else np.empty((like.size, end - at), like.dtype)
        scores = all_scores if end - at == TILE else np.empty((scored.rows, end - at), np.float32)
        base = all_base[: end - at] if based else all_base[:0]
        take(taken, at, end, rows, base, 0)
        _score(rows, base, start + at, scores, *scored.args)
        for c in range(chosen.size):
            row = scores[chosen[c]]
            found[c] += collect(row, low[c], high[c], out[c, found[c] :], counts[c])
            counts[c, 3] += count_zeros(row)


def scan_scores(score: Any) -> Any:
    """Return ``scan`` of scores, which also counts those that are 0, in ``counts[c, 3]``."""
    return specialised(_scan_scores, _score=score)


@kernel
def scan(taken: Any, size: int, chosen: Any, low: Any, high: Any, out: Any, found: Any, counts: Any, like: Any) -> None:
    """``collect`` for every cut c, of row ``chosen[c]``: into ``out[c]``, ``found[c]`` of them, and ``counts[c]``."""
    all_rows = np.empty((like.size, TILE), like.dtype)
    base = np.empty(TILE, like.dtype)
    for at in range(0, size, TILE):
        end = min(size, at + TILE)
        take(taken, at, end, all_rows, base, 0)
        for c in range(chosen.size):
            row = all_rows[chosen[c], : end - at]
            found[c] += collect(row, low[c], high[c], out[c, found[c] :], counts[c])
