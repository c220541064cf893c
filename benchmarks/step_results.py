"""Results of `benchmarks.coefficient_step`: the JSON that is kept, and the page that is generated from it.

python -m benchmarks.step_results docs/results/bench/coefficient_step.json     # write coefficient_step.md again
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks import records, rounds
from benchmarks.page import busy, compose, listed, measured, without_numbers
from benchmarks.step_experts import Kind
from benchmarks.step_sides import Found, Side
from benchmarks.tables import Table, at_least, at_most, cell, spread

FLOOR_AIM = 1.15
"""Largest time of our step as a ratio to the floor's."""
SPEED_AIM = 2
"""Least time of the straightforward step as a ratio to ours."""
GROWTH_AIM = 1.05
"""Largest memory of our step with the most experts as a ratio to that with the fewest."""
LEANNESS_AIM = 3
"""Least memory of the straightforward step as a ratio to ours."""
TOLERANCE = 1e-3
"""Of the gradients' agreement: norm of the difference over the norm. In float32 either side's own error is a tenth to a
third of it, against our step in float64."""
STEP, HIDDEN = "step", "step, hidden too"
PARTS = ("blend", "expert", "compute", "products")
LABELS = {
    "blend": "blend",
    "expert": "the expert's forward pass",
    "compute": "forward + backward",
    "products": "products",
}


@dataclass(frozen=True)
class Row:
    """One process.

    Arguments:
        side: whose step.
        kind: of the experts.
        experts: how many.
        threads: of torch.
        found: what it reports.
        anon_mb: its peak of anonymous memory, imports and loading included, in units of 10^6 bytes.
        other_cores: cores that other work kept busy meanwhile.
        failure: why there are no numbers, or "".
    """

    side: Side
    kind: Kind
    experts: int
    threads: int
    found: Found = field(default_factory=Found)
    anon_mb: float = 0.0
    other_cores: float = 0.0
    failure: str = ""

    def median(self, name: str = STEP) -> float | None:
        """Return the median wall time of a step or one of its parts."""
        return rounds.median(self.found.seconds.get(name, []))

    def times(self, name: str = STEP) -> str:
        """Return the median, and the range when there are several repeats."""
        values = self.found.seconds.get(name)
        return spread(values, self.other_cores) if values else self.failure or "-"


@dataclass(frozen=True)
class Agreement:
    """Whether our gradient and autograd's are the same, over all coefficients.

    ``error`` is the norm of the difference over that of autograd's; ``worst`` is the largest difference of one
    coefficient over the root mean square of all; ``same`` is whether ``error`` is within ``TOLERANCE``.
    """

    kind: Kind
    threads: int
    coefficients: int
    error: float
    worst: float
    same: bool


@dataclass(frozen=True)
class Results:
    """One run.

    Arguments:
        date: ISO date and time, UTC.
        machine, versions, settings: where and with what it ran.
        parameters: of the model.
        experts: how many the times are for.
        tokens: of the one sample in a step.
        rows: the processes.
        checks: agreement of the gradients.
    """

    date: str
    machine: dict[str, str]
    versions: dict[str, str]
    settings: dict[str, str]
    parameters: int
    experts: int
    tokens: int
    rows: tuple[Row, ...]
    checks: tuple[Agreement, ...]

    def find(self, side: Side, kind: Kind, threads: int, experts: int | None = None) -> Row | None:
        """Return a process that was measured, by default one with the usual number of experts."""
        wanted = (side, kind, threads, self.experts if experts is None else experts)
        for row in self.rows:
            if (row.side, row.kind, row.threads, row.experts) == wanted and not row.failure:
                return row
        return None

    def groups(self) -> "Iterator[tuple[Kind, int]]":
        """Yield (kind, threads) in the order in which they ran."""
        seen: set[tuple[Kind, int]] = set()
        for row in self.rows:
            if (row.kind, row.threads) not in seen:
                seen.add((row.kind, row.threads))
                yield row.kind, row.threads


def compare(ours: Row, reference: Row) -> Agreement:
    """Compare two processes' gradients.

    Raises:
        ValueError: they are of different coefficients.
    """
    names = sorted(reference.found.gradient)
    if names != sorted(ours.found.gradient) or not names:
        raise ValueError(f"{ours.kind}: the gradients are not of the same tensors")
    found = np.array([ours.found.gradient[name] for name in names])
    exact = np.array([reference.found.gradient[name] for name in names])
    size = float(np.sqrt(np.mean(exact**2)))
    return Agreement(
        kind=ours.kind,
        threads=ours.threads,
        coefficients=exact.size,
        error=float(np.linalg.norm(found - exact) / np.linalg.norm(exact)),
        worst=float(np.abs(found - exact).max()) / size,
        same=bool(np.linalg.norm(found - exact) <= TOLERANCE * np.linalg.norm(exact)),
    )


def _ratio(value: float | None, other: float | None) -> float | None:
    return value / other if value and other else None


def _name(kind: Kind, threads: int) -> str:
    return f"{kind}, {threads} thread{'s' if threads > 1 else ''}"


def _steps(results: Results) -> Table:
    """List every side's step."""
    body: list[tuple[str, ...]] = []
    for kind, threads in results.groups():
        bare = results.find("floor", kind, threads)
        base = bare.median() if bare else None
        named: tuple[tuple[Side, str, str], ...] = (
            ("floor", STEP, "*floor*"),
            ("ours", STEP, "consilience"),
            ("ours", HIDDEN, "consilience, hidden states too"),
            ("straightforward", STEP, "straightforward"),
        )
        for side, timed, label in named:
            row = results.find(side, kind, threads)
            if row is None or row.median(timed) is None:
                continue
            memory = f"{row.anon_mb:.0f}" if timed == STEP else ""
            body.append((_name(kind, threads), label, row.times(timed), cell(_ratio(row.median(timed), base)), memory))
    return Table(
        f"One step, K = {results.experts}, 1 x {results.tokens} tokens, float32",
        ("experts", "step", "seconds", "x floor", "memory MB"),
        tuple(body),
        "Memory is the whole process's peak, imports and loading included. What the sides do is said in "
        "docs/benchmarks.md.",
        text=2,
    )


def _aims(results: Results) -> Table:
    """Set the ratios against what we aim at."""
    body = [
        (_name(kind, threads), f"{measure}, {sides}", *judged)
        for kind, threads in results.groups()
        for measure, sides, judged in _judged(results, kind, threads)
    ]
    return Table("What we aim at", ("experts", "ratio", "value", "aim", "verdict"), tuple(body), text=2)


def _judged(results: Results, kind: Kind, threads: int) -> Iterator[tuple[str, str, tuple[str, str, str]]]:
    """Yield what is compared between which sides, and the value, its aim and the verdict."""
    floor, ours, plain = (results.find(side, kind, threads) for side in ("floor", "ours", "straightforward"))
    if ours is None:
        return
    time = ours.median()
    if floor is not None and time is not None:
        yield "time", "consilience / floor", at_most(_ratio(time, floor.median()), FLOOR_AIM)
    if plain is not None and time is not None:
        yield "time", "straightforward / consilience", at_least(_ratio(plain.median(), time), SPEED_AIM)
    if plain is not None:
        yield "memory", "straightforward / consilience", at_least(_ratio(plain.anon_mb, ours.anon_mb), LEANNESS_AIM)
    counts = sorted({r.experts for r in results.rows if (r.side, r.kind, r.threads) == ("ours", kind, threads)})
    few, many = (results.find("ours", kind, threads, count) for count in (counts[0], counts[-1]))
    if few is not None and many is not None and few is not many:
        sides = f"consilience with K = {counts[-1]} / K = {counts[0]}"
        yield "memory", sides, at_most(_ratio(many.anon_mb, few.anon_mb), GROWTH_AIM)


def _parts(results: Results) -> Table:
    """Show where the time goes."""
    body: list[tuple[str, ...]] = []
    for kind, threads in results.groups():
        rows = [results.find(side, kind, threads) for side in ("floor", "ours", "straightforward")]
        for part in PARTS:
            values = [row.median(part) if row else None for row in rows]
            if any(values):
                cells = map(cell, values)
                body.append((_name(kind, threads), LABELS[part], *cells, cell(_ratio(values[1], values[0]))))
        ours = rows[1]
        whole = ours.median() if ours else None
        parts = [ours.median(part) if ours else None for part in ("blend", "compute", "products")]
        if whole and all(parts):
            rest = whole - sum(part or 0.0 for part in parts)
            body.append((_name(kind, threads), "all the rest, less what overlaps", "", f"{rest:+.2f}", "", ""))
    return Table(
        "Where the time goes (seconds)",
        ("experts", "part", "floor", "consilience", "straightforward", "consilience / floor"),
        tuple(body),
        "Our parts are timed one by one, outside a step; inside it the products are taken beside the backward pass, "
        "and the expert's own output layer is read. The straightforward backward pass includes its products.",
        text=2,
    )


def _checks(results: Results) -> Table:
    """Show that the gradients that were timed are right."""
    body = tuple(
        (_name(check.kind, check.threads), str(check.coefficients), f"{check.error:.1e}", f"{check.worst:.1e}",
         "same" if check.same else "DIFFERENT")
        for check in results.checks
    )  # fmt: skip
    return Table(
        "Is it the same gradient? (consilience against autograd)",
        ("experts", "coefficients", "norm of the error / norm", "largest error / rms", f"within {TOLERANCE:g}"),
        body,
    )


def tables(results: Results) -> list[Table]:
    """Return the tables that have anything in them."""
    made = (_steps(results), _aims(results), _parts(results), _checks(results))
    return [table for table in made if table.body]


def page(results: Results, source: str) -> str:
    """Return the Markdown page of one run; ``source`` is the JSON's name."""
    place = listed(results.machine, ": ")
    made = measured(results.date, "python -m benchmarks.coefficient_step", place, results.versions, results.settings)
    introduction = (
        f"{made} The model has {results.parameters / 1e6:.1f} M parameters. Times are "
        "medians (lowest-highest) of steps after a first one, each side in a process of its own; memory is the peak of "
        "anonymous memory, sampled every 20 ms over the process tree."
    )
    failed = {
        f"{row.side}, {_name(row.kind, row.threads)}, K = {row.experts}": row.failure
        for row in results.rows
        if row.failure
    }
    remarks = (busy(row.other_cores for row in results.rows), without_numbers("Failed", failed))
    return compose(source, "python -m benchmarks.step_results", introduction, tables(results), remarks)


def load(path: Path) -> Results:
    """Read a results file."""
    return records.load(Results, path)


def save(results: Results, folder: Path) -> Path:
    """Write the JSON and its page into ``folder`` and return the JSON's path."""
    return records.save(results, folder / "coefficient_step.json", page)


def main(paths: Sequence[str]) -> None:
    """Write the page of a results file beside it."""
    for path in map(Path, paths):
        records.rewrite_page(Results, path, page)


if __name__ == "__main__":
    main(sys.argv[1:])
