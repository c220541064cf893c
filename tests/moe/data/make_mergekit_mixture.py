"""Record what mergekit-moe 0.1.5 makes of tiny models, for tests/moe/test_mergekit.py.

Run it by hand in an environment of its own that holds mergekit==0.1.5 (no test imports mergekit):

    python tests/moe/data/make_mergekit_mixture.py

Only outputs are stored; inputs come from numpy's legacy generator, whose stream is frozen. mergekit runs the base in
bfloat16, which would hide small differences; here it is made to take float32.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

OUT = Path(__file__).with_name("mergekit_0_1_5.npz")
#: A token is a letter, so that any class of tokenizer reads them alike.
TOKENS = ("<s>", "</s>", "<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz", "\u0120")
SIZES: dict[str, Any] = {
    "vocab_size": len(TOKENS), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64,
    "bos_token_id": 0, "eos_token_id": 1, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
#: Prompts of one length, for where mergekit pads, it takes padding into the mean of hidden_avg.
PROMPTS = {
    "math": (["add two plus two", "the sum of three"], ["the rose in moon"]),
    "poem": (["poem about roses", "moonlight and me"], []),
}
UNEQUAL = {"math": (["add two", "the sum of two plus two"], ["rose"]), "poem": (["a poem", "love and the moon"], [])}
SHARED = (["print code return"], [])
#: case -> kind of model, gate mode, prompts.
CASES = {
    "hidden": ("llama", "hidden", UNEQUAL),
    "hidden_last": ("llama", "hidden_last", UNEQUAL),
    "hidden_avg": ("llama", "hidden_avg", PROMPTS),
    "cheap_embed": ("llama", "cheap_embed", UNEQUAL),
    "qwen2": ("qwen2", "hidden_avg", PROMPTS),
    "qwen3": ("qwen3", "hidden_avg", PROMPTS),
}


def tensors(kind: str, seed: int) -> dict[str, Any]:
    """Return a dense model's tensors in float32."""
    random, h, i = np.random.RandomState(seed), SIZES["hidden_size"], SIZES["intermediate_size"]
    q, kv, d = SIZES["num_attention_heads"] * 4, SIZES["num_key_value_heads"] * 4, 4
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (len(TOKENS), h)}
    for n in range(SIZES["num_hidden_layers"]):
        own: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj.weight": (q, h), "self_attn.k_proj.weight": (kv, h), "self_attn.v_proj.weight": (kv, h),
            "self_attn.o_proj.weight": (h, q), "mlp.gate_proj.weight": (i, h), "mlp.up_proj.weight": (i, h),
            "mlp.down_proj.weight": (h, i), "input_layernorm.weight": (h,), "post_attention_layernorm.weight": (h,),
        }  # fmt: skip
        if kind == "qwen2":
            own |= {f"self_attn.{x}_proj.bias": (q if x == "q" else kv,) for x in "qkv"}
        if kind == "qwen3":
            own |= {f"self_attn.{x}_norm.weight": (d,) for x in "qk"}
        shapes |= {f"model.layers.{n}.{name}": shape for name, shape in own.items()}
    shapes |= {"model.norm.weight": (h,), "lm_head.weight": (len(TOKENS), h)}
    return {
        name: (0.4 * random.standard_normal(shape) + ("norm" in name)).astype(np.float32)
        for name, shape in shapes.items()
    }


def save(kind: str, folder: Path, seed: int) -> Path:
    """Write a dense model with its tokenizer."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True)
    save_file(tensors(kind, seed), folder / "model.safetensors", {"format": "pt"})
    config = SIZES | {"model_type": kind, "architectures": [CLASSES[kind]], "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    letters = Tokenizer(models.BPE({token: number for number, token in enumerate(TOKENS)}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=letters, **special)
    tokenizer.save_pretrained(folder)
    return folder


def recipe(case: str, folder: Path) -> dict[str, Any]:
    """Return a case's recipe, with its models written below ``folder``."""
    kind, mode, prompts = CASES[case]
    folders = {name: save(kind, folder / name, seed) for seed, name in enumerate(("base", *prompts))}

    def entry(name: str, own: tuple[list[str], list[str]]) -> dict[str, Any]:
        value: dict[str, Any] = {"source_model": str(folders[name]), "positive_prompts": own[0]}
        return value | ({"negative_prompts": own[1]} if own[1] else {})

    value: dict[str, Any] = {"base_model": str(folders["base"]), "gate_mode": mode, "dtype": "float32"}
    value["experts"] = [entry(name, own) for name, own in prompts.items()]
    # mergekit 0.1.5 opens a shared expert only where it is the base or an expert too.
    return value | ({"shared_experts": [entry("base", SHARED)]} if kind == "qwen2" else {})


def main() -> None:
    """Write the file."""
    import torch
    from mergekit.moe.config import MoEMergeConfig  # pyright: ignore
    from mergekit.options import MergeOptions  # pyright: ignore
    from mergekit.scripts.moe import build  # pyright: ignore
    from safetensors.numpy import load_file

    torch.bfloat16 = torch.float32  # pyright: ignore
    stored: dict[str, Any] = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            config = MoEMergeConfig.model_validate(recipe(case, Path(folder)))
            build(config, f"{folder}/out", MergeOptions(), device="cpu")
            for name, values in load_file(f"{folder}/out/model.safetensors").items():
                whole = case in ("hidden", "qwen2", "qwen3")  # of the others the routers alone are new
                if whole or "gate.weight" in name:
                    stored[f"{case}/{name}"] = values
    np.savez_compressed(OUT, **stored)


if __name__ == "__main__":
    main()
