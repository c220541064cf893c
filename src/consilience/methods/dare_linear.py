"""DARE with a plain sum: drop entries at random and rescale the rest."""

from typing import Annotated, Literal

from consilience.methods.linear import normalised
from consilience.methods.mergekit import Int8Mask
from consilience.methods.program import Combine, Drop, Program, Sums, WeightedSum
from consilience.methods.signature import Default, PerExpert, Range, TensorSpec, method

Rescale = Literal["exact", "l1", True, False]


def dropped(combine: Combine, density: PerExpert, rescale: "Rescale", scale: float) -> Program:
    """Return the program that drops at random before ``combine``.

    ``rescale``: "exact" (or true) multiplies the kept entries by 1/density, so that the expectation is the task vector;
    "l1" by the ratio of the row's L1 norms before and after the drop, as mergekit does; false not at all.
    """
    if rescale == "l1":

        def finish(sums: Sums) -> Program:
            assert sums.l1 is not None
            assert sums.l1_staged is not None
            ratio = tuple(
                float(before / after) if before >= 1e-7 and after >= 1e-7 else 1.0
                for before, after in zip(sums.l1, sums.l1_staged, strict=True)
            )
            return Program("task_vectors", combine, (Drop(density, ratio),), scale)

        plain = Drop(density, (1.0,) * len(density))
        return Program("task_vectors", combine, (plain,), scale, statistics="l1", finish=finish)
    factor = tuple(1.0 / d if rescale and d > 0 else 1.0 for d in density)
    return Program("task_vectors", combine, (Drop(density, factor),) if min(density) < 1 else (), scale)


@method(source="Yu et al. 2024, Language Models are Super Mario, arXiv:2311.03099", mergekit={"rescale": "l1"})
def dare_linear(
    tensor: TensorSpec,
    *,
    weight: Annotated[PerExpert, Default(1.0), "multiplier of each task vector"],
    density: Annotated[PerExpert, Default(1.0), Range(0, 1), "probability that an entry is kept (1 - drop rate)"],
    rescale: Annotated[Rescale, Default("exact"), "exact or true: 1/density; l1: mergekit's norm ratio; false: none"],
    lambda_: Annotated[float, Default(1.0), "multiplier of the sum"],
    normalize: Annotated[bool, Default(False), "divide by the sum of the weights"],
    int8_mask: Int8Mask,
) -> Program:
    """Drop entries of each task vector at random, rescale the rest, add the weighted sum to the base.

    tau'_k = m_k * tau_k / density,  m_k ~ Bernoulli(density);   theta = theta_0 + lambda sum_k w_k tau'_k

    E[tau'_k] = tau_k and E||tau'_k||^2 = ||tau_k||^2 / density. Known disagreement: mergekit rescales by the ratio of
    L1 norms instead of 1/density (``rescale: l1``), which is unbiased only approximately.
    """
    del int8_mask
    combine = WeightedSum(normalised(tensor, weight) if normalize else weight)
    return dropped(combine, density, rescale, lambda_)
