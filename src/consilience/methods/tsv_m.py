"""TSV-M: each expert's leading singular triples, made orthogonal across experts."""

from typing import Annotated

import numpy as np

from consilience.experts.stack import Stack
from consilience.methods.program import Update
from consilience.methods.rounding import rounding
from consilience.methods.signature import Default, Others, matrix
from consilience.methods.svd import Triples, leading, nothing, orthogonal


def triples_of(stack: Stack, count: int) -> list[Triples]:
    """Return each expert's leading triples; an adapter's from its factors."""
    if stack.low_rank:
        return [leading(factors.left * factors.scale, factors.right, count) for factors in stack.factors()]
    return [leading(one, None, count, floor) for one, floor in zip(stack.whole(), rounding(stack), strict=True)]


@matrix(source="Gargiulo et al. 2025, Task Singular Vectors, CVPR, arXiv:2412.00081", copies=5)
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
    then); triples of value 0 or of a float32 file's rounding, which the codes let into P with arbitrary vectors, are
    dropped, and so is what P would add where experts share directions (adapters with one A). One expert alone is
    returned as it is. Embeddings and heads are matrices like any other; exclude them with ``private`` if need be.
    """
    del lambda_, others  # the engine's
    triples = triples_of(stack, max(1, min(stack.shape) // len(stack.rows)))
    u, s, v = (np.concatenate(parts, axis) for parts, axis in zip(zip(*triples, strict=True), (1, 0, 0), strict=True))
    if not s.size:
        return nothing(stack.shape, s)
    return orthogonal(u, s, v)
