"""JSON for programs: one object on standard output; all else goes to standard error."""

import json
from typing import Any

import typer

from consilience.numbers import finite


def print_json(value: Any) -> None:
    """Print one line of JSON; NaN and Inf, which it does not have, become null."""
    typer.echo(json.dumps(finite(value), ensure_ascii=False, allow_nan=False))
