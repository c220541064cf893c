"""LOT: the task vector that moves every expert's features least, by least squares of least norm."""

from collections.abc import Iterable
from typing import Annotated

import numpy as np

from consilience.experts.stack import Stack
from consilience.methods.closed_form import Floats
from consilience.methods.program import Update
from consilience.methods.regmean import nearest_outputs
from consilience.methods.signature import Default, Others, matrix


def _above_rounding(values: Floats) -> int:
    """Return how many eigenvalues (ascending) of a sum of Gram matrices are more than their rounding in float32."""
    return int((values > values[-1] * len(values) * np.finfo(np.float32).eps).sum())


def _scales(stack: Stack, squares: Iterable[Floats]) -> Floats:
    """Return the mean of the task vectors of a norm's scale, weighed by each entry's mean square."""
    vectors = stack.whole().astype(np.float64).reshape(len(stack.rows), -1)
    weights = np.stack([one.astype(np.float64) for one in squares])
    total = weights.sum(0)
    found = (weights * vectors).sum(0) / np.where(total > 0, total, 1.0)
    return np.where(total > 0, found, vectors.mean(0)).reshape(stack.shape)


@matrix(
    source="LOT Merging 2025, NeurIPS, arXiv:2505.23859",
    copies=6,
    reads="gram",
    scales=True,
)
def lot(
    stack: Stack,
    grams: Iterable[Floats],
    *,
    lambda_: Annotated[float, Default(1.0), "multiplier of the merged task vector"],
    others: Others,
) -> Floats | Update:
    """Merge linear layers and norms by the least drift of features, and of these solutions by the shortest.

    linear layers   tau = (sum_k tau_k G_k) (sum_k G_k)^+,        G_k = mean x x^T of what expert k's layer is given
    norms' scales   tau_i = sum_k a_ki tau_ki / sum_k a_ki,       a_ki = mean of the normalised x_i^2
    theta = theta_0 + lambda tau

    Both minimise sum_k mean || x o (tau - tau_k) ||^2 over expert k's tokens, o being the layer's own product. Where no
    row has a direction, the base stays. Layers without statistics and biases are treated as ``others`` says.

    Known disagreements: no code is public; the formulas are the paper's as others restate them. G_k is a mean, so that
    experts count alike whatever their number of tokens; eigenvalues below float32's rounding, which statistics are in,
    count as zero.
    """
    del lambda_, others  # the engine's
    if len(stack.shape) == 1:
        return _scales(stack, grams)
    return nearest_outputs(stack, grams, 1.0, 0.0, _above_rounding)
