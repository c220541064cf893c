"""Merging the language suite: one measured merge, shared by the study and the demo.

Experts are the four committed LoRA adapters; the score of a merge is held-out loss per response token on every domain.
"""

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import consilience as cs
from consilience.engine.adapter_output import Kind
from consilience.progress import ProgressOption
from consilience.tasks import Evaluation, evaluate, load_task
from suites.language import CACHE, DOMAINS, adapter_path, heldout_path
from suites.language.base import base_path

#: Rows per domain and scored tokens per row: what keeps a measurement of four domains to seconds on two cores.
EXAMPLES, TOKENS = 100, 60


def experts(domains: Sequence[str] = DOMAINS) -> dict[str, str]:
    """Return expert name -> adapter folder."""
    return {domain: str(adapter_path(domain)) for domain in domains}


def measure(
    model: str,
    split: str,
    name: str | None = None,
    progress: ProgressOption = False,
    domains: Sequence[str] = DOMAINS,
) -> Evaluation:
    """Measure a model (``PATH`` or ``PATH+ADAPTER``) on every domain's ``split``."""
    tasks = [load_task(f"{d}={heldout_path(d, 'validation' if split == 'validation' else 'test')}") for d in domains]
    return evaluate(
        model,
        tasks,
        name=name,
        max_examples=EXAMPLES,
        max_tokens=TOKENS,
        dtype="bfloat16",
        batch_size=64,
        progress=progress,
    )


def merged(
    out: Path, method: str, parameters: Mapping[str, Any], space: str = "weights", progress: bool = False
) -> str:
    """Merge the four experts and return what to measure: a model folder, or ``base+adapter``.

    ``space``: "weights" (a full checkpoint in bfloat16), "cat" (exact adapter) or "svd-R" (adapter of rank R).
    """
    base = str(base_path())
    if space == "weights":
        cs.merge(base, experts(), out, method=method, force=True, progress=progress, **parameters)
        return str(out)
    kind, _, rank = space.partition("-")
    adapter: Kind = "cat" if kind == "cat" else "svd"
    values = {"as_adapter": adapter, "rank": int(rank) if rank else None, "progress": progress}
    cs.merge(base, experts(), out, method=method, force=True, **values, **parameters)
    return f"{base}+{out}"


def scores(evaluation: Evaluation) -> dict[str, Any]:
    """Return losses, their 95% intervals and accuracies by domain, ready for a cell's JSON."""
    out: dict[str, Any] = {}
    for result in evaluation.results:
        assert result.loss is not None
        out[result.task] = {
            "loss": result.loss.value,
            "low": result.loss.interval.low,
            "high": result.loss.interval.high,
            "tokens": result.loss.n_tokens,
            "accuracy": result.accuracy.acc if result.accuracy else None,
        }
    return out


def mean_loss(by_domain: Mapping[str, Mapping[str, float]]) -> float:
    """Return the mean over domains of the loss per token."""
    return sum(by_domain[d]["loss"] for d in DOMAINS) / len(DOMAINS)


def scratch() -> Path:
    """Return a fresh folder for a merge that is thrown away after it was measured."""
    CACHE.mkdir(exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="merge-", dir=CACHE)) / "merged"


def in_scratch(make: Callable[[dict[str, Any], Path], dict[str, Any]], setting: dict[str, Any]) -> dict[str, Any]:
    """Make and measure a merge of one setting in a fresh folder, which is thrown away in any case."""
    out = scratch()
    try:
        return make(setting, out)
    finally:
        shutil.rmtree(out.parent, ignore_errors=True)
