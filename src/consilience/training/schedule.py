"""Learning rates."""

import math


def cosine(step: int, steps: int, rising: int = 0, peak: float = 1.0) -> float:
    """Return the learning rate at ``step`` (from 0) of ``steps``: a linear rise, then half a cosine to 0.

    With W = ``rising`` steps of the rise: peak * (step + 1) / W below W, then
    peak * (1 + cos(pi * (step - W) / (steps - W))) / 2.
    """
    if step < rising:
        return peak * (step + 1) / rising
    falling = max(1, steps - rising)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(step - rising, falling) / falling))
