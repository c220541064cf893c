"""``consilience doctor``: what is wrong with these experts, and will they merge?"""

import json
from pathlib import Path
from typing import Annotated

import typer

EPILOG = """Examples:

\b
  consilience doctor recipe.yaml
  consilience doctor base/ -e math=experts/math -e code=adapters/code
  consilience doctor recipe.yaml --json > report.json
  consilience doctor recipe.yaml --html report.html
  consilience doctor recipe.yaml --try ties:density=0.3 --try dare_ties:density=0.5

Exit status 0 whatever is found; 2 where nothing can be diagnosed.
"""


def doctor(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE|BASE", help="A recipe file, or (with -e) the base model.")],
    expert: Annotated[
        list[str] | None, typer.Option("--expert", "-e", metavar="[NAME=]PATH", help="An expert (repeatable).")
    ] = None,
    exact: Annotated[
        bool, typer.Option(help="Compute ranks and overlaps from whole matrices instead of sketches (slower).")
    ] = False,
    probe_rows: Annotated[int, typer.Option(min=0, help="Rows used of each expert's data.probe (0: all).")] = 100,
    probes: Annotated[bool, typer.Option(help="Measure losses where all experts have probe rows.")] = True,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--try", metavar="METHOD[:KEY=VALUE,...]", help="Merge with this method and measure (repeatable)."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where probes run the model: cpu, cuda, ...")] = "cpu",
    trust_remote_code: Annotated[bool, typer.Option(help="Run .py files that come with the base.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the report as a page, with pictures.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Workers (default: all cores).")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sketches.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Examine experts before they are merged: lengths, angles, conflicts, wrong bases, copies, what to change."""
    from consilience.api import diagnose
    from consilience.cli.inputs import read_input

    if html is not None:
        _writable(html)
    found = diagnose(
        read_input(recipe, expert, None, None, {}),
        exact=exact,
        threads=threads,
        seed=seed,
        probe_rows=probe_rows if probes else None,
        methods=methods or [],
        device=device,
        trust_remote_code=trust_remote_code,
        progress=not quiet,
    )
    if as_json:
        typer.echo(json.dumps(found.to_dict(), ensure_ascii=False))
    else:
        from consilience.doctor.report.text import text

        typer.echo(text(found))
    if html is not None:
        from consilience.doctor.report.page import page
        from consilience.workdir import write_file

        write_file(html.resolve(), page(found))
        typer.echo(f"{html}: open it in a browser", err=True)


def _writable(html: Path) -> None:
    """Refuse a page's path before the work is done.

    Raises:
        InputError: it is a folder, or something else that is not a file, or lies in no folder.
    """
    from consilience.errors import InputError

    if html.is_dir():
        raise InputError(f"--html {html}: is a folder; name a file in it")
    if html.exists() and not html.is_file():
        raise InputError(f"--html {html}: is no plain file; name one")
    if not html.absolute().parent.is_dir():
        raise InputError(f"--html {html}: there is no folder {html.parent}; make it first")
