"""Results of `benchmarks.coefficient_step`: the JSON that is kept, and the page that is generated from it.

python -m benchmarks.step_results docs/results/bench/coefficient_step.json     # write coefficient_step.md again
"""

import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from benchmarks.results import NOISE, Table
from benchmarks.step_experts import Kind
from benchmarks.step_sides import Found, Side

FLOOR_AIM = 1.15
"""Largest time of our step as a ratio to the floor's."""
SPEED_AIM = 2.0
"""Least time of the straightforward step as a ratio to ours."""
GROWTH_AIM = 1.05
"""Largest memory of our step with the most experts as a ratio to that with the fewest."""
LEANNESS_AIM = 3.0
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
        values = self.found.seconds.get(name)
        return statistics.median(values) if values else None

    def times(self, name: str = STEP) -> str:
        """Return the median and the range."""
        values, middle = self.found.seconds.get(name), self.median(name)
        if not values or middle is None:
            return self.failure or "-"
        mark = " †" if self.other_cores > NOISE else ""
        return f"{middle:.2f} ({min(values):.2f}-{max(values):.2f}){mark}"


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


def _ratio(value: float | None, other: float | None) -> str:
    return f"{value / other:.2f}" if value and other else "-"


def _verdict(value: float | None, other: float | None, *, most: float = np.inf, least: float = 0.0) -> str:
    if not value or not other:
        return "-"
    return "met" if least <= value / other <= most else "missed"


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
            body.append((_name(kind, threads), label, row.times(timed), _ratio(row.median(timed), base), memory))
    return Table(
        f"One step, K = {results.experts}, 1 x {results.tokens} tokens, float32",
        ("experts", "step", "seconds", "x floor", "memory MB"),
        tuple(body),
        "Memory is the whole process's peak, imports and loading included. What the sides do is said in "
        "docs/benchmarks.md.",
    )


def _aims(results: Results) -> Table:
    """Set the ratios against what we aim at."""
    body: list[tuple[str, ...]] = []
    for kind, threads in results.groups():
        floor, ours, plain = (
            results.find("floor", kind, threads),
            results.find("ours", kind, threads),
            results.find("straightforward", kind, threads),
        )
        if ours is None:
            continue
        if floor is not None and ours.median() is not None:
            pair = ours.median(), floor.median()
            body.append((_name(kind, threads), "time, consilience / floor", _ratio(*pair), f"<= {FLOOR_AIM}",
                         _verdict(*pair, most=FLOOR_AIM)))  # fmt: skip
        if plain is not None and ours.median() is not None:
            pair = plain.median(), ours.median()
            body.append((_name(kind, threads), "time, straightforward / consilience", _ratio(*pair),
                         f">= {SPEED_AIM:.0f}", _verdict(*pair, least=SPEED_AIM)))  # fmt: skip
        if plain is not None:
            pair = plain.anon_mb, ours.anon_mb
            body.append((_name(kind, threads), "memory, straightforward / consilience", _ratio(*pair),
                         f">= {LEANNESS_AIM:.0f}", _verdict(*pair, least=LEANNESS_AIM)))  # fmt: skip
        counts = sorted({r.experts for r in results.rows if (r.side, r.kind, r.threads) == ("ours", kind, threads)})
        few, many = (results.find("ours", kind, threads, count) for count in (counts[0], counts[-1]))
        if few is not None and many is not None and few is not many:
            pair = many.anon_mb, few.anon_mb
            label = f"memory, consilience with K = {counts[-1]} / K = {counts[0]}"
            body.append((_name(kind, threads), label, _ratio(*pair), f"<= {GROWTH_AIM}",
                         _verdict(*pair, most=GROWTH_AIM)))  # fmt: skip
    return Table("What we aim at", ("experts", "ratio", "value", "aim", "verdict"), tuple(body))


def _parts(results: Results) -> Table:
    """Show where the time goes."""
    body: list[tuple[str, ...]] = []
    for kind, threads in results.groups():
        rows = [results.find(side, kind, threads) for side in ("floor", "ours", "straightforward")]
        for part in PARTS:
            values = [row.median(part) if row else None for row in rows]
            if any(values):
                cells = ("-" if value is None else f"{value:.2f}" for value in values)
                body.append((_name(kind, threads), LABELS[part], *cells, _ratio(values[1], values[0])))
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


def _markdown(table: Table) -> str:
    text = next((i for i, name in enumerate(table.header) if name in ("seconds", "value", "floor")), 1)
    lines = [f"### {table.title}", "", "| " + " | ".join(table.header) + " |"]
    lines.append("|" + "|".join("---" if i < text else "---:" for i in range(len(table.header))) + "|")
    lines += ["| " + " | ".join(row) + " |" for row in table.body]
    return "\n".join(lines) + (f"\n\n{table.note}" if table.note else "")


def page(results: Results, source: str) -> str:
    """Return the Markdown page of one run; ``source`` is the JSON's name."""
    hardware = ", ".join(f"{key}: {value}" for key, value in results.machine.items() if key != "class")
    software = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    settings = ", ".join(f"{name} {value}" for name, value in results.settings.items())
    failed = [row for row in results.rows if row.failure]
    parts = [
        f"<!-- Generated from {source} by `python -m benchmarks.step_results`; do not edit. -->",
        f"Measured {results.date[:10]} with `python -m benchmarks.coefficient_step`. Machine: {hardware}. Versions: "
        f"{software}. Settings: {settings}. The model has {results.parameters / 1e6:.1f} M parameters. Times are "
        "medians (lowest-highest) of steps after a first one, each side in a process of its own; memory is the peak of "
        "anonymous memory, sampled every 20 ms over the process tree.",
        *map(_markdown, tables(results)),
    ]
    if any(row.other_cores > NOISE for row in results.rows):
        parts.append(f"† other work (or writeback) kept more than {NOISE} cores busy: an upper bound.")
    if failed:
        parts.append(
            "Failed: " + "; ".join(f"{r.side}, {_name(r.kind, r.threads)}, K = {r.experts} ({r.failure})"
                                   for r in failed) + "."
        )  # fmt: skip
    return "\n\n".join(parts) + "\n"


def load(path: Path) -> Results:
    """Read a results file."""
    return TypeAdapter(Results).validate_json(path.read_bytes())


def save(results: Results, folder: Path) -> Path:
    """Write the JSON and its page into ``folder`` and return the JSON's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "coefficient_step.json"
    path.write_text(json.dumps(asdict(results), indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(page(results, path.name), encoding="utf-8")
    return path


def main(paths: Sequence[str]) -> None:
    """Write the page of a results file beside it."""
    for path in map(Path, paths):
        path.with_suffix(".md").write_text(page(load(path), path.name), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
