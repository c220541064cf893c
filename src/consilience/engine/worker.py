"""One segment of one tensor: load, transform, combine, round, fingerprint, write."""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from consilience.checkpoints.checkpoint import raw
from consilience.checkpoints.values import count_nonfinite, decode
from consilience.engine.plan import Plan, TensorPlan
from consilience.engine.selection import Selection
from consilience.engine.sums import block_length
from consilience.errors import ConsilienceError, InputError, option
from consilience.experts.block import Loader, Marks, NonFinite, Scratch
from consilience.kernels import random_bits
from consilience.kernels.encode import round_stochastically
from consilience.kernels.fingerprint import mix
from consilience.kernels.fused import Below, Change, Scored, fused, measure, no_score, no_step
from consilience.kernels.ingest import Taken, taken_numbers
from consilience.kernels.lowrank import add_product
from consilience.kernels.select import Kept, keep
from consilience.kernels.settle import Settled, encodes, scale_add, settle, settled
from consilience.methods.program import Elementwise, Matrix, Measured, Program, Top, Update


class Stopped(ConsilienceError):
    """Another worker failed or the user interrupted: give up quietly."""


class Sink(Protocol):
    """Where output bytes go. ``write`` is called from several threads at once."""

    def write(self, tensor: TensorPlan, start: int, data: Any) -> None:
        """Put the bytes ``data`` at byte ``start`` of the tensor."""
        ...


@dataclass
class Record:
    """What is known of one finished segment: the journal's unit, and what the summary and lineage are made of.

    ``inputs`` are the fingerprint sums of the dense inputs (base, then rows), ``output`` that of the bytes written;
    ``below`` per row: changed entries, those below one unit in the last place, L1 norm, the part below;
    ``rounding``: squared rounding error, squared change; ``measured`` per row: what the method measured.
    """

    tensor: int
    segment: int
    inputs: Marks
    output: list[int]
    below: list[list[float]] = field(default_factory=list[list[float]])
    rounding: list[float] = field(default_factory=lambda: [0.0, 0.0])
    measured: list[list[float]] = field(default_factory=list[list[float]])


def all_kept() -> Kept:
    """Return the ranks that keep every row as it is."""
    none = np.empty(0, np.float32)
    return Kept(none, none, np.zeros((2, 0), np.int64))


class Worker:
    """Runs segments with one thread's buffers."""

    def __init__(self, plan: Plan, sink: Sink, stop: threading.Event) -> None:
        self.plan, self.sink, self.stop = plan, sink, stop
        self.scratch = Scratch()

    def loader(self, tensor: TensorPlan, first: bool = True) -> Loader:
        """Return a loader of ``tensor`` over this worker's buffers; only the ``first`` pass looks for NaN and Inf."""
        check = first and not self.plan.allow_nonfinite
        return tensor.stack.loader(self.scratch, vectors=tensor.vectors, check=check)

    def _keys(self, tensor: TensorPlan) -> Any:
        """Return the seed of every row's random numbers."""
        seed = self.plan.recipe.seed
        keys = [random_bits.stream_key(seed, tensor.stream, name, "drop") for name in tensor.row_names]
        return np.array(keys, np.uint64)

    def step(self, tensor: TensorPlan, program: Elementwise, kept: Kept) -> Callable[[Any, int], None]:
        """Return the function that does to a block (rows, start) all that a program does to rows, in place."""
        keys, step, by_row = self._keys(tensor), program.step, program.row_step

        def apply(rows: Any, start: int) -> None:
            if by_row is not None:
                by_row.function(rows, start, by_row.columns, keys, *by_row.args)
            keep(rows, kept)
            if step is not None:
                step.function(rows, start, keys, *step.args)

        return apply

    def _room(self, tensor: TensorPlan, count: int) -> Any:
        """Return room for so many encoded values: whole 8-byte words, the last one's padding zero."""
        width = count * tensor.out_dtype.itemsize
        encoded = self.scratch.array("out", (-(-width // 8) * 8,), np.uint8)
        encoded[width:] = 0
        return encoded

    def _write(
        self, tensor: TensorPlan, start: int, count: int, encoded: Any, settled: Settled, record: Record
    ) -> None:
        """Write a block that was encoded, and remember what is known of it."""
        dtype, bad = tensor.out_dtype, int(settled.totals[2])
        if bad and not self.plan.allow_nonfinite:
            raise InputError(
                f"tensor {tensor.name!r}: {bad} merged values near element {start} overflow {dtype.name} (largest "
                f"{dtype.largest:g}); choose a wider out_dtype, smaller weights, or pass {option('allow_nonfinite')}"
            )
        for total, more in ((record.rounding, settled.totals[:2]), (record.output, settled.marks)):
            total[:] = [a + b for a, b in zip(total, more.tolist(), strict=True)]
        self.sink.write(tensor, start * dtype.itemsize, encoded[: count * dtype.itemsize])

    def _store(self, tensor: TensorPlan, start: int, values: Any, base: Any, record: Record) -> None:
        """Round values, at random if the plan says so, and write them; ``base`` is empty where they update none."""
        exact, dtype = values, tensor.out_dtype
        if self.plan.stochastic:
            values = self.scratch.array("noisy", (exact.size,), exact.dtype)
            values[:] = exact
            key = random_bits.stream_key(self.plan.recipe.seed, tensor.stream, "round")
            round_stochastically(values, dtype, key, start)
        encoded = self._room(tensor, exact.size)
        settled = settle(values, exact, base, dtype, encoded, start * dtype.itemsize)
        self._write(tensor, start, exact.size, encoded, settled, record)

    def _copy(self, tensor: TensorPlan, start: int, stop: int, record: Record) -> None:
        """Copy the base's bytes (integers and private tensors, and weights no expert touches)."""
        info, storage = tensor.base.dense, tensor.base.storage
        assert info is not None
        assert storage is not None
        width = info.plain.itemsize
        step = 1 << 20
        for at in range(start, stop, step):
            end = min(stop, at + step)
            copied = raw(storage, info, at, end, self.scratch.array("copy", ((end - at) * width,), np.uint8))
            low, high = mix(copied, at * width)
            record.inputs[0] = [record.inputs[0][0] + low, record.inputs[0][1] + high]
            record.output = list(record.inputs[0])
            packed = tensor.name in self.plan.alignment.packed.parts  # of which a float type may be a disguise
            if info.dtype.mergeable and not packed and not self.plan.allow_nonfinite:
                values = self.scratch.array("check", (end - at,), np.float64 if tensor.wide else np.float32)
                decode(copied, info.plain, values)
                if count_nonfinite(values, values.dtype.type(np.finfo(values.dtype).max)):
                    raise NonFinite(self.plan.alignment.owner(tensor.name), tensor.name, tensor.base)
            self.sink.write(tensor, at * width, copied)

    def merge(self, tensor: TensorPlan, segment: int, program: Program | None, selection: Selection | None) -> Record:
        """Produce one segment of the output."""
        start, stop = tensor.span(segment)
        record = Record(tensor.index, segment, [[0, 0] for _ in range(len(tensor.rows) + 1)], [0, 0])
        info = tensor.base.dense
        assert info is not None
        if program is None and info.plain is tensor.out_dtype and tensor.base.pair is None:
            self._copy(tensor, start, stop, record)
            return record
        loader = self.loader(tensor, first=tensor.passes == 1)
        record.below = [[0.0] * 4 for _ in tensor.rows]
        if program is None:
            block = self._converted(tensor, loader, record)
        elif isinstance(program, Matrix):
            block = self._updated(tensor, program, loader, record)
        else:
            kept = selection.kept((tensor.index, segment)) if selection is not None else all_kept()
            block = self._merged(tensor, program, loader, kept, record)
        size = block_length(loader, tensor.unit)
        for at in range(start, stop, size):
            if self.stop.is_set():
                raise Stopped("stopped")
            block(at, min(stop, at + size))
        return record

    def _converted(self, tensor: TensorPlan, loader: Loader, record: Record) -> Callable[[int, int], None]:
        """Return what takes a block of the base to another type."""

        def block(start: int, stop: int) -> None:
            try:
                base = loader.base(start, stop, record.inputs)
            except NonFinite as error:
                raise NonFinite(self.plan.alignment.owner(tensor.name), error.name, error.source) from None
            self._store(tensor, start, base, base, record)

        return block

    def _below(self, tensor: TensorPlan, program: Program, counts: Any) -> Below:
        count, real = len(tensor.rows), counts.dtype if tensor.wide else np.float32
        table, factors = (
            (np.array(part, np.float64).reshape(shape) * program.scale).astype(real)
            for part, shape in ((program.table.weights, (-1, count)), (program.table.factors, (count, -1)))
        )
        narrow = program.space == "task_vectors" and tensor.out_dtype.bits <= 16
        unit = np.float32(2.0**-tensor.out_dtype.significand if narrow else 0.0)
        return Below(np.array(program.table.starts, np.int64), table, program.table.inner, factors, unit, counts)

    def _merged(
        self, tensor: TensorPlan, program: Elementwise, loader: Loader, kept: Kept, record: Record
    ) -> Callable[[int, int], None]:
        """Return what merges a block by an element-wise method: one compiled pass, unless rounding takes another."""
        dtype, real = tensor.out_dtype, loader.real
        vectors = program.space == "task_vectors"
        counts = np.zeros((len(tensor.rows), 4))
        below, step = self._below(tensor, program, counts), program.step
        keys = np.empty(0, np.uint64) if step is None else self._keys(tensor)
        change = Change(keys, step.args if step is not None else ())
        seen = below if program.row_step is None else below._replace(per_unit=np.float32(0.0))
        scored, score = Scored(0, ()), no_score
        if isinstance(program.keep, Top):
            scored, score = Scored(1, program.keep.score.args), program.keep.score.function
        run = fused(program.merge.function, step.function if step is not None else no_step, score)
        taking = self._taking(tensor, program, loader, below, record)
        weights = tuple(map(float, program.weights))
        encode = encodes(dtype, real) and not self.plan.stochastic

        def block(start: int, stop: int) -> None:
            taken = taking(start, stop)
            exact = loader.nothing if encode else self.scratch.array("merged", (stop - start,), real)
            encoded = self._room(tensor, stop - start)
            ready = settled(exact, dtype, encoded, start * dtype.itemsize, encode=encode)
            run(
                taken, seen, kept, scored, change, weights, program.merge.args, stop - start, start,
                real(program.scale), vectors, ready,
            )  # fmt: skip
            if program.row_step is None:
                loader.finish(taken, record.inputs)
            record.below = counts.tolist()
            if encode:
                self._write(tensor, start, stop - start, encoded, ready, record)
            else:
                less = taken.base if taken.base.size else loader.base(start, stop, None) if vectors else loader.nothing
                self._store(tensor, start, exact, less if vectors else loader.nothing, record)

        return block

    def _taking(
        self, tensor: TensorPlan, program: Elementwise, loader: Loader, below: Below, record: Record
    ) -> Callable[[int, int], Taken]:
        """Return what brings in a block for the compiled pass; steps on whole rows come before that."""
        by_row, keys = program.row_step, self._keys(tensor)
        if by_row is None:
            return lambda start, stop: loader.take(start, stop, marked=True)

        def take(start: int, stop: int) -> Taken:
            rows, base = loader.load(start, stop, record.inputs)
            if below.per_unit > 0:
                measure(rows, base, start, below)
            by_row.function(rows, start, by_row.columns, keys, *by_row.args)
            return taken_numbers(rows, base, [[0, 0] for _ in record.inputs])

        return take

    def _updated(
        self, tensor: TensorPlan, program: Matrix, loader: Loader, record: Record
    ) -> Callable[[int, int], None]:
        """Run a matrix method, and return what adds a block of its update to the base."""
        real = loader.real
        update = program.function(tensor.stack, **program.parameters)
        if isinstance(update, Measured):
            update, record.measured = update.update, np.asarray(update.values, np.float64).tolist()
        sides = update if isinstance(update, Update) else (update,)
        *left, right = (np.ascontiguousarray(side, real) for side in sides)
        shape = (len(left[0]), right.shape[1]) if left else right.shape
        if left and len(right) * sum(shape) > math.prod(shape):  # no smaller in factors, and slower block by block
            right, left = left[0] @ right, []
        if shape != tensor.shape:
            raise InputError(
                f"tensor {tensor.name!r}: method {self.plan.method.name!r} returned an update of shape {shape}, not "
                f"{tensor.shape}"
            )
        counts = np.zeros((len(tensor.rows), 4))
        below = self._below(tensor, program, counts)

        def block(start: int, stop: int) -> None:
            rows, base = loader.load(start, stop, record.inputs)
            if below.per_unit > 0:
                measure(rows, base, start, below)
                record.below = counts.tolist()
            out = self.scratch.array("merged", (stop - start,), real)
            if left:
                out[:] = 0
                part = self.scratch.array("part", (stop - start,), real)
                add_product(out, start, left[0], right, real(1), part)
            else:
                out[:] = right.reshape(-1)[start:stop]
            scale_add(out, real(program.scale), base)
            self._store(tensor, start, out, base, record)

        return block
