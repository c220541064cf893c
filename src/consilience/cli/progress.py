"""Progress bars and the summary of a merge on a terminal."""

import math
import sys
from pathlib import Path

import typer

from consilience.engine.plan import Plan
from consilience.engine.summary import Summary
from consilience.errors import printable


def work(plan: Plan, out: Path, *, force: bool, threads: int | None, quiet: bool) -> Summary:
    """Run a merge under a progress bar (none when quiet or when standard error is not a terminal)."""
    from consilience.engine.merge import run_merge

    try:
        if quiet or not sys.stderr.isatty():
            return run_merge(plan, out, force=force, threads=threads)
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(f"merging ({plan.method.name})", total=sum(t.bytes_read for t in plan.tensors))

            class Bar:
                def advance(self, nbytes: int) -> None:
                    progress.advance(task, nbytes)

            return run_merge(plan, out, force=force, threads=threads, listener=Bar())
    finally:
        plan.close()


def show_summary(summary: Summary) -> None:
    """Print what a merge did."""
    read, written = summary.bytes_read / 1e9, summary.bytes_written / 1e9
    resumed = f", {summary.resumed_segments} segments from an earlier run" if summary.resumed_segments else ""
    typer.echo(
        f"{summary.out}: {summary.method}, {summary.merged} of {summary.tensors} tensors merged, "
        f"{summary.parameters / 1e6:.1f} M parameters, read {read:.2f} GB, wrote {written:.2f} GB, "
        f"{summary.seconds:.1f} s, verified{resumed}"
    )
    for loss in summary.below_unit:
        typer.echo(
            f"  {loss.name}: {loss.entries:.1%} of its task vector's entries ({loss.mass:.1%} of its mass) are below "
            "one unit in the last place of the output"
        )
    if not math.isnan(summary.rounding):
        typer.echo(f"  rounding error: {summary.rounding:.3%} of {summary.rounding_of}")
    for note in summary.notes:
        typer.echo(f"  note: {printable(note)}")
    typer.echo(f"  fingerprint {summary.fingerprint}")
