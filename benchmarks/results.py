"""Results of `benchmarks.merge`: the JSON that is kept, and the page that is generated from it.

python -m benchmarks.results docs/results/bench/DATE-HOST.json     # write merge.md beside it again
"""

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import records
from benchmarks.page import busy, compose, listed, measured, without_numbers
from benchmarks.tables import Table, cell, spread, verdict

AIMS = {"linear": 0.8, "task_arithmetic": 0.8, "slerp": 1.2, "dare_linear": 1.2, "dare_ties": 1.2, "ties": 1.2}
"""Largest wall time of a 0.5 B merge as a ratio to the bare torch loop of the same run."""
START_UP_AIM_S = 1.0
PLANNING_AIM_S = 5.0
TINY_AIM_S = 1.2
#: How many times faster than the commit e1e4e04 merges are to be.
FASTER = {
    ("0.5b", "linear"): 1.35, ("0.5b", "slerp"): 1.35, ("0.5b", "task_arithmetic"): 1.7, ("0.5b", "dare_linear"): 1.7,
    ("0.5b", "dare_ties"): 1.7, ("0.5b", "ties"): 2.0, ("tiny", "linear"): 1.5, ("tiny", "ties"): 1.5,
}  # fmt: skip
MEMORY_AIM_MB = 500.0
_NO_AIM = float("inf")


@dataclass(frozen=True)
class Row:
    """All runs of one job.

    Arguments:
        tool: "floor", "consilience", "mergekit" or "earlier" (a commit of ours).
        job: "raw", "raw_fsync", "torch" (floors), "merge", "plan", "help" or "methods".
        size: the synthetic set; "" for jobs without input.
        method: the merge method; "" for jobs without one.
        wall_s, cpu_s, anon_mb, other_cores: one number per run, see `benchmarks.measure.Measurement`.
        failure: why the job has no numbers, or "".
    """

    tool: str
    job: str
    size: str
    method: str
    wall_s: tuple[float, ...]
    cpu_s: tuple[float, ...]
    anon_mb: tuple[float, ...]
    other_cores: tuple[float, ...]
    failure: str = ""

    @property
    def ok(self) -> bool:
        """Whether it was measured."""
        return not self.failure and bool(self.wall_s)

    @property
    def wall(self) -> float:
        """Median wall time in seconds."""
        return statistics.median(self.wall_s)

    @property
    def memory(self) -> float:
        """Largest peak of anonymous memory in MB."""
        return max(self.anon_mb)

    @property
    def typical_other_cores(self) -> float:
        """Median of the cores that other work kept busy; nought if it was not measured."""
        return statistics.median(self.other_cores) if self.ok else 0.0

    def times(self) -> str:
        """Return the median, and the range when there are several runs."""
        return spread(self.wall_s, self.typical_other_cores) if self.ok else self.failure or "-"


@dataclass(frozen=True)
class Check:
    """Agreement of a tool's tiny merge with the float64 reference, see `benchmarks.oracle.Agreement`."""

    tool: str
    method: str
    error: float
    rounding: float
    differing: float


@dataclass(frozen=True)
class Results:
    """One benchmark run.

    Arguments:
        date: ISO date and time, UTC.
        machine: processor, cores, memory, kernel, file system.
        versions: of Python, the tools and what they stand on.
        settings: the command line's.
        parameters: number of parameters of each size.
        rows: the jobs.
        checks: correctness of the merges.
    """

    date: str
    machine: dict[str, str]
    versions: dict[str, str]
    settings: dict[str, str]
    parameters: dict[str, int]
    rows: tuple[Row, ...]
    checks: tuple[Check, ...]

    def find(self, tool: str, job: str, size: str = "", method: str = "") -> Row | None:
        """Return the row of a job, if it was measured."""
        for row in self.rows:
            if (row.tool, row.job, row.size, row.method) == (tool, job, size, method) and row.ok:
                return row
        return None


def load(path: Path) -> Results:
    """Read a results file."""
    return records.load(Results, path)


def save(results: Results, folder: Path) -> Path:
    """Write the JSON and its page into ``folder`` and return the JSON's path."""
    path = folder / f"{results.date[:10]}-{results.machine['class']}.json"
    records.write(results, path)
    _write_page(results, path)
    return path


def _write_page(results: Results, path: Path) -> None:
    """Write the page, which has the same name whatever the JSON's."""
    (path.parent / "merge.md").write_text(page(results, path.name), encoding="utf-8")


def _ratio(row: Row | None, other: Row | None) -> str:
    return cell(row.wall / other.wall if row and other else None)


def _seconds(row: Row | None) -> str:
    return row.times() if row else "-"


def _megabytes(row: Row | None) -> str:
    return f"{row.memory:.0f}" if row else "-"


def _merges(results: Results) -> Table:
    """Compare the methods at 0.5 B with the bare loop and with mergekit."""
    size = "0.5b"
    bare = results.find("floor", "torch", size)
    body: list[tuple[str, ...]] = []
    for job, label in (
        ("raw", "*raw I/O*"),
        ("raw_fsync", "*raw I/O + fsync*"),
        ("torch", "*bare torch loop*"),
    ):
        row = results.find("floor", job, size)
        if not row:
            continue
        body.append((label, _seconds(row), _ratio(row, bare), "", "", "", _megabytes(row), ""))
    for method, aim in AIMS.items():
        ours, theirs = (
            results.find("consilience", "merge", size, method),
            results.find("mergekit", "merge", size, method),
        )
        if not ours and not theirs:
            continue
        goal = f"<= {aim:.1f}" + (f", {verdict(ours.wall / bare.wall, most=aim)}" if ours and bare else "")
        body.append(
            (
                method,
                _seconds(ours),
                _ratio(ours, bare),
                goal,
                _seconds(theirs),
                _ratio(theirs, ours),
                _megabytes(ours),
                _megabytes(theirs),
            )
        )
    return Table(
        "Merging 0.5 B parameters (base + 3 experts, bf16, warm cache, whole process)",
        ("method", "seconds", "x bare loop", "aim", "mergekit s", "mergekit / ours", "memory MB", "mergekit MB"),
        tuple(body),
        "The bare loop averages three inputs with safetensors and torch in fp32 (benchmarks/floor_torch.py). "
        "Consilience's times include fsync and the verification of the output; the bare loop and mergekit do neither. "
        "`slerp` merges the base and one expert; `ties` and `dare_*` keep a density of 0.5.",
    )


def _against(results: Results) -> Table | None:
    """Compare with an earlier commit, measured in the same run; None where there was none."""
    commit = results.settings.get("against", "")
    body: list[tuple[str, ...]] = []
    for size, label in (("0.5b", "0.5 B"), ("tiny", "1 MB")):
        for method in AIMS:
            ours = results.find("consilience", "merge", size, method)
            theirs = results.find("earlier", "merge", size, method)
            if ours is not None and theirs is not None:
                cpu = [f"{statistics.median(row.cpu_s):.2f}" for row in (theirs, ours)]
                goal = FASTER.get((size, method))
                aim = "-" if goal is None else f">= {goal:.2f}, {verdict(theirs.wall / ours.wall, least=goal)}"
                memory = [f"{row.memory:.0f}" for row in (theirs, ours)]
                row = (method, label, _seconds(theirs), _seconds(ours), _ratio(theirs, ours), aim, *cpu, *memory)
                body.append(row)
    if not body:
        return None
    header = (
        "method", "set", f"{commit} s", "now s", "times faster", "aim", f"{commit} CPU s", "CPU s",
        f"{commit} MB", "MB",
    )  # fmt: skip
    return Table("Against an earlier commit", header, tuple(body), "Whole processes, fsync and verification inside.", 2)


def _start_up(results: Results) -> Table:
    """List what should feel immediate."""
    body: list[tuple[str, ...]] = []
    for job, size, method, label, aim in (
        ("help", "", "", "`--help`", START_UP_AIM_S),
        ("methods", "", "", "`methods`", START_UP_AIM_S),
        ("plan", "0.5b", "ties", "`merge --dry-run`, 0.5 B, ties", START_UP_AIM_S),
        ("plan", "many", "linear", "`merge --dry-run`, 20,001 tensors", PLANNING_AIM_S),
        ("merge", "many", "linear", "merge of 20,001 small tensors", _NO_AIM),
        ("merge", "tiny", "linear", "merge of 1 MB, linear", TINY_AIM_S),
        ("merge", "tiny", "ties", "merge of 1 MB, ties", TINY_AIM_S),
    ):
        ours, theirs = results.find("consilience", job, size, method), results.find("mergekit", job, size, method)
        if not ours and not theirs:
            continue
        goal = "-" if aim == _NO_AIM else f"<= {aim:.1f} s" + (f", {verdict(ours.wall, most=aim)}" if ours else "")
        body.append((label, _seconds(ours), goal, _megabytes(ours), _seconds(theirs), _ratio(theirs, ours)))
    return Table(
        "Start-up and planning",
        ("command", "seconds", "aim", "memory MB", "mergekit s", "mergekit / ours"),
        tuple(body),
        "Kernels are cached: every method has merged the 1 MB set once before.",
    )


def _scaling(results: Results) -> Table:
    """Show that time is linear in size and memory flat."""
    body: list[tuple[str, ...]] = []
    for tool, job, method, label in (
        ("floor", "raw_fsync", "", "*raw I/O + fsync*"),
        ("floor", "torch", "", "*bare torch loop*"),
        ("mergekit", "merge", "linear", "mergekit linear"),
        ("consilience", "merge", "linear", "linear"),
        ("consilience", "merge", "ties", "ties"),
    ):
        for size, count in results.parameters.items():
            row = results.find(tool, job, size, method)
            if row is None or count < 10**8:
                continue
            per = row.wall / (count / 1e9)
            raw = results.find("floor", "raw_fsync", size)
            memory = _megabytes(row)
            if tool == "consilience":
                memory += f" ({verdict(row.memory, most=MEMORY_AIM_MB)})"
            body.append((label, size, f"{count / 1e9:.2f} B", row.times(), f"{per:.2f}", _ratio(row, raw), memory))
    return Table(
        "Time and memory against size",
        ("job", "set", "parameters", "seconds", "s per billion", "x raw I/O + fsync", "memory MB"),
        tuple(body),
        f"Anonymous memory, imports included; the aim is under {MEMORY_AIM_MB:.0f} MB at any size. In the 7b set seven "
        "eighths of the weights are holes (see benchmarks/synthetic.py), so it shows linearity, not a competition; its "
        "time includes writing 13.5 GB.",
    )


def _checks(results: Results) -> Table:
    """Show that the merges that were timed are right."""
    body = tuple(
        (check.method, check.tool, f"{check.error:.4f}", f"{check.rounding:.4f}", f"{100 * check.differing:.2f} %")
        for check in results.checks
    )
    return Table(
        "Are the merges right? (1 MB set, against float64)",
        ("method", "program", "error / task vector", "of which bf16 rounding", "elements off"),
        body,
        "`elements off`: share of output values that differ from the exact merge rounded to bf16.",
    )


def tables(results: Results) -> list[Table]:
    """Return the tables that have anything in them."""
    made = (_merges(results), _against(results), _start_up(results), _scaling(results), _checks(results))
    return [table for table in made if table is not None and table.body]


def page(results: Results, source: str) -> str:
    """Return the Markdown page of one run; ``source`` is the JSON's name."""
    made = measured(results.date, "make bench", listed(results.machine, ": "), results.versions)
    introduction = (
        f"{made} "
        "Times are medians (lowest-highest) of whole processes, interleaved in one run; memory is the peak of "
        "anonymous memory, sampled every 20 ms over the process tree."
    )
    failed = {f"{row.tool} {row.job} {row.size} {row.method}": row.failure for row in results.rows if row.failure}
    remarks = (busy(row.typical_other_cores for row in results.rows), without_numbers("Failed", failed))
    return compose(source, "python -m benchmarks.results", introduction, tables(results), remarks)


def main(paths: Sequence[str]) -> None:
    """Write the page of a results file beside it."""
    for path in map(Path, paths):
        _write_page(load(path), path)


if __name__ == "__main__":
    main(sys.argv[1:])
