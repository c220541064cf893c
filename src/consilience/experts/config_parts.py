"""The parts of config.json: a model of text and images has configs inside, of its language model and of its tower."""

from collections.abc import Mapping
from typing import Any, cast

Config = dict[str, Any]
#: Where the language model's values lie, if they have a config of their own.
LANGUAGE = ("text_config", "llm_config")


def is_part(key: str) -> bool:
    """Whether a key's mapping is the config of a part of the model."""
    return key.endswith("_config") or key in ("encoder", "decoder", "generator", "question_encoder")


def language_part(config: Mapping[str, Any]) -> str | None:
    """Return the key of the language model's own config; None where its values are beside the others."""
    return next((key for key in LANGUAGE if isinstance(config.get(key), dict)), None)


def nested_like(config: Config, other: Config) -> Config:
    """Return a config with its language model's values inside, where another of the same model type has them there.

    Qwen2-VL's config was flat in transformers 4 and has a ``text_config`` since.
    """
    part = language_part(other)
    if part is None or language_part(config) is not None or config.get("model_type") != other.get("model_type"):
        return config
    inside = {key: value for key, value in config.items() if key not in other and not is_part(key)}
    model_type = {"model_type": other[part]["model_type"]} if "model_type" in other[part] else {}
    return {key: value for key, value in config.items() if key not in inside} | {part: model_type | inside}


def place(config: Mapping[str, Any], key: str) -> str:
    """Return where a compared key, such as ``text_config.rope_theta``, lies in this config: dotted too."""
    *outer, leaf = key.split(".")
    parts = [part for part in outer if is_part(part)]
    if parts and not isinstance(config.get(parts[0]), dict):
        parts = parts[1:]
    part = language_part(config)
    if not parts and part is not None and leaf not in config:
        parts = [part]
    return ".".join([*parts, leaf])


def expanded(changes: Mapping[str, Any]) -> Config:
    """Return changes of a config with ``text_config.rope_theta`` written as a mapping inside."""
    found: Config = {}
    for key, value in changes.items():
        first, dot, rest = key.partition(".") if all(key.split(".")) else (key, "", "")
        inner = (
            expanded({rest: value} if dot else cast(Mapping[str, Any], value)) if dot or _is_mapping(value) else value
        )
        both = isinstance(inner, dict) and isinstance(found.get(first), dict)
        found[first] = found[first] | cast(Config, inner) if both else inner
    return found


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)
