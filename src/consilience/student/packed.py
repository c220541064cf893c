"""Full bfloat16 experts on a bfloat16 base: stored bits go into the sums without a float32 copy of the task vectors.

The common case, and the one where a pass is bound by memory: a block's bits of base and experts stay in cache, and the
kernels decode and subtract as they sum. The sums are those of the general path, in the same order.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from consilience.engine.block import Scratch
from consilience.engine.plan import TensorPlan

#: Elements of a block: 512 KiB of bits a row. Smaller ones fit a nearer cache, but two threads then wait for the GIL.
BLOCK = 1 << 18


def suits(tensor: TensorPlan) -> bool:
    """Whether base and changed rows are stored in bfloat16 and nothing is done to them first."""
    program, base = tensor.program, tensor.base
    plain = program is not None and not program.stages and base.pair is None and not tensor.wide
    sources = [base, *(row for row in tensor.rows if not row.untouched)]
    stored = all(s.pair is None and s.dense is not None and s.dense.dtype.name == "BF16" for s in sources)
    return plain and stored and len(sources) > 1


def blocks(tensor: TensorPlan, segment: int, scratch: Scratch) -> Iterator[tuple[int, int, Any, list[int]]]:
    """Yield (first, last + 1, bits [1 + R, BLOCK] uint16, numbers of the R changed rows) of one segment."""
    rows = [k for k, row in enumerate(tensor.rows) if not row.untouched]
    sources = [tensor.base, *(tensor.rows[k] for k in rows)]
    bits = scratch.array("bits", (len(sources), BLOCK), np.uint16)
    start, stop = tensor.span(segment)
    for at in range(start, stop, BLOCK):
        end = min(stop, at + BLOCK)
        for row, source in zip(bits, sources, strict=True):
            assert source.dense is not None
            assert source.storage is not None
            source.storage.read(source.dense, 2 * at, row[: end - at].view(np.uint8))
        yield at, end, bits, rows
