"""Merges that could be made instead: what the quadratic model of the probes predicts of each, and what the best do.

    q_k(p) = f_k + <g_k, d_k> + c_k ||d_k||^2 / 2,     d_k = sum_j p_j tau_j - tau_k

Losses are of all K tasks, also where a merge leaves an expert out. Far from the experts losses are not quadratic, so
values rank merges; they promise nothing, and the more weights are free, the more the model is believed where it is
wrong: in docs/results/doctor.md its best weights do worse than it says, one common scale about as well. So the best of
each kind is tried on the probe rows, and what was measured counts. Only merges of fixed weights are predicted: what
other methods do to task vectors (signs, ranks, drops) is not in the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

import numpy as np

from consilience.doctor.evidence.landscape import Landscape
from consilience.doctor.evidence.probe import Probe
from consilience.doctor.theory.geometry import Vector
from consilience.doctor.theory.weights import bounded_weights
from consilience.errors import InputError
from consilience.progress import NullProgress, Progress

#: With more experts than this, subsets are those that leave one out.
_ENUMERATED = 10
#: Common scales beyond this are not proposed: the model is trusted no further.
_LONGEST = 1.5

Kind = Literal["given", "average", "scale", "weights", "subset"]


@dataclass(frozen=True)
class Candidate:
    """One merge.

    Attributes:
        name: what it is.
        kind: of what sort.
        weights: p [K].
        losses: predicted, by task, in nats.
        mean: their mean.
        worst: the largest rise over a task's own expert, of the measured losses where there are any.
        worst_task: whose it is.
        measured: losses on the probe rows, by task, if it was tried.
    """

    name: str
    kind: Kind
    weights: tuple[float, ...]
    losses: tuple[float, ...]
    mean: float
    worst: float
    worst_task: str
    measured: tuple[float, ...] | None = None

    @property
    def measured_mean(self) -> float | None:
        """The mean of what was measured."""
        return None if self.measured is None else sum(self.measured) / len(self.measured)


def candidates(names: tuple[str, ...], probe: Probe) -> tuple[Candidate, ...]:
    """Return merges by predicted mean loss, the best first; of subsets, as many as there are experts."""
    count = len(names)
    uniform = np.full(count, 1.0 / count)
    given = _candidate(names, probe, "the weights given", "given", probe.weights)
    found = [_measured(names, probe, given, probe.merged)]
    if not np.allclose(probe.weights, uniform):
        found.append(_candidate(names, probe, "average", "average", uniform))
    scale = best_scale(probe)
    if scale is not None:
        found.append(_candidate(names, probe, f"task arithmetic, scale {scale:.2f}", "scale", np.full(count, scale)))
    try:
        best = bounded_weights(probe.gram, curvatures=probe.curvatures, slopes=probe.slopes)
        found.append(_candidate(names, probe, "weights that the model calls best", "weights", best))
    except InputError:
        pass  # bent downwards on the whole: there is no best
    subsets = [_candidate(names, probe, _without(names, kept), "subset", _of(kept, count)) for kept in _subsets(count)]
    found += sorted(subsets, key=lambda one: one.mean)[:count]
    return tuple(sorted(found, key=lambda one: one.mean))


def tried(
    names: tuple[str, ...],
    probe: Probe,
    found: Sequence[Candidate],
    landscape: Landscape,
    progress: Progress | None = None,
) -> tuple[Candidate, ...]:
    """Measure the best candidate of each kind on the probe rows; return those by what was measured, then the others.

    Args:
        names: of the experts.
        probe: what the candidates are predicted from.
        found: the candidates, the best first.
        landscape: the losses that the probe has seen.
        progress: told of every loss that was measured.

    Raises:
        InputError: a loss is not finite.
    """
    chosen = [one for k, one in enumerate(found) if one.kind not in [before.kind for before in found[:k]]]
    waiting = [one for one in chosen if one.measured is None]
    done: dict[Candidate, Candidate] = {}
    progress = progress or NullProgress()
    progress.phase("measuring other weights", len(waiting) * len(names), "losses")
    for one in waiting:
        losses = np.zeros(len(names))
        for k in range(len(names)):
            losses[k] = landscape.loss(k, np.array(one.weights))
            progress.advance()
        done[one] = _measured(names, probe, one, losses)
    return tuple(sorted((done.get(one, one) for one in found), key=_rank))


def _rank(one: Candidate) -> tuple[bool, float]:
    measured = one.measured_mean
    return measured is None, one.mean if measured is None else measured


def _measured(names: tuple[str, ...], probe: Probe, one: Candidate, losses: Vector) -> Candidate:
    worst, task = worst_rise(names, losses - probe.own)
    return replace(one, measured=tuple(map(float, losses)), worst=worst, worst_task=task)


def worst_rise(names: tuple[str, ...], rises: Vector) -> tuple[float, str]:
    """Return the largest rise over a task's own expert, and whose it is."""
    at = int(np.argmax(rises))
    return float(rises[at]), names[at]


def _candidate(names: tuple[str, ...], probe: Probe, name: str, kind: Kind, p: Vector) -> Candidate:
    losses = probe.predicted(p)
    weights, shown = tuple(map(float, p)), tuple(map(float, losses))
    return Candidate(name, kind, weights, shown, float(losses.mean()), *worst_rise(names, losses - probe.own))


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
