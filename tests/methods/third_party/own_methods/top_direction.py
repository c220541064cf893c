"""A matrix method: a function of one matrix's task vectors."""

from typing import Annotated

import numpy as np

from consilience.experts import Stack
from consilience.methods import Default, Others, Update, matrix


@matrix(source="an example", copies=3)
def top_direction(stack: Stack, *, lambda_: Annotated[float, Default(1.0), "multiplier"], others: Others) -> Update:
    """Keep the leading singular direction of the mean task vector."""
    u, s, v = np.linalg.svd(stack.whole().mean(axis=0), full_matrices=False)
    return Update(u[:, :1] * s[0], v[:1])
