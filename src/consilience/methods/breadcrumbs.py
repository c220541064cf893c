"""Model Breadcrumbs: leave out the largest and the smallest entries, add the rest."""

from typing import Annotated

from consilience.methods.mergekit import Int8Mask
from consilience.methods.program import Elementwise
from consilience.methods.signature import Default, PerExpert, Range, TensorSpec, elementwise
from consilience.methods.trims import RescaleL1, band, rescaled
from consilience.methods.weighted_sum import weighted


@elementwise(source="Davari & Belilovsky 2023, Model Breadcrumbs, arXiv:2312.06795", mergekit={"density": 1.0})
def breadcrumbs(
    tensor: TensorSpec,
    *,
    weight: Annotated[PerExpert, Default(0.3), "multiplier of each task vector"],
    density: Annotated[PerExpert, Default(0.14), Range(0, 1), "share of each task vector that is kept"],
    gamma: Annotated[PerExpert, Default(0.01), Range(0, 1), "share of each task vector that is dropped at the top"],
    lambda_: Annotated[float, Default(1.0), "multiplier of the sum"],
    rescale: RescaleL1,
    int8_mask: Int8Mask,
) -> Elementwise:
    """Drop the ``gamma`` largest entries of each task vector, keep the ``density`` largest of the rest, add the sum.

    tau'_k = tau_k where the rank of |tau_k| in its tensor (0: largest) is in [floor(gamma n), floor(gamma n) +
    floor(density n)), else 0;   theta = theta_0 + lambda sum_k w_k tau'_k

    The paper masks both tails of every layer (here: of every tensor), keeping 14 % below the top 1 %, and scales by
    0.3. Where fewer entries are left than the density asks for, fewer are dropped at the top, as in mergekit.
    """
    del int8_mask
    keep = band(tensor.numel, density, gamma)
    return rescaled(Elementwise("task_vectors", weighted(weight), keep=keep, scale=lambda_), rescale)
