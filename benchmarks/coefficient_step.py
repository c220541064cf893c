"""`make bench`: speed and memory of one step on the coefficients of a learned merge, everything in one run.

    python -m benchmarks.coefficient_step                          # both kinds of experts, 1 and 2 threads
    python -m benchmarks.coefficient_step --experts dense --threads 1 --repeat 5
    python -m benchmarks.coefficient_step --only ours              # not kept among the results

Each side (the floor, ours, the straightforward one; see docs/benchmarks.md) runs in a process of its own, by default
on as many cores as it has threads. A complete run goes to docs/results/bench/ as coefficient_step.json with a
generated page beside it; any other below .cache/bench/results/.
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from rich.console import Console
from rich.markup import escape

from benchmarks import step_results
from benchmarks.floors import warm
from benchmarks.options import make_parser, positive, thread_counts
from benchmarks.provenance import machine, now, versions
from benchmarks.records import KEPT
from benchmarks.step_experts import KINDS, Kind, make_experts
from benchmarks.step_results import Agreement, Results, Row, compare
from benchmarks.step_sides import SIDES, Found, Side, Spec
from benchmarks.synthetic import CACHE
from benchmarks.terminal import make_console, make_progress, show_place, show_table
from benchmarks.worker import failure_of, run_worker

PACKAGES = ("consilience", "torch", "transformers", "safetensors", "numpy", "numba")
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
    spec = Spec(
        job.side, job.kind, base, experts, settings.tokens, settings.repeat if job.parts else 1, job.threads,
        settings.pinned, job.parts,
    )  # fmt: skip
    warm([base, *experts.values()])
    found, done = run_worker("benchmarks.step_sides", spec, Found, scratch, threads=job.threads, limit_s=LIMIT_S)
    row = Row(job.side, job.kind, job.k, job.threads)
    if found is None:
        return replace(row, failure=failure_of(done))
    return replace(row, found=found, anon_mb=done.anon_mb, other_cores=done.other_cores)


def checks_of(rows: Sequence[Row], k: int) -> tuple[Agreement, ...]:
    """Compare our gradients with the straightforward ones of the same experts and threads."""
    by = {(row.side, row.kind, row.threads): row for row in rows if row.experts == k and not row.failure}
    return tuple(
        compare(row, by[("straightforward", kind, threads)])
        for (side, kind, threads), row in by.items()
        if side == "ours" and ("straightforward", kind, threads) in by
    )


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
    rows: list[Row] = []
    settings.cache.mkdir(parents=True, exist_ok=True)
    with (
        make_progress(console) as progress,
        tempfile.TemporaryDirectory(prefix="step-", dir=settings.cache) as folder,
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
        date=now(),
        machine=machine(settings.cache),
        versions=versions(PACKAGES),
        settings={"repeat": str(settings.repeat), "cores": "one a thread" if settings.pinned else "all"},
        parameters=_parameters(base),
        experts=settings.k,
        tokens=settings.tokens,
        rows=tuple(rows),
        checks=checks_of(rows, settings.k),
    )


def parse(arguments: Sequence[str]) -> Settings:
    """Read the command line."""
    parser = make_parser("benchmarks.coefficient_step", __doc__)
    parser.add_argument("--experts", choices=KINDS, default=None, help="full checkpoints or adapters (default: both)")
    parser.add_argument("--k", type=positive, default=5, help="experts in the timed steps (default 5)")
    parser.add_argument("--tokens", type=positive, default=128, help="of the one sample in a step (default 128)")
    parser.add_argument("--repeat", type=positive, default=4, help="timed steps of each process (default 4)")
    usual = ",".join(str(count) for count in (1, 2) if count <= len(os.sched_getaffinity(0)))
    parser.add_argument("--threads", type=thread_counts, default=usual, help=f"e.g. 1,2 (default {usual})")
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
        folder=options.results or (KEPT if complete else cache / "results"),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 when a process failed or the gradients differ, 130 when interrupted."""
    settings = parse(sys.argv[1:] if arguments is None else arguments)
    console = make_console()
    try:
        found = run(settings, console)
    except KeyboardInterrupt:
        return 130
    except (OSError, RuntimeError) as error:
        console.print(f"[red]{escape(str(error))}[/red]")
        return 1
    path = step_results.save(found, settings.folder)
    for table in step_results.tables(found):
        show_table(console, table)
    show_place(console, path, f"{path.stem}.md")
    return 1 if any(row.failure for row in found.rows) or not all(check.same for check in found.checks) else 0


if __name__ == "__main__":
    raise SystemExit(main())
