"""Findings from probe data: what merging costs, what would cost less, whether more experts will help."""

import numpy as np

from consilience.doctor.candidates import Candidate
from consilience.doctor.evidence.probe import Probe
from consilience.doctor.findings.finding import Finding
from consilience.doctor.trying import Tried

#: A merge that keeps less than this share of an expert's gain over the base has lost the expert.
LOST = 0.5
#: Shares of the mean loss that a candidate must gain to be advised, and an expert's next step along its task vector.
_GAIN, _UNFINISHED = 0.02, 0.1


def findings(
    names: tuple[str, ...], probe: Probe, found: tuple[Candidate, ...], methods: tuple[Tried, ...] = ()
) -> list[Finding]:
    """Return what the losses show."""
    return [
        *_useless(names, probe), *_lost(names, probe), *_unfinished(names, probe), *_better(names, probe, found),
        *_method(probe, found, methods),
    ]  # fmt: skip


def _useless(names: tuple[str, ...], probe: Probe) -> list[Finding]:
    return [
        Finding("warning", "no-better-than-base", (name,),
                f"{name} is no better on its own task than the base ({own:.3f} against {base:.3f} nats a token)",
                "check the expert and its probe rows; as it is, it can only cost the others", "its weight is free")
        for name, own, base in zip(names, probe.own, probe.base, strict=True) if own >= base
    ]  # fmt: skip


def _lost(names: tuple[str, ...], probe: Probe) -> list[Finding]:
    found: list[Finding] = []
    for k, name in enumerate(names):
        gain = probe.base[k] - probe.own[k]
        if gain <= 0:
            continue
        kept = float((probe.base[k] - probe.merged[k]) / gain)
        if kept < LOST:
            found.append(Finding(
                "warning", "lost-in-the-merge", (name,),
                f"with these weights {name}'s task keeps {100 * kept:.0f} % of what the expert gained (loss "
                f"{probe.own[k]:.3f} alone, {probe.merged[k]:.3f} merged, {probe.base[k]:.3f} of the base)",
                "give it more weight, learn the weights (expert_merging), or route instead of merging",
                "measured on its probe rows",
            ))  # fmt: skip
    return found


def _unfinished(names: tuple[str, ...], probe: Probe) -> list[Finding]:
    """An expert whose loss still falls along its own task vector was stopped early; one whose loss rises, late."""
    found: list[Finding] = []
    for k, name in enumerate(names):
        slope, gain = float(probe.slopes[k, k]), float(probe.base[k] - probe.own[k])
        if gain > 0 and abs(slope) > _UNFINISHED * gain:
            early = slope < 0
            found.append(Finding(
                "note", "stopped-early" if early else "trained-too-far", (name,),
                f"{name}'s loss still {'falls' if early else 'rises'} along its task vector ({slope:+.3f} nats for "
                "doubling it)",
                "train it longer, or give it a larger weight" if early else "shrink it, or keep an earlier checkpoint",
                "", "likely",
            ))  # fmt: skip
    return found


def _better(names: tuple[str, ...], probe: Probe, found: tuple[Candidate, ...]) -> list[Finding]:
    """The first candidate, if it gains something over the weights given; the best that was tried, if any was."""
    best, given = found[0], float(np.mean(probe.merged))
    if best.measured_mean is None or given - best.measured_mean <= _GAIN * abs(given):
        return []
    weights = ", ".join(f"{name} {value:.2f}" for name, value in zip(names, best.weights, strict=True))
    left_out = tuple(name for name, value in zip(names, best.weights, strict=True) if value == 0)
    return [Finding(
        "warning", "better-weights", left_out,
        f"other weights do better on the probe rows: {best.name} ({weights})",
        "merge with these weights, and evaluate on rows that the doctor has not seen",
        f"mean loss {given:.3f} -> {best.measured_mean:.3f} nats a token, both measured on the probe rows",
        "likely",
    )]  # fmt: skip


def _method(probe: Probe, found: tuple[Candidate, ...], methods: tuple[Tried, ...]) -> list[Finding]:
    """The best method that was tried, if it gains something over the best fixed weights that were."""
    weights = min([float(np.mean(probe.merged)), *(one.measured_mean or np.inf for one in found)])
    if not methods or weights - methods[0].mean <= _GAIN * abs(weights):
        return []
    best = methods[0]
    return [Finding(
        "warning", "better-method", (),
        f"{best.name} does better on the probe rows than any fixed weights that were tried",
        "merge with it, and evaluate on rows that the doctor has not seen",
        f"mean loss {weights:.3f} -> {best.mean:.3f} nats a token, both measured on the probe rows", "likely",
    )]  # fmt: skip
