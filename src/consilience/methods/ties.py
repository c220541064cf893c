"""TIES: trim, elect sign, merge."""

from typing import Annotated, Any, Literal

import numpy as np

from consilience.errors import InputError
from consilience.jit import kernel
from consilience.methods.mergekit import Int8Mask
from consilience.methods.program import Arithmetic, Elementwise, Ranks
from consilience.methods.signature import Default, PerExpert, Range, TensorSpec, elementwise
from consilience.methods.trims import RescaleL1, rescaled


@kernel
def agreeing_sum(rows: Any, base: Any, start: int, weights: Any, out: Any, mean: bool) -> None:
    """Per element: the rows whose weighted sign is that of the weighted sum (0 counts as +), summed.

    ``mean`` divides by the sum of their weights; a divisor below 1e-8, what rounding leaves of weights that cancel,
    counts as 1. The election sums in float64, so that task vectors that cancel are seen to cancel; a float32 sum would
    leave a residue whose sign is noise.
    """
    zero = rows.dtype.type(0)
    one = rows.dtype.type(1)
    for i in range(out.size):
        total = 0.0
        for k in range(len(weights)):
            total += weights[k] * np.float64(rows[k, i])
        positive = total >= 0.0
        agreeing = zero
        divisor = zero
        for k in range(len(weights)):
            x = rows.dtype.type(weights[k]) * rows[k, i]
            agrees = x > zero if positive else x < zero
            agreeing += x if agrees else zero
            divisor += rows.dtype.type(weights[k]) if agrees else zero
        divisor = divisor if mean and abs(divisor) >= 1e-8 else one
        out[i] = agreeing / divisor


@kernel
def elect(rows: Any, start: int, keys: Any) -> None:
    """Zero the entries of every row whose sign is not that of the sum of the rows (0 counts as +), in float64."""
    zero = rows.dtype.type(0)
    for i in range(rows.shape[1]):
        total = 0.0
        for k in range(rows.shape[0]):
            total += np.float64(rows[k, i])
        for k in range(rows.shape[0]):
            agrees = rows[k, i] > zero if total >= 0.0 else rows[k, i] < zero
            if not agrees:
                rows[k, i] = zero


def kept(numel: int, density: float) -> int:
    """Return how many of ``numel`` entries a density keeps: ``floor(density * numel)``, at least one if any."""
    return min(numel, max(int(density * numel), 1 if density > 0 and numel else 0))


@elementwise(source="Yadav et al. 2023, TIES-Merging, arXiv:2306.01708", mergekit={"density": 1.0})
def ties(
    tensor: TensorSpec,
    *,
    weight: Annotated[PerExpert, Default(1.0), "multiplier of each task vector"],
    density: Annotated[PerExpert, Default(0.2), Range(0, 1), "share of each task vector that survives the trim"],
    lambda_: Annotated[float, Default(1.0), "multiplier of the merged task vector"],
    normalize: Annotated[bool, Default(True), "true: mean of the agreeing entries; false: their sum"],
    trim: Annotated[
        Literal["tensor", "model"], Default("tensor"), "rank magnitudes within each tensor or over the model"
    ],
    rescale: RescaleL1,
    int8_mask: Int8Mask,
) -> Elementwise:
    """Trim each task vector to its largest entries, elect a sign per element, merge the entries that agree.

    tau'_k = tau_k where |tau_k| is among the largest ``density``, else 0
    s      = sign(sum_k w_k tau'_k), 0 counting as +
    theta  = theta_0 + lambda * sum_{k: sign(w_k tau'_k) = s} w_k tau'_k / sum of those w_k

    Known disagreements: the paper ranks over the whole flattened model (``trim: model``) and keeps 20%; mergekit ranks
    per tensor and keeps everything unless told (its default density is 1). The mean is the paper's; the *sum*
    (``normalize: false``, with lambda 0.3) is the default of several vision codes under the same name. An element whose
    weighted sum is exactly zero takes the sign + (as in mergekit); the paper's code gives it the model's majority sign.
    """
    del int8_mask
    if rescale and trim == "model":
        raise InputError(
            "rescale: the norms to restore are of tensors, and trim: model trims none by itself; use false"
        )
    ranks = Ranks(tuple(kept(tensor.numel, d) for d in density), density, scope=trim) if min(density) < 1 else None
    merge = Arithmetic(agreeing_sum, weight, (normalize,))
    return rescaled(Elementwise("task_vectors", merge, keep=ranks, scale=lambda_), rescale)
