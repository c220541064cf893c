"""RegMean: the matrix whose outputs are nearest to every expert's own, on that expert's inputs."""

from collections.abc import Callable, Iterable
from typing import Annotated

import numpy as np

from consilience.experts.stack import Stack
from consilience.methods.closed_form import Floats, divided
from consilience.methods.program import Update
from consilience.methods.signature import Default, Others, Range, matrix


@matrix(
    source="Jin et al. 2023, Dataless Knowledge Fusion by Merging Weights, ICLR, arXiv:2212.09849",
    copies=6,
    reads="gram",
)
def regmean(
    stack: Stack,
    grams: Iterable[Floats],
    *,
    lambda_: Annotated[float, Default(1.0), "multiplier of the merged task vector"],
    off_diagonal: Annotated[float, Default(0.9), Range(0, 1), "multiplier of the Gram matrices' off-diagonal entries"],
    ridge: Annotated[float, Default(1e-6), Range(0), "pull to the mean, as a part of the Gram matrices' mean diagonal"],
    others: Others,
) -> Floats | Update:
    """Merge linear layers by least squares on what each expert's layer was given.

    tau = (sum_k tau_k G'_k + c mean_k tau_k) (sum_k G'_k + c I)^(-1),   c = ridge tr(sum_k G'_k) / n
    theta = theta_0 + lambda tau

    G_k = mean x x^T is in expert k's statistics, G'_k is G_k with its off-diagonal entries times ``off_diagonal``. Of
    weights instead of task vectors it is the same. Layers without statistics are treated as tensors that are no
    matrices are. Adapters stay factored: the result lies in the columns of theirs.

    Known disagreements: codes add a ridge to the sum alone, which draws the result to 0, or none; towards the mean one
    expert alone stays itself. Codes do not say what they do with layers that share an input; here they share a matrix.
    """
    del lambda_, others  # the engine's
    return nearest_outputs(stack, grams, off_diagonal, ridge)


def nearest_outputs(
    stack: Stack,
    grams: Iterable[Floats],
    off_diagonal: float,
    ridge: float,
    keep: Callable[[Floats], int] | None = None,
) -> Floats | Update:
    """Return the task vector whose outputs are nearest to every expert's own, see ``regmean``.

    Args:
        stack: of one matrix [m, n].
        grams: every expert's G_k [n, n].
        off_diagonal: multiplier of their off-diagonal entries.
        ridge: pull to the mean.
        keep: how many eigenvalues of the sum are inverted, see ``closed_form.nearest``; by default all above rounding.
    """
    size = stack.shape[1]
    low = {one.row: one for one in stack.factors()} if stack.low_rank else {}
    vectors = [] if stack.low_rank else list(stack.whole().astype(np.float64))
    total, pulled = np.zeros((size, size)), list[Floats]()
    for k, stored in enumerate(grams):
        gram = stored.astype(np.float64)
        gram *= off_diagonal + (1 - off_diagonal) * np.eye(size)
        total += gram
        if not stack.low_rank:
            pulled.append(vectors[k] @ gram)
        elif k in low:
            pulled.append(low[k].right.astype(np.float64) @ gram)
    lift = ridge * float(np.trace(total)) / size
    total += lift * np.eye(size)
    share = lift / len(stack.rows)
    if not stack.low_rank:
        return divided(np.sum(pulled, 0) + share * np.sum(vectors, 0), total, keep)
    rights = [rows + share * one.right for rows, one in zip(pulled, low.values(), strict=True)]
    lefts = [one.left.astype(np.float64) * one.scale for one in low.values()]
    return Update(np.concatenate(lefts, 1), divided(np.concatenate(rights), total, keep))
