"""A tiny Llama with a word-level tokenizer, its experts in every form they come in, and calibration rows."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

State = dict[str, torch.Tensor]
WORDS = [f"w{i}" for i in range(93)]
VOCABULARY = 96


def write_tokenizer(folder: Path, words: Sequence[str] = WORDS) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<unk>"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *words])}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made: Any = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", padding_side="right"
    )
    made.save_pretrained(folder)


def config_of(**changes: Any) -> Any:
    from transformers import LlamaConfig

    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "architectures": ["LlamaForCausalLM"],
    }
    return LlamaConfig(**(settings | changes))


def write_state(folder: Path, state: Mapping[str, torch.Tensor], shards: int = 1) -> None:
    """Write weights as one file, or as ``shards`` files with an index."""
    if shards == 1:
        save_file(dict(state), folder / "model.safetensors", {"format": "pt"})
        return
    names = sorted(state)
    place = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(place.values())):
        save_file({n: state[n] for n in names if place[n] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))


def write_base(
    folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, shards: int = 1, **changes: Any
) -> Path:
    """A base whose predictions are far from uniform."""
    from transformers import LlamaForCausalLM

    folder.mkdir(parents=True)
    model = LlamaForCausalLM(config_of(**changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(noise if parameter.ndim > 1 else 1 + noise)
    model.config.save_pretrained(folder)
    state = {name: value.to(dtype).clone() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    write_state(folder, state, shards)
    write_tokenizer(folder)
    return folder


def read_state(folder: Path) -> State:
    """All tensors of a folder, whatever files they are in."""
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def write_expert(
    folder: Path,
    base: Path,
    seed: int,
    scale: float = 0.1,
    shards: int = 1,
    only: Callable[[str], bool] = lambda name: True,
    dtype: torch.dtype | None = None,
) -> Path:
    """The base plus noise of size ``scale`` in the tensors that ``only`` names."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1000 + seed)
    state: State = {}
    for name, value in read_state(base).items():
        noise = torch.randn(value.shape, generator=generator) * scale
        changed = (value.float() + noise if only(name) else value.float()).to(value.dtype)
        state[name] = changed if dtype is None else changed.to(dtype)
    write_state(folder, state, shards)
    (folder / "config.json").write_text((base / "config.json").read_text())
    return folder


MODULES = [f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn.q_proj", "mlp.down_proj")]


def write_adapter(
    folder: Path, base: Path, seed: int, *, modules: Sequence[str] = MODULES, rank: int = 2, **config: Any
) -> Path:
    """A LoRA adapter on some of the base's modules."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(2000 + seed)
    state = read_state(base)
    tensors: State = {}
    for module in modules:
        out, into = state[f"{module}.weight"].shape
        stem = f"base_model.model.{module}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, into, generator=generator) * 0.3
        tensors[f"{stem}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.3
    save_file(tensors, folder / "adapter_model.safetensors")
    value = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(value))
    return folder


def sentences(seed: int, count: int, length: int = 6, words: Sequence[str] = WORDS) -> list[str]:
    generator = torch.Generator().manual_seed(3000 + seed)
    picks: list[list[int]] = torch.randint(len(words), (count, length), generator=generator).tolist()
    return [" ".join([words[i] for i in row[: length - k % 2]]) for k, row in enumerate(picks)]


def write_rows(path: Path, rows: Sequence[str | Mapping[str, Any]]) -> Path:
    """A JSONL file of unlabelled prompts (texts) or of rows as they are given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": row} if isinstance(row, str) else row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def recipe_of(place: Path, experts: Mapping[str, Path], base: Path | None = None, **keys: Any) -> dict[str, Any]:
    """A recipe of learned Expert Merging on ``place/rows/NAME.jsonl``; as published, unless it says more."""
    models = [
        {"model": str(path), "name": name, "data": {"calibration": str(place / "rows" / f"{name}.jsonl")}}
        for name, path in experts.items()
    ]
    value: dict[str, Any] = {"merge_method": "expert_merging", "base_model": str(base or place / "base")}
    value |= {"models": models} | keys
    if value["merge_method"].startswith("expert_merging"):
        value["parameters"] = {"preset": "paper"} | value.get("parameters", {})
    return value


def write_recipe(path: Path, value: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(value), sort_keys=False))
    return path
