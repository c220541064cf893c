"""What is compared between a base and its experts, besides weights: one table of facts, read from files alone.

A fact whose difference changes what the model computes is a *warning*, and the recipe's ``config`` chooses it; the rest
are *notes*. What is in no row is compared all the same: a further key of config.json that two models set differently
is the fact ``computation``, unless it is in ``IGNORED``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from consilience.experts import rope
from consilience.experts.config_parts import is_part, language_part, nested_like
from consilience.experts.model_files import PROCESSOR_FILES, SPECIAL_IDS, ModelFiles, special_ids
from consilience.experts.ties import SCALED_OUTPUTS, scales_outputs
from consilience.experts.vocabulary import Vocabulary

Level = Literal["error", "warning", "note"]
#: Values by key; a key that one model leaves out is not compared, unless its fact says what holds then.
Values = Mapping[str, Any]
#: Returns the values of an expert and of the base that differ, by key; None stands for a value left out.
Comparison = Callable[[ModelFiles, ModelFiles], dict[str, tuple[Any, Any]]]

#: Keys of config.json that say nothing about what a model computes, or that follow from tensors.
IGNORED = frozenset([
    "_name_or_path", "_commit_hash", "transformers_version", "torch_dtype", "dtype", "use_cache",
    "architectures", "return_dict", "output_attentions", "output_hidden_states", "output_router_logits",
    "problem_type", "torchscript", "finetuning_task", "task_specific_params", "pretraining_tp",
    "gradient_checkpointing", "quantization_config", "compression_config", "auto_map", "vocab_size",
    "tie_word_embeddings", "tie_encoder_decoder", "unsloth_version", "unsloth_fixed", "_attn_implementation",
    "_attn_implementation_autoset", "attn_implementation", "chunk_size_feed_forward", "is_composition",
    "model_name", "license", "prefix", "use_flash_attn", "_flash_attn_2_enabled", "router_aux_loss_coef",
    "router_jitter_noise", "apply_spec_augment", "ctc_loss_reduction", "ctc_zero_infinity", "generation_config",
    "summary_type", "_from_model_config", "_experts_implementation", "_experts_implementation_autoset",
    "_output_attentions", "use_bfloat16", "pruned_heads", "tokenizer_class", "processor_class",
    "mamba_ssm_dtype",
])  # fmt: skip
#: Parts of such keys: what acts in training alone.
_TRAINING = ("dropout", "drop_path", "layerdrop", "initializer", "init_std", "mask_time", "mask_feature", "_pdrop")
CONTEXT = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len", "seq_length",
    "max_source_positions", "max_target_positions", "model_max_length",
)  # fmt: skip
EPSILON = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps", "layernorm_epsilon")
ACTIVATION = (
    "hidden_act", "hidden_activation", "activation_function", "activation", "activation_fn", "dense_act_fn",
    "feed_forward_proj", "is_gated_act",
)  # fmt: skip
WINDOW = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "attention_chunk_size")
HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim", "n_head", "num_heads", "d_kv")
SCALING = (
    "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "attention_multiplier", "logit_scale",
    "residual_multiplier", "embedding_multiplier", "logits_scaling", "scale_attn_weights", "scale_embedding",
    "scale_attn_by_inverse_layer_idx", "attn_scale", "scale_depth", "scale_emb", SCALED_OUTPUTS,
)  # fmt: skip
LABELS = ("id2label", "label2id", "num_labels")
#: Names of one function: the classes of transformers compute the same, but for rounding.
_SAME_ACTIVATION = {
    "swish": "silu", "gelu_python": "gelu", "gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh",
    "gelu_pytorch": "gelu",
}  # fmt: skip
#: Values that say what a key that is left out says.
_GENERATION_DEFAULTS: dict[str, Any] = {
    "temperature": 1.0, "top_p": 1.0, "top_k": 50, "typical_p": 1.0, "repetition_penalty": 1.0, "length_penalty": 1.0,
    "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "max_length": 20, "min_length": 0,
    "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
}  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """A row of the table.

    Attributes:
        kind: its short name.
        title: what it is, in words.
        files: where it is read.
        keys: keys that a user knows it by.
        level: what a difference is: a "warning" changes what the model computes.
        option: the recipe's key that chooses whose counts.
        compare: returns what differs.
    """

    kind: str
    title: str
    files: str
    keys: str
    level: Level
    option: str
    compare: Comparison


def _configs(own: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Return (prefix, expert's, base's) of a config and of the configs inside; a text model meets a language tower."""
    if not own or not other:
        return []
    own, other = nested_like(own, other), nested_like(other, own)
    inner = language_part(own), language_part(other)
    if inner[0] is None and inner[1] is not None:
        other = other[inner[1]]
    elif inner[1] is None and inner[0] is not None:
        own = own[inner[0]]
    found = [("", own, other)]
    for key in own.keys() & other.keys():
        if isinstance(own[key], dict) and isinstance(other[key], dict) and is_part(key):
            found += [(f"{key}.{inner}", a, b) for inner, a, b in _configs(own[key], other[key])]
    return sorted(found, key=lambda entry: entry[0])


def _plain(key: str, value: Any) -> Any:
    """Return a value in the one spelling that all that mean it share."""
    if key in ACTIVATION and isinstance(value, str):
        return _SAME_ACTIVATION.get(value.lower(), value.lower())
    return value


def _differing(own: Values, other: Values, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    return {
        prefix + key: (own.get(key), other.get(key))
        for key in dict.fromkeys([*own, *other])
        if not _equal(own.get(key), other.get(key))
    }


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, float) or isinstance(other, float):
        numbers = [value for value in (one, other) if isinstance(value, int | float)]
        return len(numbers) == 2 and abs(numbers[0] - numbers[1]) <= 1e-9 * max(abs(numbers[0]), abs(numbers[1]))
    if isinstance(one, list) and isinstance(other, list):
        first, second = cast(list[Any], one), cast(list[Any], other)
        return len(first) == len(second) and all(map(_equal, first, second))
    return one == other


def _both(*keys: str) -> Comparison:
    """Compare keys of config.json that both models set."""

    def compare(own: ModelFiles, other: ModelFiles) -> dict[str, tuple[Any, Any]]:
        found: dict[str, tuple[Any, Any]] = {}
        for prefix, a, b in _configs(own.config, other.config):
            held = [key for key in keys if a.get(key) is not None and b.get(key) is not None]
            kept = [{key: _plain(key, _legacy(config, key)) for key in held} for config in (a, b)]
            found |= _differing(kept[0], kept[1], prefix)
        return found

    return compare


def _legacy(config: dict[str, Any], key: str) -> Any:
    """Return a key's value; the first Gemma's ``gelu`` always meant the tanh approximation."""
    value = config[key]
    legacy = config.get("model_type") == "gemma" and (key, value) == ("hidden_act", "gelu")
    return "gelu_pytorch_tanh" if legacy else value


def _rope(own: ModelFiles, other: ModelFiles) -> dict[str, tuple[Any, Any]]:
    found: dict[str, tuple[Any, Any]] = {}
    for prefix, a, b in _configs(own.config, other.config):
        sides = rope.rope(a), rope.rope(b)
        if sides[0] is None and sides[1] is None:
            continue
        plain = {"rope_scaling": {"rope_type": "default"}}  # what its class takes
        filled = [rope.rope(c | plain) or {} if s is None else s for s, c in zip(sides, (a, b), strict=True)]
        first, second = (_layered(side, filled) for side in filled)
        found |= _differing(first, second, prefix)
    return found


def _layered(values: Values, sides: list[Any]) -> Values:
    """Return values by kind of layer where the other side has them so."""
    layers = sorted({key.rpartition(".")[0] for side in sides for key in side if "." in key})
    if not layers or any("." in key for key in values):
        return values
    return {f"{layer}.{key}": value for layer in layers for key, value in values.items()}


def _scaling(own: ModelFiles, other: ModelFiles) -> dict[str, tuple[Any, Any]]:
    found = _both(*SCALING)(own, other)
    for prefix, a, b in _configs(own.config, other.config):
        scaled = [{SCALED_OUTPUTS: scales_outputs(config)} for config in (a, b)]
        found |= _differing(scaled[0], scaled[1], prefix) if a.get("model_type") == b.get("model_type") else {}
    return found


def _window(own: ModelFiles, other: ModelFiles) -> dict[str, tuple[Any, Any]]:
    found: dict[str, tuple[Any, Any]] = {}
    for prefix, a, b in _configs(own.config, other.config):
        first, second = _windows(a), _windows(b)
        if "layer_types" not in a or "layer_types" not in b:  # older configs leave the pattern to the class
            first, second = ({k: v for k, v in side.items() if k != "layer_types"} for side in (first, second))
        found |= _differing(first, second, prefix)
    return found


def _windows(config: dict[str, Any]) -> dict[str, Any]:
    layers: Any = config.get("layer_types")
    uniform = isinstance(layers, list) and set(map(str, cast(list[Any], layers))) <= {"full_attention"}
    window = None if uniform or config.get("use_sliding_window") is False else config.get("sliding_window")
    found: dict[str, Any] = {"sliding_window": window, "attention_chunk_size": config.get("attention_chunk_size")}
    return found | {"layer_types": None if uniform else layers}


def _heads(own: ModelFiles, other: ModelFiles) -> dict[str, tuple[Any, Any]]:
    found: dict[str, tuple[Any, Any]] = {}
    for prefix, a, b in _configs(own.config, other.config):
        found |= _differing(_head_counts(a, b), _head_counts(b, a), prefix)
    return found


def _head_counts(config: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of heads, those that follow from others filled in where the other config has them."""
    found = {key: config[key] for key in HEADS if isinstance(config.get(key), int)}
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    if isinstance(heads, int) and heads > 0:
        derived = {"num_key_value_heads": heads} | ({"head_dim": width // heads} if isinstance(width, int) else {})
        found = derived | found
    filled = ("num_key_value_heads", "head_dim")
    return {key: value for key, value in found.items() if isinstance(other.get(key), int) or key in filled}


_NAMED = frozenset([
    *CONTEXT, *EPSILON, *ACTIVATION, *WINDOW, *HEADS, *SCALING, *SPECIAL_IDS, *LABELS, *rope.KEYS, "model_type",
])  # fmt: skip


def _further(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in config.items()
        if key not in IGNORED | _NAMED and not any(part in key for part in _TRAINING) and not is_part(key)
    }


def _computation(own: ModelFiles, other: ModelFiles) -> dict[str, tuple[Any, Any]]:
    found: dict[str, tuple[Any, Any]] = {}
    for prefix, a, b in _configs(own.config, other.config):
        first, second = _further(a), _further(b)
        shared = [key for key in first.keys() & second.keys() if first[key] is not None and second[key] is not None]
        found |= _differing({key: first[key] for key in shared}, {key: second[key] for key in shared}, prefix)
    return found


def _one_sided(own: ModelFiles, other: ModelFiles) -> dict[str, tuple[Any, Any]]:
    """Return keys that one config sets and the other leaves to its class, which need not mean the same."""
    compared = frozenset([*rope.KEYS, *WINDOW, *HEADS, *SPECIAL_IDS, SCALED_OUTPUTS])
    found: dict[str, tuple[Any, Any]] = {}
    for prefix, a, b in _configs(own.config, other.config):
        named = [_further(c) | {key: c[key] for key in (_NAMED - compared) & c.keys()} for c in (a, b)]
        sides = [{key: value for key, value in side.items() if value not in (None, False)} for side in named]
        alone = {key for key in sides[0].keys() ^ sides[1].keys() if key not in a or key not in b}
        found |= {prefix + key: (sides[0].get(key), sides[1].get(key)) for key in sorted(alone)}
    return found


def _special_ids(own: ModelFiles, other: ModelFiles) -> dict[str, tuple[Any, Any]]:
    if not own.config and not own.generation:
        return {}
    return _differing(special_ids(own), special_ids(other))


def _generation(own: ModelFiles, other: ModelFiles) -> dict[str, tuple[Any, Any]]:
    if not own.config:
        return {}
    sides = [
        {
            key: value
            for key, value in side.items()
            if key not in (*IGNORED, *SPECIAL_IDS) and value not in (None, False, _GENERATION_DEFAULTS.get(key))
        }
        for side in (own.generation, other.generation)
    ]
    return _differing(sides[0], sides[1])


def _vocabularies(own: ModelFiles, other: ModelFiles) -> tuple[Vocabulary | None, Vocabulary | None]:
    """Return both models' tokenizers, where there is anything to compare."""
    return (None, None) if own.same_tokenizer(other) else (own.vocabulary, other.vocabulary)


def _vocabulary(own: ModelFiles, other: ModelFiles) -> dict[str, tuple[Any, Any]]:
    mine, theirs = _vocabularies(own, other)
    if mine is None or theirs is None:
        return {}
    if mine.kind == theirs.kind and mine.kind:
        first, second = mine.tokens, theirs.tokens
    else:  # ids of unlike files may be counted differently; those of added tokens are written out
        first, second = ({i: v.tokens[i] for i in v.added if i in v.tokens} for v in (mine, theirs))
    pairs = {i: (first.get(i), second.get(i)) for i in sorted(first.keys() | second.keys())}
    return {str(i): (own_token, its_token) for i, (own_token, its_token) in pairs.items() if own_token != its_token}


def _cutting(own: ModelFiles, other: ModelFiles) -> dict[str, tuple[Any, Any]]:
    mine, theirs = _vocabularies(own, other)
    if mine is None or theirs is None or mine.kind != theirs.kind or mine.cutting == theirs.cutting:
        return {}
    return {mine.kind or "files": ("other rules", "its own")}


def _roles(own: ModelFiles, other: ModelFiles) -> dict[str, tuple[Any, Any]]:
    mine, theirs = _vocabularies(own, other)
    return {} if mine is None or theirs is None else _differing(mine.roles, theirs.roles)


def _template(own: ModelFiles, other: ModelFiles) -> dict[str, tuple[Any, Any]]:
    mine, theirs = own.templates, other.templates
    if mine is None or (not mine and not theirs) or (theirs is None and not mine):
        return {}
    return _differing(mine, theirs or {})


def _processor(own: ModelFiles, other: ModelFiles) -> dict[str, tuple[Any, Any]]:
    mine, theirs = own.processor, other.processor
    shared = [key for key in mine.keys() & theirs.keys() if mine[key] is not None and theirs[key] is not None]
    sides = [{key: _size(side[key]) for key in shared} for side in (mine, theirs)]
    if isinstance(sides[0].get("size"), int) != isinstance(sides[1].get("size"), int):
        sides = [{**side, "size": _edge(side["size"])} for side in sides]
    return _differing(sides[0], sides[1])


def _size(value: Any) -> Any:
    """Return a square's one edge: older files write 224 for {height: 224, width: 224}."""
    edges = set(cast(dict[str, Any], value).values()) if isinstance(value, dict) else set[Any]()
    square = isinstance(value, dict) and set(cast(dict[str, Any], value)) == {"height", "width"} and len(edges) == 1
    return next(iter(edges)) if square else value


def _edge(value: Any) -> Any:
    """Return the one edge of a size beside which the other file has a number alone."""
    return cast(dict[str, Any], value).get("shortest_edge", value) if isinstance(value, dict) else value


def _of_config(kind: str, title: str, keys: Sequence[str], compare: Comparison | None = None) -> Fact:
    """Return a fact of config.json that changes what the model computes."""
    return Fact(kind, title, "config.json", ", ".join(keys), "warning", "config", compare or _both(*keys))


_TEMPLATES = "chat_template.jinja, chat_template.json, tokenizer_config.json, additional_chat_templates"
_TOKENS = "tokenizer.json, else vocab.json, vocab.txt, *.model, *.tiktoken; tokenizer_config.json, added_tokens.json"
_EVERY = "every further key that both set, but for those of training, storage and bookkeeping"
_PROCESSING = "every key that both set: size, image_mean, image_std, sampling_rate, ..."
_ROLES = "eos_token, bos_token, pad_token, add_bos_token, ..."
#: The table. Order is that of messages.
FACTS: tuple[Fact, ...] = (
    _of_config("architecture", "architecture", ["model_type"]),
    _of_config("rope", "rope", rope.KEYS, _rope),
    _of_config("context", "context length", CONTEXT),
    _of_config("eps", "norm epsilon", EPSILON),
    _of_config("activation", "activation", ACTIVATION),
    _of_config("window", "sliding window", WINDOW, _window),
    _of_config("heads", "attention heads", HEADS, _heads),
    _of_config("scaling", "scaling of attention, logits or embeddings", SCALING, _scaling),
    _of_config("computation", "config", [_EVERY], _computation),
    Fact("preprocessor", "preprocessor", ", ".join(PROCESSOR_FILES), _PROCESSING, "warning", "config", _processor),
    Fact("class", "class", "config.json", "architectures", "note", "", _both("architectures")),
    Fact("one-sided", "config", "config.json", "keys that only one sets", "note", "config", _one_sided),
    Fact("labels", "labels", "config.json", ", ".join(LABELS), "note", "config", _both(*LABELS)),
    Fact("generation", "generation config", "generation_config.json", "all but ids", "note", "config", _generation),
    Fact("vocabulary", "tokens", _TOKENS, "token by id", "note", "tokenizer", _vocabulary),
    Fact("tokenizer", "tokenizer", _TOKENS, "merges, normaliser, scores, ...", "note", "tokenizer", _cutting),
    Fact("roles", "special tokens", "tokenizer_config.json", _ROLES, "note", "tokenizer", _roles),
    Fact("token-ids", "special token ids", "generation_config.json, else config.json", ", ".join(SPECIAL_IDS), "note",
         "tokenizer", _special_ids),
    Fact("chat-template", "chat template", _TEMPLATES, "text by name", "note", "chat_template", _template),
)  # fmt: skip
