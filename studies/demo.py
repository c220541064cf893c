"""``make demo``: merge four real experts into one real model with every method, and measure what was gained and lost.

Fetches the base, merges (full weights and adapter space), prints held-out loss per domain for base, experts and merges,
and one generated sample per domain. Strengths are round numbers; the study (studies/language_merge.py) tunes them.

Models are measured side by side, one process each: two processes of one thread do more than one of two, whose threads
wait for each other after every small product, and for anything else that runs on the machine.
"""

import argparse
import ctypes
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from consilience.errors import ConsilienceError, MachineError
from consilience.tasks import Evaluation, load_model, load_task, sample
from studies.language import EXAMPLES, experts, measure, merged
from suites.language import CACHE, DOMAINS, adapter_path, heldout_path
from suites.language.base import DEFAULT_OUT, FetchError, base_path, is_complete

#: The most models measured at a time: each takes 1.9 GB at its peak.
MOST_WORKERS = 4

#: (what the table calls it, method, parameters, space)
MERGES: tuple[tuple[str, str, dict[str, Any], str], ...] = (
    ("linear", "linear", {}, "weights"),
    ("task_arithmetic", "task_arithmetic", {"lambda": 0.5}, "weights"),
    ("task_arithmetic, adapter", "task_arithmetic", {"lambda": 0.5}, "cat"),
    ("task_arithmetic, adapter of rank 8", "task_arithmetic", {"lambda": 0.5}, "svd-8"),
    ("ties", "ties", {"density": 0.2, "lambda": 1.0}, "weights"),
    ("dare_linear", "dare_linear", {"density": 0.5, "lambda": 0.5}, "weights"),
    ("dare_ties", "dare_ties", {"density": 0.5, "lambda": 0.5}, "weights"),
)


def slerp_pair(out: Path) -> str:
    """Interpolate between two experts, each given as base+adapter."""
    import consilience as cs

    first, second = (f"{base_path()}+{adapter_path(d)}" for d in ("pronounce", "translate"))
    cs.merge(first, {"translate": second}, out, method="slerp", t=0.5, force=True)
    return str(out)


def losses(evaluation: Evaluation) -> dict[str, float]:
    """Return held-out loss by domain, and sentiment accuracy as ``accuracy``."""
    out = {r.task: r.loss.value for r in evaluation.results if r.loss is not None}
    out["mean"] = sum(out[d] for d in DOMAINS) / len(DOMAINS)
    accuracy = next((r.accuracy.acc for r in evaluation.results if r.accuracy is not None), None)
    return out | ({"accuracy": accuracy} if accuracy is not None else {})


@dataclass(frozen=True, slots=True)
class Model:
    """One row of the table: what it calls the model, what to measure, and how long the merge took (None: no merge)."""

    name: str
    path: str
    merge_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """What a worker found of the model at ``index``, and in how many seconds."""

    index: int
    losses: dict[str, float]
    seconds: float


def measure_one(index: int, model: Model) -> Measured:
    """Measure one model; the work of one process."""
    started = time.perf_counter()
    found = losses(measure(model.path, "test", model.name))
    _return_memory()
    return Measured(index, found, time.perf_counter() - started)


def _return_memory() -> None:
    """Give the pages of a model that is gone back to the system; glibc keeps them, and the next one fits badly."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _start_worker(threads: int) -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process stops its workers itself
    torch.set_num_threads(threads)


def measure_all(models: Sequence[Model]) -> Iterator[Measured]:
    """Measure models in several processes; yields each as soon as it is done.

    Raises:
        MachineError: a process was killed.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cores, MOST_WORKERS, len(models))
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (cores // workers,))
    try:
        futures = [pool.submit(measure_one, index, model) for index, model in enumerate(models)]
        for future in as_completed(futures):
            yield future.result()
        pool.shutdown()
    except BrokenProcessPool:
        raise MachineError("a process that measured a model was killed; free some memory and run this again") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        pool.shutdown()


def add_row(table: Table, name: str, values: dict[str, float], seconds: float | None) -> None:
    """Add one model to the table."""
    cells = [f"{values[d]:.3f}" for d in DOMAINS]
    accuracy = f"{values['accuracy']:.0%}" if "accuracy" in values else ""
    table.add_row(name, *cells, f"{values['mean']:.3f}", accuracy, "" if seconds is None else f"{seconds:.1f}")


def samples(console: Console, model: str) -> None:
    """Print one answer per domain of the merged model beside the reference answer."""
    from transformers import AutoTokenizer

    rows = {d: load_task(f"{d}={heldout_path(d, 'test')}").rows[0] for d in DOMAINS}
    loaded = load_model(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    answers = sample(loaded, tokenizer, [str(row.prompt) for row in rows.values()], max_new_tokens=40)
    for (domain, row), answer in zip(rows.items(), answers, strict=True):
        console.print(f"\n[bold]{domain}[/bold]  {str(row.prompt).strip()[:300]}", highlight=False)
        console.print(f"  merged model: {' '.join(answer.split())[:200]}", markup=False, highlight=False)
        console.print(f"  reference:    {' '.join(str(row.response).split())[:200]}", markup=False, highlight=False)


def merge_all(console: Console, base: str, folder: Path) -> list[Model]:
    """Merge by every method, saying so; returns what to measure."""
    models = [Model("base", base)]
    models += [Model(f"expert {domain}", f"{base}+{adapter}") for domain, adapter in experts().items()]
    count = len(MERGES) + 1
    for number, (name, method, parameters, space) in enumerate(MERGES, 1):
        out = folder / "".join(c if c.isalnum() else "-" for c in name)
        shutil.rmtree(out, ignore_errors=True)
        begun = time.perf_counter()
        path = merged(out, method, parameters, space, progress=True)
        models.append(Model(name, path, time.perf_counter() - begun))
        _say(console, number, count, f"merged {name} ({models[-1].merge_seconds:.1f} s)")
    begun = time.perf_counter()
    path = slerp_pair(folder / "slerp")
    models.append(Model("slerp of pronounce and translate", path, time.perf_counter() - begun))
    _say(console, count, count, f"merged {models[-1].name} ({models[-1].merge_seconds:.1f} s)")
    return models


def _say(console: Console, number: int, count: int, text: str) -> None:
    """Print one line of progress; it is on the screen, or in the log, at once."""
    console.print(f"[{number:2}/{count:2}] {text}", markup=False, highlight=False)


def measured(console: Console, models: Sequence[Model]) -> list[dict[str, float]]:
    """Measure models, with a line for each that is done and, on a terminal, a bar; returns their losses in order."""
    out: dict[int, dict[str, float]] = {}
    columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task("", total=len(models))
        for one in measure_all(models):
            out[one.index] = one.losses
            mean = f"mean loss {one.losses['mean']:.3f} ({one.seconds:.0f} s)"
            _say(console, len(out), len(models), f"{models[one.index].name}: {mean}")
            bars.advance(bar)
    return [out[index] for index in range(len(models))]


def fetch(console: Console) -> str:
    """Fetch the base unless it is there."""
    if not is_complete(DEFAULT_OUT):
        console.print("Fetching the base once (93 MB) and dequantising it.", highlight=False)
        begun = time.perf_counter()
        base_path()
        console.print(f"The base is ready ({time.perf_counter() - begun:.0f} s).", highlight=False)
    return str(base_path())


def run(keep: bool) -> None:
    """Run the demo."""
    console = Console() if sys.stdout.isatty() else Console(width=110)
    base = fetch(console)
    started = time.perf_counter()
    merges = len(MERGES) + 1
    console.print(
        f"Merging {len(DOMAINS)} experts of SmolLM2-135M-Instruct in {merges} ways, then measuring base, experts and"
        f" merges on {len(DOMAINS)} domains of {EXAMPLES} test rows: two to three minutes on two cores.",
        highlight=False,
    )
    folder = CACHE / "demo"
    folder.mkdir(parents=True, exist_ok=True)
    models = merge_all(console, base, folder)
    found = measured(console, models)
    table = Table(title=f"held-out loss, nats per response token ({EXAMPLES} test rows a domain; lower is better)")
    for heading in ("model", *DOMAINS, "mean", "sentiment acc.", "merge s"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for model, values in zip(models, found, strict=True):
        add_row(table, model.name, values, model.merge_seconds)
    console.print(table)
    whole = [(v["mean"], m.path) for m, v in zip(models, found, strict=True)
             if m.merge_seconds is not None and "+" not in m.path]  # fmt: skip
    best = min(whole)[1]
    console.print(f"\nAnswers of the merge with the lowest mean loss ({Path(best).name}), greedy decoding:")
    samples(console, best)
    if not keep:
        shutil.rmtree(folder)
    kept = (
        f"; the merges are in {folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder}"
        if keep
        else ""
    )
    console.print(f"\n{time.perf_counter() - started:.0f} s in all{kept}.", highlight=False)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="make demo", description="Merge four real experts and measure the result.")
    parser.add_argument("--discard", action="store_true", help="remove the merged models afterwards")
    arguments = parser.parse_args()
    try:
        run(keep=not arguments.discard)
    except ConsilienceError as error:
        sys.stderr.write(f"demo: {error}\n")
        return error.exit_status
    except FetchError as error:
        sys.stderr.write(f"demo: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("demo: interrupted\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
