"""Which tensors of a mixture of experts choose among them: read off the names and shapes of what lies side by side.

Experts are what a module ``experts`` holds, each under its number or all in one tensor whose first dimension counts
them. A router is a matrix beside them with as many rows, or with one (the gate of a shared expert), and its bias; so is
whatever a part of its name calls ``router``.

A mean of routers that were trained apart sends tokens where none of them did, and the experts that they knew by number
are no longer those. ``private: [routers]`` keeps the base's.
"""

import re
from collections.abc import Iterable, Mapping

from consilience.checkpoints.checkpoint import TensorInfo

#: What a recipe calls them all.
ALIAS = "routers"
_EXPERT = re.compile(r"^(?P<layer>(?:.*\.)?)experts\.(?:(?:expert_)?(?P<number>\d+)\.)?")
_LAYER = re.compile(r"^.*\.\d+\.")


def routers(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Return the names of the tensors that choose among experts, in the order of ``tensors``."""
    counts = _counts(tensors)
    return [name for name, info in tensors.items() if _chooses(name, info, counts)]


def _counts(tensors: Mapping[str, TensorInfo]) -> dict[str, set[int]]:
    """Return, by what the names of a layer's experts begin with, how many experts there may be."""
    numbers: dict[str, set[int]] = {}
    counts: dict[str, set[int]] = {}
    for name, info in tensors.items():
        match = _EXPERT.match(name)
        if match is None:
            continue
        if match["number"] is not None:
            numbers.setdefault(match["layer"], set()).add(int(match["number"]))
        elif len(info.shape) > 2:
            counts.setdefault(match["layer"], set()).add(info.shape[0])
    for layer, found in numbers.items():
        counts.setdefault(layer, set()).add(len(found))
    return counts


def _chooses(name: str, info: TensorInfo, counts: Mapping[str, set[int]]) -> bool:
    parts = name.split(".")
    if "router" in parts:
        return True
    shape = list(info.shape)
    if len(shape) not in (1, 2) or "experts" in parts:
        return False
    for depth in (1, 2):  # mlp.gate.bias, mlp.gate.weight; mlp.bias_of_experts
        layer = ".".join(parts[:-depth]) + "." if len(parts) > depth else ""
        if layer in counts:
            return shape[0] in counts[layer] or (len(shape) == 2 and shape[0] == 1)
    return False


def patterns(names: Iterable[str]) -> list[str]:
    """Return filters that match these names whatever layer they are of, each once."""
    tails = dict.fromkeys(_LAYER.sub("", name) for name in names)
    return [rf"re:(^|\.){re.escape(tail)}$" for tail in tails]


def spelled_out(private: Iterable[str], tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Return filters with ``routers`` replaced by those that match a model's; where it has none it stays."""
    given = list(private)
    if ALIAS not in given:
        return given
    own = patterns(routers(tensors)) or [ALIAS]
    return [pattern for filter_ in given for pattern in (own if filter_ == ALIAS else [filter_])]


def merged_note(names: Iterable[str]) -> list[str]:
    """Return what to say of routers that are merged as any other tensor; nothing where there are none."""
    found = list(names)
    if not found:
        return []
    return [
        f"{len(found)} routers of a mixture are merged as any tensor ({found[0]!r} for one): a mean of routers that "
        f"were trained apart may send tokens where none of them did; private: [{ALIAS}] keeps the base's"
    ]
