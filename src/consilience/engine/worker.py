"""One segment of one tensor: load, transform, combine, round, fingerprint, write."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from consilience.checkpoints.checkpoint import raw
from consilience.checkpoints.values import count_nonfinite, decode
from consilience.engine.plan import Plan, TensorPlan
from consilience.engine.selection import Selection
from consilience.errors import ConsilienceError, InputError, option
from consilience.experts.block import Loader, Marks, NonFinite, Scratch
from consilience.kernels import random_bits
from consilience.kernels.encode import below_unit, round_stochastically
from consilience.kernels.fingerprint import mix
from consilience.kernels.lowrank import add_product
from consilience.kernels.settle import scale_add, settle
from consilience.methods.program import Elementwise, Floats, Matrix, Place, Program, Update


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
    ``rounding``: squared rounding error, squared change; ``differs``: names whose integer values are not the base's.
    """

    tensor: int
    segment: int
    inputs: Marks
    output: list[int]
    below: list[list[float]] = field(default_factory=list[list[float]])
    rounding: list[float] = field(default_factory=lambda: [0.0, 0.0])


class Worker:
    """Runs segments with one thread's buffers."""

    def __init__(self, plan: Plan, sink: Sink, stop: threading.Event) -> None:
        self.plan, self.sink, self.stop = plan, sink, stop
        self.scratch = Scratch()

    def loader(self, tensor: TensorPlan, first: bool = True) -> Loader:
        """Return a loader of ``tensor`` over this worker's buffers; only the ``first`` pass looks for NaN and Inf."""
        check = first and not self.plan.allow_nonfinite
        return tensor.stack.loader(self.scratch, vectors=tensor.vectors, check=check)

    def _place(self, tensor: TensorPlan, start: int, base: Any, keys: tuple[int, ...]) -> Place:
        none = self.scratch.array("none", (0,), np.float64 if tensor.wide else np.float32)
        return Place(start, none if base is None else base, keys)

    def _keys(self, tensor: TensorPlan) -> tuple[int, ...]:
        seed = self.plan.recipe.seed
        return tuple(random_bits.stream_key(seed, tensor.stream, name, "drop") for name in tensor.row_names)

    def step(self, tensor: TensorPlan, program: Elementwise) -> Callable[[Floats, Floats | None, int], None]:
        """Return the function that applies a program's step to a block (rows, base, start), in place."""
        keys = self._keys(tensor)

        def apply(rows: Floats, base: Floats | None, start: int) -> None:
            if program.step is not None:
                program.step(rows, self._place(tensor, start, base, keys))

        return apply

    def _store(
        self, tensor: TensorPlan, start: int, values: Any, base: Any, record: Record, scale: float | None = None
    ) -> None:
        """Round ``values``, or with a ``scale`` base + scale * values, and write them; measure what rounding cost.

        ``base`` is empty where values are not updates of one.
        """
        dtype, real = tensor.out_dtype, values.dtype.type
        exact, add = values, scale is not None
        if self.plan.stochastic:
            if scale is not None:
                scale_add(exact, real(scale), base)
            add, values = False, self.scratch.array("noisy", (exact.size,), exact.dtype)
            values[:] = exact
            key = random_bits.stream_key(self.plan.recipe.seed, tensor.stream, "round")
            round_stochastically(values, dtype, key, start)
        width, at = exact.size * dtype.itemsize, start * dtype.itemsize
        encoded = self.scratch.array("out", (-(-width // 8) * 8,), np.uint8)
        low, high, bad, error, change = settle(values, exact, scale or 1.0, base, dtype, encoded, at, add=add)
        if bad and not self.plan.allow_nonfinite:
            raise InputError(
                f"tensor {tensor.name!r}: {bad} merged values near element {start} overflow {dtype.name} (largest "
                f"{dtype.largest:g}); choose a wider out_dtype, smaller weights, or pass {option('allow_nonfinite')}"
            )
        record.rounding = [record.rounding[0] + error, record.rounding[1] + change]
        record.output = [record.output[0] + low, record.output[1] + high]
        self.sink.write(tensor, at, encoded[:width])

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
        quota = selection.quota((tensor.index, segment)) if selection else []
        record.below = [[0.0] * 4 for _ in tensor.rows]
        whole = self._update(tensor, program) if isinstance(program, Matrix) else None
        keys = self._keys(tensor) if isinstance(program, Elementwise) and program.step is not None else ()
        for at in range(start, stop, loader.size):
            if self.stop.is_set():
                raise Stopped("stopped")
            end = min(stop, at + loader.size)
            rows, base = loader.load(at, end, record.inputs)
            if program is None:
                self._store(tensor, at, base, base, record)
                continue
            place = self._place(tensor, at, base, keys)
            vectors = program.space == "task_vectors"
            if vectors:
                self._measure_below(tensor, program, rows, at, base, record)
            out = self.scratch.array("merged", (end - at,), loader.real)
            if whole is not None:
                whole(at, out)
            else:
                assert isinstance(program, Elementwise)
                if selection is not None:
                    selection.mask(rows, quota)
                if program.step is not None:
                    program.step(rows, place)
                program.merge(rows, place, out)
            less = base if vectors else self.scratch.array("none", (0,), loader.real)
            self._store(tensor, at, out, less, record, program.scale)
        return record

    def _update(self, tensor: TensorPlan, program: Matrix) -> Callable[[int, Any], None]:
        """Run a matrix method and return the function that fills a block with its update."""
        rows, columns = tensor.shape
        update = program.function(tensor.stack, **program.parameters)
        real = np.float64 if tensor.wide else np.float32
        if isinstance(update, Update):
            left, right = (np.ascontiguousarray(side, real) for side in update)
            shape = (len(left), right.shape[1])
        else:
            left, right, shape = None, np.ascontiguousarray(update, real), update.shape
        if shape != (rows, columns):
            raise InputError(
                f"tensor {tensor.name!r}: method {self.plan.method.name!r} returned an update of shape {shape}, not "
                f"{tensor.shape}"
            )

        def fill(start: int, out: Any) -> None:
            if left is None:
                out[:] = right.reshape(-1)[start : start + out.size]
            else:
                out[:] = 0
                add_product(out, start, left, right, real(1), self.scratch.array("part", (out.size,), real))

        return fill

    def _measure_below(
        self, tensor: TensorPlan, program: Program, rows: Any, start: int, base: Any, record: Record
    ) -> None:
        dtype, size, real = tensor.out_dtype, rows.shape[1], rows.dtype.type
        if dtype.bits > 16:
            return
        found, unit = np.zeros((len(rows), 4)), np.float32(2.0**-dtype.significand)
        cuts = [(0, size, program.weights)] if isinstance(program, Matrix) else program.merge.cut(start, start + size)
        for low, high, weights in cuts:
            scaled = (np.array(weights) * program.scale).astype(real)
            below_unit(rows[:, low:high], scaled, base[low:high], unit, found)
        for total, more in zip(record.below, found.tolist(), strict=True):
            total[:] = [a + b for a, b in zip(total, more, strict=True)]
