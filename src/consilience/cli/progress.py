"""A merge and its summary on a terminal."""

import math
from pathlib import Path

import typer

from consilience.engine.plan import Plan
from consilience.engine.summary import Summary
from consilience.errors import printable
from consilience.progress import open_progress


def work(plan: Plan, out: Path, *, force: bool, threads: int | None, quiet: bool) -> Summary:
    """Run a merge and show how far it is, unless quiet."""
    from consilience.engine.merge import run_merge

    try:
        with open_progress(not quiet) as progress:
            return run_merge(plan, out, force=force, threads=threads, progress=progress)
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
