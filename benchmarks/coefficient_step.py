"""`make bench`: speed and memory of one step on the coefficients of a learned merge, everything in one run.

    python -m benchmarks.coefficient_step                          # both kinds of experts, 1 and 2 threads
    python -m benchmarks.coefficient_step --experts dense --threads 1 --repeat 5
    python -m benchmarks.coefficient_step --only ours              # not kept among the results

Each side (the floor, ours, the straightforward one; see docs/benchmarks.md) runs in a process of its own, by default
on as many cores as it has threads. A complete run goes to docs/results/bench/ as coefficient_step.json with a
generated page beside it; any other below .cache/bench/results/.
"""

import argparse
import contextlib
import importlib.metadata
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from pydantic import TypeAdapter
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

from benchmarks import step_results
from benchmarks.floors import warm
from benchmarks.measure import measure
from benchmarks.results import Table, machine
from benchmarks.step_experts import KINDS, Kind, make_experts
from benchmarks.step_results import Agreement, Results, Row, compare
from benchmarks.step_sides import SIDES, Found, Side, Spec
from benchmarks.synthetic import CACHE, ROOT

MEMORY_COUNTS = (2, 8)
"""Numbers of experts between which our memory is compared."""
LIMIT_S = 600.0


@dataclass(frozen=True)
class Settings:
    """What to run; see the command line's help."""

    kinds: tuple[Kind, ...]
    k: int
    tokens: int
    repeat: int
    threads: tuple[int, ...]
    sides: tuple[Side, ...]
    pinned: bool
    base: Path | None
    cache: Path
    folder: Path


@dataclass(frozen=True)
class Job:
    """One process: a side, with ``k`` experts; its memory alone is of interest unless ``parts``."""

    side: Side
    kind: Kind
    k: int
    threads: int
    parts: bool

    @property
    def title(self) -> str:
        """A short name for the progress bar."""
        return f"{self.side} {self.kind} K={self.k} threads={self.threads}"


def jobs_of(settings: Settings) -> list[Job]:
    """Return the processes in the order in which they run: what is compared runs close together."""
    jobs = [
        Job(side, kind, settings.k, threads, True)
        for kind in settings.kinds
        for threads in settings.threads
        for side in settings.sides
    ]
    last = settings.threads[-1]
    if "ours" in settings.sides:
        jobs += [Job("ours", kind, k, last, False) for kind in settings.kinds for k in MEMORY_COUNTS if k != settings.k]
    return jobs


def run_job(job: Job, base: Path, experts: dict[str, Path], settings: Settings, scratch: Path) -> Row:
    """Run one process and return what it found."""
    row = Row(job.side, job.kind, job.k, job.threads)
    spec = Spec(
        job.side, job.kind, base, experts, settings.tokens, settings.repeat if job.parts else 1, job.threads,
        settings.pinned, job.parts, scratch / "found.json",
    )  # fmt: skip
    path = scratch / "spec.json"
    path.write_bytes(TypeAdapter(Spec).dump_json(spec))
    spec.out.unlink(missing_ok=True)
    warm([base, *experts.values()])
    count = str(job.threads)
    environment = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "HF_HUB_OFFLINE": "1"}
    command = (Path(sys.executable), "-m", "benchmarks.step_sides", path)
    done = measure(command, environment=environment, folder=ROOT, limit_s=LIMIT_S)
    if done.timed_out or done.exit_status or not spec.out.exists():
        lines = [line.strip() for line in done.output.splitlines() if line.strip()] or ["no output"]
        failure = "time limit" if done.timed_out else f"exit status {done.exit_status}: {lines[-1]}"
        return Row(row.side, row.kind, row.experts, row.threads, failure=failure.replace(f"{ROOT}/", ""))
    found = TypeAdapter(Found).validate_json(spec.out.read_bytes())
    return Row(row.side, row.kind, row.experts, row.threads, found, done.anon_mb, done.other_cores)


def checks_of(rows: Sequence[Row], k: int) -> tuple[Agreement, ...]:
    """Compare our gradients with the straightforward ones of the same experts and threads."""
    by = {(row.side, row.kind, row.threads): row for row in rows if row.experts == k and not row.failure}
    return tuple(
        compare(row, by[("straightforward", kind, threads)])
        for (side, kind, threads), row in by.items()
        if side == "ours" and ("straightforward", kind, threads) in by
    )


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in ("consilience", "torch", "transformers", "safetensors", "numpy", "numba"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, check=True, capture_output=True, text=True
        )
        found["commit"] = commit.stdout.strip()
    return found


def _parameters(base: Path) -> int:
    from benchmarks.step_floor import mapped

    return sum(tensor.numel() for tensor in mapped(base).values())


def _base(settings: Settings) -> Path:
    if settings.base is not None:
        return settings.base
    from suites.language.base import base_path

    return base_path()


def run(settings: Settings, console: Console) -> Results:
    """Make what is missing, run everything and return the results.

    Raises:
        OSError: the disk is too full, or the base cannot be fetched.
    """
    base = _base(settings)
    jobs = jobs_of(settings)
    columns = (TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows: list[Row] = []
    with (
        Progress(*columns, console=console) as progress,
        tempfile.TemporaryDirectory(prefix="step-", dir=_made(settings.cache)) as folder,
    ):
        task = progress.add_task("experts", total=len(settings.kinds))
        experts: dict[Kind, dict[str, Path]] = {}
        for kind in settings.kinds:
            most = max(job.k for job in jobs if job.kind == kind)
            experts[kind] = make_experts(base, settings.cache / "step", kind, most)
            progress.advance(task)
        # Gigabytes of dirty pages would otherwise be written back during the first measurements.
        os.sync()
        task = progress.add_task("", total=len(jobs))
        for job in jobs:
            progress.update(task, description=job.title)
            some = dict(list(experts[job.kind].items())[: job.k])
            rows.append(run_job(job, base, some, settings, Path(folder)))
            if rows[-1].failure:
                progress.console.print(f"[red]{job.title}: {escape(rows[-1].failure)}[/red]")
            progress.advance(task)
        progress.update(task, description="done")
    return Results(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine(settings.cache),
        versions=_versions(),
        settings={"repeat": str(settings.repeat), "cores": "one a thread" if settings.pinned else "all"},
        parameters=_parameters(base),
        experts=settings.k,
        tokens=settings.tokens,
        rows=tuple(rows),
        checks=checks_of(rows, settings.k),
    )


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _print(console: Console, table: Table) -> None:
    shown = RichTable(title=table.title, caption=table.note or None, title_justify="left", caption_justify="left")
    for number, name in enumerate(table.header):
        shown.add_column(escape(name), justify="left" if number == 0 else "right")
    for row in table.body:
        shown.add_row(*(escape(cell.replace("`", "").replace("*", "")) for cell in row))
    console.print(shown)


def _counts(text: str) -> tuple[int, ...]:
    """Parse a comma-separated list of positive numbers."""
    values = tuple(dict.fromkeys(_positive(part) for part in text.split(",")))
    available = len(os.sched_getaffinity(0))
    if wrong := [value for value in values if value > available]:
        raise argparse.ArgumentTypeError(f"{wrong[0]} threads, and there are {available} cores")
    return values


def _positive(text: str) -> int:
    if not text.strip().isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def parse(arguments: Sequence[str]) -> Settings:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.coefficient_step", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("--experts", choices=KINDS, default=None, help="full checkpoints or adapters (default: both)")
    parser.add_argument("--k", type=_positive, default=5, help="experts in the timed steps (default 5)")
    parser.add_argument("--tokens", type=_positive, default=128, help="of the one sample in a step (default 128)")
    parser.add_argument("--repeat", type=_positive, default=4, help="timed steps of each process (default 4)")
    usual = ",".join(str(count) for count in (1, 2) if count <= len(os.sched_getaffinity(0)))
    parser.add_argument("--threads", type=_counts, default=usual, help=f"e.g. 1,2 (default {usual})")
    parser.add_argument("--only", choices=tuple(SIDES), default=None, help="run one side alone")
    parser.add_argument("--unpinned", action="store_true", help="let processes use more cores than they have threads")
    parser.add_argument("--base", type=Path, default=None, help="a model folder (default: the language suite's base)")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where experts lie (default .cache/bench)")
    parser.add_argument("--results", type=Path, default=None, help="default docs/results/bench if the run is complete")
    options = parser.parse_args(arguments)
    usual_run = (options.k, options.tokens, options.unpinned) == (5, 128, False)
    complete = usual_run and options.experts is None and options.only is None and options.base is None
    cache = cast(Path, options.cache).resolve()
    return Settings(
        kinds=KINDS if options.experts is None else (options.experts,),
        k=options.k,
        tokens=options.tokens,
        repeat=options.repeat,
        threads=options.threads,
        sides=tuple(SIDES) if options.only is None else (options.only,),
        pinned=not options.unpinned,
        base=None if options.base is None else cast(Path, options.base).resolve(),
        cache=cache,
        folder=options.results or (ROOT / "docs" / "results" / "bench" if complete else cache / "results"),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 when a process failed or the gradients differ, 130 when interrupted."""
    settings = parse(sys.argv[1:] if arguments is None else arguments)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    try:
        found = run(settings, console)
    except KeyboardInterrupt:
        return 130
    except (OSError, RuntimeError) as error:
        console.print(f"[red]{escape(str(error))}[/red]")
        return 1
    path = step_results.save(found, settings.folder)
    for table in step_results.tables(found):
        _print(console, table)
    console.print(f"[dim]{escape(str(path))} and {path.stem}.md beside it[/dim]")
    return 1 if any(row.failure for row in found.rows) or not all(check.same for check in found.checks) else 0


if __name__ == "__main__":
    raise SystemExit(main())
