"""SWUDI-A: WUDI on the directions that take part, the sum of the task vectors on the others."""

from typing import Annotated, Literal

import numpy as np

from consilience.experts.stack import Stack
from consilience.methods.closed_form import Floats, back, inverse_norms, nearest, participation, task_matrices
from consilience.methods.program import Update
from consilience.methods.signature import Default, Others, matrix

Rest = Literal["sum", "mean", "zero"]


def rest_of(vectors: list[Floats], rest: Rest) -> Floats:
    """Return what stays on directions that a closed form leaves alone."""
    total = np.sum(vectors, 0)
    return total / {"sum": 1, "mean": len(vectors), "zero": np.inf}[rest]


@matrix(source="Wei et al. 2026, SWUDI, arXiv:2606.07289", copies=9)
def swudi_a(
    stack: Stack,
    *,
    lambda_: Annotated[float, Default(1.0), "multiplier of the merged task vector"],
    rest: Annotated[
        Rest, Default("sum"), "what stays on the directions that do not take part: of the task vectors, or nothing"
    ],
    others: Others,
) -> Floats | Update:
    """Take WUDI's minimiser where the experts are loud, their sum where they are hardly heard.

    C = sum_k tau_k^T tau_k / ||tau_k||^2 = V L V^T,   r = ceil((sum_i L_i^(1/2))^2 / sum_i L_i),  P = V_r V_r^T
    tau = F (I - P) + (sum_k tau_k tau_k^T tau_k / ||tau_k||^2) V_r L_r^(-1) V_r^T,   F = sum_k tau_k
    theta = theta_0 + lambda tau

    Small eigenvalues of C are noise that WUDI's minimiser divides by. With all of them it is WUDI.

    Known disagreements: the code for vision-language models sets lambda to 0.2 for five experts beside ``rest: sum``.
    It says that ``rest: mean`` is the same with K times that lambda, which holds for ``F (I - P)`` alone.
    """
    del lambda_, others  # the engine's
    vectors, q = task_matrices(stack)
    weights = inverse_norms(vectors, 2)
    return back(nearest(vectors, vectors, weights, rest=rest_of(vectors, rest), keep=participation), q)
