"""Task Arithmetic: add scaled task vectors to the base."""

from typing import Annotated

from consilience.methods.linear import normalised
from consilience.methods.mergekit import Int8Mask, UnusedDensity, UnusedRescale
from consilience.methods.program import Elementwise
from consilience.methods.signature import Default, PerExpert, TensorSpec, elementwise
from consilience.methods.weighted_sum import weighted


@elementwise(source="Ilharco et al. 2023, Editing models with task arithmetic, arXiv:2212.04089")
def task_arithmetic(
    tensor: TensorSpec,
    *,
    weight: Annotated[PerExpert, Default(1.0), "multiplier of each task vector; negative values negate a task"],
    lambda_: Annotated[float, Default(1.0), "multiplier of the sum"],
    normalize: Annotated[bool, Default(False), "divide by the sum of the weights"],
    density: UnusedDensity,
    rescale: UnusedRescale,
    int8_mask: Int8Mask,
) -> Elementwise:
    """Add the weighted task vectors to the base.

    theta = theta_0 + lambda sum_k w_k tau_k,   tau_k = theta_k - theta_0

    The paper uses one scale for all tasks (lambda, commonly 0.3 for eight vision tasks); mergekit's per-model
    ``weight`` and ``lambda`` both default to 1, as here.
    """
    del density, rescale, int8_mask
    return Elementwise("task_vectors", weighted(normalised(tensor, weight) if normalize else weight), scale=lambda_)
