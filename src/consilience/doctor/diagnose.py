"""The merge doctor: read a recipe's experts and say whether they will merge, what is wrong, and what to change."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from consilience.coefficients.listing import place_of
from consilience.doctor import probing
from consilience.doctor.applied import trainings_of
from consilience.doctor.candidates import Candidate
from consilience.doctor.diagnosis import BlockFacts, Diagnosis, ExpertFacts, PairFacts, ProbeFacts, SetFacts
from consilience.doctor.evidence.case import Case, open_case
from consilience.doctor.evidence.probe import Probe
from consilience.doctor.evidence.survey import Survey, TensorSurvey, sum_of, survey
from consilience.doctor.evidence.training import Training, compare
from consilience.doctor.findings import from_files, from_training, from_weights
from consilience.doctor.findings.finding import Finding, ranked
from consilience.doctor.probing import ProbeSettings, check_probes, has_probes
from consilience.doctor.theory.geometry import Geometry, Vector
from consilience.doctor.trying import Tried, check_methods, try_methods
from consilience.errors import InputError
from consilience.progress import Progress
from consilience.recipe.schema import Recipe

#: Methods whose ``weight`` is p itself.
_WEIGHTED = ("linear", "task_arithmetic", "dare_linear", "ties", "dare_ties")
_OUTSIDE = "outside blocks"


def diagnose(
    recipe: Recipe,
    *,
    where: str = "recipe",
    root: Path | None = None,
    exact: bool = False,
    threads: int | None = None,
    seed: int = 0,
    probes: ProbeSettings | None = None,
    progress: Progress | None = None,
) -> Diagnosis:
    """Diagnose a recipe's experts: from their checkpoints, in one pass, and on probe rows where all experts have them.

    Args:
        recipe: any merge with a base; its method matters only for the weights that it gives.
        where: how errors name the recipe.
        root: the folder that its relative paths start from.
        exact: compute ranks and overlaps from whole matrices instead of sketches.
        threads: number of workers; None: all cores.
        seed: of the sketches.
        probes: how probes are run; None: they are left out.
        progress: told of every part of the work.

    Raises:
        InputError: there is no base, no expert fits it, a stored value is NaN or Inf, or probe rows are wrong.
    """
    started = time.perf_counter()
    case = open_case(recipe, where, root)
    try:
        probed = probes is not None and has_probes(case)
        if probes is not None and probes.methods and not probed:
            raise InputError(
                f"{where}: no expert has data: {{probe: FILE}}, and methods are tried on probe rows; add them"
            )
        if probes is not None:
            check_probes(probes, where, probed=probed)
            check_methods(probes.methods, case, recipe)
        read = survey(case.names, case.stacks, threads=threads, exact=exact, seed=seed, progress=progress)
        beside = from_files.findings(case.plan)
        p, said = weights_of(recipe, case)
        trainings = trainings_of(case)
        measured: Probe | None = None
        others: tuple[Candidate, ...] = ()
        methods: tuple[Tried, ...] = ()
        if probed and probes is not None:
            measured, others = probing.measure(case, read.geometry, p, probes, threads=threads, progress=progress)
            methods = try_methods(case, recipe, measured.own, probes, threads, progress)
    finally:
        case.close()
    facts, found = (None, list[Finding]()) if measured is None else probing.facts(case.names, measured, others, methods)
    logged = [one.steps is not None or one.length is not None for one in trainings]
    blocks = blocks_of(read.tensors)
    geometries = [
        (name, sum_of([one.geometry for one in parts], len(p)), sum(one.numel for one in parts))
        for name, parts in blocks
    ]
    found = [*_refusals(case), *from_weights.findings(read, geometries), *beside, *found]
    found += from_training.findings(trainings) if any(logged) else []
    return Diagnosis(
        recipe=where,
        base=str(recipe.base_model),
        weights=said,
        experts=tuple(_experts(case, read, p)),
        refused=tuple((one.name, one.reason) for one in case.refused),
        together=_together(read, p),
        pairs=tuple(_pairs(read.names, read.geometry, read.tensors)),
        blocks=tuple(_block(read.names, name, parts, p) for name, parts in blocks),
        findings=ranked(found),
        unknown=tuple(_unknown(trainings, logged, facts)),
        evidence=("checkpoints", *(["logs"] if any(logged) else []), *(["probes"] if facts else [])),
        seconds=time.perf_counter() - started,
        probes=facts,
        training=from_training.trained(trainings) if any(logged) else (),
        bound=from_training.bound_facts(trainings, read.geometry, p, measured) if any(logged) else None,
    )


def _unknown(trainings: Sequence[Training], logged: Sequence[bool], probes: ProbeFacts | None) -> list[str]:
    """Return what could not be said, and what would tell."""
    found: list[str] = []
    silent = [one.name for one, said in zip(trainings, logged, strict=True) if not said]
    if silent:
        whose = "" if len(silent) == len(trainings) else f" of {', '.join(silent)}"
        found.append(
            f"training lengths, batches, data and optimizers{whose}: give each model data: {{logs: FILE or FOLDER}}"
        )
    apart = [trainings[group.experts[0]].name for group in compare(trainings).lengths if group.optimizer is None]
    if apart:
        found.append(
            f"the optimizer of {', '.join(apart)}, so that its training length is compared with nobody's: add its "
            "training_args.bin, training_args.json or YAML config to the logs"
        )
    if probes is None:
        found.append("the loss after merging: give each model data: {probe: FILE.jsonl} of 50 to 500 rows")
    return found


def weights_of(recipe: Recipe, case: Case) -> tuple[Vector, str]:
    """Return p, [K], and where it comes from: the recipe's weights where they are one number each, else 1 / K."""
    count = len(case.names)
    given: list[Any] = [
        entry.parameters.get("weight", recipe.parameters.get("weight"))
        for entry in recipe.models
        if entry.model != recipe.base_model and entry.model in {one.model for one in case.entries}
    ]
    plain = len(given) == count and all(isinstance(one, int | float) and not isinstance(one, bool) for one in given)
    if recipe.merge_method not in _WEIGHTED or not plain:
        return np.full(count, 1.0 / count), "uniform, 1 / K"
    return np.array(given, np.float64), "the recipe's"


def blocks_of(tensors: Sequence[TensorSurvey]) -> list[tuple[str, list[TensorSurvey]]]:
    """Return tensors by block, in order; what lies outside blocks comes last."""
    found: dict[tuple[bool, str, int], list[TensorSurvey]] = {}
    for one in tensors:
        place = place_of(one.name)
        key = (True, "", 0) if place.block is None else (False, place.tower, place.block)
        found.setdefault(key, []).append(one)
    return [
        (_OUTSIDE if outside else f"{tower}.{number}".lstrip("."), parts)
        for (outside, tower, number), parts in sorted(found.items(), key=lambda item: item[0])
    ]


def _refusals(case: Case) -> list[Finding]:
    return [
        Finding("stop", "cannot-be-merged", (one.name,), one.reason, "mend it, or leave this expert out")
        for one in case.refused
    ]


def _experts(case: Case, read: Survey, p: Vector) -> list[ExpertFacts]:
    geometry, numel = read.geometry, max(1, sum(one.numel for one in read.tensors))
    changed = sum((one.changed for one in read.tensors), np.zeros(len(p), np.int64))
    moved, ranks = np.sqrt(geometry.moves(p)), [_rank(read.tensors, k) for k in range(len(p))]
    return [
        ExpertFacts(
            name=expert.name,
            reference=expert.reference,
            form="adapter" if expert.checkpoint is None else "full",
            norm=float(geometry.norms[k]),
            relative_norm=float(geometry.norms[k]) / geometry.base_norm if geometry.base_norm else 0.0,
            base_cosine=float(geometry.base_cosines[k]),
            weight=float(p[k]),
            moved=float(moved[k]),
            changed=float(changed[k]) / numel,
            effective_rank=ranks[k][0],
            effective_rank_error=ranks[k][1],
        )
        for k, expert in enumerate(case.plan.experts)
    ]


def _rank(tensors: Sequence[TensorSurvey], k: int) -> tuple[float, float] | tuple[None, None]:
    """Return the median effective rank of an expert's updates of matrices, and its matrix's standard error.

    The rank is G^2 / e with G exact, so that their relative errors are the same.
    """
    found: list[tuple[float, float]] = []
    for one in tensors:
        if one.energies is not None and one.energies[k, k] > 0:
            energy, error = float(one.energies[k, k]), 0.0 if one.errors is None else float(one.errors[k, k])
            rank = float(one.geometry.gram[k, k]) ** 2 / energy
            found.append((rank, rank * error / energy))
    if not found:
        return None, None
    middle = np.array(sorted(found)[(len(found) - 1) // 2 : len(found) // 2 + 1]).mean(0)
    return float(middle[0]), float(middle[1])


def _pairs(names: Sequence[str], geometry: Geometry, tensors: Sequence[TensorSurvey]) -> list[PairFacts]:
    opposite = sum((one.opposite for one in tensors), np.zeros(geometry.gram.shape, np.int64))
    both = sum((one.both for one in tensors), np.zeros(geometry.gram.shape, np.int64))
    found: list[PairFacts] = []
    for k in range(len(names)):
        for j in range(k):
            overlap, error = _overlap(tensors, j, k)
            share = float(opposite[j, k] / both[j, k]) if both[j, k] else None
            found.append(PairFacts(names[j], names[k], float(geometry.cosines[j, k]), share, overlap, error))
    return found


def _overlap(tensors: Sequence[TensorSurvey], j: int, k: int) -> tuple[float | None, float | None]:
    """Return the overlap of two experts' input directions over some tensors' matrices, and its standard error."""
    pairs = [(one.energies, one.errors) for one in tensors if one.energies is not None]
    cross = sum(float(energies[j, k]) for energies, _ in pairs)
    own = math.sqrt(sum(float(e[j, j]) for e, _ in pairs) * sum(float(e[k, k]) for e, _ in pairs))
    if own <= 0:
        return None, None
    error = math.sqrt(sum(float(errors[j, k]) ** 2 for _, errors in pairs if errors is not None))
    return min(1.0, cross / own), error / own


def _together(read: Survey, p: Vector) -> SetFacts:
    geometry, tensors = read.geometry, read.tensors
    count = len(p)
    magnitudes = sum((one.magnitudes for one in tensors), np.zeros(count))
    return SetFacts(
        parameters=read.numel,
        changed=sum(one.numel for one in tensors),
        displacement=geometry.displacement(p) if abs(p.sum() - 1) < 1e-6 else None,
        orthogonal=float(np.trace(geometry.gram)) / count * (1 - 1 / count),
        sigma_max=geometry.sigma_max,
        sigma_max_centred=geometry.sigma_max_centred,
        common=geometry.common,
        cancelled=_cancelled(magnitudes, sum(one.kept for one in tensors)),
        by_chance=_by_chance(tensors, count),
    )


def _cancelled(magnitudes: Vector, kept: float) -> float:
    total = float(magnitudes.sum())
    return max(0.0, 1 - kept / total) if total > 0 else 0.0


def _by_chance(tensors: Sequence[TensorSurvey], count: int) -> float:
    """Return what would cancel of independent normal entries: 1 - sqrt(sum sigma_k^2) / sum sigma_k, by tensor."""
    kept, total = 0.0, 0.0
    for one in tensors:
        lengths = one.geometry.norms * math.sqrt(one.numel)
        kept, total = kept + float(np.sqrt(np.square(lengths).sum())), total + float(lengths.sum())
    return 1 - kept / total if total > 0 and count > 1 else 0.0


def _block(names: Sequence[str], name: str, parts: Sequence[TensorSurvey], p: Vector) -> BlockFacts:
    geometry = sum_of([one.geometry for one in parts], len(p))
    pair, cosine = _least(names, geometry)
    magnitudes = sum((one.magnitudes for one in parts), np.zeros(len(p)))
    ranks = [_rank(parts, k) for k in range(len(p))]
    return BlockFacts(
        name=name,
        norms=tuple(map(float, geometry.norms)),
        displacement=geometry.displacement(p / p.sum()) if p.sum() > 0 else 0.0,
        cosine=cosine,
        pair=pair,
        cancelled=_cancelled(magnitudes, sum(one.kept for one in parts)),
        sigma_max=geometry.sigma_max,
        sigma_max_centred=geometry.sigma_max_centred,
        effective_ranks=tuple(rank for rank, _ in ranks),
        effective_rank_errors=tuple(error for _, error in ranks),
        pairs=tuple(_pairs(names, geometry, parts)),
    )


def _least(names: Sequence[str], geometry: Geometry) -> tuple[tuple[str, str] | None, float | None]:
    """Return the pair that agrees least, among experts that change anything."""
    active = [k for k in range(len(names)) if geometry.norms[k] > 0]
    pairs = [(float(geometry.cosines[j, k]), (names[j], names[k])) for k in active for j in active if j < k]
    if not pairs:
        return None, None
    cosine, pair = min(pairs)
    return pair, cosine
