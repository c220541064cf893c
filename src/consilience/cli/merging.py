"""``consilience merge`` on a terminal: progress, what was learned, and what the merge did."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from consilience.cli.printing import print_json
from consilience.engine.adapter_output import AdapterSummary
from consilience.engine.load_check import OWN, LoadCheck, check_model
from consilience.engine.summary import Summary
from consilience.errors import InputError, printable

#: Share of a task vector's entries below one unit in the last place that a summary speaks of.
BELOW_UNIT = 0.01


def show_plan(
    source: Any,
    out: Path,
    as_adapter: str | None,
    rank: int | None,
    *,
    force: bool,
    threads: int | None,
    check_load: bool,
    as_json: bool,
    learning: dict[str, Any],
    **settings: Any,
) -> None:
    """Print the plan of a merge (``--dry-run``); nothing is touched."""
    from consilience.api import check_adapter_options, check_options, plan_recipe
    from consilience.cli.learning import learning_lines
    from consilience.engine.adapter_output import check_adapter
    from consilience.engine.describe import plan_facts, summary_lines, tensor_facts, tensor_lines
    from consilience.engine.output import check_plan, inputs
    from consilience.engine.stream import thread_count
    from consilience.workdir import check_out

    plan = plan_recipe(source, out, **settings)
    try:
        if check_adapter(plan, as_adapter, rank) is not None:
            check_adapter_options(
                settings["shard_size"],
                stochastic=settings["stochastic_rounding"],
                allow_nonfinite=settings["allow_nonfinite"],
            )
        plan = check_options(plan, **learning)
        folder = as_adapter is not None or plan.alignment.donor.folder is not None
        check_plan(out, plan, folder=folder)
        check_out(out, folder=folder, force=force, inputs=inputs(plan))
        learned = learning_lines(plan) if plan.unlearned and plan.merges else []
        if check_load and as_adapter is not None:
            raise InputError("--check-load: an adapter is opened once it is written; leave --dry-run out")
        how = LoadCheck(force=True, trust_remote_code=learning["trust_remote_code"])
        loader = check_model(plan, how) if check_load else None
        count = thread_count(threads)
        if as_json:
            facts = {"ok": True, "out": str(out)} | plan_facts(plan, count)
            facts |= {"learning": learned, "loader": loader, "tensor_list": tensor_facts(plan)}
            print_json(facts)
            return
        lines = [*summary_lines(plan, count), *learned, *([f"load     {loader}"] if loader is not None else [])]
        lines += tensor_lines(plan)
    finally:
        plan.close()
    typer.echo("\n".join(map(printable, lines)))


def show_warning(text: str) -> None:
    """Print what changes the output's computation, before any work."""
    typer.echo(f"consilience: warning: {printable(text)}", err=True)


def merge_command(source: Any, out: Path, *, quiet: bool, as_json: bool = False, **settings: Any) -> None:
    """Merge under progress bars (none when quiet or when standard error is no terminal) and say what was done."""
    from consilience.api import merge_recipe
    from consilience.cli.learning import summary
    from consilience.jit import skip_blas

    skip_blas()

    def tell(found: Any) -> None:
        for line in summary(found):
            typer.echo(line, err=as_json)

    settings |= {"learned": None if quiet else tell, "warned": show_warning}
    result = merge_recipe(source, out, progress=not quiet, **settings)
    if as_json:
        print_json({"ok": True, "kind": "adapter" if isinstance(result, AdapterSummary) else "model"} | asdict(result))
        return
    if quiet:
        return
    if isinstance(result, AdapterSummary):
        lost = f", {result.discarded:.2%} of the update's energy discarded" if settings["rank"] else ", exact"
        typer.echo(f"{result.out}: adapter on {result.modules} modules, rank {result.rank}{lost}")
        _show_notes(result)
    else:
        show_summary(result)


def _show_notes(summary: "Summary | AdapterSummary") -> None:
    for text in summary.warnings:
        typer.echo(f"  warning: {printable(text)}")
    for note in summary.notes:
        typer.echo(f"  note: {printable(note)}")
    if summary.loader not in ("", OWN):
        typer.echo(f"  {printable(summary.loader)}")


def show_summary(summary: Summary) -> None:
    """Print what a merge did."""
    read, written = summary.bytes_read / 1e9, summary.bytes_written / 1e9
    resumed = f", {summary.resumed_segments} segments from an earlier run" if summary.resumed_segments else ""
    merged = f"{summary.tensors} tensors"
    if summary.method != "moe":
        merged = f"{summary.merged} of {summary.tensors} tensors merged"
    typer.echo(
        f"{summary.out}: {summary.method}, {merged}, "
        f"{summary.parameters / 1e6:.1f} M parameters, read {read:.2f} GB, wrote {written:.2f} GB, "
        f"{summary.seconds:.1f} s, verified{resumed}"
    )
    swallowed = [loss for loss in summary.below_unit if loss.entries > BELOW_UNIT]
    for loss in swallowed:
        typer.echo(
            f"  {loss.name}: {loss.entries:.1%} of its task vector's entries ({loss.mass:.1%} of its mass) are below "
            "one unit in the last place of the output"
        )
    if swallowed:
        typer.echo("  to keep them, write a wider dtype (--dtype float32), or give these experts larger weights")
    if not math.isnan(summary.rounding):
        typer.echo(f"  rounding error: {summary.rounding:.3%} of {summary.rounding_of}")
    if summary.extra_passes:
        typer.echo(f"  {summary.extra_passes} rankings were misled by their sample and took one more pass")
    _show_notes(summary)
    typer.echo(f"  fingerprint {summary.fingerprint}")
