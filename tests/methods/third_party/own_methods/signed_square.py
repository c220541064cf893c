"""An element-wise method: a compiled function of a block's task vectors."""

from typing import Annotated, Any

from consilience.methods import Arithmetic, Default, Elementwise, PerExpert, TensorSpec, elementwise, kernel


@kernel
def _signed_square(rows: Any, base: Any, start: int, weights: Any, out: Any, size: float) -> None:
    for i in range(out.size):
        total = rows.dtype.type(0)
        for k in range(len(weights)):
            x = rows[k, i]
            total += rows.dtype.type(weights[k]) * x * abs(x)
        out[i] = total / rows.dtype.type(size)


@elementwise(source="an example")
def signed_square(
    tensor: TensorSpec,
    *,
    weight: Annotated[PerExpert, Default(1.0), "multiplier of each task vector"],
    size: Annotated[float, Default(0.01), "magnitude that stays as it is"],
) -> Elementwise:
    """Let large entries count for more: theta = theta_0 + sum_k w_k tau_k |tau_k| / size."""
    return Elementwise("task_vectors", Arithmetic(_signed_square, weight, (size,)))
