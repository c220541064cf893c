"""NearSwap: move the base towards one other model, fully where they are near."""

from typing import Annotated, Any

from consilience.jit import kernel
from consilience.methods.program import Arithmetic, Elementwise
from consilience.methods.signature import Default, Range, TensorSpec, elementwise


@kernel
def _clipped(rows: Any, base: Any, start: int, weights: Any, out: Any, t: float) -> None:
    limit = rows.dtype.type(t)
    for i in range(out.size):
        out[i] = min(max(rows[0, i], -limit), limit)


@elementwise(source="Alchemonaut, NearSwap (mergekit's nearswap)", experts=(1, 1))
def nearswap(
    tensor: TensorSpec,
    *,
    t: Annotated[float, Default(0.001), Range(0), "largest change of an element"],
) -> Elementwise:
    """Interpolate each element towards the other model by min(1, t / |difference|).

    theta = theta_0 + min(1, t / |tau|) tau = theta_0 + clip(tau, -t, t)

    mergekit computes the left form, whose 0 / 0 it repairs afterwards; it has no default for ``t``.
    """
    del tensor
    return Elementwise("task_vectors", Arithmetic(_clipped, (1.0,), (t,)))
