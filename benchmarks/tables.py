"""Tables of strings, and what their cells say: numbers, medians with ranges, aims with verdicts."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.measure import NOISE


@dataclass(frozen=True)
class Table:
    """A titled table of strings, printed on a terminal or as Markdown.

    Arguments:
        title: above it.
        header: the columns' names.
        body: the rows.
        note: below it.
        text: how many of the first columns are words, set to the left; the others are numbers, set to the right.
    """

    title: str
    header: tuple[str, ...]
    body: tuple[tuple[str, ...], ...]
    note: str = ""
    text: int = 1


def cell(value: float | None, form: str = ".2f") -> str:
    """Return a number in a format, or a dash."""
    return "-" if value is None else format(value, form)


def milliseconds(seconds: float | None) -> str:
    """Return a time to a tenth of a millisecond, or a dash."""
    return cell(None if seconds is None else 1e3 * seconds, ".1f")


def mark(other_cores: float) -> str:
    """Return what follows a time that was measured while other work kept so many cores busy."""
    return " †" if other_cores > NOISE else ""


def spread(values: Sequence[float], other_cores: float) -> str:
    """Return the median of times, and their range when there are several."""
    middle = f"{statistics.median(values):.2f}"
    extent = f" ({min(values):.2f}-{max(values):.2f})" if len(values) > 1 else ""
    return middle + extent + mark(other_cores)


def verdict(value: float | None, *, most: float = float("inf"), least: float = float("-inf")) -> str:
    """Say whether a value is within its aim."""
    return "-" if value is None else "met" if least <= value <= most else "missed"


def at_most(value: float | None, aim: float) -> tuple[str, str, str]:
    """Return a value, its largest aim and the verdict."""
    return cell(value), f"<= {aim}", verdict(value, most=aim)


def at_least(value: float | None, aim: float) -> tuple[str, str, str]:
    """Return a value, its least aim and the verdict."""
    return cell(value), f">= {aim}", verdict(value, least=aim)
