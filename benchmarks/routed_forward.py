"""Speed and memory of a routed model's forward pass, against its base, one unmerged adapter and PEFT's Arrow.

    python -m benchmarks.routed_forward                             # three cases, two dtypes, 1 thread
    python -m benchmarks.routed_forward --threads 1,2               # kept among the results too
    python -m benchmarks.routed_forward --device cuda
    python -m benchmarks.routed_forward --net smollm2-135m --dtype bfloat16 --repeat 3      # not kept
    python -m benchmarks.routed_forward --page docs/results/bench/routed_forward.json       # write the page again

The sides, on the same random tokens, weights and adapters, with two experts a token:

base           the plain transformers model
ours           the package's routed model: PHATGOOSE gates, and an instruction's fixed similarities for every sequence
ours, arrow    the same with Arrow's directions, without instructions
peft arrow     PEFT's own Arrow of the same adapters; with 8 experts alone: with 64 it takes minutes a pass
one adapter    the first adapter, unmerged, in PEFT

Every side is called as ``generate`` calls a model: with a cache, for the logits of the last token alone. PEFT's
adapters have the model's dtype, which is faster than its default, float32. They are timed in one process in turn, so
that other work on the machine meets all of them; memory is of a process that runs one side alone. Ours is compared with
a loop over tokens in the same run. A complete run goes to docs/results/bench/ as routed_forward.json
(routed_forward_cuda.json on a GPU) with a generated page beside it; any other below .cache/bench/results/.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from rich.console import Console
from rich.markup import escape

from benchmarks import records, rounds
from benchmarks.measure import Measurement
from benchmarks.options import make_parser, positive, thread_counts
from benchmarks.page import busy, compose, without_numbers
from benchmarks.records import Results
from benchmarks.routed_sides import NETS, SIDES, TOP_K, Found, Side, Spec, base_folder, make_adapters
from benchmarks.synthetic import CACHE
from benchmarks.tables import Table, at_most, cell, mark, milliseconds
from benchmarks.terminal import make_console, show_page
from benchmarks.worker import failure_of, run_worker

CASES = (("llama-2048", 8), ("llama-2048", 64), ("smollm2-135m", 8))
DTYPES = ("float32", "bfloat16")
PACKAGES = ("consilience", "torch", "transformers", "peft")
BASE_AIM, MANY_AIM, ADAPTER_AIM, MEMORY_AIM = 1.2, 2.0, 1.5, 1.05
"""Largest time against the base's with 8 experts and with more, and against one adapter's; largest memory against the
sum of the base's, the adapters' and the gates'."""
FEW = 8
WIDE = 2048
"""Hidden size from which a model is compared with its base, below it with one adapter."""
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest difference from the loop, as a share of the largest value. In bfloat16 a token near a tie may choose another
expert, and deep models amplify rounding, with experts or without: there logits are shown, and modules are judged."""
LIMIT_S = 1800.0
OURS: tuple[Side, ...] = ("ours", "ours, arrow")
STRICT = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""The C library gives freed blocks back at once: else its peak varies by more than the memory of all experts."""


@dataclass(frozen=True)
class Row:
    """One case: times from one process; by side, from a process of its own, the peak of memory, in MB of 10^6 bytes.

    Memory is what comes on top of the imports. ``skipped`` says why there was nothing to measure, ``failure`` what went
    wrong.
    """

    net: str
    k: int
    dtype: str
    threads: int
    found: Found = field(default_factory=Found)
    memory_mb: dict[str, float] = field(default_factory=dict[str, float])
    other_cores: float = 0.0
    skipped: str = ""
    failure: str = ""

    @property
    def title(self) -> str:
        """What tables call it."""
        return f"{self.net}, K = {self.k}, {self.dtype}, {self.threads} thread{'s' if self.threads > 1 else ''}"

    def seconds(self, load: str, side: Side) -> float | None:
        """Return the median time of a pass."""
        return rounds.median(self.found.seconds.get(load, {}).get(side, []))

    def ratio(self, load: str, side: Side, other: Side) -> float | None:
        """Return the median over rounds of one side's time over the other's in the same round."""
        sides = self.found.seconds.get(load, {})
        return rounds.median_ratio(sides.get(side, []), sides.get(other, []))

    def lean(self, side: Side) -> float | None:
        """Return a side's memory over the sum of the base's, the adapters' and the gates'."""
        if side not in self.memory_mb or "base" not in self.memory_mb:
            return None
        return self.memory_mb[side] / (self.memory_mb["base"] + self.found.experts_mb)

    @property
    def aim(self) -> tuple[Side, float]:
        """What our time is compared with, and how many times as long it may be."""
        if NETS[self.net].config.get("hidden_size", 0) < WIDE:
            return "one adapter", ADAPTER_AIM
        return "base", BASE_AIM if self.k <= FEW else MANY_AIM

    @property
    def agrees(self) -> bool:
        """Whether ours is the loop over tokens: module by module, and in float32 as a whole."""
        most, found = TOLERANCE[self.dtype], self.found.agreement.values()
        whole = all(one.logits <= most for one in found) or self.dtype != "float32"
        return bool(found) and whole and all(one.module <= most for one in found)


def run_process(spec: Spec, folder: Path, more: Mapping[str, str]) -> tuple[Found | None, Measurement]:
    """Run a process with ``more`` environment variables; None if it failed."""
    return run_worker(
        "benchmarks.routed_sides", spec, Found, folder, threads=spec.threads, limit_s=LIMIT_S, environment=more
    )


def _peak(spec: Spec, folder: Path) -> float:
    """Return what a process needs beyond its imports, or on its GPU, in MB; NaN if it failed."""
    found, done = run_process(spec, folder, STRICT)
    if found is None:
        return float("nan")
    return found.device_mb if spec.device == "cuda" else done.anon_mb - found.imports_mb


def sides_of(k: int) -> tuple[Side, ...]:
    """Return the sides that are measured with K experts."""
    return tuple(side for side in SIDES if side != "peft arrow" or k <= FEW)


def run_case(spec: Spec, folder: Path) -> Row:
    """Measure one case: its times, then each side's memory."""
    row = Row(spec.net, len(spec.adapters), spec.dtype, spec.threads)
    found, done = run_process(spec, folder, {})
    if found is None:
        return replace(row, failure=failure_of(done))
    memory = {side: _peak(replace(spec, sides=(side,), repeat=0), folder) for side in spec.sides}
    return replace(row, found=found, memory_mb=memory, other_cores=done.other_cores)


def _times(rows: Sequence[Row]) -> Table:
    body = tuple(
        (
            row.title, load, milliseconds(row.seconds(load, "base")),
            milliseconds(row.seconds(load, "ours")) + mark(row.other_cores),
            *(cell(row.ratio(load, side, "base")) for side in SIDES[1:]),
        )
        for row in rows
        for load in row.found.seconds
    )  # fmt: skip
    header = ("case", "pass", "base ms", "ours ms", *(f"{side} / base" for side in SIDES[1:]))
    note = "`prefill B x T`: T tokens of B sequences; `decode B after T`: a token of each, T in the cache."
    return Table("One forward pass", header, body, note, text=2)


def _aims(rows: Sequence[Row]) -> Table:
    body: list[tuple[str, ...]] = []
    for row in rows:
        other, most = row.aim
        for load in row.found.seconds:
            for side in OURS:
                value = row.ratio(load, side, other)
                name = f"{load}, {side} / {other}"
                body.append((row.title, name, *at_most(value, most)))
        for side in OURS:
            name = f"memory, {side} / (base + adapters + gates)"
            body.append((row.title, name, *at_most(row.lean(side), MEMORY_AIM)))
    return Table("What we aim at", ("case", "ratio", "value", "aim", "verdict"), tuple(body), text=2)


def _memory(rows: Sequence[Row]) -> Table:
    body = tuple(
        (row.title, *(cell(row.memory_mb.get(side), ".0f") for side in SIDES), f"{row.found.experts_mb:.1f}")
        for row in rows
    )
    note = "The peak beyond the imports', loading included, in a process with that side alone."
    return Table("Memory (MB)", ("case", *SIDES, "adapters + gates"), body, note)


def _checks(rows: Sequence[Row]) -> Table:
    body: list[tuple[str, ...]] = []
    for row in rows:
        for side, one in row.found.agreement.items():
            body.append((row.title, side, f"{one.module:.1e}", f"{one.logits:.1e}", "yes" if row.agrees else "no"))
    allowed = ", ".join(f"{value:g} in {dtype}" for dtype, value in TOLERANCE.items())
    note = (
        "Largest differences as shares of the largest value: of the outputs of any module that is given the loop's "
        "activations, and of the logits of a prefill and a step on its cache. "
        f"`same`: at most {allowed}, where logits count in float32 alone: in bfloat16 a token near a tie may choose "
        "another expert, and deep models amplify rounding, with experts or without."
    )
    header = ("case", "side", "module", "logits", "same")
    return Table("Are they right? (a loop over tokens)", header, tuple(body), note, text=2)


def tables(results: Results[Row]) -> list[Table]:
    """Return the page's tables."""
    rows = [row for row in results.rows if not row.failure and not row.skipped]
    return [_times(rows), _aims(rows), _memory(rows), _checks(rows)]


def page(results: Results[Row], source: str) -> str:
    """Return the Markdown page of a run."""
    made = results.made_by("python -m benchmarks.routed_forward")
    introduction = f"{made} Times are medians, the sides in turn in one process; ratios are medians over rounds."
    remarks = (
        busy(row.other_cores for row in results.rows),
        without_numbers("Skipped", {row.title: row.skipped for row in results.rows if row.skipped}),
        without_numbers("Failed", {row.title: row.failure for row in results.rows if row.failure}),
    )
    return compose(source, "python -m benchmarks.routed_forward --page", introduction, tables(results), remarks)


def name_of(results: Results[Row]) -> str:
    """Return the file that keeps a run."""
    return "routed_forward_cuda.json" if results.settings.get("device") == "cuda" else "routed_forward.json"


def save(results: Results[Row], folder: Path) -> Path:
    """Write the JSON and its page into ``folder`` and return the JSON's path."""
    return records.save(results, folder / name_of(results), page)


@dataclass(frozen=True)
class Options:
    """What to run; see the command line's help."""

    cases: tuple[tuple[str, int], ...]
    dtypes: tuple[str, ...]
    threads: tuple[int, ...]
    device: str
    repeat: int
    cache: Path
    folder: Path


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = make_parser("benchmarks.routed_forward", __doc__)
    made.add_argument("--net", choices=tuple(NETS), default=None, help="one net (default: llama-2048, smollm2-135m)")
    made.add_argument("--k", type=positive, default=None, help="experts (default: 8, and 64 of llama-2048)")
    made.add_argument("--dtype", choices=DTYPES, default=None, help="one dtype (default: both)")
    made.add_argument("--threads", type=thread_counts, default="1", help="of torch, e.g. 1,2 (default 1)")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    made.add_argument("--repeat", type=positive, default=7, help="timed rounds (default 7)")
    made.add_argument("--cache", type=Path, default=CACHE, help="where experts and partial results go")
    made.add_argument("--page", type=Path, default=None, help="write the page of this results file, and no more")
    return made


def options_of(given: argparse.Namespace) -> Options:
    """Return what the command line asks for; only a complete run is kept among the results."""
    net = cast(str | None, given.net)
    cases = [case for case in CASES if net in (None, case[0])]
    if net is not None and not cases:
        cases = [(net, FEW)]
    if given.k is not None:
        cases = [(name, cast(int, given.k)) for name in dict.fromkeys(name for name, _ in cases)]
    complete = (net, given.k, given.dtype) == (None, None, None) and 1 in given.threads
    cache = cast(Path, given.cache).resolve()
    folder = records.KEPT if complete else cache / "results"
    dtypes = DTYPES if given.dtype is None else (given.dtype,)
    return Options(tuple(cases), dtypes, given.threads, given.device, given.repeat, cache, folder)


def run(options: Options, console: Console) -> Results[Row]:
    """Make the experts, run every case and return the results."""
    rows: list[Row] = []
    options.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="routed-", dir=options.cache) as name:
        folder = Path(name)
        made: dict[str, tuple[Path, ...]] = {}
        for net, k in sorted(options.cases, key=lambda case: -case[1]):
            if net not in made and (NETS[net].config or base_folder().is_dir()):
                made[net] = make_adapters(net, k, folder)
        for net, k in options.cases:
            for dtype in options.dtypes:
                for threads in options.threads:
                    if net in made:
                        spec = Spec(net, dtype, threads, options.device, options.repeat, made[net][:k], sides_of(k))
                        rows.append(run_case(spec, folder))
                    else:
                        why = "its base is not there; make it with `python -m suites.language.base`"
                        rows.append(Row(net, k, dtype, threads, skipped=why))
                    row = rows[-1]
                    console.print(f"{row.title}: {escape(row.failure or row.skipped or 'done')}")
    settings = {"device": options.device, "rounds": str(options.repeat), "experts a token": str(TOP_K)}
    return records.results_of(rows, options.cache, PACKAGES, settings)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 when a case failed or differs from the loop, 130 when interrupted."""
    given = parser().parse_args(sys.argv[1:] if arguments is None else arguments)
    if given.page is not None:
        records.rewrite_page(Results[Row], given.page, page)
        return 0
    options = options_of(given)
    console = make_console()
    try:
        results = run(options, console)
    except KeyboardInterrupt:
        return 130
    path = save(results, options.folder)
    show_page(console, path)
    return 1 if any(row.failure or not (row.skipped or row.agrees) for row in results.rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
