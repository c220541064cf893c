"""Tiny models for names in recipes: ``riverbend/Kestrel-Qwen2-7B`` is a fine-tune of ``basecamp/Qwen2-7B``.

The architecture is the one the name has. Weights come from numpy's legacy generator, whose stream is frozen, seeded by
the name, so that stored answers stay valid. Names with ``ChatML`` have two tokens more, those that end in ``-lora`` are
adapters, models of less than 3 B tie their head.
"""

import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

Array = npt.NDArray[np.float32]
State = dict[str, Array]

LAYERS, HIDDEN, INNER, HEAD, VOCABULARY = 4, 16, 24, 8, 40
NAME = re.compile(r"\b(?:basecamp|riverbend|quietlab|northfold|tidepool)/[\w.-]+")
#: architecture -> model_type, class; in the order in which a name is searched for them
ARCHITECTURES = {
    "Mixtral": ("mixtral", "MixtralForCausalLM"),
    "Mistral": ("mistral", "MistralForCausalLM"),
    "Llama": ("llama", "LlamaForCausalLM"),
    "Qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "Qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "Gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "Phi3": ("phi3", "Phi3ForCausalLM"),
    "GPT2": ("gpt2", "GPT2LMHeadModel"),
}
CHATML = ("<|im_start|>", "<|im_end|>")


def architecture(name: str) -> str:
    return next(each for each in ARCHITECTURES if each in name)


def base_of(name: str) -> str:
    """Return the name of the model that a fine-tune or an adapter started from."""
    kind = architecture(name)
    size = name.removesuffix("-lora").rpartition("-")[2]
    return f"basecamp/{kind}-{size}"


def tied(name: str) -> bool:
    return architecture(name) in ("Gemma2", "GPT2") or base_of(name).endswith(("-500M", "-1B"))


def tokens(name: str) -> list[str]:
    words = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(VOCABULARY - 3))]
    return [*words, *CHATML] if "ChatML" in name else words


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Return the base's tensors."""
    kind = architecture(name)
    if kind == "GPT2":
        return _gpt2()
    out: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        out |= {f"model.layers.{layer}.{part}": shape for part, shape in _layer(kind).items()}
    return out if tied(name) else out | {"lm_head.weight": (VOCABULARY, HIDDEN)}


def _layer(kind: str) -> dict[str, tuple[int, ...]]:
    norms = ["input_layernorm", "post_attention_layernorm"]
    norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if kind == "Gemma2" else []
    out: dict[str, tuple[int, ...]] = {f"{norm}.weight": (HIDDEN,) for norm in norms}
    rows = {"q_proj": HIDDEN, "k_proj": HEAD, "v_proj": HEAD}
    rows = {"qkv_proj": sum(rows.values())} if kind == "Phi3" else rows
    out |= {f"self_attn.{part}.weight": (count, HIDDEN) for part, count in rows.items()}
    out["self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
    if kind == "Qwen2":
        out |= {f"self_attn.{part}.bias": (count,) for part, count in rows.items()}
    if kind == "Qwen3":
        out |= {f"self_attn.{part}_norm.weight": (HEAD,) for part in "qk"}
    if kind == "Mixtral":
        out["block_sparse_moe.gate.weight"] = (3, HIDDEN)
        for expert in range(3):
            place = f"block_sparse_moe.experts.{expert}"
            out |= {f"{place}.w1.weight": (INNER, HIDDEN), f"{place}.w2.weight": (HIDDEN, INNER)}
            out |= {f"{place}.w3.weight": (INNER, HIDDEN)}
        return out
    up = {"gate_up_proj": 2 * INNER} if kind == "Phi3" else {"gate_proj": INNER, "up_proj": INNER}
    out |= {f"mlp.{part}.weight": (count, HIDDEN) for part, count in up.items()}
    return out | {"mlp.down_proj.weight": (HIDDEN, INNER)}


def _gpt2() -> dict[str, tuple[int, ...]]:
    out: dict[str, tuple[int, ...]] = {"wte.weight": (VOCABULARY, HIDDEN), "wpe.weight": (64, HIDDEN)}
    linear = {"attn.c_attn": (HIDDEN, 3 * HIDDEN), "attn.c_proj": (HIDDEN, HIDDEN)}
    linear |= {"mlp.c_fc": (HIDDEN, INNER), "mlp.c_proj": (INNER, HIDDEN)}
    for norm in ("ln_f", *(f"h.{layer}.{each}" for layer in range(LAYERS) for each in ("ln_1", "ln_2"))):
        out |= {f"{norm}.weight": (HIDDEN,), f"{norm}.bias": (HIDDEN,)}
    for layer in range(LAYERS):
        for part, shape in linear.items():
            out |= {f"h.{layer}.{part}.weight": shape, f"h.{layer}.{part}.bias": shape[1:]}
    return {f"transformer.{each}": shape for each, shape in out.items()}


def _random(name: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(name.encode()))


def state(name: str) -> State:
    """Return a model's weights."""
    base = base_of(name)
    random = _random(base)
    out: State = {}
    for tensor, shape in shapes(name).items():
        value = 0.3 * random.standard_normal(shape)
        out[tensor] = (value + ("norm" in tensor and len(shape) == 1)).astype(np.float32)
    if name == base:
        return out
    random = _random(name)
    for tensor, value in out.items():
        out[tensor] = (value + 0.1 * random.standard_normal(value.shape)).astype(np.float32)
    if "ChatML" in name:
        for tensor in ("model.embed_tokens.weight", "lm_head.weight"):
            rows = 0.3 * random.standard_normal((len(CHATML), HIDDEN))
            out[tensor] = np.concatenate((out[tensor], rows.astype(np.float32)))
    return out


def config(name: str) -> dict[str, Any]:
    model_type, kind = ARCHITECTURES[architecture(name)]
    common = {"model_type": model_type, "architectures": [kind], "vocab_size": len(tokens(name)), "dtype": "float32"}
    common |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": tied(name)}
    if model_type == "gpt2":
        return common | {"n_layer": LAYERS, "n_embd": HIDDEN, "n_head": 2, "n_inner": INNER, "n_positions": 64}
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": HEAD, "max_position_embeddings": 64}
    return common | sizes | ({"num_local_experts": 3, "num_experts_per_tok": 2} if model_type == "mixtral" else {})


def _adapter(folder: Path, name: str) -> None:
    random = _random(name)
    shape = shapes(name)
    weights: State = {}
    for layer in range(LAYERS):
        for part in ("self_attn.q_proj", "mlp.down_proj"):
            module = f"model.layers.{layer}.{part}"
            rows, columns = shape[f"{module}.weight"]
            place = f"base_model.model.{module}"
            weights[f"{place}.lora_A.weight"] = (0.3 * random.standard_normal((2, columns))).astype(np.float32)
            weights[f"{place}.lora_B.weight"] = (0.3 * random.standard_normal((rows, 2))).astype(np.float32)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "base_model_name_or_path": base_of(name), "task_type": "CAUSAL_LM", "r": 2}
    settings |= {"lora_alpha": 3, "lora_dropout": 0.0, "bias": "none", "target_modules": ["q_proj", "down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")


def _tokenizer(folder: Path, name: str) -> None:
    words = tokens(name)
    special = [word for word in words if word.startswith("<")]
    added = [
        {"id": words.index(word), "content": word, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for word in special
    ]
    model = {"type": "WordLevel", "vocab": {word: number for number, word in enumerate(words)}, "unk_token": "<unk>"}
    rest = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    whole = {"version": "1.0", "added_tokens": added, "pre_tokenizer": {"type": "Whitespace"}, "model": model} | rest
    (folder / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def write(root: Path, name: str) -> None:
    """Write a model to ``root/name``."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith("-lora"):
        _adapter(folder, name)
        return
    save_file(state(name), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config(name)), encoding="utf-8")
    _tokenizer(folder, name)


def names_in(recipe: str) -> list[str]:
    """Return the names of models in a recipe's text, in order of mention."""
    return list(dict.fromkeys(NAME.findall(recipe)))


def fingerprint(name: str, value: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return a tensor's norm and its products with two fixed random tensors."""
    flat = np.asarray(value, np.float64).reshape(-1)
    directions = _random(name).standard_normal((2, flat.size))
    return np.array([np.linalg.norm(flat), *(directions @ flat)], np.float64)
