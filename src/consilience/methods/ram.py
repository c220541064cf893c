"""Reinforced Agent Merging: average what several experts changed, keep what one of them changed."""

from typing import Annotated, Any

import numpy as np

from consilience.jit import kernel
from consilience.methods.program import Arithmetic, Elementwise
from consilience.methods.signature import Default, Range, TensorSpec, elementwise

Epsilon = Annotated[float, Default(1e-5), Range(0), "entries of no larger magnitude count as unchanged"]


@kernel
def overlap_mean(rows: Any, base: Any, start: int, weights: Any, out: Any, epsilon: float) -> None:
    """Per element: the mean of the rows that exceed ``epsilon``; where that is one row, times its weight."""
    zero, limit = rows.dtype.type(0), rows.dtype.type(epsilon)
    for i in range(out.size):
        count = 0
        total, alone = zero, zero
        for k in range(len(weights)):
            x = rows[k, i]
            changed = abs(x) > limit
            count += changed
            total += x if changed else zero
            alone += rows.dtype.type(weights[k]) * x if changed else zero
        out[i] = total / rows.dtype.type(count) if count > 1 else alone


@kernel
def overlaps(rows: Any, base: Any, start: int, out: Any, epsilon: float) -> None:
    """Count, for every row, the elements that others exceed ``epsilon`` at as well, then those that none does."""
    count, size = rows.shape
    limit = rows.dtype.type(epsilon)
    changed = np.zeros(size, np.int32)
    for k in range(count):
        row = rows[k]
        for i in range(size):
            changed[i] += abs(row[i]) > limit
    for k in range(count):
        row = rows[k]
        shared, unique = 0, 0
        for i in range(size):
            mine = abs(row[i]) > limit
            shared += mine and changed[i] > 1
            unique += mine and changed[i] == 1
        out[k], out[count + k] = shared, unique


@elementwise(source="Reinforced Agent Merging 2026, arXiv:2601.13572")
def ram(
    tensor: TensorSpec,
    *,
    epsilon: Epsilon,
    lambda_: Annotated[float, Default(1.0), "multiplier of the merged task vector"],
) -> Elementwise:
    """Keep an element that one expert changed; average one that several did, over those.

    theta = theta_0 + lambda sum_{k in C} tau_k / max(|C|, 1),   C = {k: |tau_k| > epsilon}, per element

    As mergekit's ``ram``, which has no lambda.
    """
    ones = (1.0,) * len(tensor.experts)
    return Elementwise("task_vectors", Arithmetic(overlap_mean, ones, (epsilon,)), scale=lambda_)
