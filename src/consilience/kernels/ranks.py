"""Ranks within rows that fit in memory: buckets by the leading bits of magnitudes, then order within each bucket."""

from typing import Any

import numpy as np

from consilience.jit import kernel
from consilience.kernels.select import magnitudes

#: Buckets of more entries are sorted by merging, smaller ones by insertion.
_SMALL = 32


@kernel
def _settle_bucket(bits: Any, order: Any) -> None:
    """Sort a bucket's indices ``order`` by their bits, the lower index first among equals."""
    if order.size > _SMALL:
        ascending = True
        for i in range(1, order.size):
            ascending &= bits[order[i - 1]] <= bits[order[i]]
        if ascending:  # mostly equal magnitudes: those of models in bfloat16 are few
            return
        order[:] = order[np.argsort(bits[order], kind="mergesort")]
        return
    for i in range(1, order.size):
        index, at = order[i], i
        while at > 0 and bits[order[at - 1]] > bits[index]:
            order[at] = order[at - 1]
            at -= 1
        order[at] = index


@kernel
def row_ranks(row: Any, bits: Any, edges: Any, order: Any, ranks: Any) -> None:
    """Write the rank of every magnitude of ``row`` [n], 0 for the smallest, to ``ranks`` [n] int32; ties by index.

    ``bits`` [n] uint32, ``order`` [n] int32 and ``edges`` [m + 1] int32 are room, m being a power of two.
    """
    magnitudes(row, bits)
    low, high = bits[0], bits[0]
    for i in range(bits.size):
        low, high = min(low, bits[i]), max(high, bits[i])
    shift = np.uint32(0)
    while (high - low) >> shift >= edges.size - 1:
        shift += np.uint32(1)
    edges[:] = 0
    for i in range(bits.size):
        edges[((bits[i] - low) >> shift) + 1] += 1
    for b in range(1, edges.size):
        edges[b] += edges[b - 1]
    for i in range(bits.size):
        bucket = (bits[i] - low) >> shift
        order[edges[bucket]] = i
        edges[bucket] += 1
    begin = 0
    for b in range(edges.size - 1):
        end = edges[b]
        if end > begin + 1:
            _settle_bucket(bits, order[begin:end])
        begin = end
    for place in range(order.size):
        ranks[order[place]] = place
