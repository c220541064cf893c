"""How much instructions count, chosen for every query without labels.

    a = a_max sigmoid((c_(1) - tau) / s)          c_(1): the query's largest raw cosine with an expert

tau and s are fitted by leaving experts out. An example of an expert is *inside* by its cosine with that expert, and
*outside* by its largest cosine with the others when its own is taken away: that is how a task looks that no expert was
trained for. A logistic regression of inside against outside, both classes weighing alike, gives tau and s. Targets are
Platt's, (n + 1) / (n + 2) and 1 / (m + 2), which keep s finite where the two do not overlap; where they do, a threshold
errs, and ``wrong_inside`` and ``wrong_outside`` say how often.

The raw cosine decides also where scores are standardised: over the experts, its standard score is near sqrt(K - 1) for
any query that is nearer to one expert than to the rest, however far it is from all of them.

Source: the project's own; it answers the reviewers' objection that GLIDER sets its scale by benchmark (100 for tasks
that experts were trained on, 3 for others). Targets: Platt, Probabilistic outputs for support vector machines (1999).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from consilience.errors import InputError
from consilience.numbers import is_number

#: Bounds of s. Cosines differ by rounding and by chance below the first; beyond the second, a would hardly vary.
NARROWEST, WIDEST = 0.01, 1.0
_HALVINGS = 45


@dataclass(frozen=True, slots=True)
class Adaptive:
    """The fitted scale.

    Attributes:
        threshold: tau, the top cosine at which a is half of its most.
        width: s.
        wrong_inside: share of inside examples below tau, whose instructions count too little.
        wrong_outside: share of outside examples above tau, whose instructions count too much.
        examples: number of inside examples fitted on.
    """

    threshold: float
    width: float
    wrong_inside: float
    wrong_outside: float
    examples: int

    def scale(self, cosines: Tensor, most: float) -> Tensor:
        """Return a [B] of queries' raw cosines [B, K]."""
        top = cosines.float().amax(-1)
        return most * torch.sigmoid((top - self.threshold) / self.width)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Any, where: str) -> "Adaptive":
        """Return what ``to_dict`` gave.

        Raises:
            InputError: it is something else.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(value, dict) or sorted(cast(dict[str, Any], value)) != sorted(names):
            raise InputError(f"{where}: adaptive must have {', '.join(names)}; restore the file")
        values = cast(dict[str, Any], value)
        if not all(is_number(one) for one in values.values()):
            raise InputError(f"{where}: adaptive holds something else than numbers; restore the file")
        if values["width"] <= 0:
            raise InputError(f"{where}: adaptive has a width that is not positive; restore the file")
        return cls(**values)


def fit_adaptive(inside: Tensor, outside: Tensor) -> Adaptive:
    """Fit tau and s to cosines of inside examples [n] and outside examples [m], both at least one.

    The mean loss is convex in (1 / s, -tau / s), and its least value over tau convex in 1 / s, so both are found by
    bisection, and a bound on s needs no further care.
    """
    n, m = len(inside), len(outside)
    values = np.asarray(torch.cat([inside, outside]).double())
    targets = np.repeat([(n + 1) / (n + 2), 1 / (m + 2)], [n, m])
    weights = np.repeat([0.5 / n, 0.5 / m], [n, m])

    def excess(slope: float, threshold: float) -> NDArray[np.float64]:
        sigmoid = 0.5 + 0.5 * np.tanh(0.5 * slope * (values - threshold))
        return weights * (sigmoid - targets)

    low, high = float(values.min()) - WIDEST, float(values.max()) + WIDEST

    def threshold_of(slope: float) -> float:
        return bisect(lambda threshold: -float(excess(slope, threshold).sum()), low, high)

    slope = bisect(lambda slope: float(excess(slope, threshold_of(slope)) @ values), 1 / WIDEST, 1 / NARROWEST)
    threshold = threshold_of(slope)
    wrong_inside, wrong_outside = float((values[:n] < threshold).mean()), float((values[n:] >= threshold).mean())
    return Adaptive(threshold, 1 / slope, wrong_inside, wrong_outside, n)


def bisect(increasing: Callable[[float], float], low: float, high: float) -> float:
    """Return where an increasing function passes zero, or the nearer end of [low, high] where it does not."""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if increasing(middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2
