"""One segment of one tensor: load, transform, combine, round, fingerprint, write."""

import threading
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from consilience.checkpoints.checkpoint import raw
from consilience.checkpoints.values import count_nonfinite, decode
from consilience.engine.plan import Plan, TensorPlan
from consilience.engine.selection import Selection
from consilience.errors import ConsilienceError, InputError, option
from consilience.experts.block import Loader, Marks, NonFinite, Scratch
from consilience.kernels import combine as comb
from consilience.kernels import encode as enc
from consilience.kernels import random_bits
from consilience.kernels.fingerprint import mix
from consilience.kernels.select import trim
from consilience.kernels.settle import audit
from consilience.methods.program import Drop, Elect, PiecewiseSum, Program, SignedSum, WeightedSum


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

    def stages(self, tensor: TensorPlan, program: Program, selection: Selection | None, quota: list[int]) -> Any:
        """Return the function that applies the program's stages to a block, in place."""
        keys = [random_bits.stream_key(self.plan.recipe.seed, tensor.stream, name, "drop") for name in tensor.row_names]

        def apply(stack: Any, start: int) -> None:
            for stage in program.stages:
                if isinstance(stage, Elect):
                    comb.elect(stack)
                    continue
                for k in range(stack.shape[0]):
                    if isinstance(stage, Drop):
                        limit = np.uint64(round(stage.density[k] * 2**32))
                        random_bits.drop(stack[k], np.uint64(keys[k]), start, limit, stack.dtype.type(stage.scale[k]))
                    else:
                        assert selection is not None
                        quota[k] = int(trim(stack[k], selection.threshold[k], quota[k]))

        return apply

    def _combine(self, program: Program, stack: Any, start: int, out: Any) -> None:
        combine, real = program.combine, stack.dtype.type
        if isinstance(combine, WeightedSum):
            comb.weighted_sum(stack, tuple(map(real, combine.weights)), out)
        elif isinstance(combine, PiecewiseSum):
            for low, high, weights in combine.cut(start, start + out.size):
                comb.weighted_sum(stack[:, low:high], tuple(map(real, weights)), out[low:high])
        elif isinstance(combine, SignedSum):
            comb.signed_sum(stack, tuple(map(np.float64, combine.weights)), combine.mean, out)
        else:
            combine.function(stack, start, combine.args, out)

    def _store(self, tensor: TensorPlan, start: int, values: Any, base: Any, record: Record) -> None:
        """Round ``values``, check for overflow, measure what rounding cost, fingerprint and write."""
        dtype, real = tensor.out_dtype, values.dtype.type
        exact = values
        if self.plan.stochastic:
            values = self.scratch.array("noisy", (exact.size,), exact.dtype)
            values[:] = exact
            key = random_bits.stream_key(self.plan.recipe.seed, tensor.stream, "round")
            enc.round_stochastically(values, dtype, key, start)
        encoded = self.scratch.array("out", (values.size * dtype.itemsize,), np.uint8)
        enc.encode(values, dtype, encoded)
        rounded = self.scratch.array("rounded", (values.size,), values.dtype)
        at = start * dtype.itemsize
        low, high, bad, error, change = audit(
            encoded, dtype, rounded, exact, base, at, real(np.finfo(values.dtype).max)
        )
        if bad and not self.plan.allow_nonfinite:
            raise InputError(
                f"tensor {tensor.name!r}: {bad} merged values near element {start} overflow {dtype.name} (largest "
                f"{dtype.largest:g}); choose a wider out_dtype, smaller weights, or pass {option('allow_nonfinite')}"
            )
        record.rounding = [record.rounding[0] + error, record.rounding[1] + change]
        record.output = [record.output[0] + low, record.output[1] + high]
        self.sink.write(tensor, at, encoded)

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
        stages = self.stages(tensor, program, selection, quota) if program else None
        record.below = [[0.0] * 4 for _ in tensor.rows]
        for at in range(start, stop, loader.size):
            if self.stop.is_set():
                raise Stopped("stopped")
            end = min(stop, at + loader.size)
            stack, base = loader.load(at, end, record.inputs)
            if program is None or stages is None:
                self._store(tensor, at, base, base, record)
                continue
            out = self.scratch.array("merged", (end - at,), loader.real)
            vectors = program.space == "task_vectors"
            if vectors:
                self._measure_below(tensor, program, stack, at, base, record)
            stages(stack, at)
            self._combine(program, stack, at, out)
            if vectors:
                enc.scale_add(out, loader.real(program.scale), base)
            elif program.scale != 1.0:
                enc.multiply(out, loader.real(program.scale))
            self._store(tensor, at, out, base if vectors else self.scratch.array("zero", (0,), loader.real), record)
        return record

    def _measure_below(
        self, tensor: TensorPlan, program: Program, stack: Any, start: int, base: Any, record: Record
    ) -> None:
        if tensor.out_dtype.bits > 16:
            return
        combine = program.combine
        size = stack.shape[1]
        cuts = combine.cut(start, start + size) if isinstance(combine, PiecewiseSum) else [(0, size, combine.weights)]
        for low, high, weights in cuts:
            for k, weight in enumerate(weights):
                if not tensor.rows[k].untouched:
                    row = stack[k, low:high]
                    found = enc.below_unit(row, weight * program.scale, base[low:high], tensor.out_dtype)
                    record.below[k] = [a + b for a, b in zip(record.below[k], found, strict=True)]
