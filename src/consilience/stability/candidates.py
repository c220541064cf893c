"""Merges that could be made instead: what the quadratic model of the probes predicts of each.

    q_k(p) = f_k + <g_k, d_k> + c_k ||d_k||^2 / 2,     d_k = sum_j p_j tau_j - tau_k

Losses are of all K tasks, also where a merge leaves an expert out. Far from the experts losses are not quadratic, so
values rank merges; they promise nothing. Only merges of fixed weights are predicted: what other methods do to task
vectors (signs, ranks, drops) is not in the model.
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from consilience.errors import InputError
from consilience.stability.geometry import Vector
from consilience.stability.probe import Probe
from consilience.stability.weights import bounded_weights

#: With more experts than this, subsets are those that leave one out.
_ENUMERATED = 10
#: Common scales beyond this are not proposed: the model is trusted no further.
_LONGEST = 1.5


@dataclass(frozen=True)
class Candidate:
    """One merge.

    Attributes:
        name: what it is.
        weights: p [K].
        losses: predicted, by task, in nats.
        mean: their mean.
        worst: the largest rise over a task's own expert.
        worst_task: whose it is.
    """

    name: str
    weights: tuple[float, ...]
    losses: tuple[float, ...]
    mean: float
    worst: float
    worst_task: str


def candidates(names: tuple[str, ...], probe: Probe) -> tuple[Candidate, ...]:
    """Return merges by predicted mean loss, the best first; of subsets, as many as there are experts."""
    count = len(names)
    uniform = np.full(count, 1.0 / count)
    found = [_candidate(names, probe, "the weights given", probe.weights)]
    if not np.allclose(probe.weights, uniform):
        found.append(_candidate(names, probe, "average", uniform))
    scale = best_scale(probe)
    if scale is not None:
        found.append(_candidate(names, probe, f"task arithmetic, scale {scale:.2f}", np.full(count, scale)))
    try:
        best = bounded_weights(probe.gram, curvatures=probe.curvatures, slopes=probe.slopes)
        found.append(_candidate(names, probe, "weights that the model calls best", best))
    except InputError:
        pass  # bent downwards on the whole: there is no best
    subsets = [_candidate(names, probe, _without(names, kept), _of(kept, count)) for kept in _subsets(count)]
    found += sorted(subsets, key=lambda one: one.mean)[:count]
    return tuple(sorted(found, key=lambda one: one.mean))


def _candidate(names: tuple[str, ...], probe: Probe, name: str, p: Vector) -> Candidate:
    losses = probe.predicted(p)
    rises = losses - probe.own
    worst = int(np.argmax(rises))
    return Candidate(
        name, tuple(map(float, p)), tuple(map(float, losses)), float(losses.mean()), float(rises[worst]), names[worst]
    )


def best_scale(probe: Probe) -> float | None:
    """Return the common weight of all experts with the least predicted mean loss; None: the model has no minimum.

    q is a quadratic of the scale, so three of its values tell it.
    """
    count = len(probe.own)
    at = [float(probe.predicted(np.full(count, scale)).mean()) for scale in (0.0, 0.5, 1.0)]
    bend = 2 * (at[0] - 2 * at[1] + at[2])
    if bend <= 0:
        return None
    slope = at[2] - at[0] - bend
    return float(np.clip(-slope / (2 * bend), 0.0, _LONGEST))


def _subsets(count: int) -> list[tuple[int, ...]]:
    """Return subsets of two experts or more that leave out at least one."""
    if count < 3:
        return []
    sizes = range(2, count) if count <= _ENUMERATED else (count - 1,)
    return [kept for size in sizes for kept in combinations(range(count), size)]


def _of(kept: tuple[int, ...], count: int) -> Vector:
    p = np.zeros(count)
    p[list(kept)] = 1.0 / len(kept)
    return p


def _without(names: tuple[str, ...], kept: tuple[int, ...]) -> str:
    if len(kept) > len(names) / 2:
        return "average without " + ", ".join(name for k, name in enumerate(names) if k not in kept)
    return "average of " + ", ".join(names[k] for k in kept)
