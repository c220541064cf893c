"""KnOTS: another method on the task vectors' coordinates along the left singular vectors of all of them together."""

from typing import Annotated

import numpy as np

from consilience.experts.stack import Stack
from consilience.methods.closed_form import Floats, spectrum
from consilience.methods.inner import Inner, merged
from consilience.methods.program import Update
from consilience.methods.rounding import unrounded
from consilience.methods.signature import Default, Others, Range, matrix
from consilience.methods.svd import nothing


def coordinates(stack: Stack) -> tuple[list[Floats], Floats]:
    """Return (U^T tau_k [r, n] of every expert, U [m, r]) for [tau_1 ... tau_K] = U S [V_1 ... V_K]^T.

    U are eigenvectors of sum_k tau_k tau_k^T, those of adapters in a basis of their columns.
    """
    if stack.low_rank:
        factors = stack.factors()
        p, across = np.linalg.qr(np.concatenate([one.left * one.scale for one in factors], 1).astype(np.float64))
        found = [np.zeros((p.shape[1], stack.shape[1])) for _ in stack.rows]
        at = 0
        for one in factors:
            stop = at + len(one.right)
            found[one.row] = across[:, at:stop] @ one.right.astype(np.float64)
            at = stop
    else:
        found, p = unrounded(stack), None
    kept = spectrum(np.sum([one @ one.T for one in found], 0))[1][:, ::-1]
    return [kept.T @ one for one in found], kept if p is None else p @ kept


@matrix(source="Stoica et al. 2025, Model Merging with SVD to Tie the KnOTS, ICLR, arXiv:2410.19735", copies=9)
def knots(
    stack: Stack,
    *,
    lambda_: Annotated[float, Default(1.0), "multiplier of the merged task vector"],
    inner: Annotated[Inner, Default("ties"), "the method that merges the coordinates"],
    density: Annotated[float, Default(0.2), Range(0, 1), "share of each expert's coordinates that survive a trim"],
    others: Others,
) -> Update:
    """Merge in the basis that the task vectors have in common.

    [tau_1 ... tau_K] = U S [V_1 ... V_K]^T;   theta = theta_0 + lambda U M(S V_1^T, ..., S V_K^T)

    M is ``inner``, on matrices [r, n] whose rows stand for the same direction in every expert. Methods that are linear
    are the same with and without; of those with a trim, ``density`` is the inner method's.

    Known disagreements: the code keeps singular values above 1e-5, in the weights' unit; here those above rounding. S
    goes into V before M, as in the code; a port that scales afterwards is another method.
    """
    del lambda_, others  # the engine's
    found, basis = coordinates(stack)
    if not basis.shape[1]:
        return nothing(stack.shape, found[0])
    return Update(basis, merged(found, stack.row_names, inner, {"density": density}))
