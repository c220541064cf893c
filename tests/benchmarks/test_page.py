"""What the pages of all benchmarks share: tables, cells and remarks."""

import io
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import page, records, rounds, tables, terminal
from benchmarks.measure import NOISE
from benchmarks.tables import Table

TABLE = Table("Times", ("case", "side", "s"), (("a", "*one*", "1.0"),), "In `seconds`.", text=2)


def test_words_are_set_to_the_left_and_numbers_to_the_right() -> None:
    text = "### Times\n\n| case | side | s |\n|---|---|---:|\n| a | *one* | 1.0 |\n\nIn `seconds`."
    assert page.markdown(TABLE) == text


def test_cells_on_a_terminal_have_no_markdown() -> None:
    out = io.StringIO()
    terminal.show_table(Console(file=out, width=80), TABLE)
    assert "one" in out.getvalue()
    assert "*" not in out.getvalue()


def test_a_page_is_its_parts_in_order() -> None:
    quiet, loaded = page.busy([0.0, NOISE]), page.busy([0.0, 2 * NOISE])
    failed = page.without_numbers("Failed", {"a": "time limit", "b": "exit status 1: no"})
    assert page.without_numbers("Failed", {}) == quiet == ""
    text = page.compose("x.json", "python -m x", "Measured.", [TABLE], (quiet, loaded, failed))
    head, said, *middle, remark, last = text.split("\n\n")
    assert head == "<!-- Generated from x.json by `python -m x`; do not edit. -->"
    assert said == "Measured."
    assert "\n\n".join(middle) == page.markdown(TABLE)
    assert remark.startswith("† other work")
    assert last == "Failed: a (time limit); b (exit status 1: no).\n"


def test_an_introduction_leaves_out_the_class() -> None:
    machine = page.listed({"cores": "2", "class": "2core"}, ": ")
    said = page.measured("2026-01-02T03:04:05+00:00", "make x", machine, {"python": "3.11"})
    assert said == "Measured 2026-01-02 with `make x`. Machine: cores: 2. Versions: python 3.11."
    assert page.measured("2026-01-02", "x", "", {}, {"k": "8", "n": "1"}).endswith(" Settings: k 8, n 1.")


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        (tables.at_most(1.2, 1.2), ("1.20", "<= 1.2", "met")),
        (tables.at_most(1.201, 1.2), ("1.20", "<= 1.2", "missed")),
        (tables.at_least(2.0, 2), ("2.00", ">= 2", "met")),
        (tables.at_least(1.9, 2), ("1.90", ">= 2", "missed")),
        (tables.at_least(None, 2), ("-", ">= 2", "-")),
        (tables.at_most(float("nan"), 2), ("nan", "<= 2", "missed")),
    ],
)
def test_values_are_judged(cells: tuple[str, ...], said: tuple[str, ...]) -> None:
    assert cells == said


def test_times_have_a_range_and_a_mark() -> None:
    assert tables.spread([3.0, 1.0, 2.0], 0.0) == "2.00 (1.00-3.00)"
    assert tables.spread([3.0], 2 * NOISE) == "3.00 †"
    assert (tables.milliseconds(0.0123), tables.milliseconds(None)) == ("12.3", "-")


def test_ratios_are_taken_within_rounds() -> None:
    assert rounds.median_ratio([1.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == 2.0
    assert rounds.median_ratio([], [1.0]) is None


@dataclass(frozen=True)
class Kept:
    """Results of nothing."""

    values: tuple[float, ...]


def test_results_come_back_with_a_page_beside_them(tmp_path: Path) -> None:
    path = records.save(Kept((1.0, 2.0)), tmp_path / "new" / "x.json", lambda kept, name: f"{name}: {kept.values}")
    assert records.load(Kept, path) == Kept((1.0, 2.0))
    assert path.with_suffix(".md").read_text() == "x.json: (1.0, 2.0)"
