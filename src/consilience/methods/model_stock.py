"""Model Stock: move from the base towards the experts' mean, the farther the better their task vectors agree."""

from itertools import combinations
from typing import Annotated, Literal

import numpy as np

from consilience.methods.program import Elementwise, Over, Sums
from consilience.methods.signature import Default, TensorSpec, elementwise
from consilience.methods.vector_sum import cosines, summed
from consilience.methods.weighted_sum import weighted

#: Where 1 + (K - 1) cos is not above this, the task vectors cancel and the ratio is taken as 0.
_SINGULAR = 1e-6


@elementwise(source="Jang et al. 2024, Model Stock, ECCV, arXiv:2403.19522", experts=(2, None))
def model_stock(
    tensor: TensorSpec,
    *,
    filter_wise: Annotated[bool, Default(False), "a ratio for every output unit, not for the tensor"],
    ratio: Annotated[
        Literal["signed", "clamped"], Default("signed"), "clamped: 0 where task vectors disagree, not below it"
    ],
) -> Elementwise:
    """Interpolate between the base and the mean of the experts by how well their task vectors agree.

    theta = theta_0 + t mean_k tau_k,   t = K c / (1 + (K - 1) c),   c = mean_{i<j} cos(tau_i, tau_j)

    With ``filter_wise`` every row of a weight as a matrix of its first dimension has its own t. Task vectors of zeros
    count as orthogonal. For c < 0 the ratio is negative: that steps away from the experts, and ``clamped`` does not.

    Known disagreements: mergekit divides by at least 1e-6, so that the cosine of task vectors with norms below 1e-3
    comes out too small, up to returning the base; its filters of convolutions are along the last dimension.
    """
    count = len(tensor.experts)
    over = Over("rows" if filter_wise else "tensor")

    def finish(sums: Sums) -> Elementwise:
        found = cosines(sums)
        pairs = list(combinations(range(count), 2))
        cosine = np.zeros(found.shape[2:])
        for i, j in pairs:
            cosine = cosine + found[i, j] / len(pairs)
        denominator = 1.0 + (count - 1) * cosine
        t = np.where(denominator <= _SINGULAR, 0.0, count * cosine / np.maximum(denominator, _SINGULAR))
        t = np.maximum(t, 0.0) if ratio == "clamped" else t
        factors = np.broadcast_to(t / count, (count, *t.shape))
        return Elementwise("task_vectors", summed(factors, over, tensor.shape))

    return Elementwise("task_vectors", weighted((1.0 / count,) * count), needs="gram", over=over, finish=finish)
