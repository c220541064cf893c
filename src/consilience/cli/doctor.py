"""``consilience doctor``: what is wrong with these experts, and will they merge?"""

import json
import sys
from typing import Annotated

import typer

EPILOG = """Examples:

\b
  consilience doctor recipe.yaml
  consilience doctor base/ -e math=experts/math -e code=adapters/code
  consilience doctor recipe.yaml --json > report.json

Exit status 0 whatever is found; 2 where nothing can be diagnosed.
"""


def doctor(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE|BASE", help="A recipe file, or (with -e) the base model.")],
    expert: Annotated[
        list[str] | None, typer.Option("--expert", "-e", metavar="NAME=PATH", help="An expert (repeatable).")
    ] = None,
    exact: Annotated[
        bool, typer.Option(help="Compute ranks and overlaps from whole matrices instead of sketches (slower).")
    ] = False,
    probe_rows: Annotated[int, typer.Option(min=0, help="Rows used of each expert's data.probe (0: all).")] = 100,
    probes: Annotated[bool, typer.Option(help="Measure losses where all experts have probe rows.")] = True,
    device: Annotated[str, typer.Option(help="Where probes run the model: cpu, cuda, ...")] = "cpu",
    trust_remote_code: Annotated[bool, typer.Option(help="Run .py files that come with the base.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Workers (default: all cores).")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sketches.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Examine experts before they are merged: lengths, angles, conflicts, wrong bases, copies, what to change."""
    from consilience.api import diagnose
    from consilience.cli.app import read_input

    found = diagnose(
        read_input(recipe, expert, None, None, {}),
        exact=exact,
        threads=threads,
        seed=seed,
        probe_rows=probe_rows if probes else None,
        device=device,
        trust_remote_code=trust_remote_code,
        progress=not quiet and sys.stderr.isatty(),
    )
    if as_json:
        typer.echo(json.dumps(found.to_dict(), ensure_ascii=False))
        return
    from consilience.stability.report_text import text

    typer.echo(text(found))
