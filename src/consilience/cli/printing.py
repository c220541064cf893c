"""JSON for programs: one object on standard output; all else goes to standard error."""

import json
import math
from collections.abc import Mapping
from typing import Any, cast

import typer


def print_json(value: Any) -> None:
    """Print one line of JSON; NaN and Inf, which it does not have, become null."""
    typer.echo(json.dumps(_finite(value), ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in cast("list[Any]", value)]
    return value
