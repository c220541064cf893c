"""What config.json says of single layers, for an output whose layers are other models' in another order."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from consilience.errors import InputError
from consilience.experts.layers import LayerStack

Config = dict[str, Any]
#: Lists of a value per layer.
_PER_LAYER = frozenset({
    "layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type", "block_types", "attention_layers",
    "activation_sparsity_pattern", "num_query_heads", "num_kv_heads", "ffn_multipliers", "block_configs",
    "sliding_window_layers", "layer_norms", "moe_layer_freq", "mlp_only",
})  # fmt: skip
#: Lists of layers' numbers.
_NUMBERS = frozenset({
    "mlp_only_layers", "moe_layers", "cross_attention_layers", "full_attn_idxs", "attn_layer_indices",
    "hybrid_layer_ids", "attention_layers_idx", "deepstack_visual_indexes", "fullatt_block_indexes",
})  # fmt: skip
#: Lists that are never a value per layer, however long they are.
_OTHER_LISTS = frozenset({
    "architectures", "eos_token_id", "bos_token_id", "pad_token_id", "mrope_section", "image_size", "patch_size",
    "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "image_grid_pinpoints", "forced_decoder_ids",
    "time_step_limit", "keys_to_ignore_at_inference",
})  # fmt: skip
#: A list under another name is taken for a value per layer if it is as long as the layers, and these are so many.
_NO_COINCIDENCE = 8
#: Keys by which a model finds out from a layer's number what kind it is, and the value with which it does not; unless
#: config.json has the list beside it.
_PATTERNS: dict[str, tuple[Any, str]] = {
    "sliding_window_pattern": (1, "layer_types"), "_sliding_window_pattern": (1, "layer_types"),
    "global_attn_every_n_layers": (1, "layer_types"), "full_attention_interval": (1, "layer_types"),
    "no_rope_layer_interval": (1, "no_rope_layers"), "interleave_moe_layer_step": (1, "moe_layers"),
    "first_k_dense_replace": (0, "mlp_layer_types"), "decoder_sparse_step": (1, "mlp_layer_types"),
    "attn_layer_period": (1, "layers_block_type"), "expert_layer_period": (1, "layers_block_type"),
    "moe_every_n_layers": (1, "mlp_layer_types"), "cross_attention_freq": (1, ""),
    "scale_attn_by_inverse_layer_idx": (False, ""),
    "max_window_layers": (None, "layer_types"),
}  # fmt: skip
#: Model types that do so without a key, and the list that spells it out.
_BUILT_IN = {
    "gemma2": "layer_types", "gemma3_text": "layer_types", "gemma3": "layer_types", "cohere2": "layer_types",
    "gpt_oss": "layer_types", "smollm3": "no_rope_layers", "llama4_text": "no_rope_layers", "olmo3": "layer_types",
    "exaone4": "layer_types", "modernbert": "layer_types",
}  # fmt: skip


@dataclass(frozen=True)
class SourceLayer:
    """A layer of a model: its config.json, the layer's number, and the stack that it is of."""

    name: str
    config: Mapping[str, Any]
    number: int
    stack: LayerStack

    @property
    def values(self) -> Mapping[str, Any]:
        """The part of the config that describes the stack."""
        return cast(Mapping[str, Any], self.config.get(self.stack.part, {})) if self.stack.part else self.config


def restacked(config: Config, stack: LayerStack, layers: Sequence[SourceLayer]) -> Config:
    """Return a config with as many layers as are given, and of every list with a value per layer theirs.

    Args:
        config: of the model with the given ``stack``.
        stack: the stack of it that is replaced.
        layers: what every layer of the output is taken from.
    """
    found = copy.deepcopy(config)
    part = found if not stack.part else cast(Config, found.get(stack.part, {}))
    for key, value in part.items():
        if key in stack.keys:
            part[key] = len(layers)
        elif is_per_layer(key, value, stack.count):
            values = [_value(key, layer) for layer in layers]
            part[key] = "".join(values) if isinstance(value, str) else values
        elif key in _NUMBERS and isinstance(value, list):
            part[key] = [i for i, layer in enumerate(layers) if layer.number in _numbers(layer.values.get(key))]
    return found


def as_in(config: Config, output: Config, stack: LayerStack, count: int) -> Config:
    """Return a config with all that it says of layers as the output's, which has ``count`` of them, says it."""
    source = cast(Config, output.get(stack.part, {})) if stack.part else output
    inside = config.get(stack.part) if stack.part else config
    if not isinstance(inside, dict):
        return config
    own = cast(Config, inside)
    said = {
        key: value for key, value in source.items()
        if key in own and (key in stack.keys or key in _NUMBERS or is_per_layer(key, value, count))
    }  # fmt: skip
    return config | {stack.part: own | said} if stack.part else config | said


def is_per_layer(key: str, value: Any, count: int) -> bool:
    """Return whether a key of a config of ``count`` layers has a value for each of them."""
    if key == "hybrid_override_pattern":
        return isinstance(value, str) and len(value) == count
    if not isinstance(value, list) or len(cast(list[Any], value)) != count or key in _NUMBERS | _OTHER_LISTS:
        return False
    return key in _PER_LAYER or "layer" in key or count >= _NO_COINCIDENCE


def _numbers(value: Any) -> list[Any]:
    return cast(list[Any], value) if isinstance(value, list) else []


def _value(key: str, layer: SourceLayer) -> Any:
    value = layer.values.get(key)
    if not isinstance(value, list | str) or len(cast(list[Any], value)) != layer.stack.count:
        raise InputError(
            f"config.json of {layer.name} has no {key} of one value per layer, as that of the output has; write the "
            f"output's as config: {{{key}: [...]}}"
        )
    return value[layer.number]


def check_patterns(layers: Sequence[SourceLayer], chosen: Mapping[str, Any]) -> None:
    """Refuse layers under other numbers than their own where a model tells from the number what kind a layer is.

    Raises:
        InputError: names the key of config.json, and the list to write instead.
    """
    for number, layer in enumerate(layers):
        if layer.number == number:
            continue
        values = layer.values
        for key, (harmless, written) in _PATTERNS.items():
            given = values.get(key, harmless)
            known = written in values or written in chosen or key in chosen
            unused = key == "max_window_layers" and not values.get("use_sliding_window")
            if given not in (None, harmless, False) and not known and not unused:
                raise _by_number(layer, number, f"{key} {given}", written or key)
        written = _BUILT_IN.get(str(values.get("model_type")), "")
        if written and written not in values and written not in chosen:
            raise _by_number(layer, number, f"model_type {values['model_type']}", written)


def _by_number(layer: SourceLayer, number: int, what: str, written: str) -> InputError:
    return InputError(
        f"{layer.name}: its config.json ({what}) tells from a layer's number what kind it is, and its layer "
        f"{layer.number} would be number {number}; write what the layers are as config: {{{written}: [...]}}"
    )
