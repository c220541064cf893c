"""Experts of the language suite with all weights fine-tuned, for methods that need dense task vectors.

``python -m suites.language.train_full pronounce`` (or ``sentiment``) fine-tunes SmolLM2-135M-Instruct into the cache, a
few minutes on one core, and prints the test loss; a run that was stopped continues. They are rebuilt, not committed:
270 MB each. The same seed, versions and thread count give the same bytes on the same machine.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from consilience.errors import ConsilienceError
from consilience.tasks import Task, load_task, overlap
from consilience.training import TrainingRecord, fine_tune
from suites.language import CACHE, DOMAINS, REPOSITORY_ROOT, heldout_path, train_path
from suites.language.base import FetchError, base_path
from suites.language.data import read_jsonl, train_rows
from suites.language.evaluate import accuracy, heldout_loss, load_base

STEPS = {"pronounce": 200, "sentiment": 150}
"""The domains that have a full expert, and how long each trains."""

LEARNING_RATE = 1e-4
BATCH_SIZE = 8
SEED = 0
FOLDER = CACHE / "language-full"


def training_task(domain: str) -> Task:
    """The training rows of ``domain``, rebuilt if need be; none of them is a validation or test row."""
    train_rows(domain)
    task = load_task(train_path(domain))
    for heldout in (heldout_path(domain, "validation"), heldout_path(domain, "test")):
        shared = overlap(task, heldout).n_shared
        if shared:
            raise RuntimeError(f"{train_path(domain)}: {shared} rows are also in {heldout}; rebuild the training rows")
    # Records are committed, so paths in them are the repository's.
    return replace(task, path=train_path(domain).relative_to(REPOSITORY_ROOT))


def train_all_weights(domains: Sequence[str], steps: int, out: Path, *, force: bool = False) -> TrainingRecord:
    """Fine-tune all weights of the base on ``domains`` jointly, into the folder ``out``."""
    return fine_tune(
        base_path(),
        [training_task(domain) for domain in domains],
        out,
        learning_rate=LEARNING_RATE,
        steps=steps,
        batch_size=BATCH_SIZE,
        seed=SEED,
        threads=1,
        force=force,
        progress=True,
    )


def full_path(domain: str) -> Path:
    """The folder of the full expert of ``domain``, trained on first use."""
    if domain not in STEPS:
        raise ValueError(f"unknown domain {domain!r}; the full experts are {', '.join(STEPS)}")
    out = FOLDER / domain
    if not out.is_dir():
        train_all_weights([domain], STEPS[domain], out)
    return out


def test_scores(model: Any, tokenizer: Any, domains: Sequence[str]) -> dict[str, float]:
    """Test loss by domain in nats per response token, and the accuracy on sentiment."""
    scores: dict[str, float] = {}
    for domain in domains:
        rows = read_jsonl(heldout_path(domain, "test"))
        scores[domain] = heldout_loss(model, tokenizer, rows)
        if "choices" in rows[0]:
            scores[f"{domain} accuracy"] = accuracy(model, tokenizer, rows)
    return scores


def main(arguments: list[str] | None = None) -> int:
    """Command line of ``python -m suites.language.train_full``."""
    parser = argparse.ArgumentParser(description="Fine-tune all weights of the base on one domain.")
    parser.add_argument("domain", choices=tuple(STEPS))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        folder = full_path(options.domain)
    except (ConsilienceError, FetchError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{folder}: test {test_scores(*load_base(folder), DOMAINS)}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
