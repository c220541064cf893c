"""Work in a process of its own: what goes there and back, and why it failed."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from benchmarks.measure import Measurement
from benchmarks.synthetic import ROOT
from benchmarks.worker import failure_of, run_worker, work_on


@dataclass(frozen=True)
class Number:
    """What is to be doubled, and its double."""

    value: int


def test_a_process_reads_what_to_do_and_writes_what_it_found(tmp_path: Path) -> None:
    given, out = tmp_path / "spec.json", tmp_path / "found.json"
    given.write_text('{"value": 21}')
    work_on([str(given), str(out)], Number, lambda spec: Number(2 * spec.value))
    assert out.read_text() == '{"value": 42}'


@pytest.mark.parametrize("limit_s", [60.0, 0.0])
def test_without_a_result_there_is_a_reason(tmp_path: Path, limit_s: float) -> None:
    (tmp_path / "found.json").write_text('{"value": 1}')
    found, done = run_worker("benchmarks.absent", Number(1), Number, tmp_path, threads=1, limit_s=limit_s)
    assert found is None
    assert (tmp_path / "spec.json").read_text() == '{"value":1}'
    reason = failure_of(done)
    assert reason == "time limit" if not limit_s else reason.endswith("No module named benchmarks.absent")


def test_a_reason_has_the_last_line_and_no_paths() -> None:
    done = Measurement(1.0, 1.0, 1.0, 0.0, 2, False, f"first\n  {ROOT}/x.py: no\n\n")
    assert failure_of(done) == "exit status 2: x.py: no"
    assert failure_of(replace(done, output="\n")) == "exit status 2: no output"
    assert failure_of(replace(done, timed_out=True)) == "time limit"
