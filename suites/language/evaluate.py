"""Held-out loss of the base and of each expert on every domain of the language suite.

``python -m suites.language.evaluate`` prints a table: a row for the base and for each expert, a column for each domain.
A cell is the mean negative log-likelihood in nats per response token (the end-of-turn token included) over that
domain's rows, given the prompt in the model's chat template. A last column gives accuracy on sentiment, by which choice
is likelier.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from suites.language import DOMAINS, Split, adapter_path, heldout_path
from suites.language.base import base_path
from suites.language.data import read_jsonl


@dataclass(frozen=True)
class Batch:
    """Right-padded token ids [B, T], and labels [B, T] that are -100 outside responses.

    There is no attention mask: under causal attention nothing that counts comes after the padding.
    """

    ids: Tensor
    labels: Tensor


def encode(tokenizer: Any, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """Token ids of (the prompt in the chat template, the response with its end-of-turn token)."""
    turn = [{"role": "user", "content": prompt}]
    text: str = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    before: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    after: list[int] = tokenizer(response, add_special_tokens=False).input_ids
    return before, [*after, tokenizer.eos_token_id]


def collate(pairs: Sequence[tuple[list[int], list[int]]], pad: int) -> Batch:
    """Pad (prompt ids, response ids) pairs on the right to one length."""
    width = max(len(before) + len(after) for before, after in pairs)
    ids = torch.full((len(pairs), width), pad)
    labels = torch.full((len(pairs), width), -100)
    for i, (before, after) in enumerate(pairs):
        n, m = len(before), len(before) + len(after)
        ids[i, :m] = torch.tensor(before + after)
        labels[i, n:m] = torch.tensor(after)
    return Batch(ids, labels)


def response_losses(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """(nats of every response token [N], index of its row [N]) of a batch with N response tokens.

    The output layer (49,152 words, a fifth of the model) is applied only where a response token is predicted. ``model``
    is a causal language model of transformers, not a PEFT wrapper; adapters inside it are used.
    """
    hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state
    targets = batch.labels[:, 1:]
    rows, columns = torch.nonzero(targets != -100, as_tuple=True)
    logits = model.lm_head(hidden[rows, columns])
    losses = torch.nn.functional.cross_entropy(logits.float(), targets[rows, columns], reduction="none")
    return losses, rows


def row_losses(
    model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], batch_size: int = 16
) -> list[tuple[float, int]]:
    """(summed nats, number of tokens) of the response of each (prompt, response) pair."""
    out: list[tuple[float, int]] = []
    for start in range(0, len(pairs), batch_size):
        part = [encode(tokenizer, prompt, response) for prompt, response in pairs[start : start + batch_size]]
        with torch.no_grad():
            losses, rows = response_losses(model, collate(part, tokenizer.pad_token_id))
        sums = torch.zeros(len(part), dtype=torch.float64).index_add_(0, rows, losses.double())
        out += [(float(total), len(after)) for total, (_, after) in zip(sums, part, strict=True)]
    return out


def heldout_loss(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> float:
    """Mean nats per response token over the rows (each token weighs the same)."""
    losses = row_losses(model, tokenizer, [(row["prompt"], row["response"]) for row in rows])
    return math.fsum(total for total, _ in losses) / sum(n for _, n in losses)


def accuracy(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> float:
    """Share of rows whose labelled choice is the likeliest of its ``choices`` (summed nats)."""
    pairs = [(row["prompt"], choice) for row in rows for choice in row["choices"]]
    losses = iter(row_losses(model, tokenizer, pairs))
    hits = 0
    for row in rows:
        nats = [next(losses)[0] for _ in row["choices"]]
        hits += nats.index(min(nats)) == row["label"]
    return hits / len(rows)


def load_base(folder: Path | None = None) -> tuple[Any, Any]:
    """(model in float32, tokenizer) of the base, fetched if need be."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = folder or base_path()
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(source)


def table(split: Split, say: Callable[[str], None] = print) -> dict[str, dict[str, float]]:
    """Measure the base and every expert on every domain, saying each row of a Markdown table as it is known."""
    from peft import PeftModel

    base, tokenizer = load_base()
    rows = {domain: read_jsonl(heldout_path(domain, split)) for domain in DOMAINS}
    adapted: Any = None
    for domain in DOMAINS:
        if adapted is None:
            adapted = PeftModel.from_pretrained(base, str(adapter_path(domain)), adapter_name=domain)
        else:
            adapted.load_adapter(str(adapter_path(domain)), adapter_name=domain)
    adapted.eval()

    def measure() -> dict[str, float]:
        model = adapted.get_base_model()
        cells = {domain: heldout_loss(model, tokenizer, rows[domain]) for domain in DOMAINS}
        return cells | {"sentiment accuracy": accuracy(model, tokenizer, rows["sentiment"])}

    out: dict[str, dict[str, float]] = {}
    say(f"| model | {' | '.join(DOMAINS)} | sentiment accuracy |")
    say("|---|" + "---|" * (len(DOMAINS) + 1))
    for name in ("base", *DOMAINS):
        if name == "base":
            with adapted.disable_adapter():
                out[name] = measure()
        else:
            adapted.set_adapter(name)
            out[name] = measure()
        say(f"| {name} | " + " | ".join(f"{value:.3f}" for value in out[name].values()) + " |")
    return out


def main(arguments: list[str] | None = None) -> int:
    """Command line of ``python -m suites.language.evaluate``."""
    parser = argparse.ArgumentParser(description="Held-out loss of the base and the experts of the language suite.")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    cells = table(options.split, lambda line: print(line, flush=True))
    if options.json:
        options.json.write_text(json.dumps(cells, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
