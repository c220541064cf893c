"""Consensus Task Arithmetic: add task vectors where at least so many tasks need the sum."""

from typing import Annotated, Any

import numpy as np

from consilience.jit import kernel
from consilience.methods.program import Arithmetic, Elementwise
from consilience.methods.signature import Default, PerExpert, Range, TensorSpec, elementwise


@kernel
def _agreed(rows: Any, base: Any, start: int, weights: Any, out: Any, tall: Any, least: int) -> None:
    """Per element: the weighted sum where at least ``least`` rows are at least ``tall[k]`` times |sum - row|."""
    zero = rows.dtype.type(0)
    for i in range(out.size):
        total = zero
        for k in range(len(weights)):
            total += rows.dtype.type(weights[k]) * rows[k, i]
        needed = 0
        for k in range(len(weights)):
            x = rows[k, i]
            needed += abs(x) >= rows.dtype.type(tall[k]) * abs(total - x)
        out[i] = total if needed >= least else zero


@elementwise(source="Wang et al. 2024, Localizing Task Information for Improved Model Merging, arXiv:2405.07813")
def consensus(
    tensor: TensorSpec,
    *,
    weight: Annotated[PerExpert, Default(1.0), "multiplier of each task vector in the sum"],
    tall: Annotated[
        PerExpert, Default(0.4), Range(0), "lambda_k: how large an entry is against what the others change"
    ],
    least: Annotated[int, Default(2), Range(0), "least number of tasks that an element must be needed by"],
    lambda_: Annotated[float, Default(0.3), "multiplier of the sum"],
) -> Elementwise:
    """Add task vectors; leave out the elements that fewer than ``least`` tasks' masks have.

    tau   = sum_k w_k tau_k,   m_k = [|tau_k| >= tall_k |tau - tau_k|]   (TALL masks)
    theta = theta_0 + lambda [sum_k m_k >= least] tau

    Elements that one task alone needs are left out as selfish, those that none needs as catastrophic. The paper chooses
    ``tall`` in {0.2, ..., 0.6} for every task, and lambda, on validation data; the weights are 1.
    """
    del tensor
    merge = Arithmetic(_agreed, weight, (np.array(tall, np.float64), least))
    return Elementwise("task_vectors", merge, scale=lambda_)
