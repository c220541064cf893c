"""Read the finished files back and compare them with what was computed."""

from pathlib import Path

import numpy as np

from consilience.checkpoints.safetensors_file import read_header
from consilience.engine.output import FileSink
from consilience.engine.plan import Plan
from consilience.engine.worker import Record
from consilience.errors import MachineError
from consilience.kernels.fingerprint import MASK, mix

_STEP = 1 << 22


def verify_segment(
    plan: Plan, sink: FileSink, record: Record, buffer: "np.ndarray[tuple[int], np.dtype[np.uint8]]"
) -> int:
    """Compare one segment's bytes in the file with the fingerprint of those that were written; return how many.

    Raises:
        MachineError: they differ: the disk, the memory or another process changed them.
    """
    tensor = plan.tensors[record.tensor]
    width = tensor.out_dtype.itemsize
    start, stop = (edge * width for edge in tensor.span(record.segment))
    low = high = 0
    for at in range(start, stop, _STEP):
        view = buffer[: min(_STEP, stop - at)]
        sink.read(tensor.file, tensor.offset + at, view)
        found = mix(view, at)
        low, high = low + found[0], high + found[1]
    if (low & MASK, high & MASK) != (record.output[0] & MASK, record.output[1] & MASK):
        raise MachineError(
            f"{sink.paths[tensor.file]}: tensor {tensor.name!r} reads back differently from what was written; check "
            "the disk, then run the same command again"
        )
    return stop - start


def verify_headers(plan: Plan, files: list[Path]) -> None:
    """Reopen the files as a stranger would and compare names, types and shapes with the plan."""
    found = {
        planned.beginning + name: entry
        for file, planned in zip(files, plan.layout.files, strict=True)
        for name, entry in read_header(file)[0].items()
    }
    for tensor in plan.tensors:
        entry = found.pop(tensor.name, None)
        if entry is None or (entry.dtype, entry.shape, entry.offset) != (tensor.out_dtype, tensor.shape, tensor.offset):
            raise MachineError(
                f"{files[tensor.file]}: tensor {tensor.name!r} is not as planned; run the same command again"
            )
    if found:
        raise MachineError(
            f"{files[0]}: holds tensor {min(found)!r}, which was not planned; run the same command again"
        )
