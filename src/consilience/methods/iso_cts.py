"""Iso-CTS: a flat spectrum on the directions that task vectors share and on those that each has of its own."""

from typing import Annotated, Any

import numpy as np
import numpy.typing as npt

from consilience.experts.stack import Stack
from consilience.methods.program import Update
from consilience.methods.rounding import rounding, total
from consilience.methods.signature import Default, Others, Range, matrix
from consilience.methods.svd import leading, nothing, polar, summed

Matrix = npt.NDArray[Any]


def _cores(stack: Stack) -> tuple[list[Matrix], Matrix | None, Matrix | None]:
    """Return the task vectors as they are, or adapters' in bases P, Q of what they reach: tau_k = P core_k Q.

    Directions outside have singular value 0 in every task vector, so that the decompositions are those of the whole.
    """
    if not stack.low_rank:
        return list(stack.whole()), None, None
    left, right = summed(stack)
    assert right is not None
    (p, across), (q, along) = np.linalg.qr(left), np.linalg.qr(right.T)
    cores: list[Matrix] = []
    at = 0
    for one in stack.factors():
        part = slice(at, at + one.left.shape[1])
        cores.append(across[:, part] @ along[:, part].T)
        at = part.stop
    return cores, p, q.T


@matrix(source="Marczak et al. 2025, No Task Left Behind, ICML, arXiv:2502.04959", copies=5)
def iso_cts(
    stack: Stack,
    *,
    lambda_: Annotated[float, Default(1.0), "multiplier of the merged task vector"],
    common: Annotated[float, Default(0.8), Range(0, 1), "share of the directions that are those of the sum"],
    others: Others,
) -> Update:
    """Join the sum's leading directions with each task vector's own, make them orthogonal, flatten the spectrum.

    sum_k tau_k = U S V^T with r singular values;   n = round((r - floor(common r)) / K),  c = r - n K
    tau_k - U_c U_c^T tau_k ~ U_k S_k V_k^T with n triples
    theta = theta_0 + lambda s P([U_1 ... U_K U_c]) P([V_1 ... V_K V_c])^T,   s the mean of all these singular values

    P(A) = A (A^T A)^(-1/2). Known disagreements: r is the rank of the sum, where codes take min(m, n), so that adapters
    have no directions of value 0, which are arbitrary; for full matrices both are the same. Where K is large for r, n
    is 0 and the result Iso-C's.
    """
    del lambda_, others  # the engine's
    (cores, p, q), floors = _cores(stack), rounding(stack)
    u, s, v = leading(np.sum(cores, 0), None, min(cores[0].shape), total(floors))
    if not s.size:
        return nothing(stack.shape, s)
    own = round((len(s) - int(common * len(s))) / len(stack.rows))
    own = min(own, len(s) // len(stack.rows))
    shared = len(s) - own * len(stack.rows)
    lefts, values, rights = [u[:, :shared]], [s[:shared]], [v[:shared]]
    for core, floor in zip(cores, floors, strict=True) if own else ():
        rest = core - u[:, :shared] @ (u[:, :shared].T @ core)
        for held, part in zip((lefts, values, rights), leading(rest, None, own, floor), strict=True):
            held.append(part)
    spread = np.concatenate(values)
    left, right = polar(np.concatenate(lefts, 1)) * spread.mean(), polar(np.concatenate(rights).T).T
    return Update(left if p is None else p @ left, right if q is None else right @ q)
