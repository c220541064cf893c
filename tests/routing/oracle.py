"""Routing written again, token by token in NumPy's float64: hooks on the linear layers of a plain model."""

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn

from consilience.routing.expert import Expert

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Rule:
    """How the oracle routes: the local router, its temperature and k; ``added`` [B, K] to every token's logits.

    ``known`` is the share of the weights found so; the rest is shared by all experts alike.
    """

    local: str
    k: int
    temperature: float = 1.0
    added: Array | None = None
    known: float = 1.0


def normalised(x: Array) -> Array:
    """Layer normalisation without gain and bias."""
    return (x - x.mean()) / math.sqrt(((x - x.mean()) ** 2).mean() + 1e-5)


def local_logit(rule: Rule, u: Array, expert: Expert, module: str) -> float:
    """A token's logit for one expert; 0 for an expert that has nothing at this module."""
    if module not in expert.factors:
        return 0.0
    if rule.local == "phatgoose":
        v = expert.vectors["phatgoose"][module].double().numpy()
        return float(normalised(u) @ normalised(v)) / math.sqrt(len(u))
    if rule.local == "arrow":
        return abs(float(direction(expert, module) @ u)) / rule.temperature
    return float(expert.vectors["average"][module].double().numpy() @ u) / (rule.temperature * math.sqrt(len(u)))


@cache
def update(expert: Expert, module: str) -> Array:
    """What an expert adds to the weight [out, in] of a module."""
    one = expert.factors[module]
    return one.b.double().numpy() @ one.a.double().numpy()


@cache
def direction(expert: Expert, module: str) -> Array:
    """The right singular vector of an update's largest singular value."""
    return np.linalg.svd(update(expert, module))[2][0]


def token_weights(logits: Sequence[float], k: int) -> list[float]:
    """Softmax over all experts; the k most probable are kept and divided by what is left."""
    powers = [math.exp(z - max(logits)) for z in logits]
    shares = [p / sum(powers) for p in powers]
    kept = sorted(range(len(shares)), key=lambda e: -shares[e])[:k]
    left = sum(shares[e] for e in kept) + 1e-6
    return [shares[e] / left if e in kept else 0.0 for e in range(len(shares))]


@contextmanager
def routed_by_hooks(model: nn.Module, experts: Sequence[Expert], rule: Rule) -> Generator[None]:
    """Let every linear layer of a float64 model add its tokens' experts to its output, within."""

    def look(name: str, inputs: Any, output: Any) -> Any:
        added = torch.zeros_like(output)
        for b in range(inputs.shape[0]):
            for t in range(inputs.shape[1]):
                u = inputs[b, t].detach().numpy()
                z = [local_logit(rule, u, expert, name) for expert in experts]
                if rule.added is not None:
                    z = [value + float(rule.added[b, e]) for e, value in enumerate(z)]
                for routed, expert in zip(token_weights(z, rule.k), experts, strict=True):
                    weight = rule.known * routed + (1 - rule.known) / len(experts)
                    if weight and name in expert.factors:
                        added[b, t] += torch.from_numpy(weight * (update(expert, name) @ u))
        return output + added

    handles: list[Any] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and any(name in expert.factors for expert in experts):
            handles.append(module.register_forward_hook(lambda _, args, out, name=name: look(name, args[0], out)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
