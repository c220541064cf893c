"""Results that are kept: a JSON file, and the page that is generated from it."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import TypeAdapter

from benchmarks.synthetic import ROOT

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

R = TypeVar("R", bound="DataclassInstance")
KEPT = ROOT / "docs" / "results" / "bench"
"""Where the results of complete runs go."""


def load(kind: type[R], path: Path) -> R:
    """Read a results file."""
    return TypeAdapter(kind).validate_json(path.read_bytes())


def write(results: "DataclassInstance", path: Path) -> None:
    """Write a results file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(results), indent=1) + "\n", encoding="utf-8")


def write_page(results: R, path: Path, page: Callable[[R, str], str]) -> None:
    """Write the page of the results in ``path`` beside it; ``page`` is given the results and the file's name."""
    path.with_suffix(".md").write_text(page(results, path.name), encoding="utf-8")


def save(results: R, path: Path, page: Callable[[R, str], str]) -> Path:
    """Write results and their page beside them; return ``path``."""
    write(results, path)
    write_page(results, path, page)
    return path
