"""Weighted average of weights."""

from typing import Annotated

from consilience.errors import InputError
from consilience.methods.program import Elementwise
from consilience.methods.signature import Default, PerExpert, TensorSpec, elementwise
from consilience.methods.weighted_sum import weighted


def normalised(tensor: TensorSpec, weight: PerExpert) -> PerExpert:
    """Return ``w_k / sum_j w_j``.

    Raises:
        InputError: the weights sum to zero (mergekit then writes Inf and NaN without a word).
    """
    total = sum(weight)
    if abs(total) < 1e-8:
        pairs = ", ".join(f"{name}={w:g}" for name, w in zip(tensor.experts, weight, strict=True))
        raise InputError(
            f"tensor {tensor.name!r}: weights {pairs} sum to zero and cannot be normalised; change them or set "
            "normalize: false"
        )
    return tuple(w / total for w in weight)


@elementwise(source="Wortsman et al. 2022, Model soups, arXiv:2203.05482", base="unused")
def linear(
    tensor: TensorSpec,
    *,
    weight: Annotated[PerExpert, Default(1.0), "weight of each model"],
    normalize: Annotated[bool, Default(True), "divide by the sum of the weights"],
) -> Elementwise:
    """Average the models' weights.

    theta = sum_k w_k theta_k / sum_k w_k   (no division when ``normalize`` is false)

    A ``base_model`` is not averaged in; name it among the models if it should be. Equal weights give the uniform soup.
    """
    return Elementwise("weights", weighted(normalised(tensor, weight) if normalize else weight))
