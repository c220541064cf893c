"""Which tensors of a model are one: its *ties*, as architecture, config and data give them together.

The architecture says what may be tied (``tied_weights.json``, derived from transformers' classes by
``tools/tied_weights.py``), config.json whether it is, its class's default where config.json is silent, and a torch file
shows tensors that are one memory. A file may hold one name of a tie or several. Models of unknown architecture are tied
where config.json says so, by the names that are usual.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np

from consilience.checkpoints.adapter import LoraPair
from consilience.checkpoints.checkpoint import Bytes, Checkpoint, Storage, TensorInfo, raw, same_bytes

Config = dict[str, Any]
#: What is tied in models of unknown architecture: (alias, names it may be tied to).
_USUAL = (
    ("lm_head.weight", ("model.embed_tokens.weight", "embed_tokens.weight", "shared.weight", "transformer.wte.weight",
                        "language_model.model.embed_tokens.weight", "model.language_model.embed_tokens.weight",
                        "backbone.embeddings.weight", "model.decoder.embed_tokens.weight")),
    ("encoder.embed_tokens.weight", ("shared.weight",)),
    ("decoder.embed_tokens.weight", ("shared.weight",)),
)  # fmt: skip
_FLAG = "tie_word_embeddings"
_FLAGS = (_FLAG, "tie_embedding", "tie_codebooks_embeddings")
#: Parts of a composite model's config that may hold the flag of its language model.
_PARTS = ("text_config", "llm_config", "language_config", "thinker_config", "decoder", "fine_acoustics_config")
#: What Marian ties where encoder and decoder have vocabularies of their own.
_UNSHARED = {"lm_head.weight": "model.decoder.embed_tokens.weight"}
#: Model types whose flag says how the head's inputs are scaled, and not, or not only, what is tied: it has to stay.
_SCALING = ("t5", "mt5", "umt5", "longt5", "pop2piano", "udop", "switch_transformers")
#: The key that transformers 5 has for that in some of them, which counts before the flag.
_SCALED = ("t5", "umt5", "longt5", "pop2piano")
SCALED_OUTPUTS = "scale_decoder_outputs"


@dataclass(frozen=True)
class _Entry:
    """What an architecture ties (alias -> source), always, or by default where the config does not say."""

    ties: dict[str, str]
    always: bool
    by_default: bool


@cache
def _table() -> dict[str, _Entry]:
    content = json.loads(Path(__file__).with_name("tied_weights.json").read_text(encoding="utf-8"))
    return {
        name: _Entry(entry["ties"], kind == "always", kind == "by_default")
        for entry in content["sets"]
        for kind in ("always", "by_default", "if_said")
        for name in entry[kind]
    }


def _flags(config: Config) -> list[Any]:
    """Return every value that a config, and its language model's part, gives to the flag."""
    parts = [config, *(cast(Config, config[key]) for key in _PARTS if isinstance(config.get(key), dict))]
    return [part[flag] for part in parts for flag in _FLAGS if flag in part]


def _entry(config: Config) -> _Entry | None:
    named = config.get("architectures")
    names = cast(list[Any], named) if isinstance(named, list) else []
    return next((_table()[name] for name in names if isinstance(name, str) and name in _table()), None)


def says_tied(config: Config | None) -> bool:
    """Whether a config, or where it is silent its architecture, ties tensors of the model."""
    config = config or {}
    flags, entry = _flags(config), _entry(config)
    if any(flag is True for flag in flags):
        return True
    return entry is not None and (entry.always or (entry.by_default and not flags))


def keeps_flag(config: Config | None) -> bool:
    """Whether a config's flag must stay as it is, for it decides more than what is tied."""
    return (config or {}).get("model_type") in _SCALING


def scales_outputs(config: Config) -> bool | None:
    """Whether a T5 scales the inputs of its head, as its class reads the config; None for other model types."""
    if config.get("model_type") not in _SCALED:
        return None
    return bool(config.get(SCALED_OUTPUTS, config.get(_FLAG) is not False))


def untied(config: Config) -> Config:
    """Return the config with the flag off, wherever a loader of the model may read it."""
    out = config | {flag: False for flag in _FLAGS if flag in config or flag == _FLAG}
    for key in _PARTS:
        part = config.get(key)
        if isinstance(part, dict) and not keeps_flag(cast(Config, part)):
            out[key] = cast(Config, part) | {_FLAG: False}
    return out


def ties_of(checkpoint: Checkpoint) -> dict[str, str]:
    """Return alias -> stored tensor for every name, stored or not, of a tensor that has several.

    The architecture's own source of a tie stands for it where the file holds it, else the first name that it holds.
    """
    tensors = checkpoint.tensors
    sources = _declared(checkpoint.config, tensors)
    shared = checkpoint.storage.shared()
    names = {info.name: name for name, info in tensors.items()}  # a storage goes by the names of its own
    for alias, first in ((names[a], names[b]) for a, b in shared.items() if a in names and b in names):
        if sources.get(first) == alias:  # the head follows the embeddings, whichever the file names first
            continue
        sources.setdefault(alias, first)
    groups: dict[str, list[str]] = {}
    for alias in sources:
        groups.setdefault(_root(alias, sources), []).append(alias)
    ties: dict[str, str] = {}
    for root, aliases in groups.items():
        stored = [name for name in (root, *aliases) if name in tensors]
        if stored:
            names = [name for name in (root, *aliases) if name != stored[0]]
            ties |= {name: stored[0] for name in names if name not in tensors or _alike(tensors, name, stored[0])}
    return ties


def _declared(config: Config | None, tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Return alias -> source as architecture and config give them, by the names the file has or would have."""
    if not says_tied(config):
        return {}
    entry = _entry(config or {})
    if entry is None:
        found = {alias: next((name for name in names if name in tensors), None) for alias, names in _USUAL}
        return {alias: name for alias, name in found.items() if name is not None}
    ties = entry.ties if (config or {}).get("share_encoder_decoder_embeddings") is not False else _UNSHARED
    named = {*ties, *ties.values()}
    others = [name for name in tensors if name not in named]
    out: dict[str, str] = {}
    for alias, source in ties.items():
        ours = source if source in tensors else _spelled(source, others) or _like(source, others) or source
        beginning = source.removesuffix(ours)  # what the file leaves out of its names
        out[alias if alias in tensors else _spelled(alias, others) or alias.removeprefix(beginning or "\0")] = ours
    return {alias: source for alias, source in out.items() if alias != source}


def _spelled(name: str, others: Iterable[str]) -> str | None:
    """Return the one name that differs only in having more, or less, of a beginning."""
    found = [other for other in others if other.endswith(f".{name}") or name.endswith(f".{other}")]
    return found[0] if len(found) == 1 else None


def _like(name: str, others: Iterable[str]) -> str | None:
    """Return the one name with the same last two parts."""
    last = ".".join(name.split(".")[-2:])
    found = [other for other in others if other == last or other.endswith(f".{last}")]
    return found[0] if len(found) == 1 else None


def _root(name: str, sources: Mapping[str, str]) -> str:
    seen = {name}
    while (name := sources.get(name, name)) not in seen:
        seen.add(name)
    return name if name not in sources else min(seen)


def _alike(tensors: Mapping[str, TensorInfo], one: str, other: str) -> bool:
    return (tensors[one].shape, tensors[one].dtype) == (tensors[other].shape, tensors[other].dtype)


def same_update(one: tuple[Storage, LoraPair], other: tuple[Storage, LoraPair]) -> bool:
    """Whether two pairs of factors are one update, written twice: as an embedding's, and transposed as a layer's."""
    (storage, a), (other_storage, b) = one, other
    if a.scale != b.scale or a.delta_shape != b.delta_shape:
        return False
    pairs = ((a.a, b.a), (a.b, b.b)) if a.transposed == b.transposed else ((a.a, b.b), (a.b, b.a))
    flip = a.transposed != b.transposed
    return all(_same_factor((storage, left), (other_storage, right), flip) for left, right in pairs)


def _same_factor(one: tuple[Storage, TensorInfo], other: tuple[Storage, TensorInfo], flip: bool) -> bool:
    (storage, a), (other_storage, b) = one, other
    if not flip:
        return same_bytes(one, other)
    if a.dtype != b.dtype or a.shape != b.shape[::-1]:
        return False
    left, right = (_items(s, t) for s, t in ((storage, a), (other_storage, b)))
    return np.array_equal(left, np.swapaxes(right, 0, 1))


def _items(storage: Storage, tensor: TensorInfo) -> Bytes:
    """Return a matrix as [rows, columns, bytes of an element]."""
    return raw(storage, tensor, 0, tensor.numel).reshape(*tensor.shape, tensor.plain.itemsize)
