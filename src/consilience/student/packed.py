"""Full bfloat16 experts on a bfloat16 base: stored bits go into the sums without a float32 copy of the task vectors.

The common case, and the one where a pass is bound by memory: the kernels decode and subtract mapped pages as they sum,
and nothing is copied. The sums are those of the general path, in the same order.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from consilience.engine.plan import span
from consilience.experts.model import Source
from consilience.experts.stack import Stack

#: Elements of a block. Of float32 gradients and weights it fits a near cache; the GIL changes hands once a block.
BLOCK = 1 << 18


def suits(stack: Stack) -> bool:
    """Whether base and changed rows are stored in bfloat16."""
    plain = stack.base.pair is None and not stack.wide
    sources = [stack.base, *(row for row in stack.rows if not row.untouched)]
    stored = all(s.pair is None and s.dense is not None and s.dense.plain.name == "BF16" for s in sources)
    return plain and stored and len(sources) > 1


def blocks(stack: Stack, segment: int) -> Iterator[tuple[int, int, tuple[Any, ...], list[int]]]:
    """Yield (first, last + 1, bits of base and changed rows as 1 + R arrays of uint16, the rows' R numbers)."""
    rows = [k for k, row in enumerate(stack.rows) if not row.untouched]
    stored = [_bits(source) for source in (stack.base, *(stack.rows[k] for k in rows))]
    start, stop = span(stack.numel, segment)
    for at in range(start, stop, BLOCK):
        end = min(stop, at + BLOCK)
        yield at, end, tuple(one[at:end] for one in stored), rows


def _bits(source: Source) -> Any:
    """Return a stored tensor as uint16, read-only; a copy if it does not lie at an even address."""
    assert source.dense is not None
    assert source.storage is not None
    held = source.storage.view(source.dense)
    bits = (held if held.ctypes.data % 2 == 0 else held.copy()).view(np.uint16)
    bits.flags.writeable = False  # one type for the compiled kernels
    return bits
