"""Core Space: another method on adapters' small cores, in bases of all experts' columns and rows."""

from typing import Annotated

import numpy as np

from consilience.experts.stack import Stack
from consilience.methods.closed_form import Floats, spectrum
from consilience.methods.inner import Inner, merged
from consilience.methods.program import Update
from consilience.methods.rounding import unrounded
from consilience.methods.signature import Default, Others, Range, matrix
from consilience.methods.svd import nothing


def cores(stack: Stack) -> tuple[list[Floats], Floats, Floats]:
    """Return (U^T tau_k V, U, V^T): left vectors of [B_1 ... B_K], right ones of [A_1; ...; A_K].

    Full task vectors are their own B and A.
    """
    if stack.low_rank:
        factors = stack.factors()
        u = _left(np.concatenate([one.left for one in factors], 1).astype(np.float64))
        v = _left(np.concatenate([one.right for one in factors]).T.astype(np.float64))
        found = [np.zeros((u.shape[1], v.shape[1])) for _ in stack.rows]
        for one in factors:
            found[one.row] = one.scale * (u.T @ one.left) @ (one.right @ v)
        return found, u, v.T
    whole = unrounded(stack)
    u, v = _left(np.concatenate(whole, 1)), _left(np.concatenate(whole).T)
    return [u.T @ one @ v for one in whole], u, v.T


def _left(columns: Floats) -> Floats:
    """Return the left singular vectors of the singular values above rounding."""
    if columns.shape[1] > len(columns):  # full task vectors side by side: of [m, m]
        return spectrum(columns @ columns.T)[1][:, ::-1]
    u, s, _ = np.linalg.svd(columns, full_matrices=False)
    return u[:, s > s[0] * max(columns.shape) * np.finfo(np.float64).eps] if s.size and s[0] > 0 else u[:, :0]


@matrix(source="Panariello et al. 2025, Core Space, NeurIPS, arXiv:2509.17786", copies=10)
def core_space(
    stack: Stack,
    *,
    lambda_: Annotated[float, Default(1.0), "multiplier of the merged task vector"],
    inner: Annotated[Inner, Default("iso_c"), "the method that merges the cores"],
    density: Annotated[float, Default(0.2), Range(0, 1), "share of each core that survives a trim"],
    others: Others,
) -> Update:
    """Merge adapters where they live: cores of [sum of ranks, sum of ranks], of any ranks.

    tau_k = s_k B_k A_k;   U: left singular vectors of [B_1 ... B_K], V: right ones of [A_1; ...; A_K]
    theta = theta_0 + lambda U M(U^T tau_1 V, ..., U^T tau_K V) V^T

    M is ``inner``. Nothing is lost on the way: methods that are linear are the same with and without, as are those of
    the spectrum above rounding. Trims are other methods there than on the weights.

    Known disagreements: with a trim the result depends on how a training shared its scale between B and A, since U and
    V are those of the factors as they are stored (as published).
    """
    del lambda_, others  # the engine's
    found, u, v = cores(stack)
    if not u.shape[1]:
        return nothing(stack.shape, found[0])
    return Update(u @ merged(found, stack.row_names, inner, {"density": density}), v)
