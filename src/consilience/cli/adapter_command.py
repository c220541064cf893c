"""``consilience merge --as-adapter``: the merge of LoRA experts as one PEFT adapter."""

from pathlib import Path
from typing import Any

import typer

from consilience.errors import InputError
from consilience.progress import open_progress


def check_adapter(plan: Any, kind: str, rank: int | None) -> None:
    """Refuse what no adapter can hold, before anything is learned for it."""
    if kind not in ("cat", "svd"):
        raise InputError(f"--as-adapter {kind!r}: choose cat (exact) or svd (with --rank)")
    if (kind == "svd") != (rank is not None):
        raise InputError("--rank: goes with --as-adapter svd, which needs it")
    if kind == "cat" and plan.method.name == "expert_merging_pp":
        raise InputError(
            "--as-adapter cat: chunks of a tensor have coefficients of their own, which factors cannot hold; use svd "
            "with --rank"
        )
    from consilience.engine.adapter_output import check_low_rank

    check_low_rank(plan)


def merge_to_adapter(
    plan: Any, out: Path, kind: str, rank: int | None, force: bool, dry_run: bool, quiet: bool, threads: int | None
) -> None:
    """Write a planned merge as an adapter and say what truncation discarded."""
    from consilience.engine.adapter_output import write_adapter

    if dry_run:
        from consilience.engine.describe import describe
        from consilience.engine.stream import thread_count

        typer.echo("\n".join(describe(plan, thread_count(threads))))
        return
    with open_progress(not quiet) as progress:
        summary = write_adapter(
            plan,
            out,
            "cat" if kind == "cat" else "svd",
            rank or 0,
            force=force,
            threads=threads,
            progress=progress,
        )
    if not quiet:
        lost = f", {summary.discarded:.2%} of the update's energy discarded" if kind == "svd" else ", exact"
        typer.echo(f"{summary.out}: adapter on {summary.modules} modules, rank {summary.rank}{lost}")
        for note in summary.notes:
            typer.echo(f"  note: {note}")
