"""Run a plan: segments over threads, extra passes where a method needs whole-tensor statistics.

Workers release the GIL in reads, kernels and writes, so reading, computing and writing of different segments
overlap.
Results do not depend on the number of threads: every segment's arithmetic is fixed by the plan, and ranks and sums are
exact.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import numpy as np

from consilience.checkpoints.checkpoint import same_bytes
from consilience.engine.grams import STRIP, Grams, Peaks, out_of_range
from consilience.engine.plan import SEGMENT, Plan, TensorPlan, segments_of
from consilience.engine.selection import Piece, Selection
from consilience.engine.sums import RowTallies, Summation, Tallies
from consilience.engine.worker import Record, Sink, Stopped, Worker, all_kept
from consilience.errors import InputError, MachineError, option
from consilience.experts.align import Alignment
from consilience.experts.block import Loader, Marks, NonFinite, count_tensor
from consilience.experts.expert_set import Opened
from consilience.experts.model import Model
from consilience.experts.quantised import changed
from consilience.jit import compilation_shown
from consilience.methods.program import Elementwise, Matrix, Program, Sums, Top
from consilience.methods.ties import kept
from consilience.numbers import check_threads
from consilience.progress import NullProgress, Progress

_Each = Callable[[Iterable[Callable[[], None]]], object]


def thread_count(threads: int | None) -> int:
    """Return the number of workers: as asked, else the cores this process may use.

    Raises:
        InputError: what was asked for is no count.
    """
    check_threads(threads)
    return max(1, threads if threads is not None else len(os.sched_getaffinity(0)))


class Streamer:
    """One run over a plan. ``done`` maps finished (tensor, segment) to records; a resumed run starts with some."""

    def __init__(self, plan: Plan, sink: Sink, *, threads: int | None = None, progress: Progress | None = None) -> None:
        self.plan, self.sink = plan, sink
        self.threads = thread_count(threads)
        self.progress = progress or NullProgress()
        self.stop = threading.Event()
        self.done: dict[Piece, Record] = {}
        #: How often a ranking took one more pass, since its sample had misled it.
        self.missed = 0
        #: Fingerprint sums of the first pass over each piece that is read more than once.
        self.first: dict[Piece, Marks] = {}
        self.on_record: Callable[[Record], None] = lambda record: None
        self._local = threading.local()

    def _worker(self) -> Worker:
        if not hasattr(self._local, "worker"):
            self._local.worker = Worker(self.plan, self.sink, self.stop)
        return self._local.worker

    def run(self) -> dict[Piece, Record]:
        """Process every segment that is not done.

        Raises:
            InputError: the data is not mergeable (NaN, overflow, truncated file).
            MachineError: an operating-system call failed.
            KeyboardInterrupt: passed on after the workers have stopped.
        """
        total = sum(tensor.bytes_read for tensor in self.plan.tensors)
        self.progress.phase(f"merging ({self.plan.method.name})", total, "bytes")
        for tensor in self.plan.tensors:
            finished = [s for s in range(tensor.segments) if (tensor.index, s) in self.done]
            passes = tensor.passes if len(finished) == tensor.segments else 1
            for segment in finished:
                self._tick(tensor, segment, passes)
        with (
            compilation_shown(self.progress),
            ThreadPoolExecutor(self.threads, thread_name_prefix="merge") as pool,
        ):
            try:
                self._all(pool)
            except BaseException:
                self.stop.set()
                raise
        return self.done

    def _all(self, pool: ThreadPoolExecutor) -> None:
        model_wide = [t for t in self.plan.tensors if t.ranks is not None and t.ranks.scope == "model"]
        if any(True for tensor in model_wide for _ in self._open(tensor)):
            self._model_trim(pool, model_wide)
        wide_trims = {tensor.index for tensor in model_wide}
        small: list[Callable[[], None]] = []
        for tensor in self.plan.tensors:
            if tensor.index in wide_trims or all((tensor.index, s) in self.done for s in range(tensor.segments)):
                continue
            if isinstance(tensor.program, Matrix):  # its linear algebra has threads of its own
                self._each(pool, [lambda t=tensor: self._finish(t, 0, t.program, None)])
            elif tensor.passes == 1:
                small += [lambda t=tensor, s=s: self._finish(t, s, t.program, None) for s in self._open(tensor)]
            elif tensor.segments > 1:
                self._wide(pool, tensor)
            else:
                small.append(lambda tensor=tensor: self._alone(tensor))
        self._each(pool, small)

    def _open(self, tensor: TensorPlan) -> Iterator[int]:
        return (s for s in range(tensor.segments) if (tensor.index, s) not in self.done)

    def _finish(self, tensor: TensorPlan, segment: int, program: Program | None, selection: Selection | None) -> None:
        record = self._worker().merge(tensor, segment, program, selection)
        self.done[(tensor.index, segment)] = record
        self.on_record(record)
        self._tick(tensor, segment)

    def _marks(self, tensor: TensorPlan, segment: int) -> Marks | None:
        """Return where a pass puts its fingerprint sums: the first over a piece does, later ones need not."""
        piece = (tensor.index, segment)
        if piece in self.first:
            return None
        return self.first.setdefault(piece, [[0, 0] for _ in range(len(tensor.rows) + 1)])

    def _tick(self, tensor: TensorPlan, segment: int, passes: int = 1) -> None:
        start, stop = tensor.span(segment)
        self.progress.advance(passes * (tensor.bytes_read // tensor.passes * (stop - start) // max(tensor.numel, 1)))

    def _alone(self, tensor: TensorPlan) -> None:
        """All passes of a tensor of one segment, on one worker."""
        self._passes(tensor, lambda jobs: [job() for job in jobs])

    def _wide(self, pool: ThreadPoolExecutor, tensor: TensorPlan) -> None:
        """A tensor of many segments: every pass is shared by all workers."""
        self._passes(tensor, lambda jobs: self._each(pool, jobs))

    def _passes(self, tensor: TensorPlan, each: _Each) -> None:
        program, selection = tensor.program, None
        assert isinstance(program, Elementwise)
        pieces = [(tensor.index, s) for s in range(tensor.segments)]
        if isinstance(program.keep, Top):
            selection = Selection.top(program.keep.score, program.keep.density, tensor.numel, pieces)
        elif program.keep is not None:
            selection = Selection(program.keep.last, tensor.numel, pieces, program.keep.first)
        if selection is not None:
            self._select(selection, each)
        while program.needs != "none":
            assert program.finish is not None
            program = program.finish(self._statistics(tensor, program, selection, each))
        each([lambda s=s: self._finish(tensor, s, program, selection) for s in self._open(tensor)])

    def _statistics(self, tensor: TensorPlan, program: Elementwise, selection: Selection | None, each: _Each) -> Sums:
        """One pass for what a program needs to know of a whole tensor."""
        if program.needs == "gram":
            return self._inner_products(tensor, program, each)
        if program.needs == "quantiles":
            return self._quantiles(tensor, program, each)
        if program.needs == "by_row":
            return self._by_row(tensor, program, each)
        tallies = Tallies(program) if program.needs == "tally" else None
        summation = Summation(len(tensor.rows), tensor.unit)

        def run(segment: int) -> None:
            worker = self._worker()
            kept = selection.kept((tensor.index, segment)) if selection is not None else all_kept()
            loader, place, marks = worker.loader(tensor), tensor.span(segment), self._marks(tensor, segment)
            if tallies is not None:
                tallies.add(loader, *place, kept, marks)
            else:
                summation.add(loader, *place, worker.step(tensor, program, kept), marks)
            self._tick(tensor, segment)

        each([lambda s=s: run(s) for s in range(tensor.segments)])
        return tallies.result() if tallies is not None else summation.result()

    def _quantiles(self, tensor: TensorPlan, program: Elementwise, each: _Each) -> Sums:
        wanted = program.quantiles
        assert wanted is not None
        pieces = [(tensor.index, s) for s in range(tensor.segments)]
        selection = Selection.quantiles(wanted, tensor.numel, pieces)
        self._select(selection, each)
        return Sums(quantiles=selection.thresholds.astype(np.float64))

    def _by_row(self, tensor: TensorPlan, program: Elementwise, each: _Each) -> Sums:
        tallies = RowTallies(program, tensor.numel)

        def run(start: int, stop: int) -> None:
            tallies.add(self._worker().loader(tensor), start, stop)

        each([lambda piece=piece: run(*piece) for piece in tallies.pieces(SEGMENT)])
        for segment in range(tensor.segments):
            self._tick(tensor, segment)
        return tallies.result()

    def _inner_products(self, tensor: TensorPlan, program: Elementwise, each: _Each) -> Sums:
        rows, pieces = len(tensor.rows), range(tensor.segments)
        sums = self._gram(tensor, Grams(rows, tensor.shape, program.over), each)
        if not (tensor.wide and out_of_range(sums)):
            return sums
        highest = Peaks(rows)  # rare: magnitudes whose squares float64 cannot hold
        each([lambda s=s: highest.add(self._worker().loader(tensor, first=False), *tensor.span(s)) for s in pieces])
        if not any(highest.exponents):
            return sums
        return self._gram(tensor, Grams(rows, tensor.shape, program.over, highest.exponents), each, again=True)

    def _gram(self, tensor: TensorPlan, grams: Grams, each: _Each, *, again: bool = False) -> Sums:
        """Return the inner products over all segments; with ``again`` by a pass that was not planned."""

        def run(segments: Iterable[int]) -> None:
            for segment in segments:
                marks = None if again else self._marks(tensor, segment)
                grams.add(self._worker().loader(tensor, first=not again), *tensor.span(segment), marks)
                if not again:
                    self._tick(tensor, segment)

        pieces = range(tensor.segments)
        together = max(1, segments_of(STRIP, tensor.segments)) if grams.over.across else 1
        each([lambda at=at: run(pieces[at : at + together]) for at in range(0, tensor.segments, together)])
        return grams.result()

    def _model_trim(self, pool: ThreadPoolExecutor, tensors: Sequence[TensorPlan]) -> None:
        """A trim that ranks the magnitudes of all tensors together."""
        selection = self._model_selection(pool, tensors)
        self._each(
            pool, [lambda t=t, s=s: self._finish(t, s, t.program, selection) for t in tensors for s in self._open(t)]
        )

    def _model_selection(self, pool: ThreadPoolExecutor, tensors: Sequence[TensorPlan]) -> Selection:
        # A tied tensor that is stored twice is one tensor: ranked once, and both copies keep the same entries.
        ranked = [tensor for tensor in tensors if tensor.name == tensor.stream]
        total = sum(tensor.numel for tensor in ranked)
        ranks = tensors[0].ranks
        assert ranks is not None
        keep = [kept(total, density) for density in ranks.density]
        by_name = sorted(ranked, key=lambda tensor: tensor.name)  # ties must not depend on how files are cut
        selection = Selection(keep, total, [(t.index, s) for t in by_name for s in range(t.segments)])
        self._select(selection, lambda jobs: self._each(pool, jobs))
        places = {tensor.name: tensor.index for tensor in ranked}
        for tensor in tensors:
            if tensor.name != tensor.stream:
                selection.share(tensor.index, places[tensor.stream], tensor.segments)
        return selection

    def _select(self, selection: Selection, each: _Each) -> None:
        seen: set[Piece] = set()

        def sample(visit: Callable[[Loader, int, int], None]) -> None:
            def one(piece: Piece) -> None:
                tensor = self.plan.tensors[piece[0]]
                visit(self._worker().loader(tensor, first=False), *tensor.span(piece[1]))

            each([lambda piece=piece: one(piece) for piece in selection.pieces])

        def scan(visit: Callable[[Piece, Loader, int, int, Marks | None], None]) -> None:
            def one(piece: Piece) -> None:
                tensor = self.plan.tensors[piece[0]]
                visit(piece, self._worker().loader(tensor), *tensor.span(piece[1]), self._marks(tensor, piece[1]))
                if piece not in seen:  # what is scanned once more was not planned
                    seen.add(piece)
                    self._tick(tensor, piece[1])

            each([lambda piece=piece: one(piece) for piece in selection.pieces])

        selection.find(sample, scan)
        self.missed += selection.missed

    def _each(self, pool: ThreadPoolExecutor, jobs: Iterable[Callable[[], None]]) -> None:
        """Run jobs on the pool, a bounded number in flight; the first failure stops the rest and is raised."""
        waiting: set[Future[None]] = set()
        try:
            for job in jobs:
                waiting.add(pool.submit(self._guarded, job))
                if len(waiting) >= 4 * self.threads:
                    waiting = self._drain(waiting)
            while waiting:
                waiting = self._drain(waiting)
        except BaseException:
            self.stop.set()
            wait(waiting)
            raise

    def _drain(self, waiting: "set[Future[None]]") -> "set[Future[None]]":
        finished, rest = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
        errors = [error for future in finished if (error := future.exception()) is not None]
        errors.sort(key=lambda error: isinstance(error, Stopped))
        if errors:
            self.stop.set()
            raise self._explained(errors[0])
        return rest

    def _guarded(self, job: Callable[[], None]) -> None:
        if self.stop.is_set():
            raise Stopped("stopped")
        job()

    def _explained(self, error: BaseException) -> BaseException:
        if isinstance(error, NonFinite):
            return count_tensor(error, f"repair the model, or pass {option('allow_nonfinite')}")
        if isinstance(error, OSError):
            place = f"{error.filename}: " if error.filename else ""
            return MachineError(
                f"{place}{error.strerror or error}; free space or fix the disk, then run the same command again"
            )
        if isinstance(error, MemoryError):
            return MachineError("out of memory; use fewer threads, then run the same command again")
        return error


def integer_notes(plan: Plan) -> list[str]:
    """Compare the experts' integer buffers with the base's and say which differ (they are copied from the base)."""
    integers = [
        tensor.name for tensor in plan.tensors
        if tensor.base.dense is not None and not tensor.base.dense.dtype.mergeable
        and tensor.name not in plan.alignment.packed.parts
    ]  # fmt: skip
    return [note for alignment, experts in plan.sections for note in _integer_notes(integers, alignment, experts)]


def _integer_notes(names: Iterable[str], alignment: Alignment, experts: Iterable[Model]) -> list[str]:
    donor, notes = alignment.donor, list[str]()
    for name in (name for name in names if name in alignment.tensors):
        ours = donor.stored(name)
        for expert in experts:
            theirs = None if expert is donor else expert.stored(name)
            if ours is not None and theirs is not None and not same_bytes(ours, theirs):
                notes.append(f"{name}: integer values of {expert.name} differ; copied from {donor.name}")
    return notes


def check_copies(plan: Opened) -> None:
    """Read what is copied because it cannot be merged, packed weights and complex tensors: experts must not change it.

    Raises:
        InputError: names the weight, its format and what to pass instead.
    """
    for alignment, experts in plan.sections if isinstance(plan, Plan) else [(plan.alignment, plan.experts)]:
        _check_copies(alignment, experts)


def _check_copies(alignment: Alignment, experts: Iterable[Model]) -> None:
    donor = alignment.donor
    for name, info in alignment.tensors.items():
        ours = donor.stored(name) if info.dtype.name == "C64" else None
        for model in experts if ours is not None else ():
            theirs = None if name in alignment.private.get(model.name, ()) else model.stored(name)
            if ours is not None and theirs is not None and not same_bytes(ours, theirs):
                raise InputError(
                    f"{model.reference}: tensor {name!r} is complex and differs from {donor.reference}'s; only "
                    "real numbers are merged: save torch.view_as_real(tensor) instead in each model, then turn it back"
                )
    for model, weight in alignment.same_parts:
        for part in weight.parts:
            ours, theirs = donor.stored(part), model.stored(part)
            if ours is None or theirs is None or not same_bytes(ours, theirs):
                raise changed(model, donor, weight)
