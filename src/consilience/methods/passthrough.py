"""Passthrough: one model as it is, or times a number."""

from typing import Annotated

from consilience.methods.program import Elementwise
from consilience.methods.signature import Default, PerExpert, TensorSpec, elementwise
from consilience.methods.weighted_sum import weighted


@elementwise(source="mergekit's passthrough", base="unused", experts=(1, 1))
def passthrough(
    tensor: TensorSpec,
    *,
    scale: Annotated[PerExpert, Default(1.0), "multiplier of the weights"],
) -> Elementwise:
    """Take one model's tensors as they are, each times its ``scale``.

    theta = s theta_1

    Where s is 1 and the dtype stays, bytes are copied. A ``base_model`` gives config, tokenizer and tensor order, and
    what an adapter stands on.
    """
    del tensor
    return Elementwise("weights", weighted(scale))
