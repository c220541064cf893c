"""Tables and pictures of the Expert Merging study, from its cells alone."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from studies.cells import Cell, Tables
from suites.language import DOMAINS

KINDS = {
    "lora": "Four LoRA adapters (rank 8)",
    "full": "Two full fine-tunes (pronounce, sentiment) and two adapters (translate, code)",
}


INTRODUCTION = (
    "Ten unlabelled prompts per expert; three disjoint draws of them. *KL to the experts* is the mean over domains of "
    "KL(expert || merge) per token of 60 held-out test prompts each; *test loss* is nats per response token on 100 "
    "held-out test rows a domain, at most 60 tokens each. ± is the standard deviation over draws. Differences from "
    "Task Arithmetic, whose lambda is chosen on the same prompts by the same divergence, carry 95% bootstrap "
    "intervals over test rows (paired; draws averaged). *Gain kept* is the mean over domains of (base - merge) / "
    "(base - expert). Mixture training saw all domains' labelled training rows: it is a reference, not a competitor. "
    "One training seed per expert. AdaMerging has here the steps and the step size of the other learned methods, not "
    "its paper's."
)


def mean_kl(result: Mapping[str, Any], split: str = "test") -> float:
    """Return the mean over domains of KL(expert || merge) per prompt token."""
    return sum(result[split]["divergences"][d]["kl"] for d in DOMAINS) / len(DOMAINS)


def mean_loss(result: Mapping[str, Any], split: str = "test") -> float:
    """Return the mean over domains of the loss per response token."""
    return sum(result[split]["losses"][d]["loss"] for d in DOMAINS) / len(DOMAINS)


def own_loss(by_id: Mapping[str, Cell], kind: str, domain: str) -> float | None:
    """Return an expert's test loss on its own domain."""
    cell = by_id.get(f"{kind}-expert-{domain}") or by_id.get(f"lora-expert-{domain}")
    return None if cell is None else cell.result["test"]["losses"][domain]["loss"]


def kept(result: Mapping[str, Any], by_id: Mapping[str, Cell], kind: str) -> float | None:
    """Return the mean over domains of (base - merge) / (base - own expert), in test loss."""
    base = by_id.get("base")
    own = {d: own_loss(by_id, kind, d) for d in DOMAINS}
    if base is None or any(value is None for value in own.values()):
        return None
    shares: list[float] = []
    for domain in DOMAINS:
        start = base.result[kind]["test"]["losses"][domain]["loss"]
        end = own[domain]
        assert end is not None
        shares.append((start - result["test"]["losses"][domain]["loss"]) / (start - end))
    return sum(shares) / len(shares)


def paired(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], what: str
) -> tuple[float, float, float]:
    """Return the mean difference ours - theirs over domains, averaged over draws, and its 95% bootstrap interval.

    Rows are drawn with replacement within each domain, the same rows for both methods and all draws.
    """
    part, tokens = ("divergences", "tokens") if what == "kl" else ("losses", "row_tokens")
    return bootstrap([one["test"][part] for one in ours], [one["test"][part] for one in theirs], tokens)


def bootstrap(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], tokens: str = "row_tokens"
) -> tuple[float, float, float]:
    """Return the same of figures by domain, whose rows have ``sums`` over so many ``tokens``."""
    generator = np.random.default_rng(0)
    differences = np.zeros(1001)
    for domain in DOMAINS:
        a = np.mean([one[domain]["sums"] for one in ours], 0)
        b = np.mean([one[domain]["sums"] for one in theirs], 0)
        count = np.asarray(ours[0][domain][tokens], float)
        rows = generator.integers(0, len(count), (1000, len(count)))
        drawn = (a - b)[rows].sum(1) / count[rows].sum(1)
        differences += np.concatenate([[(a - b).sum() / count.sum()], drawn]) / len(DOMAINS)
    low, high = np.quantile(differences[1:], [0.025, 0.975])
    return float(differences[0]), float(low), float(high)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Return a mean, and its standard deviation where there are several values."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def _runs(cells: Sequence[Cell], kind: str) -> dict[str, list[Mapping[str, Any]]]:
    """Return results by label: learned and tuned methods by draw, the rest once."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for cell in cells:
        if cell.setting["kind"] == "model":
            label = {"mixture": "mixture training (supervised)", "base": "base"}[cell.setting["model"]]
            found.setdefault(label, []).append(cell.result[kind])
        elif cell.setting.get("experts") == kind and cell.setting["kind"] != "expert" and "split" not in cell.setting:
            found.setdefault(cell.setting["label"], []).append(cell.result)
    return found


def _table(cells: Sequence[Cell], kind: str, by_id: Mapping[str, Cell]) -> list[str]:
    runs = _runs(cells, kind)
    if len(runs) < 3:
        return []
    anchor = runs.get("task_arithmetic", [])
    lines = [
        f"## {KINDS[kind]}", "",
        "| method | draws | KL to the experts | KL less Task Arithmetic's | test loss | loss less Task Arithmetic's | "
        "gain kept | " + " | ".join(DOMAINS) + " |",
        "|---|---|---|---|---|---|---|" + "---|" * len(DOMAINS),
    ]  # fmt: skip
    for label, results in sorted(runs.items(), key=lambda item: np.mean([mean_kl(r) for r in item[1]])):
        gains = [gain for r in results if (gain := kept(r, by_id, kind)) is not None]
        differences: list[str] = []
        for what in ("kl", "loss"):
            if label == "task_arithmetic" or not anchor:
                differences.append("")
                continue
            value, low, high = paired(results, anchor, what)
            differences.append(f"{value:+.3f} [{low:+.3f}, {high:+.3f}]")
        each = " | ".join(f"{np.mean([r['test']['losses'][d]['loss'] for r in results]):.3f}" for d in DOMAINS)
        gain = f"{100 * np.mean(gains):.0f}%" if gains else ""
        kl, loss = spread([mean_kl(r) for r in results]), spread([mean_loss(r) for r in results])
        lines.append(
            f"| {label} | {len(results)} | {kl} | {differences[0]} | {loss} | {differences[1]} | {gain} | {each} |"
        )
    strengths = [r["strength"] for r in anchor]
    if strengths:
        lines += ["", f"Task Arithmetic's lambda by draw: {', '.join(f'{s:g}' for s in strengths)}."]
    return [*lines, ""]


def _tried(cells: Sequence[Cell]) -> list[str]:
    """Return what the defaults were chosen among, on validation rows."""
    tried = [cell for cell in cells if cell.setting.get("split") == "validation"]
    if not tried:
        return []
    lines = [
        "## Settings tried on validation rows", "",
        "First draw, LoRA experts; one setting changed at a time from rate 0.04, gamma 0.8, hidden weight 1, alphabar",
        "0.3. Test rows played no part in the choice.", "",
        "| setting | KL to the experts | loss |", "|---|---|---|",
    ]  # fmt: skip
    for cell in tried:
        kl, loss = mean_kl(cell.result, "validation"), mean_loss(cell.result, "validation")
        lines.append(f"| {cell.setting['label']} | {kl:.3f} | {loss:.3f} |")
    return [*lines, ""]


def _costs(cells: Sequence[Cell]) -> list[str]:
    lines = ["## Cost of learning", "", "| cell | coefficients per expert | steps | seconds |", "|---|---|---|---|"]
    for cell in cells:
        held = cell.result.get("learned") if cell.setting["kind"] == "learned" else None
        if held:
            seconds = held.get("seconds")
            lines.append(
                f"| {cell.id} | {held['coefficients']} | {held.get('steps', '')} | "
                f"{'' if seconds is None else f'{seconds:.0f}'} |"
            )
    return [*lines, ""] if len(lines) > 4 else []


def tables(cells: Sequence[Cell]) -> Tables:
    """Return the page and its pictures."""
    by_id = {cell.id: cell for cell in cells}
    lines = ["# Expert Merging on the language experts", "", *textwrap.wrap(INTRODUCTION, 118), ""]
    for kind in KINDS:
        lines += _table(cells, kind, by_id)
    lines += _tried(cells)
    pictures: dict[str, bytes] = {}
    held = next((c for c in cells if c.id == "lora-expert_merging_pp-0"), None)
    if held is not None:
        from consilience.coefficients.picture import importance_picture

        pictures["importance.png"] = importance_picture(held.result["learned"]["importance"])
        lines += [
            "## Importance", "",
            "Share of every tensor in what the first stage's coefficients move (draw 0), by depth and type:", "",
            "![Importance by depth and tensor type](expert_merging/importance.png)", "",
        ]  # fmt: skip
    curves = [
        cell
        for cell in cells
        if cell.setting["kind"] == "learned" and "split" not in cell.setting and cell.result["learned"]["history"]
    ]
    if curves:
        pictures["loss.png"] = _curves(curves)
        lines += ["## Loss while learning", "", "![Loss by step](expert_merging/loss.png)", ""]
    lines += _costs(cells)
    return Tables("\n".join(lines), pictures)


def _curves(cells: Sequence[Cell]) -> bytes:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    chosen = [c for c in cells if c.setting["experts"] == "lora" and c.setting["label"].startswith("expert_merging")]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    colours: dict[str, Any] = {}
    for cell in chosen:
        label = cell.setting["label"]
        new = label not in colours
        colour = colours.setdefault(label, f"C{len(colours)}")
        axes.plot(cell.result["learned"]["history"], color=colour, alpha=0.7, label=label if new else None)
    axes.set_xlabel("step of the (last) stage")
    axes.set_ylabel("objective on the step's samples")
    axes.legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": ""})
    plt.close(figure)
    return buffer.getvalue()
