"""Findings from the weights alone.

Thresholds are the project's own rules of thumb about what cannot be right (a fine-tuned model lies near its base; two
trainings do not end in one point), not predictions of a merge's quality.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from consilience.doctor.findings.finding import Finding
from consilience.doctor.theory.geometry import Geometry, Matrix, Vector

if TYPE_CHECKING:
    from consilience.doctor.evidence.survey import Survey

#: cos(theta_k, theta_0) below which an expert is not taken for a fine-tuned copy of the base: that leaves > 0.99.
STRANGER = 0.5
#: ||tau_k|| as a multiple of the median's beyond which an expert stands out, and beyond which it drowns the others.
LONG, DROWNING = 3.0, 10.0
#: ||tau_k|| / ||theta_0|| beyond which an expert has left its base.
FAR = 0.3
#: Cosine of task vectors that separate trainings do not reach, and the cosine that makes them copies.
TOO_ALIKE, SAME = 0.7, 0.999
#: Share of a task vector's energy that no combination of the others explains, below which it is a merge of them.
RESIDUAL = 0.01
#: Cosines below this are opposed, if they are so many standard deviations of chance, 1 / sqrt(entries), below 0 too.
OPPOSED, CHANCE = -0.05, 5.0

#: A part of the model: its name, its geometry, and its number of entries.
Part = tuple[str, Geometry, int]


def findings(survey: "Survey", blocks: Sequence[Part]) -> list[Finding]:
    """Return what the geometry of all tensors and of blocks of them shows."""
    names, geometry = survey.names, survey.geometry
    found = [*_empty(names, geometry), *_strangers(names, geometry), *_lengths(names, geometry)]
    copies = _copies(names, geometry)
    found += copies
    if not copies:
        found += [*_one_origin(names, geometry), *_merges(names, geometry)]
    return [*found, *_fights(names, geometry, blocks)]


def _empty(names: Sequence[str], geometry: Geometry) -> list[Finding]:
    return [
        Finding("warning", "no-change", (name,), f"{name} is the base itself: no tensor differs",
                "check that the right files were given, or drop it")
        for name, norm in zip(names, geometry.norms, strict=True) if norm == 0
    ]  # fmt: skip


def _strangers(names: Sequence[str], geometry: Geometry) -> list[Finding]:
    found: list[Finding] = []
    for name, cosine, norm in zip(names, geometry.base_cosines, geometry.norms, strict=True):
        relative = norm / geometry.base_norm if geometry.base_norm else 0.0
        if cosine < STRANGER:
            found.append(Finding(
                "stop", "wrong-base", (name,),
                f"{name} does not stem from this base: cos(theta, theta_0) = {cosine:.3f}, where fine-tuning leaves "
                "more than 0.99", "name the base that it was trained from, or drop it",
            ))  # fmt: skip
        elif relative > FAR:
            found.append(Finding(
                "warning", "far-from-base", (name,),
                f"{name} has moved by {relative:.2f} of its base's length",
                "shrink it (a weight below 1), or train it more briefly or at a lower learning rate",
                "displacement falls with the square of the weight", "likely",
            ))  # fmt: skip
    return found


def _lengths(names: Sequence[str], geometry: Geometry) -> list[Finding]:
    norms = geometry.norms
    if len(norms) < 2 or not (norms > 0).any():
        return []
    found: list[Finding] = []
    for k, name in enumerate(names):
        others = float(np.median(np.delete(norms, k)))
        ratio = norms[k] / others if others > 0 else 1.0
        if ratio > LONG:
            found.append(Finding(
                "warning" if ratio > DROWNING else "note", "long-task-vector", (name,),
                f"{name} has moved {ratio:.1f} times as far as the median of the others ({norms[k]:.3g} against "
                f"{others:.3g})", f"give it a weight of about {others / norms[k]:.2f} of the others'",
                "as if it had been trained for a shorter time: its own task loses, all others gain", "likely",
            ))  # fmt: skip
    return found


def _copies(names: Sequence[str], geometry: Geometry) -> list[Finding]:
    found: list[Finding] = []
    for j, k in _pairs(names):
        cosine = geometry.cosines[j, k]
        if cosine > SAME:
            ratio = geometry.norms[k] / geometry.norms[j]
            same = abs(ratio - 1) < 0.01
            what = (
                "are the same model" if same else f"are one model, scaled: {names[k]} is {ratio:.2f} times {names[j]}"
            )
            found.append(Finding("warning", "duplicate", (names[j], names[k]),
                                 f"{names[j]} and {names[k]} {what} (cosine {cosine:.4f})", f"drop {names[k]}",
                                 "its task vector would count twice"))  # fmt: skip
    return found


def _one_origin(names: Sequence[str], geometry: Geometry) -> list[Finding]:
    """Experts that share most of their change were trained from something that is not the base."""
    if len(names) < 2:
        return []
    off = geometry.cosines[~np.eye(len(names), dtype=bool)]
    if off.min() <= TOO_ALIKE:
        return []
    return [Finding(
        "warning", "shared-change", tuple(names),
        f"all experts share most of their change (cosines of {off.min():.2f} to {off.max():.2f}; "
        f"{100 * geometry.common:.0f} % of it is common)",
        "check that base_model is what they were trained from, rather than an earlier stage of it",
        "task vectors then hold what the experts learned, and not what they started with", "likely",
    )]  # fmt: skip


def _merges(names: Sequence[str], geometry: Geometry) -> list[Finding]:
    """Experts that are combinations of the others."""
    found: list[Finding] = []
    if len(names) < 3:
        return found
    for k, name in enumerate(names):
        weights, residual = explained(geometry.gram, k)
        if residual < RESIDUAL:
            others = [other for i, other in enumerate(names) if i != k]
            parts = " + ".join(f"{w:.2f} {other}" for w, other in zip(weights, others, strict=True) if abs(w) > 0.01)
            found.append(Finding(
                "warning", "merge-of-others", (name,),
                f"{name} is a merge of the others: {parts} ({100 * residual:.2g} % unexplained)",
                f"drop {name}, or those that it was made of", "its parts would count twice",
            ))  # fmt: skip
    return found


def explained(gram: Matrix, k: int) -> tuple[Vector, float]:
    """Return the weights of the other experts that come nearest to task vector k, and the share of it that is left."""
    others = [i for i in range(len(gram)) if i != k]
    found: Any = np.linalg.lstsq(gram[np.ix_(others, others)], gram[others, k], rcond=1e-10)
    weights: Vector = found[0]
    own = gram[k, k]
    left = own - 2 * weights @ gram[others, k] + weights @ gram[np.ix_(others, others)] @ weights
    return weights, float(max(0.0, left) / own) if own > 0 else 1.0


def _fights(names: Sequence[str], geometry: Geometry, blocks: Sequence[Part]) -> list[Finding]:
    """Pairs whose task vectors are opposed, overall or in some blocks."""
    found: list[Finding] = []
    for j, k in _pairs(names):
        inside = sorted((float(part.cosines[j, k]), name, entries) for name, part, entries in blocks)
        worst = [(cosine, name) for cosine, name, entries in inside if cosine < min(OPPOSED, -CHANCE / entries**0.5)]
        overall = float(geometry.cosines[j, k])
        if overall >= OPPOSED and not worst:
            continue
        places = tuple(f"{name} ({cosine:.2f})" for cosine, name in worst[:5])
        found.append(Finding(
            "warning" if overall < OPPOSED else "note", "opposed", (names[j], names[k]),
            f"{names[j]} and {names[k]} pull apart: cosine {overall:.3f} overall"
            + (f", below {OPPOSED} in {len(worst)} of {len(blocks)} blocks" if blocks else ""),
            "use weights by block (expert_merging), or a method that settles signs (ties)",
            "what one gains there, the other loses", "likely", places,
        ))  # fmt: skip
    return found


def _pairs(names: Sequence[str]) -> list[tuple[int, int]]:
    return [(j, k) for k in range(len(names)) for j in range(k)]
