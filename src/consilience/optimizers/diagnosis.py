"""What a run of SPSA measured, and what that says of the run.

Of estimates g_t with n coordinates and m directions, two numbers tell most:

    rho       = mean_t cos(g_t, g_{t-1}),  with a standard error of about 1 / sqrt(n T) over T steps
    overshoot = -2 rho (n + m - 1) / m

Where it is positive, rho is about the gradient's share in the estimates, |g|^2 / E|g_t|^2. On a quadratic with steps
eta g_t consecutive estimates correlate by about -eta lambda / 2 once the run hovers about its minimum, and the expected
loss falls fastest at eta lambda = m / (n + m - 1) and rises beyond twice that: overshoot is eta lambda in units of the
best (derived here, for independent directions; Adam's moves lag behind its estimates, so that it means nothing and is
not used there). A small rho is what noise leaves.

Whether coefficients have settled is not told by how far they move: steps of K weights that sum to 1 are of the order of
1 / K, and those of a small learning rate smaller, wherever they lead. It is told by whether they come back. Over the
last half of a run

    drift = |mean of its second half - mean of its first half| / root mean square distance from its mean

is sqrt(3) on a straight line and sqrt(2) on a random walk, whatever the size of the steps, and falls towards 0 where
they hover about a point.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Verdict = Literal["converged", "improving", "unsettled", "oscillating", "no signal", "noisy", "outside the hull"]
Array = npt.NDArray[np.float64]

#: Share of the loss that float32 rounds away: the noise where none was measured.
ROUNDING = 1e-6
#: Differences must be so many times the noise of the loss.
HEARD = 3.0
#: Standard errors that make a change of the loss one.
SURE = 3.0
#: A weight on the simplex this large is a vertex.
VERTEX = 0.95
#: Coefficients that stray more than this (root mean square of their distance from their mean) have not settled.
SETTLED = 0.02
#: Those that stray less have, if their drift is less than this, or they stray less than this share of their way.
RETURNS, STILL = 1.0, 0.03
#: A last third that brings less than this share of what the run has gained changes little.
SLOW = 0.02
#: Fewer steps than this say nothing.
FEWEST = 12

_ADVICE: dict[Verdict, str] = {
    "converged": "the coefficients have settled: more steps will change little",
    "improving": "the loss is still falling: give the run more steps, or raise the learning rate",
    "unsettled": (
        "nothing shows that the coefficients have settled: they moved on to the end, by too little to be seen in the "
        "loss of single steps; give the run more steps, raise the learning rate, or average more directions"
    ),
    "oscillating": "the steps overshoot: lower the learning rate, or mu",
    "no signal": "the two losses of a step differ by no more than rounding: raise mu, or use precision=float32",
    "noisy": "the steps are mostly noise: raise the number of directions, lower the learning rate, or drop experts",
    "outside the hull": (
        "no blend inside the simplex does better than its edge: use affine coefficients or task vectors, or add an "
        "expert that is nearer to the target"
    ),
}


@dataclass(frozen=True)
class Measured:
    """One step: ``plus`` and ``minus`` are L+ and L- of every direction.

    ``expected`` is the expected |delta alpha|, ``power`` |g|^2 and ``lag`` the inner product with the estimate before
    (of the estimates before they are normalised), ``alpha`` [K] the coefficients before the step, averaged over what is
    learned.
    """

    step: int
    mu: float
    plus: tuple[float, ...]
    minus: tuple[float, ...]
    expected: float
    power: float
    lag: float
    alpha: tuple[float, ...]

    @property
    def directions(self) -> int:
        """m."""
        return len(self.plus)

    @property
    def differences(self) -> tuple[float, ...]:
        """|L+ - L-| of every direction."""
        return tuple(abs(high - low) for high, low in zip(self.plus, self.minus, strict=True))

    @property
    def slopes(self) -> tuple[float, ...]:
        """The d of every direction."""
        return tuple((high - low) / (2 * self.mu) for high, low in zip(self.plus, self.minus, strict=True))

    @property
    def loss(self) -> float:
        """The mean of all values."""
        return math.fsum(self.plus + self.minus) / (2 * len(self.plus))

    def line(self) -> dict[str, Any]:
        """Return a JSON-able object."""
        return {
            "step": self.step, "mu": self.mu, "m": self.directions, "d": list(self.slopes),
            "difference": list(self.differences), "expected_move": self.expected, "alpha": list(self.alpha),
        }  # fmt: skip


@dataclass(frozen=True)
class Record:
    """A run: its steps, the number of coordinates, and the noise of the loss (0: not measured).

    ``simplex`` says whether the coefficients are confined to it, ``plain`` whether steps are the estimates themselves.
    """

    steps: tuple[Measured, ...]
    size: int
    noise: float = 0.0
    simplex: bool = True
    plain: bool = True


@dataclass(frozen=True)
class Diagnosis:
    """What a run did, the numbers that say so, and one line of advice."""

    verdict: Verdict
    evidence: dict[str, float]
    advice: str


def diagnose(record: Record, *, single: Sequence[float] | None = None) -> Diagnosis:
    """Say what a run did.

    In this order: the differences of its first quarter drown in rounding and the loss stays (no signal); the last
    third's loss is above the middle third's or the first quarter's (oscillating, or noisy if the coefficients stray
    without a sign that steps overshoot, and the loss has not doubled); a weight is at a vertex, or the loss
    stays above that of the best expert alone (outside the hull); the last third's loss is below the middle third's
    (improving); the coefficients still stray, with steps that overshoot (oscillating) or not (noisy); they stray
    little, but have neither stopped nor turned back (unsettled); else converged.

    Args:
        record: what was measured.
        single: the target loss of every expert alone, where it is known.

    Raises:
        ValueError: too few steps to say.
    """
    if len(record.steps) < FEWEST:
        raise ValueError(f"a run of {len(record.steps)} steps cannot be diagnosed; it takes {FEWEST}")
    evidence = _evidence(record, single)
    verdict = _verdict(record, evidence)
    return Diagnosis(verdict, evidence, _ADVICE[verdict])


def _evidence(record: Record, single: Sequence[float] | None) -> dict[str, float]:
    steps = record.steps
    losses = np.array([step.loss for step in steps])
    early, late = steps[: max(4, len(steps) // 4)], steps[-(len(steps) // 3) :]
    first, last = losses[: len(early)], losses[-len(late) :]
    noise = record.noise or ROUNDING * float(np.abs(first).mean())
    heard = float(np.median([value for step in early for value in step.differences]))
    path = np.array([step.alpha for step in steps])
    alpha = path[-len(late) :]
    change, change_error = _change(losses[-2 * len(late) : -len(late)], last)
    gain, gain_error = _change(last, first)
    correlation = _correlation(late)
    m = float(np.mean([step.directions for step in late]))
    crowd = 2 * (record.size + m - 1) / m
    return {
        "signal_over_noise": heard / noise if noise else math.inf,
        "noise": noise,
        "first_loss": float(first.mean()),
        "last_loss": float(last.mean()),
        "gain": gain,
        "gain_error": gain_error,
        "change": change,
        "change_error": change_error,
        "stray": _stray(alpha),
        "travel": float(np.linalg.norm(alpha.mean(0) - path[0])),
        "drift": _drift(path[-2 * (len(path) // 4) :]),
        "gradient_share": max(correlation, 0.0),
        "overshoot": max(-correlation, 0.0) * crowd,
        "overshoot_error": crowd / math.sqrt(max(1, record.size) * len(late)),
        "largest_weight": float(alpha.mean(0).max()),
        "expected_move": float(np.mean([step.expected for step in late])),
        "directions": m,
        **({} if single is None else {"best_expert_loss": float(np.min(single))}),
    }


def _verdict(record: Record, seen: Mapping[str, float]) -> Verdict:
    worse = seen["change"] > SURE * seen["change_error"] or seen["gain"] < -SURE * seen["gain_error"]
    better = seen["change"] < -max(SURE * seen["change_error"], SLOW * seen["gain"])
    if seen["signal_over_noise"] < HEARD and not better and not worse:
        return "no signal"
    strays = seen["stray"] > SETTLED
    overshoots = record.plain and seen["overshoot"] > max(1.0, 2 * seen["overshoot_error"])
    if worse:
        exploded = -seen["gain"] > abs(seen["first_loss"])
        drifts = strays and seen["overshoot"] < 2 * seen["overshoot_error"]
        return "noisy" if drifts and not exploded else "oscillating"
    above = seen["last_loss"] > seen.get("best_expert_loss", math.inf) and not better
    if (record.simplex and len(record.steps[0].alpha) > 1 and seen["largest_weight"] > VERTEX) or above:
        return "outside the hull"
    if better:
        return "improving"
    if strays:
        return "oscillating" if overshoots else "noisy"
    settled = seen["drift"] < RETURNS or seen["stray"] < STILL * seen["travel"]
    return "converged" if settled else "unsettled"


def _stray(alpha: Array) -> float:
    """Return the root mean square distance of coefficients [T, K] from their mean."""
    return float(np.sqrt(((alpha - alpha.mean(0)) ** 2).sum(1).mean()))


def _drift(alpha: Array) -> float:
    """Return how far the second half of coefficients [T, K] lies from the first, in units of their stray."""
    half, stray = len(alpha) // 2, _stray(alpha)
    return float(np.linalg.norm(alpha[half:].mean(0) - alpha[:half].mean(0))) / stray if stray else 0.0


def _change(before: Array, after: Array) -> tuple[float, float]:
    """Return the change of the mean loss, and its standard error or what float32 rounds away."""
    error = math.sqrt(before.var(ddof=1) / len(before) + after.var(ddof=1) / len(after))
    return float(after.mean() - before.mean()), max(error, ROUNDING * float(np.abs(before).mean()))


def _correlation(steps: Sequence[Measured]) -> float:
    """Return the mean cosine of consecutive estimates: no step counts more than another, however a run explodes."""
    sizes = [math.sqrt(before.power) * math.sqrt(after.power) for before, after in itertools.pairwise(steps)]
    found = [after.lag / size for after, size in zip(steps[1:], sizes, strict=True) if size]
    return math.fsum(found) / max(1, len(found))


def pack(steps: Sequence[Measured]) -> dict[str, Array]:
    """Return steps as arrays [T], those of all directions [sum of m], and coefficients [T, K]; nothing of nothing."""
    if not steps:
        return {}
    each = ("step", "mu", "directions", "expected", "power", "lag")
    found = {f"record.{name}": np.array([getattr(step, name) for step in steps], np.float64) for name in each}
    found["record.plus"] = np.array([value for step in steps for value in step.plus])
    found["record.minus"] = np.array([value for step in steps for value in step.minus])
    found["record.alpha"] = np.array([step.alpha for step in steps])
    return found


def unpack(arrays: Mapping[str, Any]) -> list[Measured]:
    """Return the steps that ``pack`` made arrays of."""
    if "record.step" not in arrays:
        return []
    counts = arrays["record.directions"].astype(int)
    ends = np.cumsum(counts)[:-1]
    columns = [arrays[f"record.{name}"].tolist() for name in ("step", "mu", "expected", "power", "lag", "alpha")]
    sides = [np.split(arrays[f"record.{name}"], ends) for name in ("plus", "minus")]
    return [
        Measured(int(step), mu, tuple(plus.tolist()), tuple(minus.tolist()), expected, power, lag, tuple(alpha))
        for step, mu, expected, power, lag, alpha, plus, minus in zip(*columns, *sides, strict=True)
    ]
