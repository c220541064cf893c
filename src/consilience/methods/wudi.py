"""WUDI: the merged task vector that least disturbs each expert on the rows of its own task vector."""

from typing import Annotated, Literal

from consilience.experts.stack import Stack
from consilience.methods.closed_form import Floats, back, inverse_norms, nearest, task_matrices
from consilience.methods.program import Update
from consilience.methods.signature import Default, Others, matrix


@matrix(source="Cheng et al. 2025, Whoever Started the Interference Should End It, ICML, arXiv:2503.08099", copies=8)
def wudi(
    stack: Stack,
    *,
    lambda_: Annotated[float, Default(1.0), "multiplier of the merged task vector"],
    divide: Annotated[
        Literal["squared", "norm"],
        Default("squared"),
        "divide an expert's loss by its task vector's squared norm, or (official code for ViT) by its norm",
    ],
    others: Others,
) -> Floats | Update:
    """Minimise the interference with every expert on the rows of its task vector, in closed form.

    tau = argmin sum_k || (tau - tau_k) tau_k^T ||_F^2 / ||tau_k||_F^2
        = (sum_k tau_k tau_k^T tau_k / ||tau_k||^2) (sum_k tau_k^T tau_k / ||tau_k||^2)^+,  theta = theta_0 + lambda tau

    Of all minimisers the one of least norm, where gradient descent from the sum of the task vectors leads, too. Experts
    whose rows are independent (adapters mostly) keep what they had: the minimum is 0.

    Known disagreements: the published codes take 300 steps of Adam, which end above the minimum. The official code for
    ViT merges attention and MLP matrices only and leaves all else at the base; others average it (``others``).
    """
    del lambda_, others  # the engine's
    vectors, q = task_matrices(stack)
    return back(nearest(vectors, vectors, inverse_norms(vectors, 2 if divide == "squared" else 1)), q)
