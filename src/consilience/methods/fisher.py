"""Fisher merging: each weight's mean over experts, by how much each expert's likelihood depends on it."""

from collections.abc import Iterable
from typing import Annotated

import numpy as np

from consilience.experts.stack import Stack
from consilience.methods.closed_form import Floats
from consilience.methods.signature import Default, Others, PerExpert, Range, matrix


@matrix(
    source="Matena and Raffel 2022, Merging Models with Fisher-Weighted Averaging, NeurIPS, arXiv:2111.09832",
    copies=5,
    reads="fisher",
)
def fisher(
    stack: Stack,
    informations: Iterable[Floats],
    *,
    lambda_: Annotated[float, Default(1.0), "multiplier of the merged task vector"],
    weight: Annotated[PerExpert, Default(1.0), Range(0), "multiplier of each expert's Fisher information"],
    floor: Annotated[float, Default(1e-6), Range(0), "added to each expert's Fisher information"],
    others: Others,
) -> Floats:
    """Weigh each weight's task vectors by the diagonal of each expert's Fisher information.

    tau = sum_k w_k (F_k + floor) tau_k / sum_k w_k (F_k + floor),  elementwise;   theta = theta_0 + lambda tau

    F_k is in expert k's statistics, of which kind (sampled, empirical, exact) they say. Where nothing weighs, the mean.
    Tensors without statistics are treated as ``others`` says.

    Known disagreements: codes also divide each F_k by its norm over the whole model; here ``weight`` can be 1 over the
    ``norm`` in the statistics.
    """
    del lambda_, others  # the engine's
    vectors = stack.whole().astype(np.float64)
    total, weighed = np.zeros_like(vectors[0]), np.zeros_like(vectors[0])
    for vector, one, multiplier in zip(vectors, informations, weight, strict=True):
        held = multiplier * (one.astype(np.float64).reshape(vector.shape) + floor)
        total += held
        weighed += held * vector
    return np.where(total > 0, weighed / np.where(total > 0, total, 1.0), vectors.mean(0)).reshape(stack.shape)
