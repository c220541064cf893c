"""Times of sides that take turns: in every round each side is timed once."""

import statistics
from collections.abc import Sequence


def median(values: Sequence[float]) -> float | None:
    """Return the median, or None without values."""
    return statistics.median(values) if values else None


def median_ratio(values: Sequence[float], others: Sequence[float]) -> float | None:
    """Return the median over rounds of one side's time over the other's in the same round."""
    return median([one / other for one, other in zip(values, others, strict=False)])
