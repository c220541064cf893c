"""An average's activations given the statistics that lie between those of the networks it was made from (REPAIR).

The average of two networks computes with units that are averages of unlike ones, whose variance collapses layer by
layer. For every layer and output channel c, on probe inputs,

    mean_c = sum_k alpha_k mean_c(net k),   std_c = sum_k alpha_k std_c(net k)
    W_c <- W_c std_c / std_c(average),      b_c <- (b_c - mean_c(average)) std_c / std_c(average) + mean_c

layer after layer, each on what the repaired layers before it hand on. No label is used, and the result has the
architecture it had. A layer without a bias keeps the ratio of its mean to its deviation; one whose weight another
module shares (a tied head) stays as it is.

Source: Jordan et al. 2023, REPAIR, arXiv:2211.08403. There statistics are set by inserted BatchNorms, folded in later;
here they are put into weight and bias directly. Networks with BatchNorm need no more than ``recalibrate``.
"""

import copy
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from consilience.errors import InputError
from consilience.mixing.symmetry import State
from consilience.mixing.target import run

#: A channel with less than this share of the deviation it should have says nothing that could be scaled up.
_DEAD = 1e-6
_Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
_Moments = tuple[Tensor, Tensor]


def repair(
    module: nn.Module,
    average: State,
    networks: Sequence[State],
    inputs: Any,
    *,
    weights: Sequence[float] | None = None,
    forward: Callable[[nn.Module, Any], Any] = run,
) -> dict[str, Tensor]:
    """Return ``average`` with the statistics of its linear and convolution layers set between the networks'.

    Args:
        module: the architecture; not changed.
        average: the state that is repaired; not changed.
        networks: the states it was made from, in one order of units.
        inputs: probe inputs, all in one batch.
        weights: one coefficient a network, by default all equal.
        forward: (module, inputs) -> anything.

    Raises:
        InputError: no network, or not one weight each.
    """
    alpha = [1 / len(networks)] * len(networks) if weights is None and networks else list(weights or ())
    if not networks or len(alpha) != len(networks):
        raise InputError(f"weights: {len(alpha)} for {len(networks)} networks; give one network or more, a weight each")
    wanted = [_moments(module, state, inputs, forward) for state in networks]
    between = {
        name: tuple(
            torch.stack([weight * one[name][part] for weight, one in zip(alpha, wanted, strict=True)]).sum(0)
            for part in (0, 1)
        )
        for name in wanted[0]
    }
    repaired = _loaded(module, average)
    seen: set[str] = set()

    def set_moments(name: str, layer: _Layer, output: Tensor) -> Tensor | None:
        if name in seen or name not in between:
            return None  # of a layer that is used again the first use counts
        seen.add(name)
        mean, std = _of(layer, output)
        alive = std > _DEAD * between[name][1]
        scale = torch.where(alive, between[name][1] / torch.where(alive, std, 1.0), 1.0)
        shift = between[name][0] - mean * scale if layer.bias is not None else torch.zeros_like(mean)
        layer.weight.data.mul_(_channelwise(scale, layer.weight, 0))
        if layer.bias is not None:
            layer.bias.data.mul_(scale).add_(shift)
        axis = _axis(layer, output)
        return output * _channelwise(scale, output, axis) + _channelwise(shift, output, axis)

    with torch.no_grad(), _watched(repaired, set_moments):
        forward(repaired, inputs)
    state = repaired.state_dict()
    return {name: state[name].to(value.dtype) for name, value in average.items()}


def _moments(module: nn.Module, state: State, inputs: Any, forward: Callable[..., Any]) -> dict[str, _Moments]:
    found: dict[str, _Moments] = {}
    network = _loaded(module, state)
    with torch.no_grad(), _watched(network, lambda name, layer, output: found.setdefault(name, _of(layer, output))):
        forward(network, inputs)
    return found


def _loaded(module: nn.Module, state: State) -> nn.Module:
    network = copy.deepcopy(module).eval()
    network.load_state_dict(dict(state))
    return network


def _axis(layer: _Layer, output: Tensor) -> int:
    return output.ndim - 1 if isinstance(layer, nn.Linear) else output.ndim + 1 - layer.weight.ndim


def _of(layer: _Layer, output: Tensor) -> _Moments:
    """Return mean and deviation of every output channel."""
    rows = output.movedim(_axis(layer, output), 0).flatten(1)
    return rows.mean(1), rows.std(1, correction=0)


def _channelwise(values: Tensor, like: Tensor, axis: int) -> Tensor:
    return values.view([-1 if number == axis else 1 for number in range(like.ndim)])


@contextmanager
def _watched(network: nn.Module, seen: Callable[[str, _Layer, Tensor], Any]) -> Generator[None]:
    """Call ``seen`` with every layer's name, itself and its output; what it returns, if a tensor, replaces that."""

    def hook(name: str) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        def call(layer: Any, _: Any, output: Tensor) -> Tensor | None:
            new = seen(name, layer, output)
            return new if isinstance(new, Tensor) else None

        return call

    owners = Counter(id(tensor) for part in network.modules() for tensor in part.parameters(recurse=False))
    named = network.named_modules()
    layers = [(name, part) for name, part in named if isinstance(part, _Layer) and owners[id(part.weight)] == 1]
    handles = [part.register_forward_hook(hook(name)) for name, part in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
