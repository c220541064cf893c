"""Tables of the study of Expert Merging on the experts' answers, from its cells alone."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from studies.cells import Cell, Tables
from studies.expert_merging_tables import bootstrap, spread
from suites.language import DOMAINS, MORE_DOMAINS

Losses = Mapping[str, Mapping[str, Any]]
MIXTURE = "joint training (supervised)"
SWEPT = "Task Arithmetic, strength chosen on validation rows"
RANDOM = "expert_merging of random experts of the same size"
FRESH, FRESH_GIVEN = "fresh LoRA on the same answers", "fresh LoRA, answers to the given prompts alone"

INTRODUCTION = (
    "Expert Merging learned on what the experts answer to a few unlabelled prompts. A draw is ten prompts of each "
    "domain (three disjoint draws; files hold thirty); every expert answers each of its prompts four times at "
    "temperature 1, and coefficients are learned where those answers are predicted. *merge + distil* "
    "(expert_merging_distil) learns a low-rank correction with them, by the same loss and on further prompts that "
    "the base writes. Losses are nats per response token on 100 held-out test rows a domain, at most 60 tokens "
    "each, of the merged checkpoint in bfloat16. ± is the standard deviation over draws. *Gain kept* is (base - "
    "merge) / (base - own expert), mean over domains, with the least of them. Differences from joint training carry "
    "95% bootstrap intervals over test rows (paired; draws averaged). *Seconds* are those of the whole command, "
    "answers included, where it had two cores to itself. Joint training saw all domains' labelled training rows for "
    "600 steps. A fresh LoRA is trained on the rows of merge + distil, written prompts included, or on answers to the "
    "given prompts alone (both sampled by an earlier revision: other rows than today's, of the same law). Random "
    "experts are adapters of Gaussian factors, each update as large as the trained one in its place. Settings were "
    "tuned on validation rows of the first draw; test rows were read once for each revision."
)


def mean_loss(losses: Losses) -> float:
    """Return the mean over domains of the loss per response token."""
    return float(np.mean([one["loss"] for one in losses.values()]))


def gains(losses: Losses, base: Losses, own: Mapping[str, float]) -> list[float]:
    """Return (base - merge) / (base - own expert) of every domain."""
    return [(base[d]["loss"] - losses[d]["loss"]) / (base[d]["loss"] - own[d]) for d in own]


def _runs(cells: Sequence[Cell], kind: str) -> dict[tuple[str, int], list[Mapping[str, Any]]]:
    """Return results by (label, prompts); prompts is 0 where none were used."""
    found: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for cell in cells:
        setting, result = cell.setting, cell.result
        own = setting.get("experts", "lora")
        of_kind = kind == (own if own in ("full", "further") else "lora")  # all else stands beside the adapters
        if setting["kind"] == "model" and (own == "further") == (kind == "further"):
            found.setdefault(({"mixture": MIXTURE, "base": "base"}[setting["model"]], 0), []).append(result)
        elif setting["kind"] in ("fresh", "learned", "swept") and of_kind:
            found.setdefault((setting["label"], setting.get("prompts", 0)), []).append(result)
    return found


def _alone(result: Mapping[str, Any]) -> bool:
    """Whether a cell had both cores to itself and was not suspended, so that its seconds are the command's."""
    threads = result.get("threads", 2)
    busy = result.get("busy", threads * result["seconds"])
    if result.get("suspended", False):
        return False
    return threads == 2 and result.get("load", 0.0) < 2.5 and busy > 0.85 * threads * result["seconds"]


def _table(cells: Sequence[Cell], kind: str, title: str) -> list[str]:
    domains = MORE_DOMAINS if kind == "further" else DOMAINS
    runs = _runs(cells, kind)
    mixture = runs.get((MIXTURE, 0), [{}])[0].get("losses")
    base = runs.get(("base", 0), [{}])[0].get("losses")
    own = {
        c.setting["domain"]: c.result["losses"][c.setting["domain"]]["loss"]
        for c in cells
        if c.setting["kind"] == "expert" and c.setting["domain"] in domains
    }
    if base is None or len(own) < len(domains) or len(runs) < 3:
        return []
    lines = [
        f"## {title}", "",
        "| method | prompts | draws | test loss | less joint training's | gain kept (least) | seconds | "
        + " | ".join(domains) + " |",
        "|---|---|---|---|---|---|---|" + "---|" * len(domains),
    ]  # fmt: skip
    for (label, prompts), results in sorted(
        runs.items(), key=lambda item: np.mean([mean_loss(r["losses"]) for r in item[1]])
    ):
        losses = [result["losses"] for result in results]
        shares = np.mean([gains(one, base, own) for one in losses], 0)
        seconds = [result["seconds"] for result in results if "seconds" in result and _alone(result)]
        cells_of_row = [
            label, prompts or "", len(results), spread([mean_loss(one) for one in losses]),
            "" if mixture is None or label == MIXTURE else _difference(losses, mixture),
            f"{100 * np.mean(shares):.1f}% ({100 * min(shares):.1f}%)", f"{np.mean(seconds):.0f}" if seconds else "",
            *(f"{np.mean([one[d]['loss'] for one in losses]):.3f}" for d in domains),
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells_of_row)) + " |")
    mean = np.mean([own[d] for d in domains])
    lines += ["", f"The experts themselves, each on its own domain: {mean:.3f} ("
              + ", ".join(f"{d} {own[d]:.3f}" for d in domains) + ")."]  # fmt: skip
    return [*lines, ""]


def _difference(losses: Sequence[Losses], mixture: Losses) -> str:
    value, low, high = bootstrap(losses, [mixture])
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


def tables(cells: Sequence[Cell]) -> Tables:
    """Return the page."""
    lines = [
        "# Expert Merging on the experts' answers",
        "",
        *textwrap.wrap(INTRODUCTION, 118, break_on_hyphens=False),
        "",
    ]
    lines += _table(cells, "lora", "Four LoRA adapters (rank 8)")
    lines += _table(cells, "full", "Two full fine-tunes (pronounce, sentiment) and two adapters (translate, code)")
    lines += _table(cells, "further", "Four adapters of further domains, settings as they were")
    return Tables("\n".join(lines))
