"""What checkpoints say of experts: one pass over the base and all task vectors, in blocks, whatever their size.

Of every tensor: inner products (exact up to rounding), how often signs oppose, how much of the magnitude cancels in a
sum, how many entries changed; and from one sketch, how many directions an update has and how much two updates share
their input directions:

    e_jk = ||tau_j tau_k^T||_F^2 = <tau_j^T tau_j, tau_k^T tau_k>        tau [m, n], y = tau x
    effective rank r_k = ||tau_k||_F^4 / e_kk in [1, rank],    overlap o_jk = e_jk / sqrt(e_jj e_kk) in [0, 1]

The sketch puts every row of tau, with a random sign, in one of S buckets, the same for all experts: B_k [S, n]. With
M = tau_j tau_k^T and i != l, E[(B_j B_k^T)_il^2] = (||M||_F^2 - sum_a M_aa^2) / S^2, and the M_aa are known exactly. As
sum_i (B_k B_k^T)_ii is ||tau_k||_F^2 in the mean, and that is known too, the estimate is multiplied by how much it is
off, which removes most of the chance where an update has few directions. The jackknife over groups of buckets removes
the bias that this brings, and gives a standard error. Cost: one addition an entry.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from consilience.doctor.theory.geometry import Geometry, Matrix, Vector
from consilience.engine.plan import SEGMENT
from consilience.engine.stream import thread_count
from consilience.experts.block import Scratch
from consilience.experts.stack import Stack
from consilience.jit import compilation_shown
from consilience.kernels import survey as kernels
from consilience.progress import NullProgress, Progress

Counts = npt.NDArray[np.int64]
#: Buckets of a sketch, and groups that its standard error is found from.
BUCKETS, GROUPS = 64, 8


@dataclass(frozen=True, eq=False)
class TensorSurvey:
    """What one tensor says.

    Attributes:
        name: of the tensor.
        shape: its shape.
        geometry: inner products.
        opposite: entries that both experts change, in opposite directions, [K, K].
        both: entries that both experts change, [K, K].
        changed: entries that an expert changes, [K].
        magnitudes: sum |tau_k|, [K].
        kept: sum |sum_k tau_k|.
        energies: e_jk, [K, K]; None where the tensor is no matrix.
        errors: their standard errors, [K, K]; 0 where they are exact, as of matrices with few rows.
    """

    name: str
    shape: tuple[int, ...]
    geometry: Geometry
    opposite: Counts
    both: Counts
    changed: Counts
    magnitudes: Vector
    kept: float
    energies: Matrix | None = None
    errors: Matrix | None = None

    @property
    def numel(self) -> int:
        """Number of entries."""
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True, eq=False)
class Survey:
    """What all tensors that some expert changes say, in the base's order; ``numel`` counts all that can be merged."""

    names: tuple[str, ...]
    tensors: tuple[TensorSurvey, ...]
    numel: int
    bytes_read: int

    @property
    def geometry(self) -> Geometry:
        """Of the whole model, as far as experts change it."""
        return sum_of([one.geometry for one in self.tensors], len(self.names))


def sum_of(parts: Sequence[Geometry], count: int) -> Geometry:
    """Return the geometry of tensors together."""
    total = Geometry(np.zeros((count, count)), np.zeros(count), 0.0)
    for part in parts:
        total = total + part
    return total


@dataclass(eq=False)
class _Sums:
    """What is added up of one tensor, by all threads."""

    gram: Matrix
    diagonal: Matrix
    counts: Counts
    magnitudes: Vector
    sketch: npt.NDArray[np.float32] | None = None
    left: int = 0

    @classmethod
    def of(cls, rows: int, columns: int | None, jobs: int) -> "_Sums":
        sketch = None if columns is None else np.zeros((rows, BUCKETS, columns), np.float32)
        pairs, counts = np.zeros((rows, rows)), np.zeros((2, rows, rows), np.int64)
        return cls(np.zeros((rows + 1, rows + 1)), pairs, counts, np.zeros(rows + 1), sketch, jobs)


def survey(
    names: tuple[str, ...],
    stacks: Sequence[Stack],
    *,
    threads: int | None = None,
    exact: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Survey:
    """Read the experts' task vectors once and return what they say.

    Args:
        names: the experts'.
        stacks: of all tensors of the base, in its order; those without rows are not merged.
        threads: number of workers; None: all cores.
        exact: compute the energies from whole matrices, one at a time, instead of sketches.
        seed: of the sketches.
        progress: told of what has been read.

    Raises:
        InputError: a stored value is NaN or Inf.
    """
    chosen = {i: replace(stack, wide=False) for i, stack in enumerate(stacks) if not stack.untouched}
    total = sum(stack.nbytes for stack in chosen.values())
    progress = progress or NullProgress()
    progress.phase("reading the experts", total, "bytes")
    run = _Run(len(names), exact, seed, progress)
    jobs = [(index, stack, first, last) for index, stack in chosen.items() for first, last in _spans(stack)]
    count = thread_count(threads)
    with compilation_shown(progress), ThreadPoolExecutor(count, thread_name_prefix="survey") as pool:
        found = _windowed(pool, run.job, jobs, 2 * count)
        surveyed = tuple(one for one in found if one is not None)
    order = {stack.name: number for number, stack in chosen.items()}
    ordered = tuple(sorted(surveyed, key=lambda one: order[one.name]))
    return Survey(names, ordered, sum(stack.numel for stack in stacks if stack.rows), total)


def _windowed(pool: ThreadPoolExecutor, run: Callable[..., Any], jobs: Sequence[Any], width: int) -> Iterator[Any]:
    """Run jobs in order with few at a time in hand, so that few tensors' sums exist at once."""
    waiting: list[Any] = []
    try:
        for job in jobs:
            waiting.append(pool.submit(run, *job))
            if len(waiting) > width:
                yield waiting.pop(0).result()
        for one in waiting:
            yield one.result()
    finally:
        for one in waiting:
            one.cancel()


def _spans(stack: Stack) -> list[tuple[int, int]]:
    """Return the spans of whole rows, of about a segment each, that workers take."""
    columns = max(1, stack.columns)
    step = max(1, SEGMENT // columns) * columns
    return [(start, min(stack.numel, start + step)) for start in range(0, stack.numel, step)]


class _Run:
    """The jobs of one survey."""

    def __init__(self, rows: int, exact: bool, seed: int, progress: Progress) -> None:
        self.rows, self.exact, self.seed, self.progress = rows, exact, seed, progress
        self.sums: dict[str, _Sums] = {}
        self.lock = threading.Lock()
        self.local = threading.local()

    def job(self, index: int, stack: Stack, first: int, last: int) -> TensorSurvey | None:
        """Add one span of the tensor of some number; return the tensor's survey with its last one."""
        if not hasattr(self.local, "scratch"):
            self.local.scratch = Scratch()
        part = _Sums.of(self.rows, self._sketched(stack), 0)
        self._read(index, stack, first, last, part)
        with self.lock:
            held = self.sums.get(stack.name)
            if held is None:
                held = self.sums[stack.name] = _Sums.of(self.rows, self._sketched(stack), len(_spans(stack)))
            _add(held, part)
            held.left -= 1
            self.progress.advance(stack.nbytes * (last - first) // stack.numel)
            if held.left:
                return None
            del self.sums[stack.name]
        return self._finished(stack, held)

    def _sketched(self, stack: Stack) -> int | None:
        """Return the width of a tensor's sketch; None: it has none."""
        return stack.columns if len(stack.shape) > 1 and stack.shape[0] > 1 and not self.exact else None

    def _read(self, index: int, stack: Stack, first: int, last: int, part: _Sums) -> None:
        scratch, columns = self.local.scratch, max(1, stack.columns)
        room = scratch.array("together", (kernels.TILE,), np.float32)
        for start, stop, vectors, base in stack.blocks(first, last, align=columns, scratch=scratch):
            sums = part.gram, part.diagonal, part.counts, part.magnitudes
            kernels.add_rows(base, vectors, columns, *sums, room)
            if part.sketch is not None:
                buckets, signs = _places(self.seed, index, stack, start // columns, stop // columns)
                kernels.add_sketch(vectors, columns, buckets, signs, part.sketch)

    def _finished(self, stack: Stack, sums: _Sums) -> TensorSurvey:
        gram = np.tril(sums.gram) + np.tril(sums.gram, -1).T
        diagonal = np.tril(sums.diagonal) + np.tril(sums.diagonal, -1).T
        opposite, both = (np.tril(one, -1) + np.tril(one, -1).T for one in sums.counts)
        energies = errors = None
        if sums.sketch is not None and stack.shape[0] <= BUCKETS:
            energies = np.array([[_energy(one, other) for other in sums.sketch] for one in sums.sketch])
            errors = np.zeros_like(energies)
        elif sums.sketch is not None:
            energies, errors = _energies(sums.sketch, gram[1:, 1:], diagonal)
        elif self.exact and len(stack.shape) > 1:
            energies = _exact_energies(stack.whole(check=False))
            errors = np.zeros_like(energies)
        return TensorSurvey(
            stack.name,
            stack.shape,
            Geometry(gram[1:, 1:], gram[1:, 0], float(gram[0, 0])),
            opposite,
            both,
            np.diag(sums.counts[1]).copy(),
            sums.magnitudes[:-1],
            float(sums.magnitudes[-1]),
            energies,
            errors,
        )


def _add(held: _Sums, part: _Sums) -> None:
    for name in ("gram", "diagonal", "counts", "magnitudes"):
        total = getattr(held, name)
        total += getattr(part, name)
    if held.sketch is not None and part.sketch is not None:
        held.sketch += part.sketch


def _energy(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    """Return the energy of two sketches whose every bucket holds one row: they are the matrices."""
    return float(np.square((one @ other.T).astype(np.float64)).sum())


def _places(seed: int, index: int, stack: Stack, first: int, last: int) -> tuple[Any, Any]:
    """Return the buckets and signs of rows ``first ... last`` of the matrix of some number, however it is cut.

    Where there are no more rows than buckets, each has one to itself.
    """
    if stack.shape[0] <= BUCKETS:
        return np.arange(first, last), np.ones(last - first, np.float32)
    numbers = np.arange(first, last, dtype=np.uint64)
    with np.errstate(over="ignore"):
        mixed = _mixed(numbers + _mixed(np.array([(seed << 32) ^ index], np.uint64)))
    return (mixed % np.uint64(BUCKETS)).astype(np.int64), np.where(mixed >> np.uint64(63), 1, -1).astype(np.float32)


def _mixed(values: Any) -> Any:
    """Return 64 well-mixed bits of each value (the finaliser of SplitMix64)."""
    with np.errstate(over="ignore"):
        values = (values + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def _energies(sketch: npt.NDArray[np.float32], gram: Matrix, diagonal: Matrix) -> tuple[Matrix, Matrix]:
    """Return the energies [K, K] that sketches [K, S, n] estimate, and their standard errors.

    Args:
        sketch: of K task vectors.
        gram: their inner products [K, K].
        diagonal: sum_a M_aa^2 [K, K] of each pair.
    """
    count = len(sketch)
    energies, errors = np.zeros((count, count)), np.zeros((count, count))
    lengths = np.square(sketch.astype(np.float64)).sum(-1)
    for j in range(count):
        for k in range(j + 1):
            squares = np.square(np.matmul(sketch[j], sketch[k].T).astype(np.float64))
            np.fill_diagonal(squares, 0.0)
            known = float(gram[j, j] * gram[k, k])
            found = _jackknife(_Energy(squares, lengths[j], lengths[k], known, float(diagonal[j, k])))
            energies[j, k], errors[j, k] = energies[k, j], errors[k, j] = found
    return energies, errors


@dataclass(frozen=True, eq=False)
class _Energy:
    """Squared products of two sketches' buckets [S, S], 0 on the diagonal, with what is known of them exactly."""

    squares: Matrix
    one: Vector
    other: Vector
    known: float
    diagonal: float

    def of(self, keep: npt.NDArray[np.bool_]) -> float:
        """Return the energy that some of the buckets tell."""
        kept = int(keep.sum())
        seen = float(self.one[keep].sum() * self.other[keep].sum()) * (BUCKETS / kept) ** 2
        if seen <= 0:
            return 0.0
        off = float(self.squares[keep][:, keep].sum()) * BUCKETS**2 / (kept * (kept - 1))
        return self.diagonal + off * self.known / seen


def _jackknife(energy: _Energy) -> tuple[float, float]:
    """Return an estimate less its bias, and its standard error, from estimates without one group of buckets each."""
    group = np.arange(BUCKETS) % GROUPS
    whole = energy.of(np.ones(BUCKETS, bool))
    without = np.array([energy.of(group != g) for g in range(GROUPS)])
    value = GROUPS * whole - (GROUPS - 1) * float(without.mean())
    spread = (GROUPS - 1) / GROUPS * float(np.square(without - without.mean()).sum())
    # No energy is less than what is known of it, nor more than ||tau_j||^2 ||tau_k||^2.
    return float(np.clip(value, energy.diagonal, max(energy.known, energy.diagonal))), float(np.sqrt(spread))


def _exact_energies(whole: npt.NDArray[np.float32]) -> Matrix:
    """Return the energies of whole task vectors [K, rows, columns], in float64."""
    (count, height, columns), matrices = whole.shape, whole.astype(np.float64)
    found = np.zeros((count, count))
    if columns <= height:  # <tau_j^T tau_j, tau_k^T tau_k>: what is squared has the shorter side
        inner = [matrix.T @ matrix for matrix in matrices]
        return np.array([[float((one * other).sum()) for other in inner] for one in inner])
    for j in range(count):
        for k in range(j + 1):
            found[j, k] = found[k, j] = float(np.square(matrices[j] @ matrices[k].T).sum())
    return found
