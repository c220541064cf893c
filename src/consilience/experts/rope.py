"""Rotary position embeddings as a config states them, in either spelling.

Older configs have ``rope_theta``, ``rope_scaling`` and ``partial_rotary_factor`` (or ``rotary_pct``,
``rotary_emb_base``, ``rope_local_base_freq``, ...) beside the other keys; transformers 5 writes one mapping,
``rope_parameters``, by kind of layer where these differ.
"""

from typing import Any, cast

#: Keys that older configs spell: by the name that ``rope_parameters`` has for them.
_OLD = {
    "rope_theta": "rope_theta", "rotary_emb_base": "rope_theta", "global_rope_theta": "rope_theta",
    "partial_rotary_factor": "partial_rotary_factor", "rotary_pct": "partial_rotary_factor",
}  # fmt: skip
#: Bases of the local layers, beside those above for the global ones.
_LOCAL = ("rope_local_base_freq", "local_rope_theta")
KEYS = (*_OLD, *_LOCAL, "rope_scaling", "rope_parameters", "original_max_position_embeddings")
#: What holds where a config that has rotary embeddings leaves a value out, as the classes of transformers have it.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "": {"rope_theta": 10000.0, "partial_rotary_factor": 1.0, "rope_type": "default"},
    "gpt_neox": {"partial_rotary_factor": 0.25},
    "gemma3": {"rope_theta": 1e6}, "gemma3_text": {"rope_theta": 1e6}, "modernbert": {"rope_theta": 160000.0},
    "qwen2_vl": {"rope_theta": 1e6}, "qwen2_5_vl": {"rope_theta": 1e6}, "mixtral": {"rope_theta": 1e6},
}  # fmt: skip
_TYPES = {"su": "longrope", "mrope": "default", "axial": "default"}  # the last two: positions have several axes


def _mapping(value: Any) -> dict[str, Any]:
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}


def _by_layer(parameters: dict[str, Any]) -> bool:
    return bool(parameters) and all(isinstance(value, dict | None) for value in parameters.values())


def rope(config: dict[str, Any]) -> dict[str, Any] | None:
    """Return what a config says of its rotary embeddings in one spelling, None where it says nothing.

    By ``rope_theta``, ``rope_type``, ``factor``, ...; keys start with ``full_attention.`` or ``sliding_attention.``
    where layers differ.
    """
    if not any(config.get(key) is not None for key in KEYS[:-1]):
        return None
    defaults = _DEFAULTS[""] | _DEFAULTS.get(str(config.get("model_type")), {})
    old = {new: config[key] for key, new in _OLD.items() if config.get(key) is not None}
    parameters = _mapping(config.get("rope_parameters"))
    scaling = _mapping(config.get("rope_scaling"))
    local = next((config[key] for key in _LOCAL if config.get(key) is not None), None)
    if _by_layer(parameters):
        layers = {name: defaults | old | _mapping(value) for name, value in parameters.items()}
    elif local is not None or str(config.get("model_type")).startswith("gemma3"):
        plain = {"rope_theta": 10000.0 if local is None else local, "rope_type": "default"}
        layers = {
            "full_attention": defaults | old | (parameters or scaling), "sliding_attention": defaults | old | plain
        }  # fmt: skip
    else:
        # transformers takes rope_scaling before rope_parameters, and rope_theta from outside where neither has it.
        layers = {"": defaults | old | (scaling or parameters)}
    outside = config.get("original_max_position_embeddings")
    found: dict[str, Any] = {}
    for layer, values in layers.items():
        for key, value in _plain(values, outside, config.get("max_position_embeddings")).items():
            found[f"{layer}.{key}" if layer else key] = value
    return found


def _plain(values: dict[str, Any], original: Any, context: Any) -> dict[str, Any]:
    kind = values.get("type", values["rope_type"]) if values["rope_type"] == "default" else values["rope_type"]
    kind = _TYPES.get(str(kind), kind)
    kept = {key: value for key, value in values.items() if key not in ("type", "rope_type") and value is not None}
    if kind == "default":  # no scaling: its numbers have no effect
        kept = {
            key: value for key, value in kept.items() if key in ("rope_theta", "partial_rotary_factor", "mrope_section")
        }
    elif kind in ("llama3", "yarn", "longrope"):
        kept["original_max_position_embeddings"] = original or kept.get("original_max_position_embeddings", context)
    return {"rope_type": kind, **kept}


def spellings(key: str) -> tuple[str, ...]:
    """Return the keys of a config that may set a value that ``rope`` has returned by this key."""
    old = [spelling for spelling, name in _OLD.items() if name == key] + list(_LOCAL if key == "rope_theta" else ())
    return (*(old or ("rope_scaling", "original_max_position_embeddings")), "rope_parameters")


def spelled_like(changes: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return changes of a config with rotary keys as ``config`` spells them: of two spellings one has no effect."""
    parameters = _mapping(config.get("rope_parameters"))
    rotary = {key: value for key, value in changes.items() if key in (*_OLD, *_LOCAL, "rope_scaling")}
    if not parameters or not rotary or "rope_parameters" in changes:
        return changes
    own = {_OLD[key]: value for key, value in rotary.items() if key in _OLD}
    local = next((value for key, value in rotary.items() if key in _LOCAL), None)
    scaling = _mapping(rotary.get("rope_scaling"))
    if "type" in scaling:
        scaling = {("rope_type" if key == "type" else key): value for key, value in scaling.items()}
    if _by_layer(parameters):
        parameters = {name: dict(_mapping(value)) for name, value in parameters.items()}
        parameters["full_attention"] = _scaled(parameters.get("full_attention", {}), rotary, scaling) | own
        if local is not None:
            parameters["sliding_attention"] = parameters.get("sliding_attention", {}) | {"rope_theta": local}
    else:
        parameters = _scaled(parameters, rotary, scaling) | own
    return {key: value for key, value in changes.items() if key not in rotary} | {"rope_parameters": parameters}


def _scaled(values: dict[str, Any], rotary: dict[str, Any], scaling: dict[str, Any]) -> dict[str, Any]:
    """Return values with another scaling, where one (or none) is asked for."""
    if "rope_scaling" not in rotary:
        return dict(values)
    if scaling and "rope_type" not in scaling:  # further values of the scaling that is there
        return values | scaling
    kept = {key: value for key, value in values.items() if key in ("rope_theta", "partial_rotary_factor")}
    return kept | {"rope_type": "default"} | scaling
