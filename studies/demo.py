"""``make demo``: merge four real experts into one real model with every method, and measure what was gained and lost.

Fetches the base, merges (full weights and adapter space), prints held-out loss per domain for base, experts and merges,
and one generated sample per domain. Strengths are round numbers; the study (studies/language_merge.py) tunes them.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from consilience.errors import ConsilienceError
from consilience.tasks import Evaluation, load_model, load_task, sample
from studies.language import measure, merged
from suites.language import CACHE, DOMAINS, adapter_path, heldout_path
from suites.language.base import base_path

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


def run(keep: bool) -> None:
    """Run the demo."""
    console = Console() if sys.stdout.isatty() else Console(width=110)
    started = time.perf_counter()
    base = str(base_path())
    folder = CACHE / "demo"
    folder.mkdir(parents=True, exist_ok=True)
    table = Table(title="held-out loss, nats per response token (100 test rows a domain; lower is better)")
    for heading in ("model", *DOMAINS, "mean", "sentiment acc.", "merge s"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    add_row(table, "base", losses(measure(base, "test", "base", progress=True)), None)
    for domain in DOMAINS:
        found = losses(measure(f"{base}+{adapter_path(domain)}", "test", f"expert {domain}", progress=True))
        add_row(table, f"expert {domain}", found, None)
    best, best_loss = "", float("inf")
    for name, method, parameters, space in MERGES:
        out = folder / "".join(c if c.isalnum() else "-" for c in name)
        shutil.rmtree(out, ignore_errors=True)
        begun = time.perf_counter()
        model = merged(out, method, parameters, space)
        seconds = time.perf_counter() - begun
        found = losses(measure(model, "test", name, progress=True))
        add_row(table, name, found, seconds)
        if found["mean"] < best_loss and "+" not in model:
            best, best_loss = model, found["mean"]
    begun = time.perf_counter()
    pair = slerp_pair(folder / "slerp")
    seconds = time.perf_counter() - begun
    add_row(table, "slerp of pronounce and translate", losses(measure(pair, "test", "slerp", progress=True)), seconds)
    console.print(table)
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
    except KeyboardInterrupt:
        sys.stderr.write("demo: interrupted\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
