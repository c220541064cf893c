"""The doctor's benchmark on the tiny set, and its page."""

from pathlib import Path

import pytest

from benchmarks import doctor, records
from benchmarks.records import Results
from benchmarks.synthetic import ensure


@pytest.mark.slow
def test_it_measures_the_tiny_set_and_writes_its_page(tmp_path: Path) -> None:
    row = doctor.run_size(ensure("tiny", tmp_path / "cache"), 1, 1, tmp_path)
    assert not row.failure
    assert all(len(values) == 1 and values[0] > 0 for values in row.wall_s.values())
    assert row.anon_mb > 0
    results = Results("2026-01-01", {"processor": "p", "class": "c"}, {"python": "3"}, {"repeat": "1"}, (row,))
    path = records.save(results, tmp_path / "doctor.json", doctor.page)
    assert records.load(Results[doctor.Row], path) == results
    text = path.with_suffix(".md").read_text()
    assert "| tiny |" in text
    assert text.startswith("<!-- Generated from doctor.json by")


def test_five_experts_are_read_whatever_the_set_has(tmp_path: Path) -> None:
    made = ensure("tiny", tmp_path / "cache")
    experts = doctor.experts_of(made, tmp_path)
    assert len({expert.resolve() for expert in experts}) == 5
    assert all(list(expert.glob("*.safetensors")) for expert in experts)


def test_a_failure_is_told_on_the_page() -> None:
    row = doctor.Row("7b", 80.0, {}, failure="exit status 1: no room")
    results = Results("2026-01-01", {"processor": "p", "class": "c"}, {"python": "3"}, {"repeat": "1"}, (row,))
    assert "Failed: 7b (exit status 1: no room)." in doctor.page(results, "doctor.json")
