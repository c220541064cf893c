"""Tiny random dense models of the kinds that mixtures are made of, on disk, with tokenizers."""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.tasks.tiny_models import make_tokenizer, shake

hf: Any = importlib.import_module("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 310, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 3, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
#: What each kind's config has beside the sizes: what a mixture could get wrong.
KINDS: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_theta": 5000.0, "rms_norm_eps": 1e-3, "head_dim": 16,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "mistral": {"sliding_window": 5},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
}  # fmt: skip
NAMES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
PROMPTS = {
    "math": (["the cat sat on the mat", "f(x) is x + 1", "one"], ["good"]),
    "code": (["def f(x): return x + 1 and more of it", "return"], []),
    "mood": (["is the sentiment positive or negative?"], ["cat", "the mat sat"]),
}


def tokenizer() -> Any:
    made = make_tokenizer()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made.backend_tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token="<s>"
    )


def save_dense(kind: str, folder: Path, seed: int, **changes: Any) -> Path:
    """Write a random model; what its config leaves to its class, its config.json leaves out."""
    config = getattr(hf, f"{NAMES[kind]}Config")(**SIZES | KINDS[kind] | changes)
    model = shake(getattr(hf, f"{NAMES[kind]}ForCausalLM")(config), seed)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    plain = json.loads(json.dumps(type(config)().to_dict()))
    kept = {"model_type", "architectures", "dtype", "transformers_version", "rope_parameters"}
    kept -= {"rope_parameters"} if written.get("rope_parameters") == plain["rope_parameters"] else set()
    lean = {key: value for key, value in written.items() if key in kept or plain.get(key, ...) != value}
    lean.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(lean))
    return folder


def write_recipe(path: Path, base: Path, experts: dict[str, Any], **more: Any) -> Path:
    """Write a mixture's recipe; ``experts`` are folders by name."""
    entries = [
        {"source_model": str(folder), "name": name, "positive_prompts": PROMPTS[name][0]}
        | ({"negative_prompts": PROMPTS[name][1]} if PROMPTS[name][1] else {})
        for name, folder in experts.items()
    ]
    value = {"base_model": str(base), "gate_mode": "mlp_input", "experts": entries} | more
    path.write_text(yaml.safe_dump(value, sort_keys=False))
    return path


def shared(folder: Path, **more: Any) -> dict[str, Any]:
    """Return what Qwen2-MoE needs beside: a shared expert."""
    return {"shared_experts": [{"source_model": str(folder), "positive_prompts": ["good bad yes no"]} | more]}


def ids(count: int = 2, length: int = 24) -> Any:
    import torch

    return torch.from_numpy(np.random.RandomState(5).randint(4, 300, (count, length)))


def load(folder: Path) -> Any:
    """Load a model in float64, in which all but a router's weights are computed."""
    import torch

    # The other implementations of experts know no float64.
    settings: dict[str, Any] = {"dtype": torch.float64, "experts_implementation": "eager", "output_loading_info": True}
    model, report = hf.AutoModelForCausalLM.from_pretrained(folder, **settings)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def logits(folder: Path) -> Any:
    """Return a model's logits [B, T, V]."""
    import torch

    with torch.no_grad():
        return load(folder)(ids()).logits
