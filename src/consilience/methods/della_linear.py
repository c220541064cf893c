"""DELLA with a plain sum: drop entries at random, small ones more often, and rescale the rest."""

from typing import Annotated, Any

import numpy as np

from consilience.errors import InputError
from consilience.jit import kernel
from consilience.kernels.random_bits import splitmix64
from consilience.kernels.ranks import row_ranks
from consilience.methods.dare_linear import Rescale
from consilience.methods.linear import normalised
from consilience.methods.mergekit import Int8Mask
from consilience.methods.program import Elementwise, Merge, RowStep, Sums
from consilience.methods.signature import Default, PerExpert, Range, TensorSpec, elementwise
from consilience.methods.trims import l1_ratios
from consilience.methods.weighted_sum import weighted

Density = Annotated[PerExpert, Default(0.5), Range(0, 1), "mean probability that an entry is kept"]
Epsilon = Annotated[
    PerExpert,
    Default(0.15),
    Range(0, 1),
    "how much the probability is lower for the smallest, and higher for the largest",
]
RescaleHelp = "exact or true: 1/probability, entry by entry; l1: mergekit's norm ratio; false: none"


@kernel
def _prune(
    rows: Any, start: int, columns: int, keys: Any, density: Any, epsilon: Any, factors: Any, exact: bool
) -> None:
    """Keep an entry of rank r in its row with probability density - epsilon + 2 epsilon r / (columns - 1)."""
    zero, buckets = rows.dtype.type(0), 1
    while buckets < columns:
        buckets *= 2
    bits, edges = np.empty(columns, np.uint32), np.empty(buckets + 1, np.int32)
    order, ranks = np.empty(columns, np.int32), np.empty(columns, np.int32)
    for k in range(rows.shape[0]):
        if density[k] >= 1:
            continue
        low, slope = density[k], 0.0
        if columns > 1:
            low, slope = density[k] - epsilon[k], 2 * epsilon[k] / (columns - 1)
        factor = rows.dtype.type(factors[k])
        for begin in range(0, rows.shape[1], columns):
            row = rows[k, begin : begin + columns]
            if density[k] <= 0:
                row[:] = zero
                continue
            row_ranks(row, bits, edges, order, ranks)
            for i in range(columns):
                share = low + slope * ranks[i]
                random = np.float64(splitmix64(keys[k], start + begin + i) >> np.uint64(32)) * 2.0**-32
                scale = rows.dtype.type(1.0 / share) if exact else factor
                row[i] = row[i] * scale if random < share else zero


def pruned(
    tensor: TensorSpec, merge: Merge, density: PerExpert, epsilon: PerExpert, rescale: Rescale, scale: float
) -> Elementwise:
    """Return the program that drops by rank before ``merge``.

    Raises:
        InputError: a probability would not lie between 0 and 1.
    """
    for name, share, more in zip(tensor.experts, density, epsilon, strict=True):
        if 0 < share < 1 and not (share - more > 0 and share + more < 1):
            raise InputError(
                f"{name}: density {share:g} and epsilon {more:g}: density - epsilon and density + epsilon must lie "
                f"between 0 and 1; choose an epsilon below {min(share, 1 - share):g}"
            )
    if min(density) >= 1:
        return Elementwise("task_vectors", merge, scale=scale)
    columns = max(1, tensor.numel // tensor.shape[0] if len(tensor.shape) > 1 and tensor.shape[0] else tensor.numel)
    shares, widths = np.array(density), np.array(epsilon)

    def step(factors: tuple[float, ...], exact: bool) -> RowStep:
        return RowStep(_prune, columns, (shares, widths, np.array(factors), exact))

    ones = (1.0,) * len(density)
    if rescale != "l1":
        return Elementwise("task_vectors", merge, row_step=step(ones, bool(rescale)), scale=scale)

    def finish(sums: Sums) -> Elementwise:
        return Elementwise("task_vectors", merge, row_step=step(l1_ratios(sums), exact=False), scale=scale)

    plain = step(ones, exact=False)
    return Elementwise("task_vectors", merge, row_step=plain, scale=scale, needs="l1", finish=finish)


@elementwise(
    source="Deep, Bhardwaj & Poria 2024, DELLA-Merging, arXiv:2406.11617", mergekit={"density": 1.0, "rescale": "l1"}
)
def della_linear(
    tensor: TensorSpec,
    *,
    weight: Annotated[PerExpert, Default(1.0), "multiplier of each task vector"],
    density: Density,
    epsilon: Epsilon,
    rescale: Annotated[Rescale, Default("exact"), RescaleHelp],
    lambda_: Annotated[float, Default(1.0), "multiplier of the sum"],
    normalize: Annotated[bool, Default(False), "divide by the sum of the weights"],
    int8_mask: Int8Mask,
) -> Elementwise:
    """Drop entries of each row at random, the smaller the likelier, rescale the rest, add the weighted sum.

    tau'_k = m_k tau_k / p_k,  m_k ~ Bernoulli(p_k),  p_k = density - epsilon + 2 epsilon r_k / (n - 1)
    theta  = theta_0 + lambda sum_k w_k tau'_k,   r_k = 0 ... n - 1: rank of |tau_k| in its row of n, 0 the smallest

    E[tau'_k] = tau_k. A row is all that makes one output (of a vector: all of it). Known disagreement: mergekit
    restores the tensor's L1 norm instead (``rescale: l1``), which leaves large entries too large.
    """
    del int8_mask
    merge = weighted(normalised(tensor, weight) if normalize else weight)
    return pruned(tensor, merge, density, epsilon, rescale, lambda_)
