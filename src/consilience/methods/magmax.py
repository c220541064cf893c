"""MagMax: of all task vectors' entries take the largest."""

from typing import Annotated, Any

from consilience.jit import kernel
from consilience.methods.program import Arithmetic, Elementwise
from consilience.methods.signature import Default, PerExpert, TensorSpec, elementwise


@kernel
def _largest(rows: Any, base: Any, start: int, weights: Any, out: Any) -> None:
    for i in range(out.size):
        best = rows.dtype.type(weights[0]) * rows[0, i]
        for k in range(1, len(weights)):
            x = rows.dtype.type(weights[k]) * rows[k, i]
            best = x if abs(x) >= abs(best) else best
        out[i] = best


@elementwise(source="Marczak et al. 2024, MagMax, arXiv:2407.06322")
def magmax(
    tensor: TensorSpec,
    *,
    weight: Annotated[PerExpert, Default(1.0), "multiplier of each task vector, before they are compared"],
    lambda_: Annotated[float, Default(0.5), "multiplier of the merged task vector"],
) -> Elementwise:
    """Take, for every element, the task vectors' entry of largest magnitude.

    theta = theta_0 + lambda w_j tau_j,   j = argmax_k |w_k tau_k| per element, the last of equal ones

    The paper fine-tunes one task after the other, each from the last one's weights, and merges those checkpoints' task
    vectors; it has no weights, and its lambda is 0.5 where it is not searched.
    """
    del tensor
    return Elementwise("task_vectors", Arithmetic(_largest, weight), scale=lambda_)
