"""The page of the doctor's study, from its finished cells."""

import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from consilience.doctor.theory.bound import Terms, excess_risk, temperature, total
from consilience.doctor.theory.saturation import fit
from studies.cells import Cell, Tables
from studies.doctor_experts import Tuning

Numbers = npt.NDArray[np.float64]
Result = Mapping[str, Any]
#: Draws of cells behind an interval.
RESAMPLES = 200
#: Points that a correlation needs.
_FEW = 4
#: The smoothness L of the bound from logs, and others to show how much hangs on it.
SMOOTHNESS, OTHERS = 5.0, (0.5, 50.0)
#: What the doctor's best figure of each kind of evidence should reach within strata.
AIMS = {"V": 0.5, "the bound": 0.6, "learning rate / batch": 0.6, "quadratic, probed at the merge": 0.8}
#: The one that was chosen by its correlations.
CHOSEN = "learning rate / batch"

_HEAD = """# Does what the doctor says agree with what merging does?

Experts on {count} small image tasks ({tasks}), each trained from one base under {settings} settings, are averaged in
subsets. Before a merge the doctor is asked for its figures: from checkpoints alone, with the training logs, and with
{probes} labelled validation rows a task. What the merge then does is measured on test rows, which the doctor never
sees. Losses are in nats; a merge's loss is the mean over the tasks of its experts.

- Tasks are {parts} parts of each data set's classes. The network ({net}) was trained briefly on all of them, on rows of
  its own; its heads, one a task, are frozen, and trunks alone are fine-tuned and merged. Experts are trained at a
  constant rate on minibatches drawn with replacement: plain SGD, as in the theory, but for the settings of Adam.
- H is the training length, learning rate times steps.
- [95%] are bootstrap intervals over cells (settings and seeds), which share the base and rows of a seed.
"""


@dataclass(frozen=True, eq=False)
class Merge:
    """One average: whose and of which experts, what it did, its experts' own losses, and the figures, all by name.

    ``tuning`` is None where the experts' settings differ; ``length`` is their mean H.
    """

    cell: str
    seed: int
    optimizer: str
    tuning: Mapping[str, Any] | None
    length: float | None
    members: tuple[int, ...]
    all: bool
    loss: float
    accuracy: float
    own: float
    own_accuracy: float
    figures: Mapping[str, float | None]

    @property
    def stratum(self) -> tuple[int, tuple[int, ...]]:
        """What is equal within a stratum: the seed, with its base and rows, and the tasks, with their number."""
        return self.seed, self.members

    @property
    def cost(self) -> float:
        """What merging costs: the loss above the experts' own."""
        return self.loss - self.own


Merges = Sequence[Merge]


def page(cells: Sequence[Cell]) -> Tables:
    """Return the page and its pictures."""
    found = [merge for cell in cells for merge in merges_of(cell)]
    sgd = [merge for merge in found if merge.optimizer == "sgd"]
    parts = [_head(cells)] if cells else ["# Does what the doctor says agree with what merging does?",
                                          "No cell has been run."]  # fmt: skip
    pictures: dict[str, bytes] = {}
    signs = [*_length_signs(sgd), *_difference_signs(sgd), *_rank_signs(sgd)]
    if signs:
        parts += ["## Which expected signs hold", _table(["expected", "measured", "", ""], signs)]
    if len(sgd) >= _FEW:
        parts += ["## Rank correlations with the merge's test loss, SGD", _correlations(sgd)]
        pictures["ranks.png"] = _scatter(sgd)
        parts += [_by_seed(sgd), "![What was said against what was measured](doctor/ranks.png)"]
    if len(sgd) < len(found) and len(found) >= _FEW:
        parts += ["With the experts that Adam trained, whose learning rates say nothing beside SGD's:",
                  _correlations(found, tuple(AIMS))]  # fmt: skip
    equal = [merge for merge in sgd if merge.tuning is not None]
    if _sweeps(equal):
        pictures["lengths.png"] = _curves(equal)
        parts += ["## Learning rate and steps", "![Loss against learning rate and steps](doctor/lengths.png)",
                  _optima(equal)]  # fmt: skip
    parts += _unequal(sgd, pictures)
    if equal:
        parts += ["## Batch, rows, and the number of experts", _effects(equal)]
        pictures["effects.png"] = _bars(equal)
        parts += ["![Loss by batch, rows and experts](doctor/effects.png)"]
    if saturated := [cell for cell in cells if cell.setting["kind"] == "saturation"]:
        pictures["saturation.png"] = _saturation_picture(saturated)
        parts += ["## More experts: predicted and measured", _saturation(saturated),
                  "![Mean loss by the number of experts](doctor/saturation.png)"]  # fmt: skip
    if advised := [one for cell in cells for one in cell.result.get("advice", ())]:
        pictures["advice.png"] = _advice_picture(advised)
        parts += ["## The advice against the plain average", _advice(advised),
                  "![Advice against average](doctor/advice.png)"]  # fmt: skip
    if found:
        parts += ["## Every setting", _settings(found)]
    return Tables("\n\n".join(parts) + "\n", pictures)


def _head(cells: Sequence[Cell]) -> str:
    suite = cells[0].setting["suite"]
    tasks = cells[0].result["tasks"]
    settings = {_name(cell.setting["tuning"]) for cell in cells if cell.setting["kind"] == "equal"}
    return _HEAD.format(count=len(tasks), tasks=", ".join(suite["sources"]), settings=len(settings),
                        probes=suite["validation"], net=suite["net"], parts=suite["parts"])  # fmt: skip


# Merges and what was said of them.


def merges_of(cell: Cell) -> list[Merge]:
    """Return a cell's averages of experts."""
    return [_merge(cell, one, merge) for one in cell.result.get("sets", ()) for merge in one["merges"]]


def _merge(cell: Cell, one: Result, merge: Result) -> Merge:
    members = tuple(merge["members"])
    experts = [one["experts"][k] for k in members]
    optimizers = {expert["tuning"].partition("-")[0] for expert in experts}
    return Merge(
        cell=cell.id, seed=cell.setting["seed"], optimizer=optimizers.pop() if len(optimizers) == 1 else "mixed",
        tuning=cell.setting.get("tuning"), length=one.get("mean_length", merge["said"]["logs"]["length"]),
        members=members, all=len(members) == len(one["experts"]),
        loss=float(np.mean(merge["losses"])), accuracy=float(np.mean(merge["accuracies"])),
        own=float(np.mean([expert["test"]["loss"] for expert in experts])),
        own_accuracy=float(np.mean([expert["test"]["accuracy"] for expert in experts])),
        figures=figures_of(experts, merge),
    )  # fmt: skip


#: Figures by the evidence that they need, as the tables name them; each is signed so that more foretells more loss.
FIGURES: dict[str, tuple[str, ...]] = {
    "none": ("K", "sum of lengths of task vectors"),
    "checkpoints": ("V", "1 - mean cosine", "sigma_max", "sigma_max, centred", "1 - common"),
    "logs": ("H", "learning rate / batch", "V's part of unequal H", "V's part of noise", "stability", "the bound",
             *(f"the bound, L = {value:g}" for value in OTHERS)),
    "probes": ("the bound's known parts, probed", "quadratic, probed at all experts' mean",
               "quadratic, probed at the merge", "measured on the probe rows"),
}  # fmt: skip


def figures_of(experts: Sequence[Result], merge: Result) -> dict[str, float | None]:
    """Return the doctor's figures of a merge by their names in ``FIGURES``; None for what could not be said."""
    seen, logs, probes = (merge["said"][kind] for kind in ("checkpoints", "logs", "probes"))
    terms = bound_of(experts, merge, SMOOTHNESS)
    known = [value for value in probes["risk"].values() if value is not None]
    return {
        "K": float(len(experts)),
        "sum of lengths of task vectors": seen["norms"],
        "V": seen["displacement"],
        "1 - mean cosine": 1 - seen["cosine"],
        "sigma_max": seen["sigma_max"],
        "sigma_max, centred": seen["sigma_max_centred"],
        "1 - common": 1 - seen["common"],
        "H": logs["length"],
        "learning rate / batch": _temperature(experts),
        "V's part of unequal H": logs["unequal"],
        "V's part of noise": logs["noise"],
        "stability": terms.part("stability"),
        "the bound": terms.total,
        **{f"the bound, L = {value:g}": bound_of(experts, merge, value).total for value in OTHERS},
        "the bound's known parts, probed": None if probes["risk"]["stability"] is None else sum(known),
        "quadratic, probed at all experts' mean": probes.get("quadratic_of_all"),
        "quadratic, probed at the merge": probes["quadratic"],
        "measured on the probe rows": probes["measured"],
    }


def _temperature(experts: Sequence[Result]) -> float | None:
    """Return the mean temperature of experts that SGD trained."""
    found = [
        temperature(squares=one["logs"]["squares"], length=one["logs"]["length"], batch=Tuning.of(one["tuning"]).batch)
        for one in experts
    ]
    whole = total(found)
    return None if whole is None else whole / len(found)


def bound_of(experts: Sequence[Result], merge: Result, smoothness: float) -> Terms:
    """Return the theorem's terms of a merge from logs and checkpoints.

    A_k is at most the training's last loss, as losses are not negative; the merge's loss on a task, which Lemma 2
    needs, is at most what Lemma 3 says.
    """
    count = len(experts)
    logs, moves = [expert["logs"] for expert in experts], merge["said"]["checkpoints"]["moves"]
    losses = [
        one["final_loss"] + one["final_gradient"] / (2 * smoothness) + smoothness * moved
        for one, moved in zip(logs, moves, strict=True)
    ]
    return excess_risk(
        [1 / count] * count, [1 / count] * count, smoothness=smoothness,
        optimisation=[one["final_loss"] for one in logs], gradients=[one["final_gradient"] for one in logs],
        moves=moves, stabilities=[one["stability"] for one in logs], merged_losses=losses,
    )  # fmt: skip


# Rank correlations.


@dataclass(frozen=True)
class Estimate:
    """A number and its interval; NaN for what is not known."""

    value: float
    low: float = np.nan
    high: float = np.nan

    def __str__(self) -> str:
        if np.isnan(self.value):
            return ""
        return f"{self.value:+.2f}" + ("" if np.isnan(self.low) else f" [{self.low:+.2f}, {self.high:+.2f}]")


@dataclass(frozen=True)
class Agreement:
    """Rank correlations of a figure with what was measured; ``strata`` counts those that the mean within is of."""

    pooled: Estimate
    tau: float
    within: Estimate
    tau_within: float
    strata: int


def agreement(found: Merges, figure: str, measured: Callable[[Merge], float], intervals: bool = True) -> Agreement:
    """Correlate a figure with a measurement, over all merges and within strata."""
    points = _Points.of([merge for merge in found if merge.figures[figure] is not None], figure, measured)
    pooled, within = (points.estimate(way, intervals) for way in (points.pooled, points.within))
    taus = [kendall(points.x[rows], points.y[rows]) for rows in points.varied()]
    tau = float(np.mean(taus)) if taus else np.nan
    return Agreement(pooled, kendall(points.x, points.y), within, tau, len(taus))


def spearman(x: Numbers, y: Numbers) -> float:
    """Return Spearman's rank correlation; NaN for fewer than four points, or where either does not vary."""
    from scipy.stats import rankdata

    if not (_varies(x) and _varies(y)):
        return np.nan
    one, two = (rankdata(side) - (len(side) + 1) / 2 for side in (x, y))
    return float(one @ two / np.sqrt((one @ one) * (two @ two)))


def kendall(x: Numbers, y: Numbers) -> float:
    """Return Kendall's tau-b; NaN for fewer than four points, or where either does not vary."""
    from scipy import stats

    measure: Any = stats.kendalltau
    return float(measure(x, y).statistic) if _varies(x) and _varies(y) else np.nan


def _varies(x: Numbers) -> bool:
    return len(x) >= _FEW and float(np.ptp(x)) > 1e-12 * float(np.abs(x).max())


@dataclass(frozen=True, eq=False)
class _Points:
    """A figure x and a measurement y by merge, the merges' cells and their strata, by number."""

    x: Numbers
    y: Numbers
    cells: npt.NDArray[np.int64]
    strata: npt.NDArray[np.int64]

    @classmethod
    def of(cls, found: Merges, figure: str, measured: Callable[[Merge], float]) -> "_Points":
        x = np.array([merge.figures[figure] for merge in found], np.float64)
        y = np.array([measured(merge) for merge in found], np.float64)
        return cls(x, y, _numbered([merge.cell for merge in found]), _numbered([merge.stratum for merge in found]))

    def varied(self) -> list[npt.NDArray[np.int64]]:
        """Return the rows of each stratum in which something varies."""
        rows = [np.flatnonzero(self.strata == one) for one in np.unique(self.strata)]
        return [some for some in rows if _varies(self.x[some]) and _varies(self.y[some])]

    def pooled(self, rows: npt.NDArray[np.int64]) -> float:
        """Return the rows' correlation."""
        return spearman(self.x[rows], self.y[rows])

    def within(self, rows: npt.NDArray[np.int64]) -> float:
        """Return the mean over strata of the rows' correlation."""
        ordered = rows[np.argsort(self.strata[rows], kind="stable")]
        ends = np.flatnonzero(np.diff(self.strata[ordered])) + 1
        found = [spearman(self.x[some], self.y[some]) for some in np.split(ordered, ends)]
        known = [value for value in found if not np.isnan(value)]
        return float(np.mean(known)) if known else np.nan

    def estimate(self, way: Callable[[npt.NDArray[np.int64]], float], interval: bool) -> Estimate:
        """Return what a way of correlating gives, and a percentile interval: cells are drawn, with all their merges."""
        value = way(np.arange(len(self.x)))
        count = int(self.cells.max()) + 1 if len(self.cells) else 0
        if not interval or count < _FEW or np.isnan(value):
            return Estimate(value)
        generator = np.random.default_rng(0)
        members = [np.flatnonzero(self.cells == cell) for cell in range(count)]
        draws = [
            way(np.concatenate([members[k] for k in generator.integers(0, count, count)])) for _ in range(RESAMPLES)
        ]
        low, high = np.nanpercentile(draws, [2.5, 97.5])
        return Estimate(value, float(low), float(high))


def _numbered(keys: Sequence[Any]) -> npt.NDArray[np.int64]:
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys], np.int64)


def _correlations(found: Merges, only: Sequence[str] | None = None) -> str:
    rows: list[list[str]] = []
    for evidence, names in FIGURES.items():
        for name in names:
            if only is not None and name not in only:
                continue
            loss = agreement(found, name, lambda merge: merge.loss)
            cost = agreement(found, name, lambda merge: merge.cost, intervals=False)
            rows.append([
                name, evidence, str(loss.pooled), str(Estimate(loss.tau)), str(loss.within),
                str(Estimate(loss.tau_within)), str(loss.strata), f"{AIMS[name]:g}" if name in AIMS else "",
                str(cost.within),
            ])  # fmt: skip
    header = ["figure", "evidence", "pooled: Spearman [95%]", "Kendall", "within strata: Spearman [95%]", "Kendall",
              "strata", "aim", "cost of merging, within: Spearman"]  # fmt: skip
    note = (
        f"{len(found)} merges. Within a stratum the seed and the tasks are the same, and only the experts' training"
        " differs; the mean over strata is given. The cost of merging is the loss above the experts' own. A figure's"
        " sign is the theory's: more of it, more loss. The bound takes"
        f" L = {SMOOTHNESS:g}, the inverse of the largest learning rate, which is the most that its assumptions allow."
        " *Probed at the merge* is the quadratic through a scan that ends there; *probed at all experts' mean* tells"
        " other merges from one scan, and never measured them."
    )
    return f"{_table(header, rows)}\n\n{note}"


def _by_seed(found: Merges) -> str:
    """Return the correlations within strata of each seed: what was chosen by looking at one is tested by the others."""
    seeds = sorted({merge.seed for merge in found})
    rows = [
        [name, *(str(agreement([one for one in found if one.seed == seed], name, lambda merge: merge.loss).within)
                 for seed in seeds)]
        for name in AIMS
    ]  # fmt: skip
    note = (
        f"*{CHOSEN}* was added after seed 0 had been looked at, and for what it did there; the other seeds, with other"
        " bases, rows and experts, are its test."
    )
    return f"{_table(['within strata: Spearman [95%]', *(f'seed {seed}' for seed in seeds)], rows)}\n\n{note}"


# Signs.


@dataclass(frozen=True)
class Sweep:
    """Losses of merges of all experts, and of single ones, along one choice while the other is held, by seed."""

    along: str
    held: float
    seed: int
    values: tuple[float, ...]
    merged: tuple[float, ...]
    single: tuple[float, ...]

    @property
    def best(self) -> tuple[float, float]:
        """The values at which merges and single experts have the least loss."""
        return self.values[int(np.argmin(self.merged))], self.values[int(np.argmin(self.single))]

    @property
    def inside(self) -> bool:
        """Whether the merge's optimum is at neither end: its loss is a U."""
        return 0 < int(np.argmin(self.merged)) < len(self.values) - 1


_OTHER = {"learning_rate": "steps", "steps": "learning_rate"}
_LESS = {"learning_rate": "a smaller learning rate", "steps": "fewer steps"}
_WORDS = {"learning_rate": "learning rate", "steps": "steps", "batch": "batch", "rows": "rows"}


def _sweeps(found: Merges) -> list[Sweep]:
    """Return the sweeps of three values or more, at the batch and rows that most cells have."""
    whole = [merge for merge in found if merge.all and merge.tuning is not None]
    usual = _usual(whole)
    groups: dict[tuple[str, float, int], dict[float, Merge]] = {}
    for merge in whole:
        if merge.tuning is not None and (merge.tuning["batch"], merge.tuning["rows"]) == usual:
            for along, held in _OTHER.items():
                key = along, float(merge.tuning[held]), merge.seed
                groups.setdefault(key, {})[float(merge.tuning[along])] = merge
    return [
        Sweep(along, held, seed, tuple(sorted(group)), tuple(group[x].loss for x in sorted(group)),
              tuple(group[x].own for x in sorted(group)))
        for (along, held, seed), group in sorted(groups.items()) if len(group) > 2
    ]  # fmt: skip


def _usual(found: Merges) -> tuple[int, int]:
    """Return the batch and rows of most merges."""
    counts = Counter((merge.tuning["batch"], merge.tuning["rows"]) for merge in found if merge.tuning is not None)
    return counts.most_common(1)[0][0] if counts else (0, 0)


def _length_signs(found: Merges) -> list[list[str]]:
    rows: list[list[str]] = []
    for along in _OTHER:
        sweeps = [sweep for sweep in _sweeps(found) if sweep.along == along]
        if not sweeps:
            continue
        inside = sum(sweep.inside for sweep in sweeps)
        smaller = sum(sweep.best[0] < sweep.best[1] for sweep in sweeps)
        larger = sum(sweep.best[0] > sweep.best[1] for sweep in sweeps)
        rows += [
            [f"merged loss is a U in {_WORDS[along]}", f"the optimum is inside the range in {inside} of {len(sweeps)}"
             " sweeps", "", _counted(inside, len(sweeps) - inside)],
            [f"its optimum is at {_LESS[along]} than single experts'",
             f"smaller in {smaller}, the same in {len(sweeps) - smaller - larger}, larger in {larger}", "",
             _counted(smaller, larger, len(sweeps))],
        ]  # fmt: skip
    return rows


def _counted(right: int, wrong: int, among: int | None = None) -> str:
    """Say whether a sign holds: more often than not among all, fails: as often or more against it, or neither."""
    among = right + wrong if among is None else among
    if 2 * right > among:
        return "holds"
    return "fails" if wrong >= right else "not clear"


def _difference_signs(found: Merges) -> list[list[str]]:
    whole = [merge for merge in found if merge.all]
    wanted = (
        ("a larger batch helps or is neutral at equal H", _changes(whole, "batch"), "neutral"),
        ("more rows help", _changes(whole, "rows"), "less"),
    )
    rows = [
        _sign(text, [after.loss - before.loss for before, after in pairs], "loss", sign)
        for text, pairs, sign in wanted if pairs
    ]  # fmt: skip
    if falls := _by_size(found):
        rows.append(_sign("accuracy falls with the number of experts", falls, "accuracy", "less"))
    if away := _unequal_less_equal(found):
        rows.append(_sign("unequal H is worse than equal H of the same mean", away, "loss", "more"))
    return rows


def _sign(text: str, values: Sequence[float], what: str, wanted: str) -> list[str]:
    mean, low, high = _mean(values)
    if wanted == "neutral":
        verdict = "fails" if low > 0 else "holds"
    else:
        right, wrong = (low > 0, high < 0) if wanted == "more" else (high < 0, low > 0)
        verdict = "holds" if right else "fails" if wrong else "not clear"
    verdict = verdict if len(values) >= _FEW else "too few"
    return [text, f"{what} {mean:+.3f} [{low:+.3f}, {high:+.3f}]", f"{len(values)} pairs", verdict]


def _mean(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean and a bootstrap interval."""
    draws = np.random.default_rng(0).choice(values, (2000, len(values))).mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(np.mean(values)), float(low), float(high)


def _changes(found: Merges, name: str) -> list[tuple[Merge, Merge]]:
    """Return pairs of merges that differ in one choice alone, which is the next larger in the second."""
    groups: dict[Any, list[Merge]] = {}
    for merge in found:
        if merge.tuning is not None:
            rest = tuple(sorted((key, value) for key, value in merge.tuning.items() if key != name))
            groups.setdefault((merge.stratum, rest), []).append(merge)
    ordered = [sorted(group, key=lambda merge: _choice(merge, name)) for group in groups.values()]
    return [pair for group in ordered for pair in pairwise(group)]


def _choice(merge: Merge, name: str) -> float:
    return float(merge.tuning[name]) if merge.tuning is not None else np.nan


def _by_size(found: Merges) -> list[float]:
    """Return by cell the mean accuracy of its largest merges less that of its smallest."""
    cells: dict[str, list[Merge]] = {}
    for merge in found:
        cells.setdefault(merge.cell, []).append(merge)
    out: list[float] = []
    for group in cells.values():
        sizes = [len(merge.members) for merge in group]
        if max(sizes) > min(sizes):
            ends = [np.mean([merge.accuracy for merge in group if len(merge.members) == size])
                    for size in (min(sizes), max(sizes))]  # fmt: skip
            out.append(float(ends[1] - ends[0]))
    return out


def _unequal_less_equal(found: Merges) -> list[float]:
    """Return each unequal set's loss less the mean of equal ones of the same seed, tasks and mean length."""
    equal = _equal(found)
    return [
        merge.loss - float(np.mean([one.loss for one in near]))
        for merge in found
        if merge.tuning is None and (near := _alike(merge, equal))
    ]


def _equal(found: Merges) -> list[Merge]:
    usual = _usual(found)
    return [merge for merge in found if merge.tuning and (merge.tuning["batch"], merge.tuning["rows"]) == usual]


def _alike(merge: Merge, equal: Merges) -> list[Merge]:
    return [
        one for one in equal
        if one.stratum == merge.stratum and one.length is not None and merge.length is not None
        and bool(np.isclose(one.length, merge.length))
    ]  # fmt: skip


def _rank_signs(found: Merges) -> list[list[str]]:
    if len(found) < _FEW:
        return []
    rows: list[list[str]] = []
    for name, least in (("quadratic, probed at the merge", 0.7), ("V", 0.4)):
        measured = agreement(found, name, lambda merge: merge.loss, intervals=False)
        pooled, within = measured.pooled.value, measured.within.value
        if np.isnan(pooled):
            continue
        known = [pooled] if np.isnan(within) else [pooled, within]
        verdict = (
            "holds"
            if min(known) >= least
            else "fails"
            if max(known) < least
            else ("holds pooled alone" if pooled >= least else "holds within strata alone")
        )
        rows.append([
            f"Spearman of *{name}* with the measured loss is at least {least:g}",
            f"pooled {pooled:+.2f}" + ("" if np.isnan(within) else f", within strata {within:+.2f}"),
            f"{len(found)} merges", verdict,
        ])  # fmt: skip
    return rows


# Tables.


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _name(tuning: Mapping[str, Any]) -> str:
    return ", ".join(str(tuning[key]) for key in ("optimizer", "learning_rate", "steps", "batch", "rows"))


def _optima(found: Merges) -> str:
    """Return where the least losses are, by what is held."""
    groups: dict[tuple[str, float], list[Sweep]] = {}
    for sweep in _sweeps(found):
        groups.setdefault((sweep.along, sweep.held), []).append(sweep)
    rows = [
        [f"{_WORDS[along]}, at {_WORDS[_OTHER[along]]} {held:g}",
         *(", ".join(f"{sweep.best[side]:g}" for sweep in sweeps) for side in (0, 1))]
        for (along, held), sweeps in groups.items()
    ]  # fmt: skip
    return _table(["least loss at", "all experts merged, by seed", "single experts, by seed"], rows)


def _unequal(found: Merges, pictures: dict[str, bytes]) -> list[str]:
    """Return the section on unequal lengths, where there are sets of them."""
    sets = [merge for merge in found if merge.tuning is None]
    if not sets:
        return []
    pictures["unequal.png"] = _unequal_picture(found)
    rows: list[list[str]] = []
    for length in sorted({merge.length for merge in sets if merge.length is not None}):
        chosen = [merge for merge in sets if merge.length == length]
        near = list({id(one): one for merge in chosen for one in _alike(merge, _equal(found))}.values())
        away = _unequal_less_equal([*chosen, *near])
        unequal = np.array([merge.figures["V's part of unequal H"] for merge in chosen], np.float64)
        rows.append([
            f"{length:g}", f"{np.mean([one.loss for one in near]):.3f} ({len(near)})" if near else "",
            f"{np.mean([merge.loss for merge in chosen]):.3f} ({len(chosen)})",
            "{:+.3f} [{:+.3f}, {:+.3f}]".format(*_mean(away)) if away else "",
            str(Estimate(spearman(unequal, np.array([merge.loss for merge in chosen])))),
        ])  # fmt: skip
    header = ["mean H", "equal: loss (merges)", "unequal: loss (merges)", "difference [95%]",
              "Spearman of V's part of unequal H with loss"]  # fmt: skip
    return ["## Equal and unequal training lengths of the same mean", _table(header, rows),
            "![Loss of all experts merged, by mean length](doctor/unequal.png)"]  # fmt: skip


def _effects(found: Merges) -> str:
    rows: list[list[str]] = []
    whole = [merge for merge in found if merge.all]
    for name in ("batch", "rows"):
        pairs: dict[tuple[float, float, float], list[tuple[Merge, Merge]]] = {}
        for before, after in _changes(whole, name):
            key = before.length or np.nan, _choice(before, name), _choice(after, name)
            pairs.setdefault(key, []).append((before, after))
        for (length, less, more), group in sorted(pairs.items()):
            merged = np.mean([after.loss - before.loss for before, after in group])
            single = np.mean([after.own - before.own for before, after in group])
            rows.append([f"{_WORDS[name]} {less:g} to {more:g}, H = {length:g}", f"{merged:+.3f}", f"{single:+.3f}",
                         str(len(group))])  # fmt: skip
    changes = _table(["change", "all experts merged: loss", "single experts: loss", "pairs"], rows) if rows else ""
    sizes: dict[int, list[Merge]] = {}
    for merge in found:
        sizes.setdefault(len(merge.members), []).append(merge)
    each = [
        [str(size), f"{np.mean([one.loss for one in group]):.3f}",
         f"{100 * np.mean([one.accuracy for one in group]):.1f}", f"{np.mean([one.cost for one in group]):+.3f}",
         str(len(group))]
        for size, group in sorted(sizes.items())
    ]  # fmt: skip
    note = "Merges of a size hold every task as often; means over all settings of SGD."
    by_size = _table(["experts", "loss", "accuracy, %", "loss above their own", "merges"], each)
    return "\n\n".join(part for part in (changes, by_size, note) if part)


def _settings(found: Merges) -> str:
    groups: dict[str, list[Merge]] = {}
    for merge in found:
        if merge.tuning is not None:
            groups.setdefault(_name(merge.tuning), []).append(merge)
    sizes = sorted({len(merge.members) for merge in found})
    rows: list[list[str]] = []
    for name, group in groups.items():
        whole = [merge for merge in group if merge.all]
        length = group[0].length
        rows.append([
            name, "" if length is None else f"{length:g}",
            f"{np.mean([merge.own for merge in whole]):.3f}" if whole else "",
            *(_shown([merge.loss for merge in group if len(merge.members) == size]) for size in sizes),
            str(len(whole)),
        ])  # fmt: skip
    header = ["optimizer, rate, steps, batch, rows", "H", "single: loss", *(f"{size} merged: loss" for size in sizes),
              "seeds"]  # fmt: skip
    return _table(header, rows)


def _shown(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f}" if values else ""


# More experts, and advice.


@dataclass(frozen=True)
class Curve:
    """Mean losses by the number of experts: predicted and measured, of all tasks and of those whose expert is in."""

    sizes: tuple[int, ...]
    predicted: Mapping[str, tuple[float, ...]]
    measured: Mapping[str, tuple[float, ...]]
    probed: tuple[float, ...]


def curve_of(cell: Cell) -> Curve:
    """Return what a cell says of the number of experts."""
    groups: dict[int, list[Result]] = {}
    for one in cell.result["measured"]:
        groups.setdefault(len(one["members"]), []).append(one)
    sizes = tuple(sorted(groups))
    everything = tuple(float(np.mean([np.mean(one["losses"]) for one in groups[size]])) for size in sizes)
    inside = tuple(float(np.mean([np.mean([one["losses"][k] for k in one["members"]]) for one in groups[size]]))
                   for size in sizes)  # fmt: skip
    predicted = {name: tuple(values[size - 1] for size in sizes) for name, values in cell.result["predicted"].items()}
    probed = tuple(float(np.mean([one["validation"] for one in groups[size]])) for size in sizes)
    return Curve(sizes, predicted, {"all": everything, "members": inside}, probed)


def extrapolated(curve: Curve) -> tuple[int, float, float] | None:
    """Fit L + A / (k + b) to what probe rows say of up to half the experts: the largest k, foretold and on the rows."""
    half = max(curve.sizes) // 2
    known = [(size, loss) for size, loss in zip(curve.sizes, curve.probed, strict=True) if size <= half]
    if len(known) < 3:
        return None
    fitted = fit([size for size, _ in known], [loss for _, loss in known])
    return curve.sizes[-1], fitted.at(curve.sizes[-1]), curve.probed[-1]


def _by_tuning(cells: Sequence[Cell]) -> dict[str, list[Curve]]:
    groups: dict[str, list[Curve]] = {}
    for cell in cells:
        groups.setdefault(_name(cell.setting["tuning"]), []).append(curve_of(cell))
    return groups


def _saturation(cells: Sequence[Cell]) -> str:
    rows: list[list[str]] = []
    for name, curves in _by_tuning(cells).items():
        for kind, words in (("all", "all tasks"), ("members", "tasks whose expert is in")):
            said = np.array([curve.predicted[kind] for curve in curves]).mean(0)
            found = np.array([curve.measured[kind] for curve in curves]).mean(0)
            rows.append([
                f"{name}: {words}", *(f"{a:.2f} / {b:.2f}" for a, b in zip(said, found, strict=True)),
                f"{np.abs(said - found).mean():.3f}",
            ])  # fmt: skip
    header = ["predicted / measured, at k =", *map(str, curve_of(cells[0]).sizes), "mean gap"]
    ends = [end for cell in cells if (end := extrapolated(curve_of(cell))) is not None]
    note = "Random subsets, averaged. The prediction is one curve from probes of all experts and their mean."
    if ends:
        gap = np.mean([abs(foretold - found) for _, foretold, found in ends])
        note += (
            f" A fit of L + A / (k + b) to the losses of up to half the experts, on the probe rows, misses that of all"
            f" {ends[0][0]} by {gap:.3f} in the mean of {len(ends)} cells."
        )
    return f"{_table(header, rows)}\n\n{note}"


#: Kinds of advice in the order of the table.
WAYS = ("followed", "best candidate", "best weights", "one scale", "some left out", "equal lengths")


def gains(advised: Sequence[Result], way: str) -> list[float]:
    """Return by set the test loss of a kind of advice less the plain average's; below 0 the advice is better."""
    found: list[float] = []
    for one in advised:
        chosen = way_of(one, way)
        if chosen is not None:
            found.append(float(np.mean(chosen["losses"]) - np.mean(one["ways"]["average"]["losses"])))
    return found


def way_of(one: Result, way: str) -> Result | None:
    """Return what came of a kind of advice: ``followed`` is what the doctor told to do, if only to average."""
    ways = one["ways"]
    if way == "followed":
        return ways[one["followed"]]
    if way == "best candidate":
        return min((ways[name] for name in ways if name != "equal lengths"), key=lambda found: found["predicted"])
    return ways.get(way)


def _advice(advised: Sequence[Result]) -> str:
    rows: list[list[str]] = []
    for way in WAYS:
        found = gains(advised, way)
        if not found:
            continue
        foretold = [chosen["predicted"] - one["ways"]["average"]["predicted"] for one in advised
                    if (chosen := way_of(one, way)) is not None]  # fmt: skip
        rows.append([
            way, "{:+.3f} [{:+.3f}, {:+.3f}]".format(*_mean(found)), f"{np.mean(foretold):+.3f}",
            f"{sum(value < 0 for value in found)} of {len(found)}", f"{max(found):+.3f}",
        ])  # fmt: skip
    told = Counter(one["followed"] for one in advised)
    said = ", ".join(f"{name} {count}" for name, count in told.most_common())
    note = (
        f"Sets of experts drawn from all settings of SGD. The doctor told: {said}. Losses are of all tasks of a set,"
        " also of those whose expert is left out. *Equal lengths* multiplies task vectors by H_target / H_k."
    )
    header = ["advice", "test loss less the average's [95%]", "predicted", "better", "worst"]
    return f"{_table(header, rows)}\n\n{note}"


# Pictures.


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _png(pyplot: Any, figure: Any) -> bytes:
    out = io.BytesIO()
    figure.tight_layout()
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return out.getvalue()


def _logarithmic(axis: Any, ticks: Sequence[float] | None = None) -> None:
    """Make x logarithmic, with ticks at these values, or at powers of ten."""
    axis.set_xscale("log")
    axis.minorticks_off()
    if ticks is not None:
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks], fontsize=8)


def _scatter(found: Merges) -> bytes:
    """Figures against test losses, a panel a kind of evidence, colours by the number of experts."""
    pyplot = _pyplot()
    shown = ("sum of lengths of task vectors", *AIMS)
    figure, axes = pyplot.subplots(1, len(shown), figsize=(3.6 * len(shown), 3.6), sharey=True, squeeze=False)
    points: Any = None
    for axis, name in zip(axes[0], shown, strict=True):
        evidence = next(evidence for evidence, names in FIGURES.items() if name in names)
        known = [merge for merge in found if merge.figures[name] is not None]
        points = axis.scatter([merge.figures[name] for merge in known], [merge.loss for merge in known], s=7, alpha=0.6,
                              c=[len(merge.members) for merge in known], cmap="viridis")  # fmt: skip
        axis.set_xlabel(name)
        axis.set_title(f"evidence: {evidence}", fontsize=9)
        if evidence != "probes":
            _logarithmic(axis)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("test loss of the merge")
    figure.colorbar(points, ax=axes[0][-1], label="experts")
    return _png(pyplot, figure)


def _curves(found: Merges) -> bytes:
    """Losses along learning rates and steps, of single experts and of all merged; stars are the least."""
    pyplot = _pyplot()
    sweeps = _sweeps(found)
    rows = [along for along in _OTHER if any(sweep.along == along for sweep in sweeps)]
    held = {along: sorted({sweep.held for sweep in sweeps if sweep.along == along}) for along in rows}
    width = max(len(values) for values in held.values())
    figure, axes = pyplot.subplots(len(rows), width, figsize=(2.7 * width + 1, 2.9 * len(rows)), sharey=True,
                                   squeeze=False)  # fmt: skip
    for along, line in zip(rows, axes, strict=True):
        for axis in line[len(held[along]) :]:
            axis.axis("off")
        for axis, value in zip(line, held[along], strict=False):
            _curve(axis, [sweep for sweep in sweeps if (sweep.along, sweep.held) == (along, value)])
            axis.set_title(f"{_WORDS[_OTHER[along]]} {value:g}", fontsize=9)
            axis.set_xlabel(_WORDS[along])
        line[0].set_ylabel("test loss")
        line[0].legend(fontsize=7)
    return _png(pyplot, figure)


def _curve(axis: Any, sweeps: Sequence[Sweep]) -> None:
    """Draw the mean over seeds."""
    for side, colour in (("single", "tab:orange"), ("merged", "tab:blue")):
        losses: dict[float, list[float]] = {}
        for sweep in sweeps:
            for x, y in zip(sweep.values, getattr(sweep, side), strict=True):
                losses.setdefault(x, []).append(y)
        xs = sorted(losses)
        ys = [float(np.mean(losses[x])) for x in xs]
        axis.plot(xs, ys, marker="o", ms=3, color=colour, label={"single": "single", "merged": "all merged"}[side])
        best = int(np.argmin(ys))
        axis.plot(xs[best], ys[best], marker="*", ms=13, color=colour)
    _logarithmic(axis, sorted({x for sweep in sweeps for x in sweep.values}))
    axis.grid(alpha=0.3)


def _unequal_picture(found: Merges) -> bytes:
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(6, 3.8))
    equal = [merge for merge in _equal(found) if merge.all and merge.length is not None]
    unequal = [merge for merge in found if merge.tuning is None]
    for seed in sorted({merge.seed for merge in [*equal, *unequal]}):
        colour = f"C{seed % 10}"
        some = [merge for merge in equal if merge.seed == seed]
        axis.scatter([merge.length for merge in some], [merge.loss for merge in some], s=16, facecolors="none",
                     edgecolors=colour, label=f"equal, seed {seed}")  # fmt: skip
        other = [merge for merge in unequal if merge.seed == seed]
        axis.scatter([1.08 * (merge.length or np.nan) for merge in other], [merge.loss for merge in other], s=22,
                     marker="x", color=colour, label=f"unequal, seed {seed}")  # fmt: skip
    _logarithmic(axis, sorted({merge.length for merge in equal if merge.length is not None}) or None)
    axis.set_xlabel("mean training length H")
    axis.set_ylabel("test loss, all merged")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    return _png(pyplot, figure)


def _bars(found: Merges) -> bytes:
    """Mean losses by batch, rows and number of experts."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.4))
    whole = [merge for merge in found if merge.all]
    for axis, name in zip(axes, ("batch", "rows"), strict=False):
        paired = {id(one): one for pair in _changes(whole, name) for one in pair}.values()
        lines: dict[float, dict[float, list[Merge]]] = {}
        for merge in paired:
            lines.setdefault(merge.length or np.nan, {}).setdefault(_choice(merge, name), []).append(merge)
        for number, (length, values) in enumerate(sorted(lines.items())):
            for side, style in (("loss", "-"), ("own", "--")):
                ys = [float(np.mean([getattr(one, side) for one in values[x]])) for x in sorted(values)]
                label = f"H = {length:g}, {'all merged' if side == 'loss' else 'single'}"
                axis.plot(sorted(values), ys, style, marker="o", ms=3, color=f"C{number % 10}", label=label)
        axis.set_xlabel(_WORDS[name])
        if lines:
            _logarithmic(axis, sorted({x for values in lines.values() for x in values}))
            axis.legend(fontsize=7)
    sizes = sorted({len(merge.members) for merge in found})
    for side, label in (("loss", "merged"), ("own", "the same experts alone")):
        ys = [float(np.mean([getattr(one, side) for one in found if len(one.members) == size])) for size in sizes]
        axes[2].plot(sizes, ys, marker="o", ms=3, label=label)
    axes[2].set_xlabel("experts")
    axes[2].legend(fontsize=7)
    axes[0].set_ylabel("test loss")
    for axis in axes:
        axis.grid(alpha=0.3)
    return _png(pyplot, figure)


def _saturation_picture(cells: Sequence[Cell]) -> bytes:
    """Predicted (lines) and measured (points) mean losses by the number of experts, the mean over seeds."""
    pyplot = _pyplot()
    groups = _by_tuning(cells)
    figure, axes = pyplot.subplots(1, len(groups), figsize=(3.6 * len(groups) + 1, 3.4), sharey=True, squeeze=False)
    for axis, (name, curves) in zip(axes[0], groups.items(), strict=True):
        sizes = curves[0].sizes
        for kind, colour in (("all", "tab:blue"), ("members", "tab:orange")):
            said = np.array([curve.predicted[kind] for curve in curves]).mean(0)
            found = np.array([curve.measured[kind] for curve in curves]).mean(0)
            label = "all tasks" if kind == "all" else "tasks whose expert is in"
            axis.plot(sizes, said, color=colour, label=f"{label}, predicted")
            axis.scatter(sizes, found, color=colour, s=18, label=f"{label}, measured")
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("experts")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("mean loss")
    axes[0][0].legend(fontsize=7)
    return _png(pyplot, figure)


def _advice_picture(advised: Sequence[Result]) -> bytes:
    """The advice's test loss against the average's, a point a set; below the line the advice is better."""
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(4.4, 4.2))
    plain = [float(np.mean(one["ways"]["average"]["losses"])) for one in advised]
    for way, mark in (("followed", "o"), ("equal lengths", "x")):
        known = [(x, float(np.mean(chosen["losses"]))) for x, one in zip(plain, advised, strict=True)
                 if (chosen := way_of(one, way)) is not None]  # fmt: skip
        axis.scatter([x for x, _ in known], [y for _, y in known], marker=mark, s=22, label=way)
    ends = [min(plain) * 0.95, max(plain) * 1.05]
    axis.plot(ends, ends, color="grey", lw=1)
    axis.set_xlabel("test loss of the plain average")
    axis.set_ylabel("test loss of the advice")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return _png(pyplot, figure)
