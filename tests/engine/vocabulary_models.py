"""Tiny Llama folders whose vocabularies differ, of numpy's frozen generator: for tests and for mergekit's answers."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from safetensors.numpy import save_file

ROLES = ["<unk>", "<s>", "</s>"]
#: name -> words in the order of their ids, added tokens, rows. The base and x have rows without a token.
VOCABULARIES: dict[str, tuple[list[str], list[str], int]] = {
    "base": ([*ROLES, *"abcdefghij"], [], 24),
    "x": ([*ROLES, *"abcdefghij"], ["<|x|>", "<|both|>"], 24),
    "y": ([*ROLES, *"jihgfedkl"], ["<|y|>", "<|both|>"], 14),
}
WIDTH, INNER = 16, 24


def tokenizer(words: list[str], added: list[str]) -> Any:
    """Return a tokenizer of words, and of tokens added to it."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([*ROLES, *(tokenizers.AddedToken(token, special=True) for token in added)])
    return made


def save_tokenizer(folder: Path, words: list[str], added: list[str], **settings: Any) -> None:
    """Write a folder's tokenizer files."""
    tokenizer(words, added).save(str(folder / "tokenizer.json"))
    roles = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    text = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | roles | settings)
    (folder / "tokenizer_config.json").write_text(text)


def weights(seed: int, rows: int, *, tied: bool = False) -> dict[str, Any]:
    """Return a model's tensors in float32."""
    random = np.random.RandomState(seed)
    layer = "model.layers.0"
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (rows, WIDTH),
        **{f"{layer}.self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"},
        f"{layer}.mlp.gate_proj.weight": (INNER, WIDTH),
        f"{layer}.mlp.up_proj.weight": (INNER, WIDTH),
        f"{layer}.mlp.down_proj.weight": (WIDTH, INNER),
        f"{layer}.input_layernorm.weight": (WIDTH,),
        f"{layer}.post_attention_layernorm.weight": (WIDTH,),
        "model.norm.weight": (WIDTH,),
        **({} if tied else {"lm_head.weight": (rows, WIDTH)}),
    }
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def save(folder: Path, state: dict[str, Any], *, tied: bool = False, **config: Any) -> Path:
    """Write a model's weights and config."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    values = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": INNER,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "vocab_size": len(state["model.embed_tokens.weight"]), "tie_word_embeddings": tied, "bos_token_id": 1,
        "eos_token_id": 2, "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values | config))
    return folder


def models(root: Path, *, tied: bool = False) -> dict[str, Path]:
    """Write all models of ``VOCABULARIES``."""
    found: dict[str, Path] = {}
    for seed, (name, (words, added, rows)) in enumerate(VOCABULARIES.items()):
        found[name] = save(root / name, weights(20261201 + seed, rows, tied=tied), tied=tied)
        save_tokenizer(found[name], words, added)
    return found


def checksum() -> str:
    """Return a digest of all weights."""
    whole = hashlib.sha256()
    for seed, (_, _, rows) in enumerate(VOCABULARIES.values()):
        for array in weights(20261201 + seed, rows).values():
            whole.update(array.tobytes())
    return whole.hexdigest()


def ids(folder: Path) -> dict[str, int]:
    """Return id by token of a folder's tokenizer, as its library reads it."""
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True)
