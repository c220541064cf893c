"""WUDI v2 (OptMerge): WUDI on each task vector's leading singular triples."""

from typing import Annotated, Literal

import numpy as np

from consilience.experts.stack import Stack
from consilience.methods.closed_form import Floats, back, inverse_norms, nearest, task_matrices
from consilience.methods.program import Update
from consilience.methods.signature import Default, Others, matrix
from consilience.methods.svd import leading
from consilience.methods.swudi_a import Rest, rest_of


@matrix(source="Wei et al. 2025, OptMerge, ICLR 2026, arXiv:2505.19892", copies=12)
def wudi_v2(
    stack: Stack,
    *,
    lambda_: Annotated[float, Default(1.0), "multiplier of the merged task vector"],
    centre: Annotated[
        Literal["none", "mean"],
        Default("none"),
        "cut the task vectors themselves, or (official code for InternVL) their differences from the mean",
    ],
    rest: Annotated[Rest, Default("mean"), "what stays on the directions that no expert uses"],
    others: Others,
) -> Floats | Update:
    """Minimise the interference with every expert's leading triples on its leading directions, in closed form.

    tau_k ~ U_k S_k V_k^T with floor(r / K) triples, r = min(m, n)
    tau = argmin sum_k || (tau - T_k) V_k S_k ||_F^2 / ||tau_k||_F^2,   T_k = U_k S_k V_k^T
    theta = theta_0 + lambda tau;   of all minimisers the nearest to the mean

    With ``centre: mean``, T_k = mean + the leading triples of tau_k - mean; V_k and S_k stay those of tau_k.

    Known disagreements: published codes take 300 steps towards it, of SGD from the mean (Qwen2-VL) or of Adam from the
    sum (InternVL, with ``centre: mean``): that start is ``rest``. Every expert keeps at least one triple, where K
    exceeds r too.
    """
    del lambda_, others  # the engine's
    vectors, q = task_matrices(stack)
    count = max(1, min(stack.shape) // len(vectors))
    mean = np.mean(vectors, 0) if centre == "mean" else np.zeros_like(vectors[0])
    used: list[Floats] = []
    wanted: list[Floats] = []
    for vector in vectors:
        u, s, v = leading(vector, None, count)
        used.append(s[:, None] * v)
        if centre == "mean":
            u, s, v = leading(vector - mean, None, count)
        wanted.append((u * s) @ v + mean)
    return back(nearest(wanted, used, inverse_norms(vectors, 2), rest=rest_of(vectors, rest)), q)
