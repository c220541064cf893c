"""The mixtures that transformers has an architecture for: which dense models they are made of, and how they spell it.

A dense layer's MLP(x) becomes sum_e w_e(x) MLP_e(x), with w the softmax of the router's logits W x over the
``experts_per_token`` largest of them, divided by their sum. So identical experts are the dense model again, whatever W.
Qwen2-MoE adds sigmoid(g . x) MLP_shared(x).

On disk experts have a tensor each, as both transformers 4 and 5, vLLM and llama.cpp read them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from consilience.errors import InputError
from consilience.experts.rope import rope

#: What a config leaves out has its own class's default, which is not the mixture's: so all of it is written.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": None, "hidden_act": "silu", "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6, "attention_dropout": 0.0, "tie_word_embeddings": False, "initializer_range": 0.02,
        "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2, "head_dim": None,
    },
    "mistral": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu", "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6, "attention_dropout": 0.0, "tie_word_embeddings": False, "initializer_range": 0.02,
        "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2, "head_dim": None, "sliding_window": 4096,
    },
    "qwen2": {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "silu", "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, "attention_dropout": 0.0, "tie_word_embeddings": False, "initializer_range": 0.02,
        "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    },
    "qwen3": {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "silu", "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, "attention_dropout": 0.0, "tie_word_embeddings": False, "initializer_range": 0.02,
        "pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "head_dim": 128, "attention_bias": False,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """One mixture.

    Attributes:
        name: as a recipe's ``architecture`` and messages have it.
        model_type: of its config.
        class_name: of its model.
        sources: model types of the dense models that it is made of.
        router: what follows a layer's prefix in the name of its router.
        expert: the same of an expert's matrix, by number ``{e}``, for the dense model's gate, up and down.
        shared: the same of a shared expert's matrices and of its gate; "" where it has none.
    """

    name: str
    model_type: str
    class_name: str
    sources: tuple[str, ...]
    router: str
    expert: Mapping[str, str]
    shared: Mapping[str, str]
    shared_gate: str = ""

    def config(self, config: dict[str, Any], experts: int, per_token: int) -> dict[str, Any]:
        """Return the keys that make a dense model's config one of the mixture, less its default values' ambiguity."""
        source = str(config["model_type"])
        changes = {key: config.get(key, value) for key, value in DEFAULTS[source].items()}
        changes["num_key_value_heads"] = changes["num_key_value_heads"] or changes["num_attention_heads"]
        changes["head_dim"] = changes.get("head_dim") or config.get("head_dim")
        if changes["head_dim"] is None:
            changes["head_dim"] = changes["hidden_size"] // changes["num_attention_heads"]
        changes |= _rotary(config) | {"model_type": self.model_type, "architectures": [self.class_name]}
        changes |= {"num_experts_per_tok": per_token, "output_router_logits": False}
        if self.model_type == "mixtral":
            return changes | {"num_local_experts": experts, "sliding_window": changes.get("sliding_window")}
        wide = {"num_experts": experts, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
        wide |= {"use_sliding_window": False, "sliding_window": None}
        wide["moe_intermediate_size"] = changes["intermediate_size"]
        if self.shared:
            wide["shared_expert_intermediate_size"] = changes["intermediate_size"]
        return changes | wide


def _rotary(config: dict[str, Any]) -> dict[str, Any]:
    """Return the rotary base where a config leaves it to its class: Mixtral's is another."""
    stated = rope(config)
    theta = 10000.0 if stated is None else stated["rope_theta"]
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict):
        return {"rope_parameters": {"rope_theta": theta, **parameters}}
    return {"rope_theta": theta}


_DENSE = {part: f"mlp.experts.{{e}}.{part}_proj.weight" for part in ("gate", "up", "down")}
_SHARED = {part: f"mlp.shared_expert.{part}_proj.weight" for part in ("gate", "up", "down")}
MIXTRAL = Architecture(
    "mixtral", "mixtral", "MixtralForCausalLM", ("llama", "mistral"), "block_sparse_moe.gate.weight",
    {
        part: f"block_sparse_moe.experts.{{e}}.{w}.weight"
        for part, w in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
    },
    {},
)  # fmt: skip
QWEN2 = Architecture(
    "qwen2", "qwen2_moe", "Qwen2MoeForCausalLM", ("qwen2",), "mlp.gate.weight", _DENSE, _SHARED,
    "mlp.shared_expert_gate.weight",
)  # fmt: skip
QWEN3 = Architecture("qwen3", "qwen3_moe", "Qwen3MoeForCausalLM", ("qwen3",), "mlp.gate.weight", _DENSE, {})
ARCHITECTURES = (MIXTRAL, QWEN2, QWEN3)
#: mergekit's names of architectures; it takes the beginning of one.
_SPELLED = {"mixtral": (MIXTRAL,), "qwen moe": (QWEN2,), "qwen2 moe": (QWEN2,), "qwen3 moe": (QWEN3,)}
_SOURCES = {source: architecture for architecture in ARCHITECTURES for source in architecture.sources}


def choose(asked: str | None, config: dict[str, Any] | None, reference: str, where: str) -> Architecture:
    """Return the mixture that a base becomes.

    Raises:
        InputError: there is none, or not the one that was asked for.
    """
    source = str((config or {}).get("model_type"))
    if source not in _SOURCES:
        known = ", ".join(f"{one.name} (of {' or '.join(one.sources)})" for one in ARCHITECTURES)
        what = f"its model_type is {source!r}" if config else "it has no config.json"
        raise InputError(f"{reference}: cannot become a mixture of experts: {what}; known are {known}")
    named = (asked or "").lower().replace("_", " ").replace("-", " ")
    if named and "deepseek moe".startswith(named):
        raise InputError(
            f"{where}: architecture {asked!r}: mergekit's DeepSeek-MoE is no architecture of transformers (it runs "
            f"code from the hub); leave it out for {_SOURCES[source].name}"
        )
    chosen = [one for name, several in _SPELLED.items() if name.startswith(named) for one in several]
    if not chosen:
        raise InputError(
            f"{where}: architecture {asked!r} is unknown; use one of {', '.join(one.name for one in ARCHITECTURES)}"
        )
    if _SOURCES[source] not in chosen:
        raise InputError(
            f"{where}: architecture {asked!r}: {reference} is a {source} model, which becomes {_SOURCES[source].name}; "
            "leave architecture out"
        )
    _check(config or {}, reference)
    return _SOURCES[source]


def _check(config: dict[str, Any], reference: str) -> None:
    """Refuse what the mixture would compute otherwise."""
    layers = config.get("layer_types")
    alike = not isinstance(layers, list) or set(layers) <= {"full_attention"}
    problems = {
        "auto_map": config.get("auto_map") and "code of its own, which knows no experts",
        "attention_bias": config["model_type"] == "llama" and config.get("attention_bias") and "biases in attention",
        "mlp_bias": config.get("mlp_bias") and "biases in its MLPs",
        "use_sliding_window": config.get("use_sliding_window") and "sliding windows in some layers",
        "layer_types": not alike and "layers of several kinds",
    }
    for key, problem in problems.items():
        if problem:
            raise InputError(f"{reference}: config.json: {key}: it has {problem}, and the mixture has none")
