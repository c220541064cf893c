"""DARE with a plain sum: drop entries at random and rescale the rest."""

from typing import Annotated, Any, Literal

import numpy as np

from consilience.jit import kernel
from consilience.kernels.random_bits import splitmix64
from consilience.methods.linear import normalised
from consilience.methods.mergekit import Int8Mask
from consilience.methods.program import Elementwise, Merge, Step, Sums
from consilience.methods.signature import Default, PerExpert, Range, TensorSpec, elementwise
from consilience.methods.trims import l1_ratios
from consilience.methods.weighted_sum import weighted

Rescale = Literal["exact", "l1", True, False]


@kernel
def _drop(rows: Any, start: int, keys: Any, limits: Any, scales: Any) -> None:
    """Keep entry i of row k where its upper 32 random bits are below ``limits[k]`` (density * 2^32), times a scale."""
    zero = rows.dtype.type(0)
    for k in range(rows.shape[0]):
        row, key, limit, scale = rows[k], keys[k], limits[k], rows.dtype.type(scales[k])
        for i in range(row.size):
            keep = (splitmix64(key, start + i) >> np.uint64(32)) < limit
            row[i] = row[i] * scale if keep else zero


def drop(density: PerExpert, scale: tuple[float, ...]) -> Step:
    """Return the step that keeps each entry of row k with probability ``density[k]``, times ``scale[k]``.

    The random numbers are counter-based: SplitMix64 keyed by seed, tensor and expert, indexed by element.
    """
    limits = np.array([round(share * 2**32) for share in density], np.uint64)
    return Step(_drop, (limits, np.array(scale, np.float64)))


def dropped(merge: Merge, density: PerExpert, rescale: Rescale, scale: float) -> Elementwise:
    """Return the program that drops at random before ``merge``.

    ``rescale``: "exact" (or true) multiplies the kept entries by 1/density, so that the expectation is the task vector;
    "l1" by the ratio of the row's L1 norms before and after the drop, as mergekit does; false not at all.
    """
    if rescale == "l1":

        def finish(sums: Sums) -> Elementwise:
            return Elementwise("task_vectors", merge, step=drop(density, l1_ratios(sums)), scale=scale)

        plain = drop(density, (1.0,) * len(density))
        return Elementwise("task_vectors", merge, step=plain, scale=scale, needs="l1", finish=finish)
    factor = tuple(1.0 / d if rescale and d > 0 else 1.0 for d in density)
    step = drop(density, factor) if min(density) < 1 else None
    return Elementwise("task_vectors", merge, step=step, scale=scale)


@elementwise(source="Yu et al. 2024, Language Models are Super Mario, arXiv:2311.03099", mergekit={"rescale": "l1"})
def dare_linear(
    tensor: TensorSpec,
    *,
    weight: Annotated[PerExpert, Default(1.0), "multiplier of each task vector"],
    density: Annotated[PerExpert, Default(1.0), Range(0, 1), "probability that an entry is kept (1 - drop rate)"],
    rescale: Annotated[Rescale, Default("exact"), "exact or true: 1/density; l1: mergekit's norm ratio; false: none"],
    lambda_: Annotated[float, Default(1.0), "multiplier of the sum"],
    normalize: Annotated[bool, Default(False), "divide by the sum of the weights"],
    int8_mask: Int8Mask,
) -> Elementwise:
    """Drop entries of each task vector at random, rescale the rest, add the weighted sum to the base.

    tau'_k = m_k * tau_k / density,  m_k ~ Bernoulli(density);   theta = theta_0 + lambda sum_k w_k tau'_k

    E[tau'_k] = tau_k and E||tau'_k||^2 = ||tau_k||^2 / density. Known disagreement: mergekit rescales by the ratio of
    L1 norms instead of 1/density (``rescale: l1``), which is unbiased only approximately.
    """
    del int8_mask
    merge = weighted(normalised(tensor, weight) if normalize else weight)
    return dropped(merge, density, rescale, lambda_)
