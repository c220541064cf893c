"""Every data-free method on the four language experts: strength tuned on validation rows, reported on test rows."""

import io
import shutil
from collections.abc import Sequence
from typing import Any

from studies.cells import Cell, Study, Tables
from studies.language import mean_loss, measure, merged, scores, scratch
from suites.language import DOMAINS, adapter_path
from suites.language.base import base_path

#: method label -> (method, space, parameters besides the strength); the strength multiplies the merged task vector.
METHODS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "task_arithmetic": ("task_arithmetic", "weights", {}),
    "task_arithmetic, adapter (cat)": ("task_arithmetic", "cat", {}),
    "task_arithmetic, adapter (svd-8)": ("task_arithmetic", "svd-8", {}),
    "ties, density 0.2": ("ties", "weights", {"density": 0.2}),
    "ties, density 0.5": ("ties", "weights", {"density": 0.5}),
    "ties, density 0.2, sum": ("ties", "weights", {"density": 0.2, "normalize": False}),
    "ties, density 0.2 over the model": ("ties", "weights", {"density": 0.2, "trim": "model"}),
    "dare_linear, density 0.5": ("dare_linear", "weights", {"density": 0.5}),
    "dare_ties, density 0.5": ("dare_ties", "weights", {"density": 0.5}),
    "tsv_m": ("tsv_m", "weights", {}),
    "iso_c": ("iso_c", "weights", {}),
    "iso_cts": ("iso_cts", "weights", {}),
    "wudi": ("wudi", "weights", {}),
    "wudi_v2": ("wudi_v2", "weights", {}),
    "swudi_a": ("swudi_a", "weights", {}),
    "actmat": ("actmat", "weights", {}),
    "svc": ("svc", "weights", {}),
    "knots": ("knots", "weights", {}),
    "core_space, ties": ("core_space", "weights", {"inner": "ties"}),
    "ace": ("ace", "weights", {}),
    "tact": ("tact", "weights", {}),
}
STRENGTHS = (0.25, 0.5, 0.75)
#: Methods of whole matrices, whose published strength is 1.
MATRIX = frozenset({
    "tsv_m", "iso_c", "iso_cts", "wudi", "wudi_v2", "swudi_a", "actmat", "svc", "knots", "core_space", "ace", "tact",
})  # fmt: skip
MATRIX_STRENGTHS = (0.5, 1.0, 1.5)
#: Further strengths of methods whose best was the first or the last of these.
FURTHER_STRENGTHS: dict[str, Sequence[float]] = {
    "wudi": (0.35, 0.7), "wudi_v2": (0.35, 0.7), "actmat": (0.35, 0.7), "tact": (0.35, 0.7),
    "iso_c": (2.0, 3.0), "iso_cts": (2.0, 3.0), "svc": (2.0, 3.0),
}  # fmt: skip
#: A disjoint mean is about a fourth of the sum of four task vectors, so it is tried at larger strengths.
MEAN_STRENGTHS = (0.75, 1.0, 1.5, 2.0)


def _strengths(label: str) -> Sequence[float]:
    method, _, parameters = METHODS[label]
    if method in MATRIX:
        return (*MATRIX_STRENGTHS, *FURTHER_STRENGTHS.get(method, ()))
    return MEAN_STRENGTHS if method == "ties" and parameters.get("normalize", True) else STRENGTHS


def _id(label: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in label).replace("--", "-").strip("-")


def _cells() -> list[tuple[str, dict[str, Any]]]:
    cells: list[tuple[str, dict[str, Any]]] = [("base", {"kind": "base", "seed": 0})]
    cells += [(f"expert-{domain}", {"kind": "expert", "domain": domain, "seed": 0}) for domain in DOMAINS]
    cells.append(
        (
            "linear",
            {"kind": "merge", "label": "linear", "method": "linear", "space": "weights", "parameters": {}, "seed": 0},
        )
    )
    for label, (method, space, parameters) in METHODS.items():
        for strength in _strengths(label):
            setting = {"kind": "merge", "label": label, "method": method, "space": space, "seed": 0}
            cells.append(
                (
                    f"{_id(label)}-{strength}",
                    setting | {"parameters": parameters | {"lambda": strength}, "strength": strength},
                )
            )
    return cells


def run(setting: dict[str, Any]) -> dict[str, Any]:
    """Make one model and measure it on validation and test rows."""
    out = scratch()
    try:
        if setting["kind"] == "base":
            model = str(base_path())
        elif setting["kind"] == "expert":
            model = f"{base_path()}+{adapter_path(setting['domain'])}"
        else:
            model = merged(out, setting["method"], setting["parameters"], setting["space"])
        return {split: scores(measure(model, split)) for split in ("validation", "test")}
    finally:
        shutil.rmtree(out.parent, ignore_errors=True)


def chosen(cells: Sequence[Cell]) -> dict[str, Cell]:
    """Return for each method the cell with the lowest mean validation loss."""
    best: dict[str, Cell] = {}
    for cell in cells:
        if cell.setting["kind"] == "merge":
            label = cell.setting["label"]
            if label not in best or mean_loss(cell.result["validation"]) < mean_loss(best[label].result["validation"]):
                best[label] = cell
    return best


def kept(cell: Cell, base: Cell, own: dict[str, Cell]) -> float:
    """Return the mean over domains of the gain kept, (base - merge) / (base - own expert), in test loss."""
    shares: list[float] = []
    for domain in DOMAINS:
        start, end = (c.result["test"][domain]["loss"] for c in (base, own[domain]))
        shares.append((start - cell.result["test"][domain]["loss"]) / (start - end))
    return sum(shares) / len(shares)


def _row(name: str, strength: str, cell: Cell, gain: str) -> str:
    test = cell.result["test"]
    losses = " | ".join(f"{test[d]['loss']:.3f} [{test[d]['low']:.2f}, {test[d]['high']:.2f}]" for d in DOMAINS)
    accuracy = test["sentiment"]["accuracy"]
    shown = f"{accuracy:.0%}" if accuracy is not None else ""
    return f"| {name} | {strength} | {losses} | {mean_loss(test):.3f} | {gain} | {shown} |"


def tables(cells: Sequence[Cell]) -> Tables:
    """Return the test table (strengths chosen on validation) and a picture of loss against strength."""
    by_id = {cell.id: cell for cell in cells}
    base = by_id.get("base")
    own = {d: by_id[f"expert-{d}"] for d in DOMAINS if f"expert-{d}" in by_id}
    if base is None or len(own) < len(DOMAINS):
        return Tables("# Merging the language experts\n\nNot measured yet: run `make results`.\n")
    lines = [
        "# Merging the language experts",
        "",
        "Four LoRA r8 experts on SmolLM2-135M-Instruct (4-bit weights dequantised), 100 held-out test rows, at most 60",
        "scored tokens a row; loss in nats per response token with a 95% bootstrap interval over rows. The strength (a",
        "multiplier of the merged task vector) is chosen by mean loss on separate validation rows; *gain kept* is the",
        "mean over domains of (base - merge) / (base - own expert). One seed: intervals cover rows, not training runs.",
        "",
        "| model | strength | " + " | ".join(DOMAINS) + " | mean | gain kept | sentiment accuracy |",
        "|---|---|" + "---|" * (len(DOMAINS) + 3),
        _row("base", "", base, "0%"),
        *(_row(f"expert {d}", "", own[d], f"{kept(own[d], base, own):.0%}") for d in DOMAINS),
    ]
    best = sorted(chosen(cells).values(), key=lambda cell: mean_loss(cell.result["test"]))
    lines += [
        _row(c.setting["label"], f"{c.setting.get('strength', '')}", c, f"{kept(c, base, own):.0%}") for c in best
    ]
    lines += ["", "![Mean validation loss against strength](language_merge/strength.png)", ""]
    return Tables("\n".join(lines), {"strength.png": _picture(cells, base)})


def _picture(cells: Sequence[Cell], base: Cell) -> bytes:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    colours = plt.get_cmap("tab20").colors  # pyright: ignore[reportAttributeAccessIssue]
    for number, label in enumerate(METHODS):
        points = sorted(
            (c.setting["strength"], mean_loss(c.result["validation"])) for c in cells if c.setting.get("label") == label
        )
        if points:
            style: dict[str, Any] = {
                "color": colours[number % len(colours)],
                "marker": "osD^v"[number % 5],
                "linewidth": 1.2,
            }
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.axhline(mean_loss(base.result["validation"]), color="grey", linestyle="--", label="base")
    axes.set_xlabel("strength (multiplier of the merged task vector)")
    axes.set_ylabel("mean validation loss, nats per token")
    axes.set_ylim(top=mean_loss(base.result["validation"]) * 1.03)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": ""})
    plt.close(figure)
    return buffer.getvalue()


STUDY = Study("language_merge", tuple(_cells()), run, tables)
