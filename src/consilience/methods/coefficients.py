"""Apply a coefficients file that was learned before."""

from typing import Annotated

from consilience.methods.program import Elementwise
from consilience.methods.signature import Default, PerExpert, TensorSpec, elementwise
from consilience.methods.weighted_sum import weighted


@elementwise(source="Consilience")
def coefficients(
    tensor: TensorSpec,
    *,
    weight: Annotated[PerExpert, Default(1.0), "multiplier of running statistics (BatchNorm) in their average"],
) -> Elementwise:
    """Multiply each task vector by the coefficients of a file.

    theta[chunk] = theta_0[chunk] + sum_k alpha[k, chunk] tau_k[chunk]

    The file is the recipe's ``coefficients:`` (``--coefficients`` on the command line), as a learned method
    writes it to OUT/consilience. Tensors that have no coefficients there keep the base's value. Apply it to the same
    experts by name, in any form they come in: full weights, adapters, shards.
    """
    return Elementwise("task_vectors", weighted(weight))
