"""DELLA: drop entries at random, small ones more often, rescale, elect signs, merge."""

from typing import Annotated

from consilience.methods.dare_linear import Rescale
from consilience.methods.della_linear import Density, Epsilon, RescaleHelp, pruned
from consilience.methods.mergekit import Int8Mask
from consilience.methods.program import Arithmetic, Elementwise
from consilience.methods.signature import Default, PerExpert, TensorSpec, elementwise
from consilience.methods.ties import agreeing_sum


@elementwise(
    source="Deep, Bhardwaj & Poria 2024, DELLA-Merging, arXiv:2406.11617", mergekit={"density": 1.0, "rescale": "l1"}
)
def della(
    tensor: TensorSpec,
    *,
    weight: Annotated[PerExpert, Default(1.0), "multiplier of each task vector"],
    density: Density,
    epsilon: Epsilon,
    rescale: Annotated[Rescale, Default("exact"), RescaleHelp],
    lambda_: Annotated[float, Default(1.0), "multiplier of the merged task vector"],
    normalize: Annotated[bool, Default(True), "true: mean of the agreeing entries; false: their sum"],
    int8_mask: Int8Mask,
) -> Elementwise:
    """Drop entries of each row at random, the smaller the likelier, rescale, then merge what agrees with the sum.

    tau'_k = m_k tau_k / p_k,  m_k ~ Bernoulli(p_k),  p_k = density - epsilon + 2 epsilon r_k / (n - 1)
    s      = sign(sum_k w_k tau'_k), 0 counting as +;   r_k = 0 ... n - 1: rank of |tau_k| in its row of n
    theta  = theta_0 + lambda sum_{k: sign(w_k tau'_k) = s} w_k tau'_k / sum of those w_k

    Drop, elect, fuse; see ``della_linear`` for the drop. ``normalize: false`` leaves out the division.
    """
    del int8_mask
    return pruned(tensor, Arithmetic(agreeing_sum, weight, (normalize,)), density, epsilon, rescale, lambda_)
