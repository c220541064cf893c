"""DARE followed by TIES' sign election."""

from typing import Annotated

from consilience.methods.dare_linear import Rescale, dropped
from consilience.methods.mergekit import Int8Mask
from consilience.methods.program import Arithmetic, Elementwise
from consilience.methods.signature import Default, PerExpert, Range, TensorSpec, elementwise
from consilience.methods.ties import agreeing_sum


@elementwise(
    source="Yu et al. 2024, arXiv:2311.03099, with the sign election of Yadav et al. 2023, arXiv:2306.01708",
    mergekit={"rescale": "l1"},
)
def dare_ties(
    tensor: TensorSpec,
    *,
    weight: Annotated[PerExpert, Default(1.0), "multiplier of each task vector"],
    density: Annotated[PerExpert, Default(1.0), Range(0, 1), "probability that an entry is kept (1 - drop rate)"],
    rescale: Annotated[Rescale, Default("exact"), "exact or true: 1/density; l1: mergekit's norm ratio; false: none"],
    lambda_: Annotated[float, Default(1.0), "multiplier of the merged task vector"],
    normalize: Annotated[bool, Default(False), "true: mean of the agreeing entries; false: their sum"],
    int8_mask: Int8Mask,
) -> Elementwise:
    """Drop entries at random and rescale, then elect a sign per element and merge the entries that agree.

    tau'_k = m_k * tau_k / density;   s = sign(sum_k w_k tau'_k);   theta = theta_0 + lambda sum_{agreeing k} w_k tau'_k

    ``normalize`` divides by the sum of the agreeing weights; it is off by default, as in mergekit.
    """
    del tensor, int8_mask
    return dropped(Arithmetic(agreeing_sum, weight, (normalize,)), density, rescale, lambda_)
