"""Where more coefficients pay off: the importance of each group, and the chunks it earns (Expert Merging++)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from consilience.coefficients.coefficients import Coefficients
from consilience.coefficients.groups import Group
from consilience.errors import InputError

#: Lifts products such as 49 * (1 / 49), which rounds to just below 1, over the edge that floor() cuts at.
_SLACK = 1e-9


def importance(coefficients: Coefficients, l1: Mapping[str, Any]) -> dict[str, float]:
    """Return the share of every group in what the coefficients move.

        I_g = sum_k |alpha_k^g| s_k^g n_g / sum_j (the same of group j)

    ``s_k^g`` is the mean absolute value of expert k's task vector on the group and ``n_g`` its number of elements, so
    ``s n`` is the l1 norm. Shares are >= 0, sum to 1, and stay the same when all task vectors or all coefficients are
    multiplied by one number. When every product is 0 the groups share equally.

    Args:
        coefficients: their groups may be chunked; then each chunk's |alpha| counts with the chunk's part of the norm.
        l1: l1 norm of each expert's task vector, by tensor: an array [K] (spread over the tensor's pieces by their
            number of elements), or [K, pieces of the tensor]. K in the order of ``coefficients.experts``.

    Raises:
        ValueError: a tensor has no norms, or they have the wrong shape, are negative or are not finite.

    Source: Expert Merging (arXiv:2509.25712), importance-guided chunking. The public code has no such step.
    """
    norms = {name: _per_piece(coefficients, name, l1) for group in coefficients.groups for name, _ in group.tensors}
    # Norms and coefficients are scaled to at most 1 first, so that no product or sum of theirs overflows.
    unit = max((float(norm.max(initial=0)) for norm in norms.values()), default=0.0) or 1.0
    size = np.abs(coefficients.alpha)
    size = size / (float(size.max(initial=0)) or 1.0)
    mass: list[float] = []
    for group in coefficients.groups:
        parts = (
            size[:, [piece.index for piece in coefficients.pieces[name]]] * (norms[name] / unit)
            for name, _ in group.tensors
        )
        mass.append(math.fsum(float(part.sum()) for part in parts))
    names = [group.name for group in coefficients.groups]
    largest = max(mass, default=0.0)
    if largest == 0:
        return {name: 1 / len(names) for name in names}
    shares = [value / largest for value in mass]
    total = math.fsum(shares)
    return {name: share / total for name, share in zip(names, shares, strict=True)}


def _per_piece(coefficients: Coefficients, name: str, l1: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    """Return the norms of one tensor as [K, pieces]."""
    pieces = coefficients.pieces[name]
    if name not in l1:
        raise ValueError(f"tensor {name!r} has no l1 norms")
    norm = np.asarray(l1[name], np.float64)
    experts = len(coefficients.experts)
    if norm.shape not in ((experts,), (experts, len(pieces))):
        raise ValueError(
            f"l1 norms of {name!r} have shape {norm.shape}, not ({experts},) or ({experts}, {len(pieces)})"
        )
    if not (np.isfinite(norm) & (norm >= 0)).all():
        raise ValueError(f"l1 norms of {name!r} are not all finite and >= 0")
    if norm.ndim == 2:
        return norm
    sizes = np.array([piece.stop - piece.start for piece in pieces], np.float64)
    return norm[:, None] * (sizes / sizes.sum())


def allocate(importance: Mapping[str, float], budget: float, kappa: float) -> dict[str, int]:
    """Return how many chunks each of L groups is cut into.

        m_g = floor(B L I_g^kappa / sum_j I_j^kappa + 1e-9)

    A group with m_g = 0 keeps one coefficient that is not learned. ``kappa`` = 0 is uniform: every m_g is floor(B), so
    0 everywhere if B < 1. Larger values concentrate: the top group's share never falls as kappa grows, and ``inf``
    gives floor(B L) to the most important group (the first, if several are) and 0 to the others. Groups with I = 0
    get nothing unless kappa = 0; if all have I = 0 they share equally. The m_g sum to at most B L (within the slack of
    1e-9 a group); the caller caps each at its group's number of elements.

    Args:
        importance: I_g >= 0 by group name; only the ratios count.
        budget: B, chunks to hand out in units of the number of groups (the paper: 0.9 to 1.2). Read as a plain number
            it would be 0 chunks everywhere, so the unit is the one that makes the formula work.
        kappa: sharpness >= 0. The value used in the paper is not published.

    Raises:
        InputError: ``budget`` or ``kappa`` is negative or NaN, or ``budget`` is infinite.
        ValueError: an importance is negative or not finite.

    Source: Expert Merging (arXiv:2509.25712), importance-guided chunking. The public code takes chunk counts as given.
    """
    if not 0 <= budget < math.inf:
        raise InputError(f"budget {budget}: write a number >= 0, in units of the number of groups (1.0 is usual)")
    if not kappa >= 0:
        raise InputError(f"kappa {kappa}: write a number >= 0 (0 is uniform)")
    wrong = next((name for name, share in importance.items() if not 0 <= share < math.inf), None)
    if wrong is not None:
        raise ValueError(f"importance of {wrong!r} is {importance[wrong]}, not a finite number >= 0")
    if not importance:
        return {}
    top = max(importance, key=lambda name: importance[name])
    if kappa == math.inf:
        return {name: math.floor(budget * len(importance) + _SLACK) if name == top else 0 for name in importance}
    powers = [_power(share, importance[top], kappa) for share in importance.values()]
    # In this order a uniform share is L * 1 / L = 1 exactly, so m = floor(B) whatever L is.
    total = sum(powers)
    shares = [len(powers) * power / total for power in powers]
    return {name: math.floor(budget * share + _SLACK) for name, share in zip(importance, shares, strict=True)}


def _power(share: float, largest: float, kappa: float) -> float:
    """Return (share / largest)^kappa in log space, where large exponents neither overflow nor turn into 0 / 0."""
    if kappa == 0 or share == largest:
        return 1.0
    return math.exp(kappa * (math.log(share) - math.log(largest))) if share > 0 else 0.0


def allocation_groups(groups: Sequence[Group], chunks: Mapping[str, int]) -> tuple[Group, ...]:
    """Return ``groups`` cut into ``chunks[name]`` pieces each, at most one per element; 0: one that is not learned.

    Raises:
        ValueError: a group has no number of chunks.
    """
    new: list[Group] = []
    first = 0
    for group in groups:
        if group.name not in chunks:
            raise ValueError(f"group {group.name!r} has no number of chunks")
        wanted = chunks[group.name]
        count = min(max(wanted, 1), group.numel)
        new.append(replace(group, chunks=count, first=first, learned=wanted > 0))
        first += count
    return tuple(new)
