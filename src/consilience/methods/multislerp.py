"""Multi-SLERP: the weighted mean direction of several models, at their mean length."""

import math
from typing import Annotated

import numpy as np

from consilience.methods.linear import normalised
from consilience.methods.program import Elementwise, Floats, Over, Sums
from consilience.methods.signature import Default, PerExpert, Range, TensorSpec, elementwise
from consilience.methods.vector_sum import cosines, lengths, summed
from consilience.methods.weighted_sum import weighted


@elementwise(source="C. Goddard 2025, MultiSLERP, goddard.blog", base="optional")
def multislerp(
    tensor: TensorSpec,
    *,
    weight: Annotated[PerExpert, Default(1.0), "weight of each model"],
    normalize_weights: Annotated[bool, Default(True), "divide by the sum of the weights"],
    eps: Annotated[float, Default(1e-8), Range(0), "length of the mean direction from which on it is one"],
) -> Elementwise:
    """Take the weighted mean of the models' directions, or of their task vectors', at the weighted mean of their norms.

    v = sum_k w_k ||v_k|| m / ||m||,   m = sum_k w_k v_k / ||v_k||

    v_k is theta_k, or with a base tau_k, to which theta_0 is added again. mergekit goes from m / ||m|| along the
    tangents' weighted mean: that is zero, for the tangents are taken at the weighted mean itself, and what it adds is
    rounding. Where ||m|| < ``eps`` the result is the weighted mean of the v_k. One model alone is returned as it is.

    Known disagreements: mergekit refuses ||m|| < eps of more than two models, as where all task vectors are zero; it
    adds ``eps`` to the norms too, which moves what is not much longer than that.
    """
    space = "task_vectors" if tensor.base else "weights"
    if len(weight) == 1:
        return Elementwise(space, weighted((1.0,)))
    weights = np.array(normalised(tensor, weight) if normalize_weights else weight)

    def finish(sums: Sums) -> Elementwise:
        mean = math.sqrt(max(0.0, float((weights * (cosines(sums) * weights).sum(1)).sum())))
        return Elementwise(space, summed(multipliers(lengths(sums), mean), Over(), tensor.shape))

    def multipliers(norms: Floats, mean: float) -> Floats:
        if mean < eps or mean == 0:
            return weights
        length = float((weights * norms).sum())
        with np.errstate(over="ignore"):  # a model 1e308 times as long as another: what overflows is refused
            return np.where(norms > 0, weights * (length / mean) / np.where(norms > 0, norms, 1.0), 0.0)

    return Elementwise(space, weighted(tuple(map(float, weights))), needs="gram", finish=finish)
