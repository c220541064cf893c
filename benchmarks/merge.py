"""`make bench`: speed and memory of merging, everything in one run.

    python -m benchmarks.merge                      # all sizes, with mergekit; about 20 minutes once the sets are made
    python -m benchmarks.merge --quick              # 0.5 B once, without mergekit's slow methods; a few minutes
    python -m benchmarks.merge --sizes 0.5b --no-mergekit --repeat 5 --against e1e4e04
    python -m benchmarks.merge --quick --methods task_arithmetic,sce,della     # further methods of mergekit's

Jobs are interleaved (every job once, then every job again) so that a slow minute of the machine hits all of them.
Before each run the inputs are read once and dirty pages are flushed; after it the output is deleted. Results go to
docs/results/bench/ as JSON with a generated page merge.md beside it; quick runs go below .cache/bench/ instead.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TaskID

from benchmarks import mergekit_env, oracle, provenance, results, synthetic
from benchmarks.floors import warm
from benchmarks.measure import Measurement, measure
from benchmarks.options import make_parser, names_of
from benchmarks.records import KEPT
from benchmarks.synthetic import CACHE, ROOT, SIZES, SyntheticSet
from benchmarks.terminal import make_console, make_progress, show_place, show_table
from benchmarks.worker import failure_of

TOOLS = ("floor", "consilience", "mergekit")
EARLIER = "earlier"
"""The tool that an earlier commit of this one is."""
CONSILIENCE = Path(sys.executable).parent / "consilience"
RESERVE = 2 << 30
"""Bytes of disk that stay free whatever is run."""


@dataclass(frozen=True)
class Method:
    """A method as it is benchmarked, with the same parameters in every program.

    Arguments:
        parameters: passed as ``--set key=value`` or in mergekit's YAML.
        experts: how many of the set's experts are merged.
        slow: whether mergekit takes so long that it is run once only.
        further: whether it is run only where ``--methods`` names it; earlier commits may not have it.
    """

    parameters: Mapping[str, float]
    experts: int = 3
    slow: bool = False
    further: bool = False


METHODS: dict[str, Method] = {
    "linear": Method({"weight": 1.0}),
    "task_arithmetic": Method({"weight": 0.3}),
    "slerp": Method({"t": 0.5}, experts=1),
    "dare_linear": Method({"weight": 0.3, "density": 0.5}, slow=True),
    "dare_ties": Method({"weight": 0.3, "density": 0.5}, slow=True),
    "ties": Method({"weight": 0.3, "density": 0.5}, slow=True),
    "nuslerp": Method({"weight": 1.0}, experts=2, further=True),
    "multislerp": Method({"weight": 1.0}, further=True),
    "karcher": Method({}, further=True),
    "model_stock": Method({}, further=True),
    "nearswap": Method({"t": 0.001}, experts=1, further=True),
    "ram": Method({}, slow=True, further=True),
    "breadcrumbs": Method({"weight": 0.3, "density": 0.5, "gamma": 0.01}, slow=True, further=True),
    "breadcrumbs_ties": Method({"weight": 0.3, "density": 0.5, "gamma": 0.01}, slow=True, further=True),
    "sce": Method({"select_topk": 0.5}, slow=True, further=True),
    "della": Method({"weight": 0.3, "density": 0.5}, slow=True, further=True),
    "della_linear": Method({"weight": 0.3, "density": 0.5}, slow=True, further=True),
    "arcee_fusion": Method({}, experts=1, slow=True, further=True),
}
SCALING = ("linear", "ties")
"""Methods that are run on the sets larger than 0.5 B."""


@dataclass(frozen=True, eq=False)
class Job:
    """A command to be measured.

    Arguments:
        tool, job, size, method: see `benchmarks.results.Row`.
        command: the command line.
        out: what the command makes; deleted after each run.
        warm: folders whose weights are read into the page cache before each run.
        repeats: how often it is run.
        tensors: how many tensors ``out`` must hold, or 0 when it is no checkpoint.
        needed: bytes of disk that ``out`` takes.
        environment: variables for the child.
    """

    tool: str
    job: str
    size: str
    method: str
    command: tuple[str | Path, ...]
    out: Path | None = None
    warm: tuple[Path, ...] = ()
    repeats: int = 1
    tensors: int = 0
    needed: int = 0
    environment: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def title(self) -> str:
        """A short name for the progress bar."""
        return " ".join(part for part in (self.tool, self.job, self.method, self.size) if part)


@dataclass(frozen=True)
class Settings:
    """What to run; see the command line's help."""

    sizes: tuple[str, ...]
    tools: tuple[str, ...]
    methods: tuple[str, ...]
    repeat: int
    quick: bool
    cache: Path
    folder: Path
    against: str = ""


def _experts(made: SyntheticSet, method: str) -> dict[str, Path]:
    """Return the experts that ``method`` merges."""
    return dict(list(made.experts.items())[: METHODS[method].experts])


def consilience_command(made: SyntheticSet, method: str, out: Path, *extra: str) -> tuple[str | Path, ...]:
    """Return the command line of one merge with Consilience."""
    command: list[str | Path] = [CONSILIENCE, "merge", made.base, out]
    for name, path in _experts(made, method).items():
        command += ["-e", f"{name}={path}"]
    command += ["--method", method]
    for key, value in METHODS[method].parameters.items():
        command += ["--set", f"{key}={value}"]
    return (*command, *extra)


def earlier_environment(scratch: Path) -> dict[str, str]:
    """Return the variables that let Python find the earlier commit's package, which ``check_out`` left there."""
    return {"PYTHONPATH": str(scratch / EARLIER / "src")}


def check_out(commit: str, scratch: Path) -> None:
    """Leave the package as it was at a commit in ``scratch``.

    Raises:
        OSError: there is no such commit.
    """
    folder = scratch / EARLIER
    folder.mkdir()
    made = subprocess.run(["git", "archive", commit, "src"], cwd=ROOT, capture_output=True, check=False)
    if made.returncode:
        raise OSError(f"{commit}: {made.stderr.decode().strip()}")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=made.stdout, check=True)


def earlier_command(made: SyntheticSet, method: str, out: Path) -> tuple[str | Path, ...]:
    """Return the command line of one merge with the earlier commit."""
    return (sys.executable, "-m", "consilience", *consilience_command(made, method, out)[1:])


def mergekit_command(made: SyntheticSet, method: str, out: Path, scratch: Path) -> tuple[str | Path, ...]:
    """Write mergekit's recipe into ``scratch`` and return the command line of one merge with it."""
    path = scratch / f"{made.size.name}-{method}.yaml"
    text = mergekit_env.recipe(method, made.base, _experts(made, method), METHODS[method].parameters)
    path.write_text(text, encoding="utf-8")
    return (mergekit_env.VENV / "bin" / "mergekit-yaml", path, out)


def _inputs(made: SyntheticSet, method: str) -> tuple[Path, ...]:
    """Return the folders to warm for one merge; none for sets that are larger than memory."""
    total = 4 * 2 * made.size.parameters()
    if total > 0.7 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        return ()
    return (made.base, *_experts(made, method).values())


def _repeats(made: SyntheticSet, settings: Settings) -> int:
    """Return how often the jobs of one size are run: those beyond memory take minutes and are run once."""
    return settings.repeat if _inputs(made, "linear") else 1


def _floor_jobs(made: SyntheticSet, scratch: Path, repeats: int) -> Iterator[Job]:
    """Yield the floors of one size: raw I/O without and with fsync, and the bare torch loop."""
    name = made.size.name
    folders = tuple(made.experts.values())
    needed = 2 * made.size.parameters()
    python = Path(sys.executable)
    inputs = _inputs(made, "linear")
    for job, module, extra in (
        ("raw", "benchmarks.floors", ()),
        ("raw_fsync", "benchmarks.floors", ("--fsync",)),
        ("torch", "benchmarks.floor_torch", ()),
    ):
        if not inputs and job != "raw_fsync":
            continue  # Of a set beyond memory only the floor that includes the disk means anything.
        out = scratch / f"{name}-{job}.safetensors"
        command = (python, "-m", module, *extra, out, *folders)
        yield Job("floor", job, name, "", command, out, inputs, repeats, needed=needed)


def _merge_jobs(made: SyntheticSet, settings: Settings, scratch: Path) -> Iterator[Job]:
    """Yield the merges of one size by both programs."""
    size = made.size
    small = size.name in ("tiny", "0.5b")
    methods = settings.methods if size.name == "0.5b" else SCALING if size.name != "many" else ("linear",)
    repeats = _repeats(made, settings)
    tensors, needed = len(size.tensors()), 2 * size.parameters()
    for method in (method for method in methods if method in settings.methods):
        inputs = _inputs(made, method)
        if "consilience" in settings.tools:
            out = scratch / f"{size.name}-{method}-consilience"
            command = consilience_command(made, method, out)
            yield Job("consilience", "merge", size.name, method, command, out, inputs, repeats, tensors, needed)
        if settings.against and small and not METHODS[method].further:
            out = scratch / f"{size.name}-{method}-{EARLIER}"
            command, environment = earlier_command(made, method, out), earlier_environment(scratch)
            yield Job(EARLIER, "merge", size.name, method, command, out, inputs, repeats, tensors, needed, environment)
        slow = METHODS[method].slow and size.name != "tiny"
        wanted = (small and not (slow and settings.quick)) or (size.name == "1.5b" and not slow and not settings.quick)
        if "mergekit" in settings.tools and wanted:
            out = scratch / f"{size.name}-{method}-mergekit"
            command = mergekit_command(made, method, out, scratch)
            often = 1 if slow or not small else repeats
            environment = mergekit_env.ENVIRONMENT
            yield Job("mergekit", "merge", size.name, method, command, out, inputs, often, tensors, needed, environment)


def _start_up_jobs(sets: Mapping[str, SyntheticSet], settings: Settings, scratch: Path) -> Iterator[Job]:
    """Yield help, the list of methods and dry runs."""
    repeats = max(settings.repeat, 3)
    if "consilience" in settings.tools:
        yield Job("consilience", "help", "", "", (CONSILIENCE, "--help"), repeats=repeats)
        yield Job("consilience", "methods", "", "", (CONSILIENCE, "methods"), repeats=repeats)
        for size, method in (("0.5b", "ties"), ("many", "linear")):
            if size in sets:
                command = consilience_command(sets[size], method, scratch / "planned", "--dry-run")
                yield Job("consilience", "plan", size, method, command, repeats=repeats)
    if "mergekit" in settings.tools:
        command = (mergekit_env.VENV / "bin" / "mergekit-yaml", "--help")
        yield Job("mergekit", "help", "", "", command, repeats=settings.repeat, environment=mergekit_env.ENVIRONMENT)


def tensor_count(folder: Path) -> int:
    """Return how many tensors the safetensors files in ``folder`` declare."""
    return sum(len(oracle.header(path)[0]) for path in synthetic.weight_files(folder))


def _remove(path: Path) -> None:
    """Delete a file or a folder, and what an interrupted merge leaves beside it."""
    for leftover in (path, path.with_name(path.name + ".partial")):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)


def _run(job: Job, scratch: Path) -> Measurement:
    """Run ``job`` once and return its cost.

    Raises:
        RuntimeError: it failed, was too slow, or its output lacks tensors.
        OSError: the disk is too full to start it.
    """
    if job.out is not None:
        _remove(job.out)
        synthetic.require_free(scratch, job.needed + RESERVE, job.title)
    warm(list(job.warm))
    # Writeback of the run before must not land in this one.
    os.sync()
    try:
        measured = measure(job.command, environment=job.environment, folder=ROOT)
        if measured.timed_out or measured.exit_status:
            raise RuntimeError(failure_of(measured))
        if job.tensors and job.out is not None and (found := tensor_count(job.out)) != job.tensors:
            raise RuntimeError(f"{found} tensors in the output, {job.tensors} in the input")
        return measured
    finally:
        if job.out is not None:
            _remove(job.out)


def _run_all(jobs: Sequence[Job], scratch: Path, progress: Progress) -> tuple[results.Row, ...]:
    """Run the jobs in turns and return a row for each."""
    runs: dict[Job, list[Measurement]] = {job: [] for job in jobs}
    failures: dict[Job, str] = dict.fromkeys(jobs, "")
    task = progress.add_task("", total=sum(job.repeats for job in jobs))
    for turn in range(max((job.repeats for job in jobs), default=0)):
        for job in jobs:
            if turn >= job.repeats:
                continue
            progress.update(task, description=job.title)
            if not failures[job]:
                try:
                    runs[job].append(_run(job, scratch))
                except (OSError, RuntimeError) as error:
                    # One job that cannot run must not cost the results of the others. Paths stay out of the results.
                    failures[job] = str(error).replace(f"{scratch}/", "").replace(f"{ROOT}/", "")
                    progress.console.print(f"[red]{escape(job.title)}: {escape(failures[job])}[/red]")
            progress.advance(task)
    progress.update(task, description="done")
    return tuple(
        results.Row(
            job.tool,
            job.job,
            job.size,
            job.method,
            tuple(round(m.wall_s, 3) for m in measured),
            tuple(round(m.cpu_s, 3) for m in measured),
            tuple(round(m.anon_mb, 1) for m in measured),
            tuple(round(m.other_cores, 2) for m in measured),
            failures[job],
        )
        for job, measured in runs.items()
    )


def _check_all(made: SyntheticSet, settings: Settings, scratch: Path, progress: Progress) -> Iterator[results.Check]:
    """Merge the tiny set once with every method and tool, compare with the reference, and so warm every cache."""
    methods = [m for m in settings.methods if "consilience" in settings.tools or m in oracle.METHODS]
    task = progress.add_task("", total=len(methods))
    for method in methods:
        progress.update(task, description=f"check {method}")
        for tool in ("consilience", "mergekit"):
            if tool not in settings.tools or (tool == "mergekit" and method not in oracle.METHODS):
                continue
            out = scratch / f"check-{method}-{tool}"
            _remove(out)
            ours = tool == "consilience"
            command = consilience_command(made, method, out) if ours else mergekit_command(made, method, out, scratch)
            done = measure(command, environment={} if ours else mergekit_env.ENVIRONMENT, folder=ROOT)
            if done.exit_status != 0:
                progress.console.print(f"[red]{tool} {method} on the tiny set failed:[/red]\n{escape(done.output)}")
            elif method in oracle.METHODS:
                found = oracle.agreement(
                    method, out, made.base, list(_experts(made, method).values()), METHODS[method].parameters
                )
                if found.missing:
                    progress.console.print(f"[red]{tool} {method}: missing {escape(', '.join(found.missing))}[/red]")
                yield results.Check(tool, method, found.error, found.rounding, found.differing)
            _remove(out)
        progress.advance(task)


def _versions(settings: Settings) -> dict[str, str]:
    """Return the versions of Python, of both tools and of what they stand on."""
    found = provenance.versions(("consilience", "torch", "safetensors", "numpy", "numba"))
    if "mergekit" in settings.tools:
        mergekit = mergekit_env.versions()
        found["mergekit"] = mergekit["mergekit"]
        found["mergekit's torch"] = mergekit["torch"]
    return found


def run(settings: Settings, console: Console) -> results.Results:
    """Make what is missing, run everything and return the results."""
    if "consilience" in settings.tools and not CONSILIENCE.exists():
        raise FileNotFoundError(f"{CONSILIENCE} is absent; install the package, or leave it out with --tools")
    with make_progress(console) as progress:
        if "mergekit" in settings.tools:
            task = progress.add_task("mergekit's environment", total=1)
            mergekit_env.ensure()
            progress.advance(task)
        sets: dict[str, SyntheticSet] = {}
        for name in ("tiny", "many", *settings.sizes):
            task = progress.add_task(f"set {name}", total=None)

            def update(done: int, total: int, task: TaskID = task) -> None:
                progress.update(task, completed=done, total=total)

            sets[name] = synthetic.ensure(name, settings.cache, progress=update)
            progress.update(task, completed=1, total=1)
        with tempfile.TemporaryDirectory(prefix="out-", dir=settings.cache) as folder:
            scratch = Path(folder)
            if settings.against:
                check_out(settings.against, scratch)
                for method in settings.methods:  # compiles its kernels
                    out = scratch / f"check-{method}-{EARLIER}"
                    command = earlier_command(sets["tiny"], method, out)
                    measure(command, environment=earlier_environment(scratch), folder=scratch)
                    _remove(out)
            checks = tuple(_check_all(sets["tiny"], settings, scratch, progress))
            jobs = list(_start_up_jobs(sets, settings, scratch))
            for name, made in sets.items():
                if name in settings.sizes and "floor" in settings.tools:
                    jobs += _floor_jobs(made, scratch, _repeats(made, settings))
                jobs += _merge_jobs(made, settings, scratch)
            # On a virtual machine the first use of a page of memory costs a fault in the host as well: one unmeasured
            # run keeps that out of whichever job happens to come first.
            for job in [job for job in jobs if job.job == "torch"][:1]:
                with contextlib.suppress(OSError, RuntimeError):  # It will fail, and be reported, in its own place.
                    _run(job, scratch)
            rows = _run_all(jobs, scratch, progress)
    return results.Results(
        date=provenance.now(),
        machine=provenance.machine(settings.cache),
        versions=_versions(settings),
        settings={
            "sizes": ",".join(settings.sizes),
            "tools": ",".join(settings.tools),
            "methods": ",".join(settings.methods),
            "repeat": str(settings.repeat),
            "quick": str(settings.quick).lower(),
            "against": settings.against,
        },
        parameters={name: made.size.parameters() for name, made in sets.items()},
        rows=rows,
        checks=checks,
    )


def parse(arguments: Sequence[str]) -> Settings:
    """Read the command line."""
    large = tuple(name for name in SIZES if name not in ("tiny", "many"))
    parser = make_parser("benchmarks.merge", __doc__)
    parser.add_argument("--quick", action="store_true", help="0.5 B once; no slow mergekit methods; results not kept")
    mergekit = parser.add_mutually_exclusive_group()
    mergekit.add_argument("--with-mergekit", dest="mergekit", action="store_true", default=True)
    mergekit.add_argument("--no-mergekit", dest="mergekit", action="store_false")
    parser.add_argument("--sizes", type=names_of(large), default=None, help=f"of {', '.join(large)} (default: all)")
    usual = tuple(name for name, method in METHODS.items() if not method.further)
    parser.add_argument("--methods", type=names_of(tuple(METHODS)), default=usual)
    parser.add_argument("--tools", type=names_of(TOOLS), default=TOOLS)
    parser.add_argument("--against", default="", metavar="COMMIT", help="measure an earlier commit beside this one")
    parser.add_argument("--repeat", type=int, default=None, help="runs of each fast job (default 3, quick 1)")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where sets and outputs lie (default .cache/bench)")
    parser.add_argument("--results", type=Path, default=None, help="default docs/results/bench, or the cache if quick")
    options = parser.parse_args(arguments)
    return Settings(
        sizes=options.sizes if options.sizes is not None else ("0.5b",) if options.quick else large,
        tools=tuple(tool for tool in options.tools if tool != "mergekit" or options.mergekit),
        methods=options.methods,
        repeat=options.repeat or (1 if options.quick else 3),
        quick=options.quick,
        cache=options.cache.resolve(),
        folder=options.results or (options.cache / "results" if options.quick else KEPT),
        against=options.against,
    )


def main() -> int:
    """Run the benchmark and return the exit status: 1 when any job failed, 130 when interrupted."""
    settings = parse(sys.argv[1:])
    console = make_console()
    try:
        found = run(settings, console)
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        console.print(f"[red]{escape(str(error))}[/red]")
        return 1
    path = results.save(found, settings.folder)
    for table in results.tables(found):
        show_table(console, table)
    show_place(console, path, "merge.md")
    return 1 if any(row.failure for row in found.rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
