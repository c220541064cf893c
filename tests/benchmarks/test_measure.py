"""What is measured is what was used: anonymous memory of the whole tree, processor time, exit status."""

import sys
from pathlib import Path

import pytest

from benchmarks.measure import measure

PYTHON = Path(sys.executable)


def test_anonymous_memory_is_seen() -> None:
    found = measure([PYTHON, "-c", "import time; block = bytearray(b'x') * 200_000_000; time.sleep(0.3)"])
    assert found.exit_status == 0
    assert found.anon_mb == pytest.approx(200, rel=0.2)


def test_memory_of_children_counts() -> None:
    child = "import time; block = bytearray(b'x') * 100_000_000; time.sleep(0.5)"
    parent = (
        "import subprocess, sys\n"
        f"children = [subprocess.Popen([sys.executable, '-c', {child!r}]) for _ in 'ab']\n"
        "for each in children: each.wait()"
    )
    assert measure([PYTHON, "-c", parent]).anon_mb == pytest.approx(200, rel=0.2)


def test_mapped_files_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(50_000_000))
    code = (
        "import mmap, sys, time\n"
        "pages = mmap.mmap(open(sys.argv[1]).fileno(), 0, prot=mmap.PROT_READ)\n"
        "sum(pages[::4096]); time.sleep(0.2)"
    )
    assert measure([PYTHON, "-c", code, path]).anon_mb < 40


def test_status_output_and_environment() -> None:
    code = "import os, sys; print(os.environ['ANSWER']); print('why', file=sys.stderr); sys.exit(3)"
    found = measure([PYTHON, "-c", code], environment={"ANSWER": "42"})
    assert (found.exit_status, found.timed_out) == (3, False)
    assert set(found.output.split()) == {"42", "why"}
    assert found.wall_s > 0


def test_a_time_limit_ends_it() -> None:
    found = measure([PYTHON, "-c", "import time; time.sleep(60)"], limit_s=0.3)
    assert found.timed_out
    assert found.exit_status == -9
