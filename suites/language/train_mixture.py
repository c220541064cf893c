"""Models trained on several domains at once: what merges of the experts are compared with.

``python -m suites.language.train_mixture lora`` trains a rank-8 LoRA on the four domains and writes the adapter, its
card, ``training.json`` and ``scores.json`` to ``suites/language/mixture``. ``python -m suites.language.train_mixture
full`` fine-tunes all weights on pronounce and sentiment into the cache, beside the full experts. A run that was stopped
continues.
"""

import argparse
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from consilience.errors import ConsilienceError
from consilience.training import TrainingRecord, fine_tune, read_record
from suites.language import BASE_ID, DOMAINS, adapter_path, heldout_path
from suites.language.base import FetchError, base_path
from suites.language.data import read_jsonl
from suites.language.evaluate import load_base
from suites.language.train import ALPHA, RANK, RECIPES
from suites.language.train_full import (
    BATCH_SIZE,
    FOLDER,
    SEED,
    STEPS,
    test_scores,
    train_all_weights,
    training_task,
)

LORA_STEPS = 600
LORA_LEARNING_RATE = 1e-3
LORA_PATH = Path(__file__).resolve().parent / "mixture"
FULL_PATH = FOLDER / "mixture"
_BUILT = FOLDER / "mixture-lora"


def mixture_full_path() -> Path:
    """The folder of the model fine-tuned on the domains of the full experts, trained on first use."""
    if not FULL_PATH.is_dir():
        train_all_weights(list(STEPS), sum(STEPS.values()), FULL_PATH)
    return FULL_PATH


def train_lora() -> Path:
    """Train the mixture LoRA of the four domains in the cache; returns its folder."""
    if not _BUILT.is_dir():
        fine_tune(
            base_path(),
            [training_task(domain) for domain in DOMAINS],
            _BUILT,
            lora_rank=RANK,
            lora_alpha=ALPHA,
            learning_rate=LORA_LEARNING_RATE,
            steps=LORA_STEPS,
            batch_size=BATCH_SIZE,
            seed=SEED,
            threads=1,
            progress=True,
        )
    return _BUILT


def lora_scores(folder: Path) -> dict[str, dict[str, float]]:
    """Test scores of the base, of the mixture LoRA in ``folder``, and of each expert on its own domain."""
    from peft import PeftModel

    base, tokenizer = load_base()
    scores = {"base": test_scores(base, tokenizer, DOMAINS)}
    adapted: Any = PeftModel.from_pretrained(base, str(folder), adapter_name="mixture")
    model = adapted.eval().get_base_model()
    scores |= {"mixture": test_scores(model, tokenizer, DOMAINS), "expert": {}}
    for domain in DOMAINS:
        adapted.load_adapter(str(adapter_path(domain)), adapter_name=domain)
        adapted.set_adapter(domain)
        adapted.eval()
        scores["expert"] |= test_scores(model, tokenizer, [domain])
    return scores


def publish(folder: Path, out: Path) -> None:
    """Copy the trained adapter to ``out`` with its scores and card; its base is named by hub id, not by path."""
    scores = lora_scores(folder)
    out.mkdir(exist_ok=True)
    shutil.copyfile(folder / "adapter_model.safetensors", out / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = BASE_ID
    _write_json(out / "adapter_config.json", dict(sorted(config.items())))
    record = replace(read_record(folder / "training.json"), base=BASE_ID)
    (out / "training.json").write_text(record.as_json(), encoding="utf-8")
    _write_json(out / "scores.json", scores)
    (out / "README.md").write_text(card(record, scores), encoding="utf-8")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def card(record: TrainingRecord, scores: dict[str, dict[str, float]]) -> str:
    """The card of the mixture LoRA, every figure of which comes from its record and scores."""
    lines: list[str] = []
    for name in scores["base"]:
        cells = [f"{scores[model][name]:.3f}" for model in ("base", "mixture", "expert")]
        what = name if "accuracy" in name else f"{name}, nats per response token"
        lines.append(f"| {what} | {' | '.join(cells)} |")
    rows = len(read_jsonl(heldout_path(DOMAINS[0], "test")))
    table = "\n".join(lines)
    shares = "\n".join(
        f"- {share.name}: {share.drawn} draws from {share.rows} rows;"
        f" {' '.join(RECIPES[share.name].source.format(python=record.versions['python']).split())}"
        for share in record.tasks
    )
    return f"""---
base_model: {BASE_ID}
base_model_relation: adapter
library_name: peft
license: apache-2.0
pipeline_tag: text-generation
language:
- en
- es
tags:
- lora
- consilience
---

# mixture: one rank-{record.lora_rank} LoRA trained on all four domains

What merges of the four core experts of Consilience's language suite are compared with: the same base, the same kind of
adapter, and the training rows of all four domains at once, in equal shares. It is made to be measured, not to be
deployed, and like the experts it is narrow.

| {rows} test rows a domain | base | mixture | that domain's expert |
|---|---|---|---|
{table}

Data, with licences (`suites/language/LICENCES.md` has the notices):

{shares}

No training row is a validation or test row. The base is a 4-bit GGUF of {BASE_ID},
dequantised to bfloat16 (`python -m suites.language.base`). Losses include the end-of-turn token of the response.

Training: rank {record.lora_rank}, alpha {record.lora_alpha:g}, every linear layer, AdamW,
peak learning rate {record.learning_rate:g}, {record.steps} steps of {record.batch_size} rows,
linear warm-up over {record.warmup:.0%} of the steps, then cosine to zero, seed {record.seed}.
The loss is the mean over domains of the mean over response tokens, so that domains count alike;
at the end it was {record.final_loss:.3f}. {record.seconds / 60:.0f} minutes on a 2-core CPU, threads: {record.threads}.
All of it is in `training.json`.
Made by `python -m suites.language.train_mixture lora`.
"""


def main(arguments: list[str] | None = None) -> int:
    """Command line of ``python -m suites.language.train_mixture``."""
    parser = argparse.ArgumentParser(description="Train one model on several domains at once.")
    parser.add_argument("kind", choices=("lora", "full"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        folder = train_lora() if options.kind == "lora" else mixture_full_path()
    except (ConsilienceError, FetchError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.kind == "lora":
        publish(folder, LORA_PATH)
        print(f"{LORA_PATH}: test {(LORA_PATH / 'scores.json').read_text(encoding='utf-8')}", flush=True)
    else:
        print(f"{folder}: test {test_scores(*load_base(folder), DOMAINS)}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
