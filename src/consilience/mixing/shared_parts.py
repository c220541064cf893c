"""Experts whose architectures differ in part: what all of them have is mixed, the rest comes from one of them.

A module is shared if it holds tensors of the same names and shapes in every expert, and so does everything below it.
Its tensors are mixed whole: a weight without its bias, or a normalisation without its statistics, is not mixed.

    theta[t] = sum_k alpha_k theta_k[t]   for t in shared modules,      theta[t] = theta_keep[t]   for the rest

Names and shapes say that two modules fit, not that they do the same: blends are of use where the experts come from one
initialisation and differ in what was added to it or taken away.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from consilience.coefficients.coefficients import Alpha
from consilience.errors import InputError

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class SharedParts:
    """What experts have in common.

    Attributes:
        parts: the longest shared modules, by name (none of them lies in another); "" is the whole model.
        names: their tensors, in the order of the first expert.
        unshared: the modules with tensors of their own that are not shared, each with why, over all experts.
        numel: elements of all shared tensors.
        totals: elements of each expert.
    """

    parts: tuple[str, ...]
    names: tuple[str, ...]
    unshared: Mapping[str, str]
    numel: int
    totals: tuple[int, ...]

    def describe(self) -> list[str]:
        """Return one line for what is shared and one for each module that is not."""
        shares = ", ".join(f"{self.numel / total:.1%}" for total in self.totals)
        parts = ", ".join(part or "(the whole model)" for part in self.parts)
        head = f"shared: {parts}: {len(self.names)} tensors, {self.numel} elements ({shares} of the experts)"
        return [head, *(f"not shared: {part or '(top level)'}: {why}" for part, why in self.unshared.items())]


def shared_parts(states: Sequence[State]) -> SharedParts:
    """Find the modules that all experts share, from names and shapes alone.

    Args:
        states: one state dict an expert, two or more.

    Raises:
        InputError: fewer than two experts, or nothing is shared.
    """
    if len(states) < 2:
        raise InputError(f"experts: {len(states)} given; two or more are needed to share anything")
    unshared: dict[str, str] = {}
    held = [_modules(state) for state in states]
    for module in dict.fromkeys(name for modules in held for name in modules):
        why = _difference(module, [modules.get(module, {}) for modules in held])
        if why is not None:
            unshared[module] = why
    names = tuple(name for name in states[0] if _module(name) not in unshared)
    if not any(states[0][name].is_floating_point() for name in names):
        first, why = next(iter(unshared.items()), ("(none)", "there are no tensors"))
        raise InputError(
            f"experts: no module is the same in all of them ({first or 'the top level'}: {why}); mix their outputs and "
            "distil them into a student"
        )
    # A module whose every tensor is shared is whole; of those inside one another the outermost is named.
    broken = {above for module in unshared for above in _ancestors(module)}
    whole = dict.fromkeys(next(above for above in _ancestors(_module(name)) if above not in broken) for name in names)
    sizes = tuple(sum(value.numel() for value in state.values()) for state in states)
    return SharedParts(tuple(whole), names, unshared, sum(states[0][name].numel() for name in names), sizes)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _modules(state: State) -> dict[str, dict[str, Tensor]]:
    """Return module -> its own tensors, without those of modules below."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        found.setdefault(_module(name), {})[name] = value
    return found


def _ancestors(module: str) -> Iterator[str]:
    """Yield "", then every prefix of a module's name, then the module."""
    yield ""
    parts = module.split(".") if module else []
    for length in range(1, len(parts) + 1):
        yield ".".join(parts[:length])


def _difference(module: str, tensors: Sequence[Mapping[str, Tensor]]) -> str | None:
    """Return why a module is not shared, None if it is."""
    for name in dict.fromkeys(name for own in tensors for name in own):
        short = name.removeprefix(f"{module}.")
        missing = [str(k) for k, own in enumerate(tensors) if name not in own]
        if missing:
            return f"{short} is missing in expert {', '.join(missing)}"
        first = tensors[0][name]
        for k, own in enumerate(tensors):
            if own[name].shape != first.shape:
                return f"{short} is {list(own[name].shape)} in expert {k} and {list(first.shape)} in expert 0"
            if own[name].is_floating_point() != first.is_floating_point():
                return f"{short} is {own[name].dtype} in expert {k} and {first.dtype} in expert 0"
    return None


def graft(states: Sequence[State], keep: int) -> tuple[list[dict[str, Tensor]], SharedParts]:
    """Give every expert the architecture of expert ``keep``: its own shared parts, the other's for the rest.

    The results can be mixed like experts of one architecture wherever coefficients sum to 1 over the experts; the rest
    then stays what it was (up to rounding). Tensors are not copied.

    Raises:
        InputError: as for ``shared_parts``, or there is no such expert.
    """
    found = shared_parts(states)
    kept = states[_expert(keep, states)]
    names = set(found.names)
    return [{name: state[name] if name in names else kept[name] for name in kept} for state in states], found


def mix_shared(states: Sequence[State], alpha: Alpha, keep: int) -> tuple[dict[str, Tensor], SharedParts]:
    """Mix what all experts share with coefficients ``alpha`` and take the rest from expert ``keep``.

    Sums are in float64 and end in the kept expert's dtype; integer tensors are the kept expert's.

    Args:
        states: one state dict an expert.
        alpha: [K] or [K, 1] coefficients.
        keep: the expert whose architecture the result has.

    Raises:
        InputError: as for ``graft``, or there is not one finite coefficient an expert.
    """
    grafted, found = graft(states, keep)
    weights = torch.as_tensor(alpha, dtype=torch.float64).reshape(-1)
    if len(weights) != len(states) or not bool(torch.isfinite(weights).all()):
        raise InputError(f"alpha: {len(weights)} coefficients for {len(states)} experts; give each one finite number")
    mixed = dict(grafted[keep])
    for name in found.names:
        if mixed[name].is_floating_point():
            total = torch.zeros_like(mixed[name], dtype=torch.float64)
            for weight, state in zip(weights.tolist(), grafted, strict=True):
                total.add_(state[name].detach().to(total), alpha=weight)
            mixed[name] = total.to(mixed[name].dtype)
    return mixed, found


def _expert(keep: int, states: Sequence[State]) -> int:
    if not 0 <= keep < len(states):
        raise InputError(f"keep: there is no expert {keep}; give a number below {len(states)}")
    return keep
