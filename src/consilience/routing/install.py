"""Put experts into a loaded model: its linear layers are replaced in place, and everything else stays as it is."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from consilience.errors import InputError, nearest_tensor
from consilience.routing import scores
from consilience.routing.expert import Expert, StoredFactors
from consilience.routing.layer import Experts, Factors, LowRank, RoutedLinear, put, routed
from consilience.routing.router import Router
from consilience.routing.settings import Settings


def install(model: nn.Module, experts: Sequence[Expert], settings: Settings, router: Router | None = None) -> Router:
    """Replace every layer that an expert adapts, and return the router that all of them share.

    Installing again replaces the experts.

    Args:
        model: a model with linear layers; changed in place.
        experts: one at least.
        settings: how tokens are routed.
        router: one to go on with, whoever holds it; None: a new one.

    Raises:
        InputError: there is no expert, two have one name, an expert's module is not in the model, is of another size or
            kind, or an expert lacks the vectors of ``settings.local``.
    """
    names = [expert.name for expert in experts]
    if not names:
        raise InputError("experts: there are none; give at least one adapter")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"experts: {twice[0]!r} is named twice; choose another name")
    found = dict(model.named_modules())
    for expert in experts:
        check_fit(model, expert)
        _check_vectors(expert, settings)
    router = router or Router(tuple(names), settings)
    router.serve(tuple(names), settings)
    changed = list(dict.fromkeys(module for expert in experts for module in expert.factors))
    for name, module in found.items():
        if isinstance(module, RoutedLinear) and name not in changed:
            put(model, name, module.plain())
    for name in changed:
        put(model, name, _layer(name, found[name], experts, router))
    return router


def installed(model: nn.Module, experts: Sequence[Expert]) -> list[Expert]:
    """Return experts whose factors are those that the model holds: views, so that nothing is kept twice."""
    factors: list[dict[str, LowRank]] = [{} for _ in experts]
    for name, module in model.named_modules():
        if isinstance(module, RoutedLinear):
            stack = module.experts
            for k, own in enumerate(factors):
                span = slice(stack.edges[k], stack.edges[k + 1])
                if span.stop > span.start:
                    own[name] = Factors(stack.into[span], stack.out_of[span].t())
    return [replace(expert, factors=own) for expert, own in zip(experts, factors, strict=True)]


def _layer(name: str, module: nn.Module, experts: Sequence[Expert], router: Router) -> nn.Module:
    factors = [expert.factors.get(name) for expert in experts]
    weight: Any = module.weight
    stack = Experts(name, factors, _prototypes(name, experts, router.settings), weight.detach(), router)
    made = routed(module, stack)
    assert made is not None
    return made


def _prototypes(name: str, experts: Sequence[Expert], settings: Settings) -> Tensor:
    width = next(expert.factors[name].shape[1] for expert in experts if name in expert.factors)
    empty = torch.zeros(width)
    if settings.local == "none":
        return empty.repeat(len(experts), 1)
    vectors = [expert.vectors[settings.local].get(name, empty).float() for expert in experts]
    return scores.prototypes(settings.local, torch.stack(vectors))


def check_fit(model: nn.Module, expert: Expert) -> None:
    """Check that an expert fits a model.

    Raises:
        InputError: it adapts nothing, or a module that the model has not, or of another size or kind.
    """
    modules = dict(model.named_modules())
    if not expert.factors:
        raise InputError(f"expert {expert.name!r}: adapts nothing; leave it out")
    for name, one in expert.factors.items():
        module = modules.get(name)
        if module is None:
            raise InputError(
                f"expert {expert.name!r}: adapts {name!r}, which the base does not have"
                f"{nearest_tensor(name, modules)}; check which base it was trained on"
            )
        if type(module) not in (nn.Linear, RoutedLinear):
            raise InputError(
                f"expert {expert.name!r}: adapts {name!r}, a {type(module).__name__}, and only torch's Linear is "
                "routed; merge the adapters instead (consilience merge), or train them without it"
            )
        assert isinstance(module, nn.Linear)
        height, width = one.shape
        if width != module.in_features or height != module.out_features:
            raise InputError(
                f"expert {expert.name!r}: {name}: adapts a layer of {width} inputs and {height} outputs, and the "
                f"base's has {module.in_features} and {module.out_features}; check its base"
            )
        if isinstance(one, StoredFactors) and not one.has_weight(module.weight):
            raise InputError(
                f"expert {expert.name!r}: {name}: its file holds a weight of this layer that is not the base's, and "
                "only factors are routed; give the base it was trained on"
            )


def _check_vectors(expert: Expert, settings: Settings) -> None:
    if settings.local == "none":
        return
    vectors = expert.vectors.get(settings.local)
    if vectors is None or any(name not in vectors for name in expert.factors):
        raise InputError(
            f"expert {expert.name!r}: has no {settings.local} vectors; build them, or choose another local router"
        )
    for name, one in expert.factors.items():
        vector, width = vectors[name], one.shape[1]
        if vector.shape != (width,):
            raise InputError(
                f"expert {expert.name!r}: {name}: its {settings.local} vector has {vector.numel()} values and the "
                f"layer {width} inputs; build the routed model again"
            )
        if not bool(vector.isfinite().all()):
            raise InputError(
                f"expert {expert.name!r}: {name}: its {settings.local} vector holds NaN or Inf; build the routed model "
                "again"
            )
