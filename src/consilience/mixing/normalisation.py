"""Experts that normalise their input differently, brought to one common normalisation by their first layer's weights.

    expert k sees u_k = s_k p + t_k of the pixels p (per channel: s = rescale / std, t = -mean / std)
    given u = s p + t instead:  u_k = g u + h  with g = s_k / s,  h = t_k - g t
    first layer W u_k + b  =  W' u + b',   W' = W g,   b' = b + sum over the layer's window of W h

Blending first layers that expect different inputs would blend answers to different questions; after folding all of them
expect the same.

The borders of a convolution that pads with zeros are not of this form: a zero of u_k is the pixel -t_k / s_k, another
one for every mean. Only where h = 0 (the same zero) is folding exact there. Otherwise it is refused, or the input has
to be padded before the layer with the value of u that means zero to the expert (``border="fill"``).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from consilience.errors import InputError

Border = Literal["refuse", "fill"]

#: Keys that change which pixels there are: no weights make up for a difference in them.
_GEOMETRY = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "crop_pct", "do_pad", "pad_size")
#: Shifts below this are rounding in the metadata's decimal numbers (mean and std are read as float64).
_ZERO = 1e-12

_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


@dataclass(frozen=True)
class Normalisation:
    """What is done to pixels before the first layer: ``(rescale * pixel - mean) / std``, per channel.

    ``geometry`` holds resizing, cropping and padding as the metadata state them, without what is switched off.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale: float = 1.0
    geometry: tuple[tuple[str, Any], ...] = ()

    @property
    def scale(self) -> tuple[float, ...]:
        """``s`` of ``u = s p + t``."""
        return tuple(self.rescale / std for std in self.std)

    @property
    def shift(self) -> tuple[float, ...]:
        """``t`` of ``u = s p + t``."""
        return tuple(-mean / std for mean, std in zip(self.mean, self.std, strict=True))


@dataclass(frozen=True)
class Folded:
    """An expert's state for another normalisation; ``fill`` is what its first layer's input must be padded with.

    ``fill`` is None where the layer pads as it did. Otherwise the layer's own padding must be off, and the input padded
    by ``pad_input``.
    """

    state: dict[str, Tensor]
    fill: tuple[float, ...] | None = None


def read_normalisation(metadata: Mapping[str, Any], where: str = "preprocessor_config.json") -> Normalisation:
    """Read a normalisation from an image processor's metadata.

    Args:
        metadata: ``image_mean``, ``image_std`` (a number, or one a channel), ``rescale_factor`` and the switches
            ``do_normalize`` and ``do_rescale``, both on where absent; geometry by the keys of ``transformers``.
        where: what errors name.

    Raises:
        InputError: mean or std is missing, of unequal length, not finite, or a std or factor is not above 0.
    """
    mean, std = (0.0,), (1.0,)
    if metadata.get("do_normalize", True):
        mean, std = (_numbers(metadata, key, where) for key in ("image_mean", "image_std"))
        length = max(len(mean), len(std))
        mean, std = (values * length if len(values) == 1 else values for values in (mean, std))
        if len(mean) != len(std):
            raise InputError(f"{where}: image_mean has {len(mean)} values and image_std {len(std)}; give one a channel")
    rescale = 1.0
    if metadata.get("do_rescale", True):
        rescale = _numbers({"rescale_factor": 1 / 255} | dict(metadata), "rescale_factor", where)[0]
    if not (min(std) > 0 and rescale > 0):
        raise InputError(f"{where}: image_std and rescale_factor must be above 0; correct the file")
    return Normalisation(mean, std, rescale, _geometry(metadata))


def _numbers(metadata: Mapping[str, Any], key: str, where: str) -> tuple[float, ...]:
    value = metadata.get(key)
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    held = tuple(float(v) for v in values if isinstance(v, int | float) and math.isfinite(v))
    if not held or len(held) != len(values):
        raise InputError(f"{where}: {key} is {value!r}; give a number, or one a channel")
    return held


def _geometry(metadata: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    off = {
        key
        for switch, keys in (
            ("do_resize", ("do_resize", "size", "resample", "crop_pct")),
            ("do_center_crop", ("do_center_crop", "crop_size")),
            ("do_pad", ("do_pad", "pad_size")),
        )
        if metadata.get(switch) is False
        for key in keys
    }
    return tuple((key, metadata[key]) for key in _GEOMETRY if metadata.get(key) is not None and key not in off)


def normalised_alike(normalisations: Sequence[Normalisation]) -> bool:
    """Return whether all experts normalise alike, so that nothing has to be folded.

    Raises:
        InputError: resizing, cropping or padding differ: no weights make up for that.
    """
    first = normalisations[0]
    for number, other in enumerate(normalisations):
        mine, theirs = dict(first.geometry), dict(other.geometry)
        for key in _GEOMETRY:
            if mine.get(key) != theirs.get(key):
                raise InputError(
                    f"expert {number}: {key} is {theirs.get(key)!r} but {mine.get(key)!r} in expert 0; no weights "
                    "make up for other geometry: fine-tune the experts on one, or mix their outputs"
                )
    return all(_same(first, other) for other in normalisations)


def _same(one: Normalisation, other: Normalisation) -> bool:
    gain, shift = _change(one, other, max(len(one.mean), len(other.mean)))
    return all(math.isclose(g, 1.0, rel_tol=_ZERO) for g in gain) and not any(shift)


def _change(own: Normalisation, common: Normalisation, channels: int) -> tuple[list[float], list[float]]:
    """Return g and h with ``u_own = g u_common + h``, one a channel."""
    wide = [
        values * channels if len(values) == 1 else values
        for values in (own.scale, own.shift, common.scale, common.shift)
    ]
    if any(len(values) != channels for values in wide):
        lengths = sorted({len(values) for values in wide} - {channels})
        raise InputError(f"image_mean: {lengths[0]} values for an input of {channels} channels; give one a channel")
    gain = [own_s / s for own_s, s in zip(wide[0], wide[2], strict=True)]
    shift = [own_t - g * t for own_t, g, t in zip(wide[1], gain, wide[3], strict=True)]
    return gain, [h if abs(h) > _ZERO * max(1.0, abs(t)) else 0.0 for h, t in zip(shift, wide[1], strict=True)]


def fold_all(
    module: nn.Module,
    states: Sequence[Mapping[str, Tensor]],
    normalisations: Sequence[Normalisation],
    common: Normalisation,
    *,
    layer: str | None = None,
    norm: str | None = None,
    border: Border = "refuse",
) -> list[Folded]:
    """Fold every expert (see ``fold``) so that all take input of the ``common`` normalisation and can be blended.

    Raises:
        InputError: geometries differ, or the borders of two experts need different padding: no one input has both.
    """
    normalised_alike([*normalisations, common])
    folded = [
        fold(module, state, own, common, layer=layer, norm=norm, border=border)
        for state, own in zip(states, normalisations, strict=True)
    ]
    if not all(_alike(part.fill, folded[0].fill) for part in folded):
        raise InputError(
            "experts: their first convolutions pad with zeros that mean different pixels, so no one padding is right "
            "for a blend; give them one mean (fine-tune on it), or mix their outputs"
        )
    return folded


def _alike(one: tuple[float, ...] | None, other: tuple[float, ...] | None) -> bool:
    if one is None or other is None:
        return one is other
    return all(math.isclose(a, b, rel_tol=_ZERO, abs_tol=_ZERO) for a, b in zip(one, other, strict=True))


def fold(
    module: nn.Module,
    state: Mapping[str, Tensor],
    own: Normalisation,
    common: Normalisation,
    *,
    layer: str | None = None,
    norm: str | None = None,
    border: Border = "refuse",
) -> Folded:
    """Return the expert's state for input of the ``common`` normalisation: the same answers, from other input.

    Args:
        module: the architecture; only its layers' kinds are read.
        state: the expert's tensors; not changed. The first layer's are computed in float64 and keep their dtype.
        own: what the expert was trained with.
        common: what it will be given.
        layer: name of the first layer (a convolution, or a linear layer over flattened [channels, ...]); None: the
            first of those kinds in the module's order.
        norm: the BatchNorm right behind a first layer without bias: its running mean takes up the shift. Exact in
            eval mode; in train mode batch statistics remove a shift anyway.
        border: what to do where the layer pads with zeros that mean other pixels: "refuse", or "fill", which returns
            the value that the input must be padded with instead (see ``pad_input``).

    Raises:
        InputError: no such layer, a shift that has no bias to go to, a border that is not exact under "refuse", or
            numbers of channels that do not meet.
    """
    name, first = _first(module, layer)
    weight = state[f"{name}.weight"]
    channels = _channels(first, max(len(own.mean), len(common.mean)), name)
    gain, shift = _change(own, common, channels)
    fill = _fill(name, first, gain, shift, border)
    wide = weight.to(torch.float64)
    held = dict(state)
    held[f"{name}.weight"] = (wide * _along(first, weight, gain)).to(weight.dtype)
    if any(shift):
        offset = (wide * _along(first, weight, shift)).flatten(1).sum(1)
        target, sign = _taker(module, held, name, norm)
        held[target] = (held[target].to(torch.float64) + sign * offset).to(held[target].dtype)
    return Folded(held, fill)


def pad_input(inputs: Tensor, fill: Sequence[float], padding: Sequence[int]) -> Tensor:
    """Pad [n, channels, ...] by ``padding[i]`` on both sides of spatial axis i with one value a channel."""
    sides = [side for width in reversed(padding) for side in (width, width)]
    values = torch.tensor(fill, dtype=inputs.dtype, device=inputs.device).view(-1, *[1] * len(padding))
    # Exact: x - v + v would round.
    inside = nn.functional.pad(torch.ones_like(inputs[:1, :1], dtype=torch.bool), sides)
    return torch.where(inside, nn.functional.pad(inputs, sides), values)


def _first(module: nn.Module, layer: str | None) -> tuple[str, _Convolution | nn.Linear]:
    parts = dict(module.named_modules())
    name = (
        next((n for n, p in parts.items() if isinstance(p, _Convolution | nn.Linear)), "") if layer is None else layer
    )
    part = parts.get(name)
    if not isinstance(part, _Convolution | nn.Linear):
        raise InputError(f"layer: {name!r} is not a convolution or linear layer of the module; name the first one")
    return name, part


def _channels(first: _Convolution | nn.Linear, stated: int, name: str) -> int:
    if not isinstance(first, nn.Linear):
        return first.in_channels
    if first.in_features % stated:
        raise InputError(f"layer {name!r}: {first.in_features} inputs are not {stated} channels of equal size")
    return stated


def _along(first: _Convolution | nn.Linear, weight: Tensor, values: list[float]) -> Tensor:
    """Return one value a channel in a shape that multiplies the layer's weight."""
    channels = torch.tensor(values, dtype=torch.float64, device=weight.device)
    if isinstance(first, nn.Linear):
        return channels.repeat_interleave(first.in_features // len(values))[None]
    # Group i of the outputs reads group i of the channels.
    grouped = channels.view(first.groups, 1, -1).expand(-1, first.out_channels // first.groups, -1)
    return grouped.reshape(first.out_channels, -1, *[1] * (weight.ndim - 2))


def _fill(
    name: str, first: _Convolution | nn.Linear, gain: list[float], shift: list[float], border: Border
) -> tuple[float, ...] | None:
    """Return what to pad the input with, None where the layer's own padding is exact."""
    if isinstance(first, nn.Linear) or first.padding_mode != "zeros" or not any(shift):
        return None
    padded = first.padding not in ("valid",) and any(cast(tuple[Any, ...], (*first.padding,)))
    if not padded:
        return None
    if border == "fill":
        return tuple(-h / g for h, g in zip(shift, gain, strict=True))
    raise InputError(
        f"layer {name!r}: it pads with zeros, and zero means another pixel under the common mean, so its borders would "
        'change; keep the expert\'s mean, or pad the input yourself (border="fill")'
    )


def _taker(module: nn.Module, state: Mapping[str, Tensor], name: str, norm: str | None) -> tuple[str, int]:
    """Return the tensor that takes up the shift of the layer's output, and the sign it takes it with."""
    if f"{name}.bias" in state:
        return f"{name}.bias", 1
    if norm is None:
        raise InputError(
            f"layer {name!r}: it has no bias to take up another mean; name the BatchNorm right behind it (norm=...), "
            "or give the layer a bias of zeros"
        )
    part = dict(module.named_modules()).get(norm)
    if not isinstance(part, _BatchNorm) or f"{norm}.running_mean" not in state:
        raise InputError(f"norm: {norm!r} is not a BatchNorm with running statistics; name the one behind {name!r}")
    return f"{norm}.running_mean", -1
