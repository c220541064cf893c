"""NuSLERP: spherical interpolation of two models or of their task vectors, also vector by vector."""

import math
from typing import Annotated, Any

import numpy as np

from consilience.jit import kernel
from consilience.methods.linear import normalised
from consilience.methods.program import Elementwise, Over, Sums
from consilience.methods.signature import Default, PerExpert, TensorSpec, elementwise
from consilience.methods.vector_sum import summed
from consilience.methods.weighted_sum import weighted

#: Where sin^2 of the angle is not above this, the interpolation is linear.
FLAT = 1e-12


@kernel
def interpolations(aa: Any, ab: Any, bb: Any, t: float, out: Any) -> None:
    """Write the multipliers [2, G] of pairs of vectors with inner products <a, a>, <a, b>, <b, b> [G] to ``out``."""
    for g in range(aa.size):
        out[0, g], out[1, g] = 1.0 - t, t
        if aa[g] > 0 and bb[g] > 0:
            cosine = max(-1.0, min(1.0, ab[g] / (math.sqrt(aa[g]) * math.sqrt(bb[g]))))
            if 1.0 - cosine * cosine > FLAT:
                angle = math.acos(cosine)
                out[0, g] = math.sin((1.0 - t) * angle) / math.sin(angle)
                out[1, g] = math.sin(t * angle) / math.sin(angle)


@elementwise(source="mergekit's nuslerp (C. Goddard)", base="optional", experts=(2, 2))
def nuslerp(
    tensor: TensorSpec,
    *,
    weight: Annotated[PerExpert, Default(1.0), "share of each model on the arc"],
    nuslerp_flatten: Annotated[bool, Default(True), "one angle per tensor; false: one per vector within it"],
    nuslerp_row_wise: Annotated[bool, Default(False), "vectors along the first dimension, not the last"],
) -> Elementwise:
    """Interpolate on the sphere between two models, or with a base between their task vectors.

    v = sin((1-t) a)/sin(a) v_1 + sin(t a)/sin(a) v_2,   t = w_2 / (w_1 + w_2),   a = angle between v_1 and v_2

    v_k is theta_k, or with a base tau_k, to which theta_0 is added again. Linear where a is 0 or 180 degrees or a
    vector is zero. Without ``nuslerp_flatten`` every vector along the last dimension (a weight's row), or with
    ``nuslerp_row_wise`` along the first (a column, in spite of the name, which is mergekit's), has an angle of its own.

    Known disagreements: mergekit takes the angle as 90 degrees where a vector is zero, and shrinks it where a norm is
    below 1e-7; weights that sum to zero mean t = 0.5 there, and are an error here.
    """
    t = normalised(tensor, weight)[1]
    over = Over() if nuslerp_flatten else Over("first" if nuslerp_row_wise else "last")
    space = "task_vectors" if tensor.base else "weights"

    def finish(sums: Sums) -> Elementwise:
        assert sums.gram is not None
        aa, ab, bb = (np.ascontiguousarray(sums.gram[i, j]).reshape(-1) for i, j in ((0, 0), (0, 1), (1, 1)))
        factors = np.empty((2, aa.size))
        interpolations(aa, ab, bb, t, factors)
        return Elementwise(space, summed(factors if sums.gram.ndim > 2 else factors[:, 0], over, tensor.shape))

    return Elementwise(space, weighted((1.0 - t, t)), needs="gram", over=over, finish=finish)
