"""Iso-C: the sum of the task vectors with a flat spectrum."""

from typing import Annotated, Literal

import numpy as np

from consilience.experts.stack import Stack
from consilience.methods.program import Update
from consilience.methods.rounding import rounding, total
from consilience.methods.signature import Default, Others, matrix
from consilience.methods.svd import leading, nothing, summed


@matrix(source="Marczak et al. 2025, No Task Left Behind, ICML, arXiv:2502.04959", copies=5)
def iso_c(
    stack: Stack,
    *,
    lambda_: Annotated[float, Default(1.0), "multiplier of the merged task vector"],
    flatten: Annotated[
        Literal["rank", "all"],
        Default("rank"),
        "give the mean to the singular values above rounding, or (official codes) to those that are zero, too",
    ],
    others: Others,
) -> Update:
    """Give all singular values of the summed task vectors their mean.

    sum_k tau_k = U S V^T with r singular values;   theta = theta_0 + lambda (1/r) tr(S) U V^T

    Known disagreements: official codes count min(m, n) values and give the mean to zero ones too, whose vectors are
    arbitrary: of adapters, whose sum has low rank, the result then depends on rounding (``flatten: all``). The sum's
    scale does not matter, only its directions: with one expert the result is *not* that expert.
    """
    del lambda_, others  # the engine's
    if flatten == "all":
        u, s, v = np.linalg.svd(stack.whole().sum(0), full_matrices=False)
    else:
        u, s, v = leading(*summed(stack), min(stack.shape), total(rounding(stack)))
    return Update(u * s.mean(), v) if s.size else nothing(stack.shape, s)
