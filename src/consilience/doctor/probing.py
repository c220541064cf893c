"""The doctor's part that needs data: run the probes of a case and put what they say into the report."""

from contextlib import closing
from dataclasses import dataclass

import numpy as np

from consilience.doctor.candidates import Candidate, candidates, tried
from consilience.doctor.diagnosis import ProbedTask, ProbeFacts
from consilience.doctor.evidence.case import Case
from consilience.doctor.evidence.landscape import RecipeLandscape
from consilience.doctor.evidence.probe import SCAN, Probe, probe
from consilience.doctor.findings import from_probe
from consilience.doctor.findings.finding import Finding
from consilience.doctor.theory.geometry import Geometry, Vector
from consilience.doctor.theory.saturation import expected_losses
from consilience.doctor.trying import Tried, Wanted
from consilience.engine.plan import resolve_file
from consilience.errors import InputError, option
from consilience.progress import Progress
from consilience.tasks.load import check_device, require_transformers


@dataclass(frozen=True)
class ProbeSettings:
    """How probes are run: the first ``rows`` of each file (0: all), where, and whether a model's own code may run.

    ``methods`` are merged and measured too.
    """

    rows: int = 100
    device: str = "cpu"
    trust_remote_code: bool = False
    methods: tuple[Wanted, ...] = ()


def has_probes(case: Case) -> bool:
    """Whether every expert has probe rows; that some have and others not is a mistake.

    Raises:
        InputError: names an expert without.
    """
    given = [entry.data is not None and entry.data.probe is not None for entry in case.entries]
    if any(given) and not all(given):
        missing = case.names[given.index(False)]
        raise InputError(
            f"{case.where}: {missing}: has no data: {{probe: FILE}}, and others have; give every expert one, or none"
        )
    for entry in case.entries if all(given) else ():
        assert entry.data is not None
        assert entry.data.probe is not None
        resolve_file(entry.data.probe, case.root)
    return all(given)


def check_probes(settings: ProbeSettings, where: str, *, probed: bool) -> None:
    """Check, before anything takes time, that probes can run where they are to, and that the choice has an effect.

    Raises:
        InputError: there is no such device, or torch is missing, or nothing runs the model.
    """
    if probed:
        require_transformers("measuring losses on probe rows")
        check_device(settings.device)
    elif settings.device != "cpu":
        shown = option("device", settings.device)
        raise InputError(f"{where}: {shown}: has no effect, since no expert has data: {{probe: FILE}}; leave it out")


def measure(
    case: Case,
    geometry: Geometry,
    p: Vector,
    settings: ProbeSettings,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[Probe, tuple[Candidate, ...]]:
    """Measure a case on its probe rows, and the best of the merges that could be made instead.

    Raises:
        InputError: a file or row is wrong, or the base is no Hugging Face folder.
    """
    landscape = RecipeLandscape(
        case,
        rows=settings.rows,
        device=settings.device,
        threads=threads,
        trust_remote_code=settings.trust_remote_code,
    )
    with closing(landscape):
        measured = probe(landscape, geometry.gram, p, progress)
        return measured, tried(case.names, measured, candidates(case.names, measured), landscape, progress)


def facts(
    names: tuple[str, ...], measured: Probe, found: tuple[Candidate, ...], methods: tuple[Tried, ...] = ()
) -> tuple[ProbeFacts, list[Finding]]:
    """Return what was measured, of the experts and of other merges, and the findings."""
    tasks = tuple(
        ProbedTask(
            task=name,
            rows=measured.rows[k],
            base=float(measured.base[k]),
            own=float(measured.own[k]),
            merged=float(measured.merged[k]),
            scan=tuple(map(float, measured.scan[:, k])),
            curvature=float(measured.curvatures[k]),
            barrier=float(measured.barriers[k]),
            heterogeneity=float(measured.heterogeneity[k]),
            noise=None if np.isnan(measured.noise[k]) else float(measured.noise[k]),
        )
        for k, name in enumerate(names)
    )
    curve, gain = saturation(measured)
    return (
        ProbeFacts(SCAN, tasks, found, methods, curve, gain),
        from_probe.findings(names, measured, found, methods),
    )


def saturation(measured: Probe) -> tuple[tuple[float, ...], float | None]:
    """Return the predicted mean loss of uniform merges of k random experts, k = 1 ... K, and what one more would gain.

    The curve is a constant plus A / k (``saturation.py``), and so goes on to K + 1 by itself.
    """
    count = len(measured.own)
    if count < 2:
        return (), None
    means = [
        float(expected_losses(k, measured.gram, measured.own, measured.slopes, measured.curvatures).mean())
        for k in range(1, count + 1)
    ]
    rate = 2 * (means[0] - means[1])
    return tuple(means), rate / count - rate / (count + 1) if count > 2 else None
