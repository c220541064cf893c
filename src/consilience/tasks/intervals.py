"""Bootstrap intervals over examples."""

from collections.abc import Sequence

import numpy as np

from consilience.tasks.results import Interval


def bootstrap(
    numerators: Sequence[float],
    denominators: Sequence[float] | None = None,
    *,
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap interval of ``sum(numerators) / sum(denominators)`` over examples.

    Examples are drawn with replacement, not tokens: tokens of one example are not independent (Efron and Tibshirani
    1993, sections 13.3 and 7.3 for a ratio). The same arguments give the same interval.

    Args:
        numerators: one value per example [n], such as summed nats, or 0 and 1 for an accuracy.
        denominators: one positive weight per example [n], such as its number of tokens; None for a plain mean.
        seed: of the draws.
        resamples: number of draws of n examples.
        level: share of the bootstrap distribution inside the interval.

    Raises:
        ValueError: there are no examples, or the lengths differ.
    """
    up = np.asarray(numerators, np.float64)
    down = np.ones_like(up) if denominators is None else np.asarray(denominators, np.float64)
    if up.ndim != 1 or up.size == 0 or up.shape != down.shape:
        raise ValueError(
            f"bootstrap needs one numerator and one denominator per example, got {up.shape} and {down.shape}"
        )
    rng = np.random.default_rng(seed)
    block = max(1, 1_000_000 // up.size)  # bounds the drawn indices to 8 MB
    means: list[float] = []
    for start in range(0, resamples, block):
        drawn = rng.integers(0, up.size, (min(block, resamples - start), up.size))
        means += (up[drawn].sum(1) / down[drawn].sum(1)).tolist()
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(low), float(high))
