"""Speed and memory of one step of GLUE's search, against its floor, the gradient and a straightforward search.

    python -m benchmarks.glue_step                                 # seven nets, 10 experts, 1 thread
    python -m benchmarks.glue_step --net vit8 --k 4 --repeat 3     # not kept among the results
    python -m benchmarks.glue_step --page docs/results/bench/glue_step.json    # write the page again

The sides of one step, on the same minibatch of random images, experts and pair of points:

floor              one [2, K] x [K, P] product, then a forward pass of each of two modules that lie in its rows
spsa               the package's step: minibatch, directions, blends, two evaluations, update
gradient           the package's step by backpropagation
straightforward    each point's state dict summed expert by expert, loaded, evaluated

They are timed in one process in turn, so that other work on the machine meets all of them; memory is of a process that
runs one side alone. A complete run goes to docs/results/bench/ as glue_step.json with a generated page beside it; any
other below .cache/bench/results/.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from rich.markup import escape

from benchmarks import records, rounds
from benchmarks.glue_sides import BATCH, NETS, SIDES, SIZE, Found, Spec
from benchmarks.measure import Measurement
from benchmarks.options import make_parser, positive
from benchmarks.page import busy, compose, without_numbers
from benchmarks.records import Results
from benchmarks.synthetic import CACHE
from benchmarks.tables import Table, at_least, at_most, cell, mark, milliseconds
from benchmarks.terminal import make_console, show_page
from benchmarks.worker import failure_of, run_worker

PACKAGES = ("consilience", "torch", "numpy")
FLOOR_AIM, SPEED_AIM, LEANNESS_AIM = 1.1, 1.2, 2.0
"""Largest time against the floor's; least time and memory of the gradient against ours."""
LIMIT_S = 600.0
#: Largest relative difference of the two points' losses from the straightforward ones.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Row:
    """One net: times from one process; by side, from a process of its own, the peak of anonymous memory.

    Memory is what comes on top of the imports, in units of 10^6 bytes.
    """

    net: str
    k: int
    threads: int
    found: Found = field(default_factory=Found)
    anon_mb: dict[str, float] = field(default_factory=dict[str, float])
    other_cores: float = 0.0
    failure: str = ""

    def seconds(self, side: str) -> float | None:
        """Return the median time of a side's step."""
        return rounds.median(self.found.seconds.get(side, []))

    def ratio(self, side: str, other: str) -> float | None:
        """Return the median over rounds of one side's time over the other's in the same round."""
        return rounds.median_ratio(self.found.seconds.get(side, []), self.found.seconds.get(other, []))

    @property
    def error(self) -> float:
        """Return the largest relative difference of our two losses from the straightforward ones."""
        ours, theirs = self.found.losses.get("spsa", []), self.found.losses.get("straightforward", [])
        return max((abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=False)), default=float("nan"))


def _peak(spec: Spec, folder: Path) -> float:
    """Return what a process needs beyond its imports, in MB; NaN if it failed."""
    found, done = run_process(spec, folder)
    return float("nan") if found is None else done.anon_mb - found.imports_mb


def run_process(spec: Spec, folder: Path) -> tuple[Found | None, Measurement]:
    """Run a process; None if it failed."""
    return run_worker("benchmarks.glue_sides", spec, Found, folder, threads=spec.threads, limit_s=LIMIT_S)


def run_net(net: str, k: int, threads: int, repeat: int, folder: Path) -> Row:
    """Measure one net: its times, then each side's memory."""
    found, done = run_process(Spec(net, k, threads, repeat, SIDES, True), folder)
    if found is None:
        return Row(net, k, threads, failure=failure_of(done))
    memory = {side: _peak(Spec(net, k, threads, 4, (side,)), folder) for side in SIDES}
    return Row(net, k, threads, found, memory, done.other_cores)


def tables(results: Results[Row]) -> list[Table]:
    """Return the page's tables."""
    steps: list[tuple[str, ...]] = []
    aims: list[tuple[str, ...]] = []
    costs: list[tuple[str, ...]] = []
    for row in (row for row in results.rows if not row.failure):
        for side in SIDES:
            time, memory = milliseconds(row.seconds(side)) + mark(row.other_cores), cell(row.anon_mb.get(side), ".0f")
            steps.append((row.net, side, time, cell(row.ratio(side, "floor")), memory))
        floor, speed = row.ratio("spsa", "floor"), row.ratio("gradient", "spsa")
        lean = row.anon_mb["gradient"] / row.anon_mb["spsa"] if row.anon_mb.get("spsa") else None
        plain = row.ratio("straightforward", "spsa")
        aims += [
            (row.net, "time, spsa / floor", *at_most(floor, FLOOR_AIM)),
            (row.net, "time, gradient / spsa", *at_least(speed, SPEED_AIM)),
            (row.net, "memory, gradient / spsa", *at_least(lean, LEANNESS_AIM)),
            (row.net, "time, straightforward / spsa", cell(plain), "", ""),
        ]
        c = row.found.costs
        if c:
            parts = (c["forward"], c["backward"], c["blend"], c["slopes"])
            costs.append(
                (row.net, *(f"{1e3 * value:.1f}" for value in parts), f"{c['backward'] / c['forward']:.2f}",
                 f"{c['predicted']:.2f}", f"{c['measured']:.2f}", f"{row.error:.1e}")
            )  # fmt: skip
    return [
        Table("One step", ("net", "side", "ms", "x floor", "memory MB"), tuple(steps),
              "Memory is the peak of anonymous memory beyond the imports', in a process with that side alone."),
        Table("What we aim at", ("net", "ratio", "value", "aim", "verdict"), tuple(aims)),
        Table("The cost model (ms)", ("net", "F", "backward", "C_mix", "D_alpha", "gamma", "m* predicted",
              "m* measured", "losses' error"), tuple(costs),
              "The error is of both points' losses, relative to the straightforward ones."),
    ]  # fmt: skip


def page(results: Results[Row], source: str) -> str:
    """Return the Markdown page of a run."""
    made = results.made_by("python -m benchmarks.glue_step")
    introduction = (
        f"{made} Times are medians of steps, the sides in turn in one process; ratios are medians over rounds."
    )
    remarks = (
        busy(row.other_cores for row in results.rows),
        without_numbers("Failed", {row.net: row.failure for row in results.rows if row.failure}),
    )
    return compose(source, "python -m benchmarks.glue_step --page", introduction, tables(results), remarks)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("benchmarks.glue_step", __doc__)
    parser.add_argument("--net", choices=NETS, action="append", default=None, help="one net (default: all)")
    parser.add_argument("--k", type=positive, default=10, help="experts (default 10)")
    parser.add_argument("--threads", type=positive, default=1, help="of torch (default 1)")
    parser.add_argument("--repeat", type=positive, default=15, help="timed rounds (default 15)")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where partial results go (default .cache/bench)")
    parser.add_argument("--page", type=Path, default=None, help="write the page of this results file, and no more")
    return parser


def save(results: Results[Row], folder: Path) -> Path:
    """Write the JSON and its page into ``folder`` and return the JSON's path."""
    return records.save(results, folder / "glue_step.json", page)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 when a net failed or its losses differ, 130 when interrupted."""
    options = _parser().parse_args(sys.argv[1:] if arguments is None else arguments)
    if options.page is not None:
        records.rewrite_page(Results[Row], options.page, page)
        return 0
    console = make_console()
    complete = (options.net, options.k, options.threads) == (None, 10, 1)
    cache = cast(Path, options.cache).resolve()
    rows: list[Row] = []
    try:
        with tempfile.TemporaryDirectory(prefix="glue-") as folder:
            for net in options.net or NETS:
                rows.append(run_net(net, options.k, options.threads, options.repeat, Path(folder)))
                console.print(f"{net}: {escape(rows[-1].failure or 'done')}")
    except KeyboardInterrupt:
        return 130
    settings = {
        "experts": str(options.k), "batch": str(BATCH), "images": f"3 x {SIZE} x {SIZE}",
        "threads": str(options.threads), "rounds": str(options.repeat),
    }  # fmt: skip
    results = records.results_of(rows, cache, PACKAGES, settings)
    path = save(results, records.KEPT if complete else cache / "results")
    show_page(console, path)
    return 1 if any(row.failure or not row.error <= TOLERANCE for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
