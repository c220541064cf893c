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
import contextlib
import importlib
import importlib.metadata
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from pydantic import TypeAdapter
from rich.console import Console
from rich.markup import escape

from benchmarks.measure import Measurement, measure
from benchmarks.results import NOISE, Table, machine
from benchmarks.synthetic import CACHE, ROOT

#: Three depths of two kinds: the paper says that the savings grow with depth.
NETS = ("resnet20", "resnet56", "resnet110", "mobilenet_v2", "vit4", "vit8", "vit16")
SIDES = ("floor", "spsa", "gradient", "straightforward")
BATCH, CLASSES, SIZE = 64, 10, 32
FLOOR_AIM, SPEED_AIM, LEANNESS_AIM = 1.1, 1.2, 2.0
"""Largest time against the floor's; least time and memory of the gradient against ours."""
LIMIT_S = 600.0
#: Largest relative difference of the two points' losses from the straightforward ones.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Spec:
    """What a process is to do: ``sides`` in turn, ``repeat`` times after one that is not counted."""

    net: str
    k: int
    threads: int
    repeat: int
    sides: tuple[str, ...]
    costs: bool = False


@dataclass(frozen=True)
class Found:
    """What a process found: seconds of every step by side, the pair's losses by side, and predicted costs.

    ``imports_mb`` is its anonymous memory before there was any weight.
    """

    parameters: int = 0
    imports_mb: float = 0.0
    seconds: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    losses: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    costs: dict[str, float] = field(default_factory=dict[str, float])


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
        values = self.found.seconds.get(side)
        return statistics.median(values) if values else None

    def ratio(self, side: str, other: str) -> float | None:
        """Return the median over rounds of one side's time over the other's in the same round."""
        pairs = zip(self.found.seconds.get(side, []), self.found.seconds.get(other, []), strict=False)
        ratios = [one / two for one, two in pairs]
        return statistics.median(ratios) if ratios else None

    @property
    def error(self) -> float:
        """Return the largest relative difference of our two losses from the straightforward ones."""
        ours, theirs = self.found.losses.get("spsa", []), self.found.losses.get("straightforward", [])
        return max((abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=False)), default=float("nan"))


@dataclass(frozen=True)
class Results:
    """One run."""

    date: str
    machine: dict[str, str]
    versions: dict[str, str]
    settings: dict[str, str]
    rows: tuple[Row, ...]


def make_net(name: str) -> Any:
    """Return one of the vision suite's nets for colour images, with fresh weights."""
    import torch

    from suites.vision.nets import NetSpec, build

    specs = {
        "mobilenet_v2": NetSpec("mobilenet_v2", 0.5),
        **{f"resnet{depth}": NetSpec("resnet", 16, depth) for depth in (20, 56, 110)},
        **{f"vit{depth}": NetSpec("vit", 96, depth, patch=8, heads=4) for depth in (4, 8, 16)},
    }
    torch.manual_seed(0)
    common = {"size": SIZE, "channels": 3, "classes": CLASSES, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return build(TypeAdapter(NetSpec).validate_python(asdict(specs[name]) | common))


class Experts(Mapping[str, Any]):
    """K experts, the base with noise, each made when it is asked for."""

    def __init__(self, base: Mapping[str, Any], count: int) -> None:
        self.base, self.names = base, [f"expert{k}" for k in range(count)]

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __getitem__(self, name: str) -> dict[str, Any]:
        import torch

        generator = torch.Generator().manual_seed(1 + self.names.index(name))

        def moved(value: Any) -> Any:
            if not value.is_floating_point():
                return value
            return value * (1 + 0.05 * torch.randn(value.shape, generator=generator))

        return {key: moved(value) for key, value in self.base.items()}


class Case:
    """What all sides share."""

    def __init__(self, spec: Spec) -> None:
        import torch

        self.net = make_net(spec.net).eval()
        self.experts = Experts(self.net.state_dict(), spec.k)
        generator = torch.Generator().manual_seed(9)
        self.images = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator)
        self.labels = torch.randint(CLASSES, (BATCH,), generator=generator)
        high = torch.linspace(0.5, 1.5, spec.k, dtype=torch.float64)
        self.points = [(high / high.sum()).numpy(), (high.flip(0) / high.sum()).numpy()]

    def loss(self, optimizer: str) -> tuple[Any, Any]:
        """Return the package's loss and an optimizer of it."""
        from consilience.mixing.bank import ExpertBank
        from consilience.mixing.problem import TargetLoss
        from consilience.mixing.target import Target, Tensors
        from consilience.optimizers.anchor import Anchor
        from consilience.optimizers.gradient import Descent
        from consilience.optimizers.make import make_optimizer
        from consilience.optimizers.parameterisation import parameterise

        bank = ExpertBank.of(self.experts, self.net)
        loss = TargetLoss(bank, self.net, Target(Tensors(self.images, self.labels), batch_size=BATCH))
        start = bank.table([1.0 / len(self.experts)] * len(self.experts))
        mapped = parameterise("softmax", start, [True])
        anchor = Anchor(mapped.start, mapped.learned, 0.0)
        return loss, make_optimizer(optimizer, Descent("sgd", 0.1, 100, "constant"), mapped, anchor, 0)


Step = Callable[[int], None]
Pair = Callable[[], list[float]]


def floor_side(case: Case) -> tuple[Step, Pair]:
    """Return the least that a step can do: one product and two forward passes."""
    import copy

    import torch

    names = [name for name, _ in case.net.named_parameters()]
    numel = sum(value.numel() for value in case.net.parameters())
    bank, rows = torch.empty(len(case.experts), numel), torch.empty(2, numel)
    for row, state in zip(bank, case.experts.values(), strict=True):
        torch.cat([state[name].reshape(-1) for name in names], out=row)
    modules = [copy.deepcopy(case.net), copy.deepcopy(case.net)]
    for row, module in zip(rows, modules, strict=True):
        start = 0
        for value in module.parameters():
            value.data = row[start : start + value.numel()].view(value.shape)
            start += value.numel()
    weights = torch.stack([torch.from_numpy(point) for point in case.points]).float()

    def pair() -> list[float]:
        with torch.no_grad():
            torch.mm(weights, bank, out=rows)
            return [float(torch.nn.functional.cross_entropy(module(case.images), case.labels)) for module in modules]

    return lambda number: (pair(), None)[1], pair


def spsa_side(case: Case) -> tuple[Step, Pair]:
    """Return the package's step by two evaluations."""
    loss, optimizer = case.loss("spsa")
    points = [loss.bank.table(point) for point in case.points]
    return lambda number: optimizer.step(loss, number), lambda: [terms["target"] for terms in loss.at(points, 0)]


def gradient_side(case: Case) -> tuple[Step, Pair]:
    """Return the package's step by backpropagation."""
    loss, optimizer = case.loss("sgd")
    points = [loss.bank.table(point) for point in case.points]
    return lambda number: optimizer.step(loss, number), lambda: [terms["target"] for terms in loss.at(points, 0)]


def straightforward_side(case: Case) -> tuple[Step, Pair]:
    """Return what one would write: for each point a pass over every expert's state dict, a load and a forward pass."""
    import copy

    import torch

    states, module = [*case.experts.values()], copy.deepcopy(case.net)

    def pair() -> list[float]:
        losses: list[float] = []
        with torch.no_grad():
            for point in case.points:
                merged = {
                    name: sum(float(w) * state[name] for w, state in zip(point, states, strict=True))
                    if value.is_floating_point()
                    else value
                    for name, value in states[0].items()
                }
                module.load_state_dict(cast(dict[str, Any], merged))
                losses.append(float(torch.nn.functional.cross_entropy(module(case.images), case.labels)))
        return losses

    return lambda number: (pair(), None)[1], pair


MAKERS: dict[str, Callable[[Case], tuple[Step, Pair]]] = {
    "floor": floor_side,
    "spsa": spsa_side,
    "gradient": gradient_side,
    "straightforward": straightforward_side,
}


def work(spec: Spec) -> Found:
    """Run the sides of a process in turn."""
    import torch

    torch.set_num_threads(spec.threads)
    imports = _imported()
    case = Case(spec)
    made = {side: MAKERS[side](case) for side in spec.sides}
    losses = {side: pair() for side, (_, pair) in made.items() if len(spec.sides) > 1}
    seconds: dict[str, list[float]] = {side: [] for side in spec.sides}
    for number in range(spec.repeat + 1):
        for side, (step, _) in made.items():
            begun = time.perf_counter()
            step(number)
            seconds[side].append(time.perf_counter() - begun)
    costs: dict[str, float] = {}
    if spec.costs:
        from consilience.mixing.cost import measure_cost

        cost = measure_cost(case.loss("sgd")[0], repeat=spec.repeat)
        costs = asdict(cost) | {"predicted": cost.break_even, "measured": cost.measured_break_even}
    parameters = sum(value.numel() for value in case.net.parameters())
    return Found(parameters, imports, {side: values[1:] for side, values in seconds.items()}, losses, costs)


def _imported() -> float:
    """Import what any side needs, compiler of torch's optimizers included, and return the anonymous memory in MB."""
    import torch

    for name in ("consilience.mixing", "suites.vision.nets"):
        importlib.import_module(name)
    torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:"))) / 1e6


def _peak(spec: Spec, folder: Path) -> float:
    """Return what a process needs beyond its imports, in MB; NaN if it failed."""
    found, done = run_process(spec, folder)
    return float("nan") if found is None else done.anon_mb - found.imports_mb


def run_process(spec: Spec, folder: Path) -> tuple[Found | None, Measurement]:
    """Run a process; None if it failed."""
    out = folder / "found.json"
    out.unlink(missing_ok=True)
    (folder / "spec.json").write_bytes(TypeAdapter(Spec).dump_json(spec))
    count = str(spec.threads)
    environment = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "HF_HUB_OFFLINE": "1"}
    command = (Path(sys.executable), "-m", "benchmarks.glue_step", "--work", folder / "spec.json", "--out", out)
    done = measure(command, environment=environment, folder=ROOT, limit_s=LIMIT_S)
    if done.timed_out or done.exit_status or not out.exists():
        return None, done
    return TypeAdapter(Found).validate_json(out.read_bytes()), done


def run_net(net: str, k: int, threads: int, repeat: int, folder: Path) -> Row:
    """Measure one net: its times, then each side's memory."""
    found, done = run_process(Spec(net, k, threads, repeat, SIDES, True), folder)
    if found is None:
        lines = [line.strip() for line in done.output.splitlines() if line.strip()] or ["no output"]
        return Row(net, k, threads, failure="time limit" if done.timed_out else lines[-1].replace(f"{ROOT}/", ""))
    memory = {side: _peak(Spec(net, k, threads, 4, (side,)), folder) for side in SIDES}
    return Row(net, k, threads, found, memory, done.other_cores)


def _cell(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def _verdict(value: float | None, *, most: float = float("inf"), least: float = 0.0) -> str:
    return "-" if value is None else "met" if least <= value <= most else "missed"


def tables(results: Results) -> list[Table]:
    """Return the page's tables."""
    steps: list[tuple[str, ...]] = []
    aims: list[tuple[str, ...]] = []
    costs: list[tuple[str, ...]] = []
    for row in (row for row in results.rows if not row.failure):
        mark = " †" if row.other_cores > NOISE else ""
        for side in SIDES:
            value = row.seconds(side)
            milliseconds = _cell(None if value is None else 1e3 * value, ".1f") + mark
            steps.append(
                (row.net, side, milliseconds, _cell(row.ratio(side, "floor")), _cell(row.anon_mb.get(side), ".0f"))
            )
        floor, speed = row.ratio("spsa", "floor"), row.ratio("gradient", "spsa")
        lean = row.anon_mb["gradient"] / row.anon_mb["spsa"] if row.anon_mb.get("spsa") else None
        plain = row.ratio("straightforward", "spsa")
        aims += [
            (row.net, "time, spsa / floor", _cell(floor), f"<= {FLOOR_AIM}", _verdict(floor, most=FLOOR_AIM)),
            (row.net, "time, gradient / spsa", _cell(speed), f">= {SPEED_AIM}", _verdict(speed, least=SPEED_AIM)),
            (row.net, "memory, gradient / spsa", _cell(lean), f">= {LEANNESS_AIM}", _verdict(lean, least=LEANNESS_AIM)),
            (row.net, "time, straightforward / spsa", _cell(plain), "", ""),
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


def page(results: Results, source: str) -> str:
    """Return the Markdown page of a run."""
    shown = [", ".join(f"{key} {value}" for key, value in facts.items() if key != "class")
             for facts in (results.machine, results.versions, results.settings)]  # fmt: skip
    parts = [
        f"<!-- Generated from {source} by `python -m benchmarks.glue_step --page`; do not edit. -->",
        f"Measured {results.date[:10]} with `python -m benchmarks.glue_step`. Machine: {shown[0]}. "
        f"Versions: {shown[1]}. Settings: {shown[2]}. "
        "Times are medians of steps, the sides in turn in one process; ratios are medians over rounds.",
    ]
    for table in tables(results):
        lines = [f"### {table.title}", "", "| " + " | ".join(table.header) + " |"]
        lines.append("|" + "|".join("---" if i == 0 else "---:" for i in range(len(table.header))) + "|")
        lines += ["| " + " | ".join(cells) + " |" for cells in table.body]
        parts.append("\n".join(lines) + (f"\n\n{table.note}" if table.note else ""))
    if any(row.other_cores > NOISE for row in results.rows):
        parts.append(f"† other work kept more than {NOISE} cores busy: an upper bound.")
    if failed := [f"{row.net} ({row.failure})" for row in results.rows if row.failure]:
        parts.append("Failed: " + "; ".join(failed) + ".")
    return "\n\n".join(parts) + "\n"


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in ("consilience", "torch", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "describe", "--always", "--dirty"]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        found["commit"] = done.stdout.strip()
    return found


def _positive(text: str) -> int:
    if not text.strip().isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.glue_step", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--net", choices=NETS, action="append", default=None, help="one net (default: all)")
    parser.add_argument("--k", type=_positive, default=10, help="experts (default 10)")
    parser.add_argument("--threads", type=_positive, default=1, help="of torch (default 1)")
    parser.add_argument("--repeat", type=_positive, default=15, help="timed rounds (default 15)")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where partial results go (default .cache/bench)")
    parser.add_argument("--page", type=Path, default=None, help="write the page of this results file, and no more")
    parser.add_argument("--work", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=None, help=argparse.SUPPRESS)
    return parser


def save(results: Results, folder: Path) -> Path:
    """Write the JSON and its page into ``folder`` and return the JSON's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "glue_step.json"
    path.write_text(json.dumps(asdict(results), indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(page(results, path.name), encoding="utf-8")
    return path


def load(path: Path) -> Results:
    """Read a results file."""
    return TypeAdapter(Results).validate_json(path.read_bytes())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 when a net failed or its losses differ, 130 when interrupted."""
    options = _parser().parse_args(sys.argv[1:] if arguments is None else arguments)
    if options.work is not None:
        found = work(TypeAdapter(Spec).validate_json(options.work.read_bytes()))
        options.out.write_text(json.dumps(asdict(found)), encoding="utf-8")
        return 0
    if options.page is not None:
        options.page.with_suffix(".md").write_text(page(load(options.page), options.page.name), encoding="utf-8")
        return 0
    console = Console() if sys.stdout.isatty() else Console(width=120)
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
    results = Results(
        datetime.now(UTC).isoformat(timespec="seconds"),
        machine(_made(cache)),
        _versions(),
        {
            "experts": str(options.k), "batch": str(BATCH), "images": f"3 x {SIZE} x {SIZE}",
            "threads": str(options.threads), "rounds": str(options.repeat),
        },
        tuple(rows),
    )  # fmt: skip
    path = save(results, ROOT / "docs" / "results" / "bench" if complete else cache / "results")
    console.print(path.with_suffix(".md").read_text(encoding="utf-8"), markup=False)
    console.print(f"[dim]{escape(str(path))} and {path.stem}.md beside it[/dim]")
    return 1 if any(row.failure or not row.error <= TOLERANCE for row in rows) else 0


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    raise SystemExit(main())
