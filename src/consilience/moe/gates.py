"""Routers as values: one vector per layer and expert, and how they route the prompts they were made of.

A layer's router gives expert e the logit g_e . x, with x the input of the layer's MLP. Random ones are

    random:          g ~ N(0, 1)
    uniform_random:  g ~ U(-1/sqrt(hidden), 1/sqrt(hidden)), as torch.nn.Linear begins

each from a stream of bits of its own, keyed by seed, layer and expert: the same on any machine.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from consilience.kernels.random_bits import stream_key

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Routed:
    """Where one expert's own prompts go: over all layers, and per layer.

    Attributes:
        name: of the expert.
        prompts: how many there are.
        tokens: how many they have, less a token that begins all texts.
        share: of tokens that the expert is among the ``experts_per_token`` chosen for, per layer.
        first: of tokens that it is the first choice for, per layer.
        prompts_first: of prompts, most of whose tokens have it as their first choice, over all layers.
    """

    name: str
    prompts: int
    tokens: int
    share: tuple[float, ...]
    first: tuple[float, ...]
    prompts_first: float

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Routed":
        """Return what ``asdict`` was taken of, by way of JSON."""
        plain: dict[str, Any] = {**value, "share": tuple(value["share"]), "first": tuple(value["first"])}
        return cls(**plain)


@dataclass(frozen=True, eq=False)
class Gates:
    """A mixture's routers.

    Attributes:
        mode: the recipe's ``gate_mode``.
        per_token: experts that a token is sent to.
        routed: [layers, experts, hidden].
        shared: [layers, shared experts, hidden].
        routing: of every expert that has prompts.
    """

    mode: str
    per_token: int
    routed: Array
    shared: Array
    routing: tuple[Routed, ...] = ()

    def weight(self, layer: int, *, shared: bool) -> Array:
        """Return the router of a layer, or the gate of its shared experts: [experts, hidden]."""
        return (self.shared if shared else self.routed)[layer]

    @property
    def chance(self) -> float:
        """The share of tokens that a router without knowledge sends to an expert."""
        return self.per_token / self.routed.shape[1]

    def facts(self) -> dict[str, Any]:
        """Return what the lineage says."""
        return {"chance": self.chance, "routing": [asdict(one) for one in self.routing]}

    def lines(self) -> list[str]:
        """Return a line for every expert: how many of its own prompts' tokens go to it."""
        if not self.routing:
            return [f"routers: {self.mode}, and no prompts to try them on; train the mixture before it is used"]
        first = 1 / self.routed.shape[1]
        return [
            f"router: of the {one.tokens} tokens of {one.name}'s own prompts {_mean(one.share):.0%} go to it (chance "
            f"{self.chance:.0%}), {_mean(one.first):.0%} as their first choice (chance {first:.0%}); by layer from "
            f"{min(one.first):.0%} to {max(one.first):.0%}; first choice of {one.prompts_first * one.prompts:.0f} of "
            f"its {one.prompts} prompts"
            for one in self.routing
        ]

    def warnings(self) -> list[tuple[str, str, str]]:
        """Return (expert, what is wrong, what to do) for experts whose own prompts find them no better than chance."""
        found: list[tuple[str, str, str]] = []
        for one in self.routing:
            whole = self.per_token == self.routed.shape[1]
            share, chance = (one.first, 1 / self.routed.shape[1]) if whole else (one.share, self.chance)
            if self.routed.shape[1] > 1 and _mean(share) <= chance:
                what = (
                    f"{one.name}: {_mean(share):.0%} of the tokens of its own prompts {'prefer' if whole else 'go to'} "
                    f"it, no more than by chance ({chance:.0%})"
                )
                other = "gate_mode: mlp_input" if self.mode != "mlp_input" else "other prompts"
                found.append((one.name, what, f"try {other}, add negative_prompts, or train the routers"))
        return found


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def random_gates(mode: str, layers: int, experts: int, hidden: int, seed: int, *, part: str = "routed") -> Array:
    """Return random routers [layers, experts, hidden], as ``mode`` says."""
    gates = np.empty((layers, experts, hidden), np.float32)
    for layer in range(layers):
        for expert in range(experts):
            key = stream_key(seed, "gate", part, layer, expert)
            if mode == "uniform_random":
                gates[layer, expert] = (2 * _uniform(key, hidden) - 1) / math.sqrt(hidden)
            else:
                u, v = _uniform(key, 2 * hidden).reshape(2, hidden)
                gates[layer, expert] = np.sqrt(-2 * np.log1p(-u)) * np.cos(2 * np.pi * v)  # Box and Muller
    return gates


def _uniform(key: int, count: int) -> npt.NDArray[Any]:
    """Return numbers in [0, 1) by SplitMix64, as ``kernels.random_bits`` has it."""
    z = np.uint64(key) + (np.arange(count, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def normalised(state: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return states [..., hidden] of length 1; one that is all but 0 stays as it is."""
    length = np.sqrt(np.square(state).sum(-1, keepdims=True))
    return state / np.maximum(length, 1e-8)
