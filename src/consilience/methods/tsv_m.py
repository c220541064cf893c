"""TSV-M: each expert's leading singular triples, made orthogonal across experts."""

from typing import Annotated, Any

import numpy as np
import numpy.typing as npt

from consilience.experts.stack import Stack
from consilience.methods.program import Update
from consilience.methods.signature import Default, Others, matrix

Triples = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]


def leading(left: npt.NDArray[Any], right: npt.NDArray[Any] | None, count: int) -> Triples:
    """Return at most ``count`` singular triples (u [m, c], s [c], v [c, n]) of ``left`` or ``left @ right``.

    Triples of no more than rounding's size are not among them: their vectors are arbitrary. Factors stay factors: two
    QR decompositions and an SVD of [r, r].
    """
    if right is None:
        u, s, v = np.linalg.svd(left, full_matrices=False)
        size = max(left.shape)
    else:
        (q, r), (p, t) = np.linalg.qr(left), np.linalg.qr(right.T)
        u, s, v = np.linalg.svd(r @ t.T, full_matrices=False)
        u, v, size = q @ u, v @ p.T, max(len(left), right.shape[1])
    rank = int((s > s[0] * size * np.finfo(s.dtype).eps).sum()) if s.size and s[0] > 0 else 0
    kept = min(count, rank)
    return u[:, :kept], s[:kept], v[:kept]


def polar(columns: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the nearest matrix with orthonormal columns: U V^T of an SVD."""
    u, _, v = np.linalg.svd(columns, full_matrices=False)
    return u @ v


def triples_of(stack: Stack, count: int) -> list[Triples]:
    """Return each expert's leading triples; an adapter's from its factors."""
    if stack.low_rank:
        return [leading(factors.left * factors.scale, factors.right, count) for factors in stack.factors()]
    return [leading(vector, None, count) for vector in stack.whole()]


@matrix(source="Gargiulo et al. 2025, Task Singular Vectors, CVPR, arXiv:2412.00081", copies=4)
def tsv_m(
    stack: Stack,
    *,
    lambda_: Annotated[float, Default(1.0), "multiplier of the merged task vector"],
    others: Others,
) -> Update:
    """Keep each task vector's leading singular triples, make them orthogonal to each other, add them up.

    tau_k ~ U_k S_k V_k^T with floor(r / K) triples, r = min(m, n);  U = [U_1 ... U_K], S, V likewise
    theta = theta_0 + lambda P(U) S P(V)^T,   P(A) = A (A^T A)^(-1/2), the nearest orthonormal columns

    Known disagreements: every expert keeps at least one triple, where K exceeds r too (public codes drop all experts'
    then); triples of value 0, which the codes let into P with arbitrary vectors, are dropped. One expert alone is
    returned as it is. Embeddings and heads are matrices like any other; exclude them with ``private`` if need be.
    """
    del lambda_, others  # the engine's
    triples = triples_of(stack, max(1, min(stack.shape) // len(stack.rows)))
    u, s, v = (np.concatenate(parts, axis) for parts, axis in zip(zip(*triples, strict=True), (1, 0, 0), strict=True))
    if not s.size:
        return Update(np.zeros((stack.shape[0], 1), s.dtype), np.zeros((1, stack.shape[1]), s.dtype))
    return Update(polar(u) * s, polar(v.T).T)
