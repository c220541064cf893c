"""``consilience stats``: what merges need of data, as files that can be passed on without the data."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

EPILOG = """Examples:

\b
  consilience stats experts/code rows/code.jsonl stats/code
  consilience stats base/+adapters/math rows/math.jsonl stats/math --kind gram --kind fisher
  consilience merge base/ merged/ -e code=experts/code -e math=experts/math --method regmean \\
      --statistics code=stats/code --statistics math=stats/math

\b
Kinds: gram (mean of x x^T of what each linear layer is given; for regmean, lot), mean (of x), fisher (mean squared
slope of the log-likelihood of every weight; for fisher). Rows are JSONL, as for evaluate; they need no responses
but for --fisher empirical (the row's own response) and exact (all of a row's choices).
"""

JOIN_EPILOG = """Example:

\b
  consilience stats-join stats/math stats/math-part-1 stats/math-part-2
"""


def stats(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, MODEL+ADAPTER, or hub reference.")],
    data: Annotated[str, typer.Argument(metavar="DATA", help="A JSONL file of rows.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")],
    kind: Annotated[
        list[str] | None, typer.Option(metavar="gram|mean|fisher", help="What to collect (repeatable; default: gram).")
    ] = None,
    fisher: Annotated[
        str, typer.Option(metavar="sampled|empirical|exact", help="Whose labels Fisher information is over.")
    ] = "sampled",
    rows: Annotated[int | None, typer.Option(min=1, help="Use the first rows only.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 16,
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 (2-3 times as fast on many CPUs).")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    seed: Annotated[int, typer.Option(min=0, help="Seed of sampled labels.")] = 0,
    force: Annotated[bool, typer.Option(help="Replace statistics that are there.")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Run .py files that come with the model.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no summary.")] = False,
) -> None:
    """Collect a model's statistics on rows: Gram matrices, means, Fisher information."""
    from consilience.learned.statistics import Collecting, collect_statistics

    kinds: Any = tuple(dict.fromkeys(kind or ["gram"]))
    whose: Any = fisher
    settings = Collecting(kinds, whose, rows, batch_size, dtype, device, seed, trust_remote_code)
    facts = collect_statistics(model, data, out, settings=settings, force=force, progress=not quiet)
    if as_json:
        typer.echo(json.dumps(asdict(facts) | {"alias": len(facts.alias)}))
    elif not quiet:
        held = ", ".join(f"{one} ({facts.fisher})" if one == "fisher" else one for one in facts.kinds)
        typer.echo(f"{out}: {held} of {facts.rows} rows, {facts.tokens} tokens")


def stats_join(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")],
    parts: Annotated[list[str], typer.Argument(metavar="PART...", help="Statistics of one model on different rows.")],
    force: Annotated[bool, typer.Option(help="Replace statistics that are there.")] = False,
) -> None:
    """Join statistics of one model on several sets of rows, as if they had been read together."""
    from consilience.experts.statistics import join, open_statistics

    join(parts, out, force=force)
    found = open_statistics(out)
    found.close()
    typer.echo(f"{out}: {', '.join(found.facts.kinds)} of {found.facts.rows} rows, {found.facts.tokens} tokens")
