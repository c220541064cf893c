"""The page of the routing study, from its finished cells."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from studies.cells import Cell, Tables

Numbers = npt.NDArray[np.float64]
#: Whom the others are compared with: what METHODS proposes, and what did best.
OURS, BEST = "GLIDER, adaptive a", "GLIDER, adaptive a, base's states, else the mean"
RESAMPLES = 1000
#: Sections about one choice, in the first fold: title, and labels in order.
CHOICES: dict[str, tuple[str, ...]] = {
    "The scale of the instructions": (
        "without global (PHATGOOSE)", "GLIDER, a = 1", "GLIDER, a = 3", "GLIDER, a = 10", "GLIDER, a = 30",
        "GLIDER, a = 100", "without local", OURS, "GLIDER, adaptive a, z-scores",
    ),
    "Experts of a token": (
        "GLIDER, adaptive a, top 1", OURS, "GLIDER, adaptive a, top 3", "GLIDER, adaptive a, top p 0.75",
        "PHATGOOSE, top 1", "without global (PHATGOOSE)", "PHATGOOSE, top 3", "Arrow, top 1", "Arrow", "Arrow, top 3",
    ),
    "What speaks for an expert and a query": (
        OURS, "GLIDER, adaptive a, raw queries and examples", "GLIDER, adaptive a, TF-IDF",
        "GLIDER, adaptive a, base's states",
    ),
    "What becomes of queries that no expert recognises": (
        OURS, "GLIDER, adaptive a, else the mean", "GLIDER, adaptive a, raw queries and examples",
        "GLIDER, adaptive a, raw queries and examples, else the mean", "GLIDER, adaptive a, base's states", BEST,
        "merged experts",
    ),
    "The router is told the task, or is not": (
        "GLIDER, a = 100, told the task", "GLIDER, a = 100", "GLIDER, a = 3, told the task", "GLIDER, a = 3", OURS,
    ),
    "What does without a router": (
        "merged experts", "multitask adapter", "LoraHub, five labelled rows a task", OURS,
    ),
}  # fmt: skip
SWEEP = {0.0: "without global (PHATGOOSE)"} | {a: f"GLIDER, a = {a:g}" for a in (1.0, 3.0, 10.0, 30.0, 100.0)}
PICTURED = ("without global (PHATGOOSE)", "Arrow", "GLIDER, a = 3", OURS, "GLIDER, a = 100", "retrieval (top 1)")

_HEAD = """# Routing eight language experts

Eight LoRA experts of rank 8 on SmolLM2-135M-Instruct, each trained for one kind of instruction. A routed model holds
six of them; the tasks of the other two are tasks that no expert of the model was trained for. There are four folds, so
that every task is left out once. Measured are the first {examples} test rows of each task and the first {tokens} tokens
of an answer, matrix products in bfloat16.

- The score is the loss on the answer in nats per token, and **gain kept**: (base - model) / (base - own expert) of a
  task's loss, so that 0 is the base and 100 % the task's own expert, which a user can always choose on the tasks that
  experts were trained for. A held-out task's own expert is not in the model.
- A row is routed by its prompt alone. *Told the task* is the published protocol instead: one sentence a task, looked up
  by the task's name.
- What experts do is said by a sentence of their cards; queries are taken as they are (there is no language model here
  that describes them well enough); both are embedded by all-MiniLM-L6-v2. *Raw* has no card: an expert is the mean of
  its examples; *base's states* likewise, with the base's own mean hidden states for vectors.
- PHATGOOSE's gates had 100 steps of 8 rows (the paper: batches of 1,024).
- Two experts a token, unless said. *a = 100* and *a = 3* are what GLIDER's code has for held-in and for held-out tasks:
  it chooses by knowing which is which. *Adaptive* chooses for each query, without labels.
- *Else the mean* leaves queries to the mean of all experts as far as none recognises them (`fallback: mean`). It was
  thought of when the other rows had been measured; nothing in it is fitted to test rows.
- [95%] are bootstrap intervals: tasks are drawn with replacement, then rows within each.
- The *multitask adapter* is one adapter of the same rank that was trained on the rows of the six held-in tasks
  together, for 300 steps (each expert had 150 or 200 on its own): what those could have who own all the data.
- LoraHub is given five labelled training rows of every task, held out or not, and searches one weight an expert.
- Oracle is the expert of the model that does best on the task's test rows.
"""


@dataclass(frozen=True, eq=False)
class Outcome:
    """Nats and tokens of a task's rows, measured with a model that has or has not the task's expert."""

    task: str
    held_in: bool
    nats: Numbers
    tokens: Numbers

    @property
    def loss(self) -> float:
        """Nats per token."""
        return float(self.nats.sum() / self.tokens.sum())


Outcomes = Sequence[Outcome]


def outcomes(cell: Cell) -> list[Outcome]:
    """Return a cell's outcomes by task."""
    experts = cell.result["experts"]
    return [
        Outcome(name, name in experts, np.array(one["nats"]), np.array(one["tokens"], np.float64))
        for name, one in cell.result["tasks"].items()
    ]


def page(cells: Sequence[Cell]) -> Tables:
    """Return the page and its pictures."""
    singles = {cell.setting["expert"]: cell for cell in cells if cell.setting["kind"] == "single"}
    by_label: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.setting["kind"] == "routed":
            by_label.setdefault(cell.setting["label"], []).append(cell)
    if not by_label:
        return Tables("# Routing eight language experts\n\nNo cell has been run.\n")
    found = {label: [one for cell in group for one in outcomes(cell)] for label, group in by_label.items()}
    folds = {label: [cell.setting["held_out"] for cell in group] for label, group in by_label.items()}
    common = next(iter(by_label.values()))[0].setting
    parts = [_HEAD.format(examples=common["examples"], tokens=common["tokens"])]
    first = min((cell for group in by_label.values() for cell in group), key=_first).setting["held_out"]
    every = max(len(group) for group in by_label.values())
    wide = [label for label, group in by_label.items() if len(group) == every]
    scale = _Scale.of(singles)
    parts += [f"## All methods, {every} fold(s)", _methods({label: found[label] for label in wide}, scale, folds)]
    for ours in (OURS, BEST):
        if ours in wide:
            parts += [f"## {ours}, less another", _differences(ours, {label: found[label] for label in wide})]
    parts += [f"## One choice at a time\n\nOf the fold that leaves out {' and '.join(first)}."]
    inside = {label: [one for cell in group if cell.setting["held_out"] == first for one in outcomes(cell)]
              for label, group in by_label.items()}  # fmt: skip
    for title, labels in CHOICES.items():
        chosen = {label: inside[label] for label in labels if inside.get(label)}
        if chosen:
            parts += [f"### {title}", _methods(chosen, scale, {})]
    pictures: dict[str, bytes] = {}
    if sum(1 for label in SWEEP.values() if inside.get(label)) > 2:
        pictures["scale.png"] = _sweep(inside)
        parts += ["![Loss against the scale of the instructions](routing/scale.png)"]
    shown = [cell for label in PICTURED for cell in by_label.get(label, []) if cell.setting["held_out"] == first]
    if shown:
        pictures["shares.png"], pictures["depth.png"] = _heat(shown), _depth(shown)
        parts += ["## Where tokens go", "![Experts' mean weights by task](routing/shares.png)",
                  "![The own expert's mean weight by block](routing/depth.png)"]  # fmt: skip
    if adaptive := [cell for label in (OURS, BEST) for cell in by_label.get(label, [])]:
        parts += ["## What the adaptive scale learned", _adaptive(adaptive)]
    if singles:
        parts += ["## Every expert on every task (loss)", _transfer(singles)]
    parts += ["## Accuracy where answers are choices", _accuracy({**singles}, by_label, wide)]
    return Tables("\n\n".join(part for part in parts if part) + "\n", pictures)


def _first(cell: Cell) -> bool:
    return not cell.id.startswith("0-")


@dataclass(frozen=True)
class _Scale:
    """Losses of the base and of each expert, by expert and task."""

    losses: Mapping[str, Mapping[str, float]]

    @classmethod
    def of(cls, singles: Mapping[str, Cell]) -> "_Scale":
        return cls({name: {one.task: one.loss for one in outcomes(cell)} for name, cell in singles.items()})

    def kept(self, one: Outcome) -> float | None:
        """Return the share of the own expert's gain over the base that is kept."""
        base, own = self.losses.get("base", {}).get(one.task), self.losses.get(one.task, {}).get(one.task)
        return None if base is None or own is None else (base - one.loss) / (base - own)

    def oracle(self, task: str, held_out: Sequence[str]) -> float | None:
        """Return the least loss of the model's experts on a task."""
        found = [self.losses[name][task] for name in self.losses if name != "base" and name not in held_out]
        return min(found) if found else None


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _methods(found: Mapping[str, Outcomes], scale: _Scale, folds: Mapping[str, Sequence[Sequence[str]]]) -> str:
    rows: list[list[str]] = []
    for label, parts in found.items():
        row = [label]
        for inside in (True, False):
            chosen = [one for one in parts if one.held_in is inside]
            kept = [value for one in chosen if (value := scale.kept(one)) is not None]
            row += [f"{100 * np.mean(kept):.1f}" if kept else "", _interval(chosen, _mean_loss)]
        rows.append(row)
    if folds:
        left_out = next(iter(folds.values()))
        rows += _references(scale, left_out, next(iter(found.values())))
    return _table(["", "held in: gain kept, %", "loss [95%]", "held out: gain kept, %", "loss [95%]"], rows)


def _references(scale: _Scale, folds: Sequence[Sequence[str]], parts: Outcomes) -> list[list[str]]:
    """Return the rows of the base, the own expert and the oracle."""
    rows: list[list[str]] = []
    tasks = list(dict.fromkeys(one.task for one in parts))
    inside = [(task, fold) for fold in folds for task in tasks if task not in fold]
    outside = [(task, fold) for fold in folds for task in fold]
    if "base" in scale.losses:
        rows.append(_reference("base", scale, inside, outside, lambda task, _: scale.losses["base"][task]))
    if all(task in scale.losses for task in tasks):
        rows.append(_reference("own expert", scale, inside, outside, lambda task, _: scale.losses[task][task]))
        rows.append(_reference("oracle", scale, inside, outside, scale.oracle))
    return rows


def _reference(
    label: str, scale: _Scale, inside: Sequence[Any], outside: Sequence[Any], loss: Callable[..., float | None]
) -> list[str]:
    row = [f"*{label}*"]
    for pairs in (inside, outside):
        losses = [(task, value) for task, fold in pairs if (value := loss(task, fold)) is not None]
        one = np.ones(1)
        kept = [value for task, at in losses if (value := scale.kept(Outcome(task, True, one * at, one))) is not None]
        row += [
            f"{100 * np.mean(kept):.1f}" if kept else "",
            f"{np.mean([at for _, at in losses]):.3f}" if losses else "",
        ]
    return row


def _mean_loss(parts: Outcomes) -> float:
    return float(np.mean([one.loss for one in parts]))


def _interval(parts: Outcomes, value: Callable[[Outcomes], float]) -> str:
    if not parts:
        return ""
    low, high = _bounds([partial(_drawn_loss, one) for one in parts])
    return f"{value(parts):.3f} [{low:.3f}, {high:.3f}]"


Draw = Callable[[np.random.Generator], float]


def _bounds(draws: Sequence[Draw]) -> tuple[float, float]:
    """Return a percentile interval of the mean over tasks: tasks are drawn, then rows within each."""
    generator = np.random.default_rng(0)
    means = [
        np.mean([draws[k](generator) for k in generator.integers(0, len(draws), len(draws))]) for _ in range(RESAMPLES)
    ]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _drawn_loss(one: Outcome, generator: np.random.Generator) -> float:
    rows = generator.integers(0, len(one.nats), len(one.nats))
    return float(one.nats[rows].sum() / one.tokens[rows].sum())


def _drawn_difference(pair: tuple[Outcome, Outcome], generator: np.random.Generator) -> float:
    rows = generator.integers(0, len(pair[0].nats), len(pair[0].nats))
    one, other = ((side.nats[rows].sum() / side.tokens[rows].sum()) for side in pair)
    return float(one - other)


def _differences(ours: str, found: Mapping[str, Outcomes]) -> str:
    """Return differences of loss, paired by row; below 0 ours is better."""
    rows: list[list[str]] = []
    for label, others in found.items():
        if label == ours:
            continue
        row = [label]
        for inside in (True, False):
            pairs = [(one, two) for one, two in zip(found[ours], others, strict=True) if one.held_in is inside]
            low, high = _bounds([partial(_drawn_difference, pair) for pair in pairs])
            mean = np.mean([one.loss - two.loss for one, two in pairs])
            better = sum(one.loss < two.loss for one, two in pairs)
            row += [f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]", f"{better} of {len(pairs)}"]
        rows.append(row)
    header = ["less", "held in: loss [95%]", "tasks better", "held out: loss [95%]", "tasks better"]
    return _table(header, rows) + f"\n\nBelow 0 {ours} is better."


def _adaptive(cells: Sequence[Cell]) -> str:
    rows: list[list[str]] = []
    for cell in cells:
        fitted = cell.result["adaptive"]
        values = (f"{fitted[key]:.3f}" for key in ("threshold", "width", "wrong_inside", "wrong_outside"))
        left_out, latency = " and ".join(cell.setting["held_out"]), f"{1e3 * cell.result['seconds_a_query']:.0f}"
        rows.append([cell.setting["label"], left_out, *values, latency])
    header = ["", "left out", "tau", "s", "inside below tau", "outside above tau", "ms a new query"]
    return _table(header, rows)


def _transfer(singles: Mapping[str, Cell]) -> str:
    tasks = list(next(iter(singles.values())).result["tasks"])
    rows = [[name, *(f"{cell.result['tasks'][task]['loss']:.2f}" for task in tasks)] for name, cell in singles.items()]
    return _table(["expert", *tasks], rows)


def _accuracy(singles: Mapping[str, Cell], by_label: Mapping[str, Sequence[Cell]], wide: Sequence[str]) -> str:
    groups = {f"*{name}*": [cell] for name, cell in singles.items()} | {label: by_label[label] for label in wide}
    tasks = [name for name, one in next(iter(groups.values()))[0].result["tasks"].items() if "correct" in one]
    rows: list[list[str]] = []
    for label, cells in groups.items():
        row = [label]
        for task in tasks:
            for inside in (True, False):
                right = [100 * np.mean(cell.result["tasks"][task]["correct"]) for cell in cells
                         if (task in cell.result["experts"]) is inside]  # fmt: skip
                row.append(f"{np.mean(right):.0f}" if right else "")
        rows.append(row)
    header = [f"{task}, held {where}, %" for task in tasks for where in ("in", "out")]
    return _table(["", *header], rows)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _png(pyplot: Any, figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return out.getvalue()


def _sweep(found: Mapping[str, Outcomes]) -> bytes:
    """Loss against a, held in and held out."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6))
    scales = [a for a, label in SWEEP.items() if found.get(label)]
    for axis, inside, title in ((axes[0], True, "tasks with their expert"), (axes[1], False, "tasks without")):
        for task in dict.fromkeys(one.task for parts in found.values() for one in parts if one.held_in is inside):
            losses = [next(one.loss for one in found[SWEEP[a]] if one.task == task) for a in scales]
            line = axis.plot(range(len(scales)), losses, marker="o", ms=4, label=task)[0]
            ours = [one.loss for one in found.get(OURS, ()) if one.task == task]
            axis.scatter([len(scales)] * len(ours), ours, color=line.get_color(), marker="*", s=70)
        axis.set_xticks(range(len(scales) + 1), [*(f"{a:g}" for a in scales), "adaptive"])
        axis.set_xlabel("a")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, ncol=3, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    axes[0].set_ylabel("loss, nats per token")
    figure.tight_layout()
    return _png(pyplot, figure)


def _heat(cells: Sequence[Cell]) -> bytes:
    """Mean weight of every expert on every task, a panel a method."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(2, 3, figsize=(11, 7.2), squeeze=False)
    for axis in axes.flat[len(cells) :]:
        axis.axis("off")
    for axis, cell in zip(axes.flat, cells, strict=False):
        experts, tasks = cell.result["experts"], list(cell.result["tasks"])
        tasks = [*experts, *(task for task in tasks if task not in experts)]
        values = np.array([np.mean(cell.result["tasks"][task]["shares"], 0) for task in tasks])
        axis.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            axis.text(j, i, f"{value:.2f}"[1:] if value < 0.995 else "1", ha="center", va="center", fontsize=7,
                      color="white" if value > 0.6 else "black")  # fmt: skip
        axis.axhline(len(experts) - 0.5, color="black", lw=1)
        axis.set_xticks(range(len(experts)), experts, rotation=45, ha="right", fontsize=7)
        axis.set_yticks(range(len(tasks)), tasks, fontsize=7)
        axis.set_title(cell.setting["label"], fontsize=9)
    figure.suptitle("mean weight of an expert (columns) on a task (rows); below the line, tasks without their expert",
                    fontsize=9)  # fmt: skip
    figure.tight_layout()
    return _png(pyplot, figure)


def _depth(cells: Sequence[Cell]) -> bytes:
    """The own expert's weight by block, the mean over the tasks that have one."""
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(7, 3.2))
    for cell in cells:
        experts = cell.result["experts"]
        own = [np.array(cell.result["tasks"][name]["shares"])[:, k] for k, name in enumerate(experts)]
        axis.plot(np.mean(own, 0), marker="o", ms=3, label=cell.setting["label"])
    axis.set_xlabel("block")
    axis.set_ylabel("own expert's mean weight")
    axis.set_ylim(0, 1.05)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    figure.tight_layout()
    return _png(pyplot, figure)
