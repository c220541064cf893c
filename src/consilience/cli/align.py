"""``consilience align``: a model in the order of another one's units, and whether that lets the two be averaged."""

import json
from pathlib import Path
from typing import Annotated

import typer

from consilience.errors import printable

EPILOG = """Examples:

\b
  consilience align base/ model/ aligned/
  consilience align base/ model/ aligned/ --rows heldout/code.jsonl --rows heldout/math.jsonl
  consilience align base.pt model.pt aligned.safetensors --axes axes.yaml
  consilience align base/ model/ aligned/ --json > report.json

\b
Of a transformers folder the units are found from its architecture; of other files a YAML file states them:
  up.weight: [hidden, null]          # rows belong to the group "hidden", columns are fixed
  up.bias: [hidden]
  down.weight: [null, hidden]
  layers.*.mix.weight: [stream, [stream, 16]]   # one axis of two parts; * is any text without dots

Exit status 0 if the model is aligned, whether or not that makes the two mergeable: the last line says.
"""


def align(
    base: Annotated[
        str,
        typer.Argument(metavar="BASE", help="Whose order is kept: a model folder, hub reference or file of tensors."),
    ],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Whose units are reordered, of the same architecture.")],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to write (a .safetensors file for files of tensors).")
    ],
    axes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Which axes may be reordered together, as YAML.")
    ] = None,
    rows: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Rows with responses: measure the loss along the line (repeatable)."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order in which groups take turns.")] = 0,
    force: Annotated[bool, typer.Option(help="Replace a non-empty OUT.")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Run .py files that come with the model.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no summary.")] = False,
) -> None:
    """Reorder a model's hidden units to match a base's: the same function, with weights that may be averaged."""
    from consilience.mixing.align_files import align_files

    found = align_files(
        base,
        model,
        out,
        axes=axes,
        rows=rows or (),
        seed=seed,
        force=force,
        trust_remote_code=trust_remote_code,
        progress=not quiet,
    )
    if as_json:
        typer.echo(json.dumps({"out": str(out)} | found.to_dict(), ensure_ascii=False))
    elif not quiet:
        first, *rest = found.lines()
        typer.echo("\n".join([f"{printable(str(out))}: {first}", *(f"  {printable(text)}" for text in rest)]))
