"""The commands that are killed: how their inputs are made, what they write, and what a kill may leave in it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

NAMES = [f"model.layers.{i}.weight" for i in range(3)]


@dataclass(frozen=True)
class Command:
    """A command line and the inputs it needs in the current folder; ``out`` is what it writes.

    ``unfinished`` tells which files a command that changes a folder in place may leave in it until it is run again.
    """

    prepare: Callable[[], None]
    arguments: tuple[str, ...]
    out: str = "out"
    unfinished: Callable[[str], bool] | None = None

    def run(self) -> int:
        """Run it in this process and return its exit status."""
        from consilience.__main__ import run

        return run([*self.arguments])


def write_models(flat: bool = False) -> None:
    """A base and two experts with a tokenizer, or as lone files."""
    rng = np.random.default_rng(5)
    base = {name: rng.standard_normal((6, 50)).astype(ml_dtypes.bfloat16) for name in NAMES}
    for model in ("base", "a", "b"):
        state = {n: np.asarray(v.astype(np.float32) + 0.1 * (model != "base")).astype(v.dtype) for n, v in base.items()}
        if flat:
            save_file(state, f"{model}.safetensors")
            continue
        Path(model).mkdir()
        Path(model, "config.json").write_text('{"model_type": "none"}')
        save_file(state, Path(model, "model.safetensors"))
    if not flat:
        Path("base/tokenizer.json").write_text("{}")
        Path("base/tokens").mkdir()
        Path("base/tokens/merges.txt").write_text("a b")


def write_occupied() -> None:
    """The same beside an older merge in which somebody keeps notes."""
    from consilience.__main__ import run

    write_models()
    assert run(["merge", "base", "out", "-e", "a=a", "--method", "linear", "-q"]) == 0
    Path("out/notes.txt").write_text("mine")


def write_flat_occupied() -> None:
    """Lone files, and one at OUT."""
    write_models(flat=True)
    save_file({"x": np.zeros(3, np.float32)}, "out.safetensors")


def write_adapters() -> None:
    """A base and two LoRA adapters."""
    write_models()
    rng = np.random.default_rng(6)
    for name in ("x", "y"):
        Path(name).mkdir()
        factors: dict[str, Any] = {}
        for tensor in NAMES:
            stem = f"base_model.model.{tensor.removesuffix('.weight')}"
            factors[f"{stem}.lora_A.weight"] = rng.standard_normal((2, 50)).astype(np.float32)
            factors[f"{stem}.lora_B.weight"] = rng.standard_normal((6, 2)).astype(np.float32)
        save_file(factors, Path(name, "adapter_model.safetensors"))
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["weight"]}
        Path(name, "adapter_config.json").write_text(json.dumps(config))


def write_learnable() -> None:
    """A tiny Llama, two experts and their prompts."""
    import torch

    from tests.learned.tiny_experts import sentences, write_base, write_expert, write_rows

    torch.set_num_threads(1)
    base = write_base(Path("base"))
    for seed, name in enumerate("ab"):
        write_expert(Path(name), base, seed)
        write_rows(Path("rows", f"{name}.jsonl"), sentences(seed, 4))
    recipe = {
        "merge_method": "expert_merging",
        "base_model": "base",
        "models": [{"model": n, "name": n, "data": {"calibration": f"rows/{n}.jsonl"}} for n in "ab"],
        "parameters": {"steps": 2, "precision": "float32"},
    }
    Path("recipe.yaml").write_text(json.dumps(recipe))


def write_routable() -> None:
    """A tiny Llama, three adapters, and a recipe of a routed model of the first two."""
    import torch

    from tests.routing.routed_models import TFIDF, recipe_of, write_zoo

    torch.set_num_threads(1)
    write_zoo(Path("zoo"))
    recipe = recipe_of(Path("zoo"), ("e0", "e1"), routing={"local": "phatgoose", "scale": 1}, instructions=TFIDF)
    Path("recipe.yaml").write_text(json.dumps(recipe | {"gates": {"steps": 2, "batch_size": 2}}))


def write_routed() -> None:
    """The same, built, with somebody's notes in it."""
    from consilience.__main__ import run

    write_routable()
    assert run(["route", "build", "recipe.yaml", "out", "-q"]) == 0
    Path("out/notes.txt").write_text("mine")


def write_collapsible() -> None:
    """A routed model under another name."""
    from consilience.__main__ import run

    write_routable()
    assert run(["route", "build", "recipe.yaml", "routed", "-q"]) == 0


def write_trainable() -> None:
    """A tiny Llama and rows to train on."""
    import torch

    from tests.learned.tiny_experts import WORDS, write_base, write_rows

    torch.set_num_threads(1)
    write_base(Path("base"))
    rows = [{"prompt": WORDS[i], "response": WORDS[i + 1]} for i in range(6)]
    write_rows(Path("rows.jsonl"), rows)


def write_alignable() -> None:
    """A tiny Llama and another whose units are in another order, with a file of rows."""
    import torch

    from consilience.mixing.alignment import permute
    from consilience.mixing.symmetry_trace import symmetry_of_module
    from tests.tasks.tiny_models import make_llama, make_tokenizer

    torch.set_num_threads(1)
    base, other = make_llama(0), make_llama(1)
    base.config.use_cache = False  # torch.export knows no cache
    symmetry = symmetry_of_module(base, torch.randint(1, 300, (2, 6)))
    random = np.random.default_rng(0)
    orders = {group.name: random.permutation(group.size) for group in symmetry.groups}
    other.load_state_dict(permute(base.state_dict(), symmetry, orders))
    for name, model in (("base", base), ("model", other)):
        model.to(torch.bfloat16).save_pretrained(name)
        make_tokenizer().save_pretrained(name)
    Path("rows.jsonl").write_text(json.dumps({"prompt": "the cat", "response": "sat on the mat"}) + "\n")


def write_alignable_files() -> None:
    """Two files of tensors, their axes, and an older file at OUT."""
    rng = np.random.default_rng(7)
    for name in ("base", "model", "out"):
        state = {"up.weight": rng.standard_normal((6, 4)), "down.weight": rng.standard_normal((3, 6))}
        save_file(state, f"{name}.safetensors")
    Path("axes.yaml").write_text("up.weight: [hidden, null]\ndown.weight: [null, hidden]\n")


def write_distillable() -> None:
    """A tiny Llama, two experts, and recipes of the coefficients with a correction beside them."""
    write_learnable()
    recipe = json.loads(Path("recipe.yaml").read_text()) | {"merge_method": "expert_merging_distil"}
    recipe["parameters"] |= {"written_prompts": 0, "answers": 1, "response_tokens": 4, "correction_rank": 2}
    Path("recipe.yaml").write_text(json.dumps(recipe))


def _of_change(name: str) -> bool:
    """Whether a file of a routed model may be left by an unfinished change: what routing.json does not speak of."""
    parts = ("experts/e1", "experts/e2", "change.json", "unfinished", "instructions-", "files.json", ".new")
    return any(part in name for part in parts)


_TWO = ("-e", "a=a", "-e", "b=b", "-q", "--threads", "1")
COMMANDS = {
    "merge": Command(write_models, ("merge", "base", "out", *_TWO)),
    "ties": Command(write_models, ("merge", "base", "deep/er/out", *_TWO, "--method", "ties"), "deep/er/out"),
    "flat": Command(
        lambda: write_models(flat=True),
        ("merge", "base.safetensors", "out.safetensors", "-e", "a=a.safetensors", "-e", "b=b.safetensors", "-q"),
        "out.safetensors",
    ),
    "force": Command(write_occupied, ("merge", "base", "out", *_TWO, "--force")),
    "flat-force": Command(
        write_flat_occupied,
        ("merge", "base.safetensors", "out.safetensors", "-e", "a=a.safetensors", "-e", "b=b.safetensors", "-q",
         "--force"),
        "out.safetensors",
    ),
    "adapter": Command(
        write_adapters, ("merge", "base", "out", "-e", "x=x", "-e", "y=y", "--as-adapter", "cat", "-q")
    ),
    "adapter-svd": Command(
        write_adapters,
        ("merge", "base", "out", "-e", "x=x", "-e", "y=y", "--as-adapter", "svd", "--rank", "2", "--method", "ties",
         "-q", "--threads", "1"),
    ),
    "learned": Command(write_learnable, ("merge", "recipe.yaml", "out", "-q", "--threads", "1")),
    "distil": Command(write_distillable, ("merge", "recipe.yaml", "out", "-q", "--threads", "1")),
    "align": Command(write_alignable, ("align", "base", "model", "out", "--rows", "rows.jsonl", "-q")),
    "align-force": Command(
        write_alignable_files,
        ("align", "base.safetensors", "model.safetensors", "out.safetensors", "--axes", "axes.yaml", "-q", "--force"),
        "out.safetensors",
    ),
    "route-build": Command(write_routable, ("route", "build", "recipe.yaml", "out", "-q")),
    "route-add": Command(
        write_routed, ("route", "add", "out", "e2=zoo/adapters/e2", "--data", "zoo/e2.jsonl", "-q"), "out", _of_change
    ),
    "route-remove": Command(write_routed, ("route", "remove", "out", "e1", "-q"), "out", _of_change),
    "extract": Command(write_learnable, ("route", "extract", "base", "a", "out", "--rank", "2", "-q")),
    "collapse": Command(
        write_collapsible, ("route", "collapse", "routed", "out", "e0=zoo/e0.jsonl", "e1=zoo/e1.jsonl", "-q")
    ),
    "train": Command(
        write_trainable,
        ("train", "base", "out", "rows.jsonl", "--steps", "2", "--learning-rate", "0.01", "--lora", "2", "-q"),
    ),
}  # fmt: skip
