"""ACTMat: a regression of the experts' outputs whose inputs are the task vectors' own rows."""

from typing import Annotated

from consilience.experts.stack import Stack
from consilience.methods.closed_form import Floats, back, nearest, task_matrices
from consilience.methods.program import Update
from consilience.methods.signature import Default, Others, matrix


@matrix(source="ACTMat 2026, arXiv:2604.01329", copies=8)
def actmat(
    stack: Stack,
    *,
    lambda_: Annotated[float, Default(1.0), "multiplier of the merged task vector"],
    others: Others,
) -> Floats | Update:
    """Merge as RegMean does, with tau_k^T tau_k in place of the activations' covariance.

    tau = (sum_k tau_k C_k) (sum_k C_k)^+,   C_k = tau_k^T tau_k,   theta = theta_0 + lambda tau

    A task vector's rows are sums of inputs that its expert was trained on, so that C_k is their covariance up to scale.
    It is WUDI without its division by norms: both agree where all task vectors are equally long.
    """
    del lambda_, others  # the engine's
    vectors, q = task_matrices(stack)
    return back(nearest(vectors, vectors, [1.0] * len(vectors)), q)
