"""Results that are kept: a JSON file, and the page that is generated from it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from pydantic import TypeAdapter

from benchmarks.page import listed, measured
from benchmarks.provenance import machine, now, versions
from benchmarks.synthetic import ROOT
from studies.json_rows import json_rows

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

R = TypeVar("R", bound="DataclassInstance")
Row = TypeVar("Row", bound="DataclassInstance")
KEPT = ROOT / "docs" / "results" / "bench"
"""Where the results of complete runs go."""


@dataclass(frozen=True)
class Results(Generic[Row]):
    """One run.

    Arguments:
        date: ISO date and time, UTC.
        machine, versions, settings: where and with what it ran.
        rows: what was measured, of the benchmark's own kind.
    """

    date: str
    machine: dict[str, str]
    versions: dict[str, str]
    settings: dict[str, str]
    rows: tuple[Row, ...]

    def made_by(self, command: str) -> str:
        """Return the sentences that open the page's introduction: when, how, where and with what the run was made."""
        return measured(self.date, command, listed(self.machine), self.versions, self.settings)


def results_of(rows: Iterable[Row], folder: Path, packages: Sequence[str], settings: dict[str, str]) -> Results[Row]:
    """Return the results of a run that ends now.

    Arguments:
        rows: what was measured.
        folder: where it ran, which tells the file system.
        packages: those whose versions count.
        settings: how it ran.
    """
    return Results(now(), machine(folder), versions(packages), settings, tuple(rows))


def load(kind: type[R], path: Path) -> R:
    """Read a results file."""
    return TypeAdapter(kind).validate_json(path.read_bytes())


def write(results: "DataclassInstance", path: Path) -> None:
    """Write a results file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A measurement that failed is NaN.
    path.write_text(json_rows(asdict(results), allow_nan=True), encoding="utf-8")


def write_page(results: R, path: Path, page: Callable[[R, str], str]) -> None:
    """Write the page of the results in ``path`` beside it; ``page`` is given the results and the file's name."""
    path.with_suffix(".md").write_text(page(results, path.name), encoding="utf-8")


def rewrite_page(kind: type[R], path: Path, page: Callable[[R, str], str]) -> None:
    """Write the page of a results file again, beside it."""
    write_page(load(kind, path), path, page)


def save(results: R, path: Path, page: Callable[[R, str], str]) -> Path:
    """Write results and their page beside them; return ``path``."""
    write(results, path)
    write_page(results, path, page)
    return path
