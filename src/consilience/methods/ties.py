"""TIES: trim, elect sign, merge."""

from typing import Annotated, Literal

from consilience.methods.mergekit import Int8Mask
from consilience.methods.program import Program, SignedSum, Trim
from consilience.methods.signature import Default, PerExpert, Range, TensorSpec, method


def kept(numel: int, density: float) -> int:
    """Return how many of ``numel`` entries a density keeps: ``floor(density * numel)``, at least one if any."""
    return min(numel, max(int(density * numel), 1 if density > 0 and numel else 0))


@method(source="Yadav et al. 2023, TIES-Merging, arXiv:2306.01708", mergekit={"density": 1.0})
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
    rescale: Annotated[Literal[False], Default(False), "accepted from mergekit recipes; only false is supported"],
    int8_mask: Int8Mask,
) -> Program:
    """Trim each task vector to its largest entries, elect a sign per element, merge the entries that agree.

    tau'_k = tau_k where |tau_k| is among the largest ``density``, else 0
    s      = sign(sum_k w_k tau'_k), 0 counting as +
    theta  = theta_0 + lambda * sum_{k: sign(w_k tau'_k) = s} w_k tau'_k / sum of those w_k

    Known disagreements: the paper ranks over the whole flattened model (``trim: model``) and keeps 20%; mergekit ranks
    per tensor and keeps everything unless told (its default density is 1). The mean is the paper's; the *sum*
    (``normalize: false``, with lambda 0.3) is the default of several vision codes under the same name. An element whose
    weighted sum is exactly zero takes the sign + (as in mergekit); the paper's code gives it the model's majority sign.
    """
    del rescale, int8_mask
    stages = (Trim(tuple(kept(tensor.numel, d) for d in density), density, trim),) if min(density) < 1 else ()
    return Program("task_vectors", SignedSum(weight, normalize), stages, lambda_)
