"""The page of the GLUE study on images, from its finished cells."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from studies.cells import Cell, Tables
from studies.glue_vision import AFFINE, METHODS, SEARCH

Key = tuple[str, str, str]
#: Whom GLUE is compared with, and what the paper claims of it at most, in points of test accuracy after fine-tuning.
CLAIMS = {
    "data-size": "up to +8.5",
    "logme": "up to +9.1 (over a proxy's choice)",
    "h-score": "up to +9.1 (over a proxy's choice)",
    "leep": "up to +9.1 (over a proxy's choice)",
    "full-gradient": "within 1.4, or better",
    "uniform": "not said",
    "best-single": "not said",
    "base": "not said",
}

_HEAD = """# GLUE on images

Ten experts from one short shared pre-training, each on its own class-skewed shard (Dirichlet delta; the smaller, the
more skewed), are mixed for a target of {train} labelled images and fine-tuned on them for five epochs. Weights are
found on training and validation images of the target alone; test accuracy is in percent on 3,000 published test images,
± the standard deviation over seeds. *Before* is the mixture itself, its BatchNorm statistics re-estimated on the
target's training images (for every method alike), *after* is after the same fine-tuning. The search: {search}.
The paper's step sizes, steps, sizes and fine-tuning are not known; these are ours.
"""


def page(cells: Sequence[Cell]) -> Tables:
    """Return the page and its pictures."""
    groups: dict[Key, list[Cell]] = {}
    for cell in cells:
        s = cell.setting
        if s["kind"] in ("skewed", "halves"):
            groups.setdefault((s["kind"], s["data"], f"{s['net']}, delta {s['delta']:g}" if "delta" in s else s["net"]),
                              []).append(cell)  # fmt: skip
    search = ", ".join(f"{key} {value}" for key, value in SEARCH.items())
    search += "; affine: " + ", ".join(f"{key} {value}" for key, value in AFFINE.items())
    parts = [_HEAD.format(train="1,000", search=search)]
    skewed = {key: found for key, found in groups.items() if key[0] == "skewed"}
    pictures: dict[str, bytes] = {}
    if skewed:
        parts += ["## Which of the paper's claims hold here", _claims(skewed), "## Before fine-tuning"]
        parts += [_grid(skewed, "before"), "## After fine-tuning", _grid(skewed, "after")]
        pictures["accuracy.png"] = _picture(skewed)
        parts += ["![Accuracy before and after fine-tuning](glue_vision/accuracy.png)"]
        parts += ["## Where the mixtures lie", _places(skewed)]
    halves = {key: found for key, found in groups.items() if key[0] == "halves"}
    if halves:
        parts += ["## Experts on classes 0-4 and 5-9, a target of all ten", _grid(halves, "before"),
                  "After fine-tuning:", _grid(halves, "after"), _places(halves)]  # fmt: skip
    unlike = [cell for cell in cells if cell.setting["kind"] == "unlike"]
    if unlike:
        parts += ["## Five ResNet-20 and five ViT experts: predictions mixed, then distilled", _unlike(unlike)]
    tried = [cell for cell in cells if cell.setting["kind"] == "tried"]
    if tried:
        parts += ["## Settings tried on validation images", _tried(tried)]
    return Tables("\n\n".join(parts) + "\n", pictures)


def _values(cells: Sequence[Cell], method: str, key: str) -> list[float]:
    found = [cell.result["methods"].get(method, {}).get(key) for cell in cells]
    return [100 * value for value in found if value is not None]


def _shown(values: Sequence[float], sign: bool = False) -> str:
    if not values:
        return ""
    mean = f"{np.mean(values):+.1f}" if sign else f"{np.mean(values):.1f}"
    return f"{mean} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else mean


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _grid(groups: dict[Key, list[Cell]], key: str) -> str:
    """Methods by settings; the number of seeds is in the header."""
    header = ["method", *(f"{data}, {what} (n={len(cells)})" for (_, data, what), cells in groups.items())]
    rows: list[list[str]] = []
    for method, label in METHODS.items():
        shown = [_shown(_values(cells, method, key)) for cells in groups.values()]
        if any(shown):
            rows.append([label, *shown])
    return _table(header, rows)


def _claims(groups: dict[Key, list[Cell]]) -> str:
    """Differences of GLUE from the others, paired by cell: mean over all cells, and the extremes of settings' means."""
    rows: list[list[str]] = []
    for other, claim in CLAIMS.items():
        row = [METHODS[other], claim]
        for key in ("before", "after"):
            each = {place: _differences(cells, other, key) for place, cells in groups.items()}
            every = [value for found in each.values() for value in found]
            means = [float(np.mean(found)) for found in each.values() if found]
            if not every:
                row += ["", ""]
                continue
            row += [_interval(every), f"{min(means):+.1f} to {max(means):+.1f}"]
        rows.append(row)
    header = [
        "GLUE less",
        "the paper",
        "before: mean [95%]",
        "before: settings",
        "after: mean [95%]",
        "after: settings",
    ]
    return _table(header, rows)


def _differences(cells: Sequence[Cell], other: str, key: str) -> list[float]:
    found: list[float] = []
    for cell in cells:
        methods = cell.result["methods"]
        one, two = methods["glue"].get(key), methods.get(other, {}).get(key)
        if one is not None and two is not None:
            found.append(100 * (one - two))
    return found


def _interval(values: Sequence[float]) -> str:
    """Mean with a percentile bootstrap interval over cells."""
    if len(values) < 3:
        return f"{np.mean(values):+.1f}"
    generator = np.random.default_rng(0)
    draws = generator.choice(values, (4000, len(values))).mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"{np.mean(values):+.1f} [{low:+.1f}, {high:+.1f}]"


def _places(groups: dict[Key, list[Cell]]) -> str:
    """What the searches found and what they cost."""
    rows: list[list[str]] = []
    for (_, data, what), cells in groups.items():
        for method in ("glue", "glue-affine", "full-gradient"):
            found = [cell.result["methods"][method] for cell in cells]
            entropy = [one["entropy"] for one in found if one["entropy"] is not None]
            rows.append([
                f"{data}, {what}", METHODS[method], f"{np.mean([one['steps'] for one in found]):.0f}",
                f"{np.mean([one['seconds'] for one in found]):.0f}", f"{np.mean(entropy):.2f}" if entropy else "",
                f"{np.mean([one['distance'] for one in found]):.2f}",
                f"{sum(one['left_hull'] for one in found)} of {len(found)}",
            ])  # fmt: skip
    header = [
        "setting",
        "search",
        "steps",
        "seconds",
        "entropy (ln 10 = 2.30)",
        "distance from the mean",
        "left the hull",
    ]
    note = "The distance is a share of the experts' own root mean square distance from their mean."
    return _table(header, rows) + "\n\n" + note


def _unlike(cells: Sequence[Cell]) -> str:
    names = list(cells[0].result["unlike"])
    rows = [[name, _shown([100 * cell.result["unlike"][name] for cell in cells])] for name in names]
    return _table(["model", f"test accuracy, % (n={len(cells)})"], rows)


def _tried(cells: Sequence[Cell]) -> str:
    rows = [
        [f"{cell.setting['mu']:g}", f"{cell.setting['learning_rate']:g}", f"{cell.result['validation'][0][1]:.4f}",
         f"{min(value for _, value in cell.result['validation']):.4f}", str(cell.result["validation"][-1][0])]
        for cell in cells
    ]  # fmt: skip
    return _table(["mu", "learning rate", "validation loss, uniform", "best", "steps"], rows)


def _picture(groups: dict[Key, list[Cell]]) -> bytes:
    """Accuracy of every method by setting: hollow before, filled after fine-tuning."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pyplot: Any = plt
    colours: Callable[[int], Any] = pyplot.get_cmap("tab20")
    names = [name for name in METHODS if name != "random"]
    figure, axes = pyplot.subplots(1, len(groups), figsize=(1.2 + 2.1 * len(groups), 4.6), sharey=True, squeeze=False)
    for axis, ((_, data, what), cells) in zip(axes[0], groups.items(), strict=True):
        for place, name in enumerate(names):
            for key, fill in (("before", "none"), ("after", colours(place))):
                values = _values(cells, name, key)
                axis.scatter([place] * len(values), values, facecolors=fill, edgecolors=[colours(place)], s=28)
        axis.set_title(f"{data}\n{what}", fontsize=8)
        axis.set_xticks(range(len(names)), [METHODS[name].split(" (")[0] for name in names], rotation=90, fontsize=7)
        axis.grid(axis="y", alpha=0.3)
    axes[0][0].set_ylabel("test accuracy, % (hollow: before fine-tuning)", fontsize=8)
    figure.tight_layout()
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return out.getvalue()
