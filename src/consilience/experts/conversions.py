"""The names that transformers changes as it loads a file: ``encoder.layer.0.attention.attention.query`` of a ViT file
is ``layers.0.attention.q_proj`` in the model, and so in adapters and in files that were saved from its state dict.

``conversions.json`` is derived from transformers' own mapping by ``tools/conversions.py``: sets of renamings, applied
in order, and which of them each model type needs. Applied to a name of either kind they give the loaded one, so that
two names mean one tensor where they become equal. Some files hold a tensor in another *form* (experts apart, queries,
keys and values in one); these conversions are listed too, so that an error can name them.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, cast


@dataclass(frozen=True)
class Conversion:
    """What changes its form as it is loaded: patterns of the stored and the loaded names, and by which operations."""

    stored: tuple[str, ...]
    loaded: tuple[str, ...]
    operations: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rules:
    """Renamings in order, as (pattern, replacement), and what changes its form."""

    renamings: tuple[tuple[re.Pattern[str], str], ...]
    conversions: tuple[Conversion, ...] = ()

    def __call__(self, name: str) -> str:
        """Return what a stored name is called once loaded."""
        for pattern, replacement in self.renamings:
            match = pattern.search(name)
            if match is not None:
                name = name.replace(match[0], match.expand(replacement), 1)
        return name

    def __add__(self, other: "Rules") -> "Rules":
        """Return these rules followed by others."""
        return Rules(self.renamings + other.renamings, self.conversions + other.conversions)

    def converted(self, name: str) -> str | None:
        """Return how a tensor's form changes as it is loaded, in words; None: it keeps it."""
        name = self(name)
        for form in self.conversions:
            if any(name_pattern(pattern).search(name) for pattern in (*form.stored, *form.loaded)):
                return f"{' + '.join(form.stored)} -> {' + '.join(form.loaded)}"
        return None


@cache
def name_pattern(pattern: str) -> re.Pattern[str]:
    """Compile a conversion's pattern: ``*.`` is an expert's number, a group, and a name ends where a word does."""
    return re.compile(pattern.replace("*.", r"(\d+)\.") + (r"(?!\w)" if pattern[-1].isalnum() else ""))


@cache
def _raw() -> dict[str, Any]:
    return json.loads(files("consilience.experts").joinpath("conversions.json").read_text(encoding="utf-8"))


@cache
def _set(number: int, nested: bool = False) -> Rules:
    """Return a set by its number, or as the parts of a larger model need it; compiling all of them takes 0.1 s."""
    return _rules(_raw()["sets"][number], r"(?:^|(?<=\.))" if nested else "^")


def _rules(raw: dict[str, Any], start: str) -> Rules:
    """Compile a set; ``start`` is where its names begin: at the front, or, in a part of a larger model, at any dot."""
    renamings = tuple(
        (re.compile(start + pattern[1:] if pattern.startswith("^") else pattern), replacement)
        for pattern, replacement in raw["renamings"]
    )
    return Rules(renamings, tuple(Conversion(*map(tuple, conversion)) for conversion in raw["conversions"]))


def model_types(config: dict[str, Any] | None) -> set[str]:
    """Return the model types in a config, those of its parts included."""
    return {name for name, _ in _types(config or {})}


def _types(config: dict[str, Any], nested: bool = False) -> Iterator[tuple[str, bool]]:
    """Walk a config's model types, outermost first, with whether each is a part's."""
    if isinstance(config.get("model_type"), str):
        yield config["model_type"], nested
    for value in config.values():
        if isinstance(value, dict):
            yield from _types(cast(dict[str, Any], value), nested=True)


def rules_for(*configs: dict[str, Any] | None) -> list[Rules]:
    """Return the rules that may relate the names of models with these configs, likeliest first.

    First all that the configs' model types ask for, one after another, then each set alone. Files without a config may
    be of any model type.
    """
    types: dict[str, list[int]] = _raw()["model_types"]
    known = [config for config in configs if config is not None]
    chosen: list[Rules] = []
    for model_type, nested in dict.fromkeys(found for config in known for found in _types(config)):
        chosen += [_set(number, nested) for number in types.get(model_type, [])]
    legacy = [_set(number) for number in types["legacy"]]
    if not known:
        return [_set(number) + legacy[0] for number in range(len(_raw()["sets"]))]
    joined = Rules(())
    for rules in [*chosen, *legacy]:
        joined += rules
    return [joined, *chosen] if len(chosen) > 1 else [joined]
