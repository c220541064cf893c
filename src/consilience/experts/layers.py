"""Stacks of layers in a model's names, and where its config counts them, whatever the architecture.

A *stack* is a list ``PREFIX.0.``, ``PREFIX.1.``, ... in the names of tensors whose length is what a key of config.json
says (``num_hidden_layers``, ``n_layer``, ``decoder_layers``, ``vision_config.depth``, ...). A model of one stack is one
*module*; one of several (a text decoder and a vision tower, an encoder and a decoder) has a module for each, to which
tensors outside layers belong by the beginnings of their names, and one for what connects them.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from consilience.experts.config_parts import LANGUAGE, is_part

Config = Mapping[str, Any]
_NUMBERED = re.compile(r"^((?:.*?\.)?)(\d{1,9})\.(.+)$")
#: Keys that count the layers of a model's only stack, of its encoder, or of one part; of its decoder; of its encoder.
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_layer", "depth")
_DECODER, _ENCODER = ("decoder_layers", "num_decoder_layers"), ("encoder_layers", "num_encoder_layers")
#: What the list of layers is called, where no config tells which of several lists it is.
_USUAL = frozenset({"layers", "layer", "h", "block", "blocks"})
_VISION, _AUDIO = re.compile(r"vis|image|vit\b"), re.compile(r"audio|speech")
#: Modules between a tower and the language model.
_PROJECTOR = re.compile(r"(^|\.)(\w*projector|connector|\w*merger|\w*merger_list|vision_adapter|mm_\w+)(\.|$)")
PROJECTOR, SHARED = "multi_modal_projector", "shared"
_BEFORE = re.compile(
    r"embed|embd|wte|wpe|shared|rotary|inv_freq|relative|patch|conv\d|position|token_type|slopes|ln_pre|layernorm_pre|pre_la"
)
_AFTER = re.compile(
    r"embed_out|unembed|embedding_norm|lm_head|output|score|classifier|pooler|^cls$|vocab_|proj_out|head|final|ln_f|"
    r"norm|qa_outputs|ln_post"
)
#: Of those, what a name means that matches both.
_SURELY_AFTER = re.compile(r"embed_out|unembed|embedding_norm|predictions|lm_head|ln_post|layernorm_post|post_la")


@dataclass(frozen=True)
class LayerStack:
    """A list of layers: what names begin with before the layer's number, how many there are, and where config says so.

    ``part`` is the key of the part of config.json that describes it ("" for the top), ``keys`` those that count it.
    """

    prefix: str
    count: int
    part: str = ""
    keys: tuple[str, ...] = ()

    def layer(self, name: str) -> int | None:
        """Return the layer that a tensor lies in; None: in none of this stack."""
        match = _NUMBERED.match(name)
        return int(match[2]) if match is not None and match[1] == self.prefix else None

    def renumbered(self, name: str, layer: int) -> str:
        """Return the name of the same tensor of another layer."""
        match = _NUMBERED.match(name)
        assert match is not None
        return f"{self.prefix}{layer}.{match[3]}"

    @property
    def usual(self) -> bool:
        """Whether the list is called as layers mostly are."""
        return self.prefix.rstrip(".").split(".")[-1] in _USUAL

    @property
    def words(self) -> list[str]:
        """The parts of the prefix, less the list's own name."""
        return self.prefix.rstrip(".").split(".")[:-1]


@dataclass(frozen=True)
class Modules:
    """The modules of a model: their stacks by name, and which module a tensor outside layers belongs to."""

    stacks: Mapping[str, LayerStack]
    further: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict[str, str])

    def owner(self, name: str) -> str:
        """Return the module of a tensor."""
        if len(self.stacks) < 2:
            return next(iter(self.stacks), SHARED)
        for module, stack in self.stacks.items():
            if stack.layer(name) is not None:
                return module
        if PROJECTOR in self.further and _PROJECTOR.search(name):
            return PROJECTOR
        shared = {module: _common(name.split("."), stack.words) for module, stack in self.stacks.items()}
        most = max(shared.values())
        best = [module for module, count in shared.items() if count == most]
        if most and len(best) == 1:
            return best[0]
        return "text_decoder" if "text_decoder" in self.stacks else SHARED


def _common(one: list[str], other: list[str]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def numbered_lists(names: Iterable[str]) -> dict[str, int]:
    """Return the prefixes of numbered lists without a gap, and how many entries each has."""
    found: dict[str, set[int]] = {}
    for name in names:
        match = _NUMBERED.match(name)
        if match is not None:
            found.setdefault(match[1], set()).add(int(match[2]))
    return {prefix: len(numbers) for prefix, numbers in found.items() if max(numbers) == len(numbers) - 1}


def modules_of(names: Iterable[str], config: Config | None) -> Modules:
    """Return a model's modules; none where no list of layers is as long as its config says."""
    listed = [*names]
    lists = numbered_lists(listed)
    stacks = [_counted(prefix, count, lists, config or {}) for prefix, count in lists.items()]
    found = _one_each([stack for stack in stacks if stack.keys])
    if not found and not _states_layers(config or {}):
        usual = [stack for stack in stacks if stack.usual]
        found = usual if len(usual) == 1 else stacks if len(stacks) == 1 else []
    if len(found) < 2:
        single: dict[str, LayerStack] = dict(zip(("default",), found, strict=False))
        return Modules(single, names=_aliases(single) | (dict.fromkeys(("text_decoder",), "default") if found else {}))
    named = {_module_name(stack, found): stack for stack in found}
    if len(named) < len(found):
        named = {stack.prefix.rstrip("."): stack for stack in found}
    further = (PROJECTOR,) if "text_decoder" in named else ()
    return Modules(named, (*further, SHARED), _aliases(named))


def _states_layers(config: Config) -> bool:
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    return any(isinstance(part.get(key), int) for part in parts for key in (*_COUNTS, *_DECODER, *_ENCODER))


def _counted(prefix: str, count: int, lists: Mapping[str, int], config: Config) -> LayerStack:
    """Return a list with the keys of config.json that count it: those that do and say its length."""
    words = prefix.rstrip(".").split(".")
    other = {"encoder": "decoder", "decoder": "encoder"}
    paired = any(".".join([*(other.get(word, word) for word in words), ""]) in lists for word in words if word in other)
    own = () if not paired else _DECODER if "decoder" in words else _ENCODER
    for part in _config_parts(prefix, config):
        values = config if not part else cast(Config, config[part])
        counted = own if own is _DECODER and any(key in values for key in own) else (*own, *_COUNTS)
        stated = tuple(key for key in counted if values.get(key) == count and not isinstance(values.get(key), bool))
        if stated:
            return LayerStack(prefix, count, part, stated)
    return LayerStack(prefix, count)


def _config_parts(prefix: str, config: Config) -> list[str]:
    """Return the parts of a config that may describe a list of layers, likeliest first."""
    parts = [key for key, value in config.items() if is_part(key) and isinstance(value, dict)]
    for kind in (_VISION, _AUDIO):
        if kind.search(prefix) and any(kind.search(part) for part in parts):
            return [part for part in parts if kind.search(part)]
    language = [part for part in parts if part in LANGUAGE]
    others = [part for part in parts if part not in LANGUAGE and not _VISION.search(part) and not _AUDIO.search(part)]
    named = [part for part in others if part in prefix.split(".")]
    return [*named, *language, "", *(part for part in others if part not in named)]


def _one_each(stacks: list[LayerStack]) -> list[LayerStack]:
    """Keep, of lists that the same keys would count, the one that is called as layers are."""
    found: list[LayerStack] = []
    for stack in stacks:
        same = [other for other in stacks if (other.part, other.keys) == (stack.part, stack.keys)]
        usual = [other for other in same if other.usual]
        if len(usual) != 1 or usual[0] is stack:
            found.append(stack)
    return found


def _module_name(stack: LayerStack, stacks: list[LayerStack]) -> str:
    if _VISION.search(stack.part) or _VISION.search(stack.prefix):
        return "vision_tower"
    if _AUDIO.search(stack.part) or _AUDIO.search(stack.prefix):
        return "audio_tower"
    other = any(_VISION.search(each.prefix + each.part) or _AUDIO.search(each.prefix + each.part) for each in stacks)
    if other:
        return "text_decoder"
    return next((word for word in ("encoder", "decoder") if word in stack.words), stack.prefix.rstrip("."))


def _aliases(named: Mapping[str, LayerStack]) -> dict[str, str]:
    """Return what else a recipe may call a module: a part of its prefix that no other has, or all of the prefix."""
    found: dict[str, str] = {}
    for module, stack in named.items():
        others = {word for each, other in named.items() if each != module for word in other.words}
        words = [word for word in stack.words if word not in others]
        found |= dict.fromkeys([*words, stack.prefix.rstrip("."), module], module)
        if module == "vision_tower":
            found |= {"vision_model": module}
    return found


def comes_first(name: str) -> bool | None:
    """Return whether a tensor outside layers acts before them (embeddings) or after (norm, head); None: unknown."""
    words = name.split(".")[:-1] or [name]
    if any(_SURELY_AFTER.search(word) for word in words):
        return False
    if any(_BEFORE.search(word) for word in words):
        return True
    return False if any(_AFTER.search(word.lower()) for word in words) else None
