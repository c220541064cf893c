"""Model Breadcrumbs followed by TIES' sign election."""

from typing import Annotated

from consilience.methods.mergekit import Int8Mask
from consilience.methods.program import Arithmetic, Elementwise
from consilience.methods.signature import Default, PerExpert, Range, TensorSpec, elementwise
from consilience.methods.ties import agreeing_sum
from consilience.methods.trims import RescaleL1, band, rescaled


@elementwise(
    source="Davari & Belilovsky 2023, arXiv:2312.06795, with the sign election of Yadav et al. 2023, arXiv:2306.01708",
    mergekit={"density": 1.0},
)
def breadcrumbs_ties(
    tensor: TensorSpec,
    *,
    weight: Annotated[PerExpert, Default(0.3), "multiplier of each task vector"],
    density: Annotated[PerExpert, Default(0.14), Range(0, 1), "share of each task vector that is kept"],
    gamma: Annotated[PerExpert, Default(0.01), Range(0, 1), "share of each task vector that is dropped at the top"],
    lambda_: Annotated[float, Default(1.0), "multiplier of the merged task vector"],
    normalize: Annotated[bool, Default(False), "true: mean of the agreeing entries; false: their sum"],
    rescale: RescaleL1,
    int8_mask: Int8Mask,
) -> Elementwise:
    """Leave out each task vector's largest and smallest entries, elect a sign per element, merge those that agree.

    tau'_k = tau_k where the rank of |tau_k| is within the band of ``breadcrumbs``, else 0;   s = sign(sum_k w_k tau'_k)
    theta  = theta_0 + lambda sum_{k: sign(w_k tau'_k) = s} w_k tau'_k

    mergekit's combination of two papers; neither has it. ``normalize`` divides by the sum of the agreeing weights.
    """
    del int8_mask
    merge, keep = Arithmetic(agreeing_sum, weight, (normalize,)), band(tensor.numel, density, gamma)
    return rescaled(Elementwise("task_vectors", merge, keep=keep, scale=lambda_), rescale)
