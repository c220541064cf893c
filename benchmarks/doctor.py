"""Time and memory of the merge doctor on checkpoints, against reading every file once.

    python -m benchmarks.doctor                     # 0.5 B and 7 B shapes, five experts each; a few minutes
    python -m benchmarks.doctor --sizes 0.5b --repeat 5

The five experts are the three of ``benchmarks.synthetic``, two of them in a second folder of hard links: the doctor
reads each as often as it is named, and so does the floor, which does nothing else. Both run in turn, as whole
processes, inputs warm in the page cache where they fit. Results go to docs/results/bench/doctor.json with a page.
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import records, rounds
from benchmarks.floors import warm
from benchmarks.measure import measure
from benchmarks.options import make_parser, names_of, positive
from benchmarks.page import busy, compose, without_numbers
from benchmarks.records import Results
from benchmarks.synthetic import CACHE, ROOT, SIZES, SyntheticSet, ensure
from benchmarks.tables import Table, at_most, cell, spread
from benchmarks.terminal import make_console, show_page
from benchmarks.worker import failure_of

PACKAGES = ("consilience", "numpy", "numba")
TIME_AIM, MEMORY_AIM_MB = 2.0, 1000.0
SIDES = ("read", "doctor")
LIMIT_S = 1200.0


@dataclass(frozen=True)
class Row:
    """One size: seconds by side, peak anonymous memory, cores that other work took; or why there are none."""

    size: str
    gigabytes: float
    wall_s: dict[str, list[float]]
    anon_mb: float = 0.0
    other_cores: float = 0.0
    failure: str = ""


def experts_of(made: SyntheticSet, folder: Path) -> list[Path]:
    """Return five experts: the set's three, and links to the first two in folders of their own."""
    found = list(made.experts.values())
    for number, source in enumerate(found[:2]):
        place = folder / f"{made.size.name}-link-{number}"
        place.mkdir()
        for file in source.iterdir():
            (place / file.name).symlink_to(file.resolve())
        found.append(place)
    return found


def run_size(made: SyntheticSet, repeat: int, threads: int, folder: Path) -> Row:
    """Measure one size."""
    experts = experts_of(made, folder)
    models = [made.base, *experts]
    size = sum(file.stat().st_size for model in models for file in model.glob("*.safetensors"))
    names = [part for k, expert in enumerate(experts) for part in ("-e", f"e{k}={expert}")]
    program = Path(sys.executable).parent / "consilience"
    doctor = (program, "doctor", made.base, *names, "--json", "--threads", str(threads))
    sides = {"read": (sys.executable, "-m", "benchmarks.doctor", "--read", *models), "doctor": doctor}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    memory, others = 0.0, 0.0
    for _ in range(repeat + 1):  # the first round compiles and warms, and is not counted
        for side, command in sides.items():
            done = measure(command, environment={"OMP_NUM_THREADS": "1"}, folder=ROOT, limit_s=LIMIT_S)
            if done.timed_out or done.exit_status:
                return Row(made.size.name, size / 1e9, {}, failure=failure_of(done))
            seconds[side].append(done.wall_s)
            others = max(others, done.other_cores)
            memory = max(memory, done.anon_mb if side == "doctor" else 0.0)
    return Row(made.size.name, size / 1e9, {side: values[1:] for side, values in seconds.items()}, memory, others)


def tables(results: Results[Row]) -> list[Table]:
    """Return the page's tables."""
    body: list[tuple[str, ...]] = []
    for row in results.rows:
        if not row.failure:
            times = [spread(row.wall_s[side], row.other_cores) for side in SIDES]
            ratio = rounds.median_ratio(row.wall_s["doctor"], row.wall_s["read"])
            body.append((row.size, cell(row.gigabytes, ".1f"), *times, *at_most(ratio, TIME_AIM),
                         *at_most(row.anon_mb, MEMORY_AIM_MB)))  # fmt: skip
    header = ("shape", "GB read", "reading (s)", "doctor (s)", "ratio", "aim", "", "memory (MB)", "aim", "")
    return [Table("Five experts from checkpoints alone", header, tuple(body))]


def page(results: Results[Row], source: str) -> str:
    """Return the Markdown page of a run."""
    introduction = results.made_by("python -m benchmarks.doctor")
    failed = {row.size: row.failure for row in results.rows if row.failure}
    remarks = [busy(row.other_cores for row in results.rows), without_numbers("Failed", failed)]
    return compose(source, "python -m benchmarks.doctor --page", introduction, tables(results), remarks)


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark, or read folders once."""
    if arguments[:1] == ["--read"]:
        warm([Path(folder) for folder in arguments[1:]])
        return 0
    parser = make_parser("benchmarks.doctor", __doc__)
    known = tuple(SIZES)
    parser.add_argument("--sizes", type=names_of(known), default=("0.5b", "7b"), help="of " + ", ".join(known))
    parser.add_argument("--repeat", type=positive, default=3, help="timed rounds (default 3)")
    parser.add_argument("--threads", type=positive, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--results", type=Path, default=records.KEPT / "doctor.json", help="where results go")
    parser.add_argument("--page", type=Path, default=None, help="write the page of this results file, and no more")
    options = parser.parse_args(arguments)
    if options.page is not None:
        records.rewrite_page(Results[Row], options.page, page)
        return 0
    made = [ensure(size) for size in options.sizes]
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        rows = tuple(run_size(one, options.repeat, options.threads, Path(folder)) for one in made)
    settings = {"threads": str(options.threads), "repeat": str(options.repeat)}
    results = records.results_of(rows, CACHE, PACKAGES, settings)
    records.save(results, options.results, page)
    show_page(make_console(), options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
