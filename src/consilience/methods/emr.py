"""EMR-Merging's unified task vector: elect a sign, keep the largest entry that has it."""

from typing import Annotated, Any

import numpy as np

from consilience.jit import kernel
from consilience.methods.program import Arithmetic, Elementwise
from consilience.methods.signature import Default, PerExpert, TensorSpec, elementwise


@kernel
def _elected(rows: Any, base: Any, start: int, weights: Any, out: Any) -> None:
    """Per element: of the rows whose sign is that of the sum (0 counts as -) the entry of largest magnitude."""
    zero = rows.dtype.type(0)
    for i in range(out.size):
        total = 0.0
        high, low = zero, zero
        for k in range(len(weights)):
            x = rows.dtype.type(weights[k]) * rows[k, i]
            total += weights[k] * np.float64(rows[k, i])
            high = max(high, x)
            low = min(low, x)
        out[i] = high if total > 0.0 else low


@elementwise(source="Huang et al. 2024, EMR-Merging, arXiv:2405.17461")
def emr(
    tensor: TensorSpec,
    *,
    weight: Annotated[PerExpert, Default(1.0), "multiplier of each task vector, before the election"],
    lambda_: Annotated[float, Default(1.0), "multiplier of the unified task vector"],
) -> Elementwise:
    """Elect a sign per element, and take the largest of the entries that have it: EMR's unified model.

    theta = theta_0 + lambda s max(0, max_k s w_k tau_k),   s = sign(sum_k w_k tau_k), 0 counting as -, per element

    This is the part of EMR-Merging that is one checkpoint. The paper's results come from a mask and a rescaler for
    each task besides, which are applied when the task of an input is known; here there are none.
    """
    del tensor
    return Elementwise("task_vectors", Arithmetic(_elected, weight), scale=lambda_)
