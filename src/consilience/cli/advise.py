"""``consilience advise``: before an expert is trained, how will it merge?"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

EPILOG = """Examples:

\b
  consilience advise --learning-rate 1e-4 --steps 2000 --batch-size 16 --rows 8000
  consilience advise --learning-rate 1e-4 --steps 2000 --batch-size 16 --rows 8000 --with runs/math --with runs/code

Directions are those of the stability bound (docs/theory-of-merging.md): they rank changes and promise nothing.
"""


def advise(
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate that is planned.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a step, over all devices.")],
    rows: Annotated[int, typer.Option(min=1, help="Rows of the training data.")],
    optimizer: Annotated[str, typer.Option(help="Such as adamw or sgd.")] = "adamw",
    others: Annotated[
        list[Path] | None,
        typer.Option("--with", metavar="LOG", help="Log or folder of an expert it is to be merged with (repeatable)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what to change before fine-tuning an expert that is to be merged."""
    from consilience.doctor.advise import Advice, Planned, advise
    from consilience.doctor.evidence.training import read_training

    plan = Planned(learning_rate, steps, batch_size, rows, optimizer)
    found: Advice = advise(plan, [read_training(path, path.name) for path in others or []])
    if as_json:
        typer.echo(json.dumps(asdict(found), ensure_ascii=False))
        return
    for line in found.said:
        typer.echo(line)
    typer.echo("\nchange                length   instability   rate / batch   why")
    for one in found.changes:
        terms = f"x {one.length:<6.3g} x {one.stability:<10.3g}  x {one.temperature:<11.3g}"
        typer.echo(f"{one.what:<20}  {terms}  {one.why}")
    typer.echo("\nFactors are of the bound's terms, for SGD and one task; none is a guarantee.")
