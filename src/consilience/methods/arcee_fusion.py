"""Arcee Fusion: take over another model's elements of outstanding importance, leave the rest."""

import math
from typing import Annotated, Any

import numpy as np

from consilience.jit import kernel
from consilience.kernels.exponential import exponentials, log_ratio
from consilience.methods.program import Arithmetic, Elementwise, Quantiles, RowTally, Score, Sums
from consilience.methods.signature import Default, TensorSpec, elementwise

#: Added to every probability, as in mergekit.
_EPSILON = 1e-8


@kernel
def _divergences(rows: Any, base: Any, columns: int, out: Any) -> None:
    """Write KL(p || q) of every row, p and q the softmax of the model's and of the base's row, plus 1e-8 each."""
    p, q, terms = np.empty(columns), np.empty(columns), np.empty(columns)
    for r in range(out.size):
        at = r * columns
        less, more = base[at : at + columns], rows[0, at : at + columns]
        for i in range(columns):
            q[i] = less[i]
            p[i] = np.float64(less[i]) + np.float64(more[i])
        for values in (p, q):
            top = values[0]
            for i in range(columns):
                top = max(top, values[i])
            for i in range(columns):
                values[i] -= top
            exponentials(values)
            total = 0.0
            for i in range(columns):
                total += values[i]
            for i in range(columns):
                values[i] = values[i] / total + _EPSILON
        log_ratio(p, q, terms)
        total = 0.0
        for i in range(columns):
            total += p[i] * terms[i]
        out[r] = max(total, 0.0)


@kernel
def _importance(rows: Any, base: Any, start: int, out: Any, columns: int, divergence: Any) -> None:
    """Write ``|tau| * KL`` of the element's row."""
    at = start
    stop = start + out.shape[1]
    while at < stop:
        row = at // columns
        end = min(stop, (row + 1) * columns)
        for i in range(at - start, end - start):
            out[0, i] = np.float32(abs(np.float64(rows[0, i])) * divergence[row])
        at = end


@kernel
def _fused_above(
    rows: Any, base: Any, start: int, weights: Any, out: Any, columns: int, divergence: Any, threshold: float
) -> None:
    zero = rows.dtype.type(0)
    at = start
    stop = start + out.size
    while at < stop:
        row = at // columns
        end = min(stop, (row + 1) * columns)
        for i in range(at - start, end - start):
            important = np.float64(np.float32(abs(np.float64(rows[0, i])) * divergence[row])) >= threshold
            out[i] = rows[0, i] if important else zero
        at = end


@elementwise(source="Arcee AI 2025, Arcee Fusion (mergekit's arcee_fusion)", experts=(1, 1))
def arcee_fusion(
    tensor: TensorSpec,
    *,
    whiskers: Annotated[float, Default(1.5), "multiplier of the interquartile range above the median"],
) -> Elementwise:
    """Take the elements of the other model whose importance is far above the tensor's median.

    I     = |tau| KL(p || q),   p = softmax(theta_1's row) + 1e-8, q = softmax(theta_0's row) + 1e-8
    theta = theta_0 + tau where I >= median(I) + whiskers (Q3(I) - Q1(I)), else theta_0

    Rows run along the last axis. Quantiles are those of the sorted I at floor(q (n - 1)). Known disagreement: mergekit
    takes them from a random sample where a tensor has more than a million elements, and computes the divergence in the
    models' dtype; here they are exact and it is in float64.
    """
    columns, size = max(1, tensor.shape[-1] if tensor.shape else 1), tensor.numel
    ranks = tuple(size - math.floor(q * (size - 1)) for q in (0.25, 0.5, 0.75))

    def compare(first: Sums) -> Elementwise:
        divergence = first.by_row

        def finish(sums: Sums) -> Elementwise:
            assert sums.quantiles is not None
            lower, median, upper = sums.quantiles.tolist()
            threshold = median + whiskers * (upper - lower)
            return Elementwise("task_vectors", Arithmetic(_fused_above, (1.0,), (columns, divergence, threshold)))

        importance = Quantiles(Score(_importance, (columns, divergence)), ranks, (0,) * 3)
        return Elementwise("task_vectors", merge, needs="quantiles", finish=finish, quantiles=importance)

    merge = Arithmetic(_fused_above, (1.0,), (columns, np.zeros(1), 0.0))
    by_row = RowTally(_divergences, columns)
    return Elementwise("task_vectors", merge, needs="by_row", finish=compare, by_row=by_row, stages=2)
