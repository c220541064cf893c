"""The suite's networks, made from a small specification that is kept beside their weights.

Every network maps normalised images, float32 [B, C, H, W], to logits [B, classes]; ``features`` gives what its head,
a linear layer named ``head``, sees.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from consilience.errors import InputError, nearest
from consilience.workdir import write_file
from suites.vision.images import DataSet, channel_statistics, normalised
from suites.vision.mobilenet import MobileNetV2
from suites.vision.resnet import ResNet
from suites.vision.vit import ViT

WEIGHTS, SPEC = "model.safetensors", "net.json"
StateDict = dict[str, Tensor]

#: Networks by name: kind, depth and width (channels, multiplier or tokens' width). Depths and widths can be changed.
NAMES = ("resnet20", "resnet56", "resnet110", "mobilenet_v2", "vit8")


class Net(Protocol):
    """What every network of the suite offers beyond being an ``nn.Module``."""

    head: nn.Linear

    def features(self, images: Tensor) -> Tensor:
        """Map images to what the head sees, [B, d]."""
        ...


@dataclass(frozen=True)
class NetSpec:
    """Everything a network is made from, its weights apart.

    ``width`` is the channels of the first stage (resnet), the multiplier (mobilenet_v2) or the tokens' width (vit);
    ``depth`` the layers (resnet: 6n + 2; vit); ``patch`` and ``heads`` are the transformer's. ``mean`` and ``std``, by
    channel on the scale 0 to 1, are those its images are normalised with.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    kind: Literal["resnet", "mobilenet_v2", "vit"]
    width: float
    depth: int = 0
    patch: int = 0
    heads: int = 0
    size: int = 28
    channels: int = 1
    classes: int = 10
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)

    def inputs(self, images: Tensor) -> Tensor:
        """Normalise uint8 images [N, C, H, W] into what the network takes, float32."""
        return normalised(images, self.mean, self.std)


def spec_for(
    name: str, data: DataSet, *, width: float | None = None, depth: int | None = None, patch: int | None = None
) -> NetSpec:
    """Return the specification of the network ``name`` (``resnet20``, ``mobilenet_v2``, ``vit8``, ...) for a data set.

    Args:
        name: a kind, with the depth written at its end where it has one.
        data: gives channels, size, classes and, from its training images, mean and standard deviation.
        width: instead of 16 (resnet), 0.25 (mobilenet_v2) or 64 (vit).
        depth: instead of the one in the name.
        patch: instead of a quarter of the image's size (vit).

    Raises:
        InputError: no such network, or one that does not fit the images.
    """
    match = re.fullmatch(r"(resnet|vit)(\d{1,4})|(mobilenet_v2)", name)
    if not match:
        raise InputError(f"{name}: no such network{nearest(name, NAMES)}; there are {', '.join(NAMES)}")
    mean, std = channel_statistics(data.train.images)
    kind = cast(Literal["resnet", "mobilenet_v2", "vit"], match[1] or match[3])
    spec = NetSpec(
        kind,
        {"resnet": 16.0, "mobilenet_v2": 0.25, "vit": 64.0}[kind] if width is None else width,
        depth=0 if kind == "mobilenet_v2" else int(match[2]) if depth is None else depth,
        patch=0 if kind != "vit" else max(1, data.size // 4) if patch is None else patch,
        heads=4 if kind == "vit" else 0,
        size=data.size,
        channels=data.channels,
        classes=len(data.classes),
        mean=mean,
        std=std,
    )
    _check(spec)
    return spec


def _check(spec: NetSpec) -> None:
    if len(spec.mean) != spec.channels or len(spec.std) != spec.channels or min(spec.std, default=0) <= 0:
        raise InputError(f"mean, std: {spec.channels} channels need as many of each, and std above 0")
    if min(spec.channels, spec.classes, spec.size) < 1 or spec.width <= 0:
        raise InputError("width, size, channels, classes: each must be above 0; mend the network's specification")
    if spec.kind == "resnet" and (spec.depth < 8 or spec.depth % 6 != 2):
        raise InputError(f"depth={spec.depth}: a resnet has 6n + 2 layers; choose 20, 56 or 110")
    if spec.kind != "mobilenet_v2" and spec.width != int(spec.width):
        raise InputError(f"width={spec.width}: a {spec.kind} has a whole number of channels; choose one")
    if spec.kind == "vit":
        _check_vit(spec)


def _check_vit(spec: NetSpec) -> None:
    if spec.depth < 1 or spec.heads < 1 or spec.patch < 1:
        raise InputError("depth, heads, patch: a vit needs at least 1 of each; mend the network's specification")
    if spec.size % spec.patch:
        raise InputError(f"patch={spec.patch}: images of {spec.size} pixels do not divide into it; choose a divisor")
    if spec.width % spec.heads:
        raise InputError(f"width={spec.width:g}: does not divide into {spec.heads} heads; choose a multiple")


def build(spec: NetSpec, seed: int = 0) -> nn.Module:
    """Make the network with weights drawn from ``seed`` (the caller's random state is left as it was).

    Raises:
        InputError: the specification contradicts itself.
    """
    _check(spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if spec.kind == "resnet":
            return ResNet(spec.depth, int(spec.width), spec.channels, spec.classes)
        if spec.kind == "mobilenet_v2":
            return MobileNetV2(spec.width, spec.channels, spec.classes)
        return ViT(spec.depth, int(spec.width), spec.heads, spec.patch, spec.size, spec.channels, spec.classes)


def features(net: nn.Module, images: Tensor) -> Tensor:
    """Return what the head of one of the suite's networks sees, [B, d]."""
    return cast(Net, net).features(images)


def save_net(folder: Path, spec: NetSpec, state: StateDict) -> None:
    """Write ``net.json`` and then ``model.safetensors`` into ``folder``, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / SPEC, (json.dumps(asdict(spec), indent=2) + "\n").encode())
    write_file(folder / WEIGHTS, save({name: tensor.contiguous() for name, tensor in state.items()}))


def read_spec(folder: Path) -> NetSpec:
    """Return the specification kept in ``folder``.

    Raises:
        InputError: ``net.json`` is missing or damaged.
    """
    path = folder / SPEC
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a folder of the vision suite") from None
    try:
        return TypeAdapter(NetSpec).validate_json(raw)
    except ValidationError as error:
        first: Any = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        raise InputError(f"{path}: {key}: {first['msg']}; delete its folder and train it again") from None


def read_state(folder: Path) -> StateDict:
    """Return the weights and buffers kept in ``folder``.

    Raises:
        InputError: ``model.safetensors`` is missing or damaged.
    """
    path = folder / WEIGHTS
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read ({error}); delete its folder and train it again") from None


def load_net(folder: Path) -> tuple[NetSpec, nn.Module]:
    """Return a trained network of ``folder`` and its specification, in evaluation mode.

    Raises:
        InputError: a file is missing or damaged, or the weights are of another network.
    """
    spec, state = read_spec(folder), read_state(folder)
    net = build(spec)
    try:
        net.load_state_dict(state)
    except RuntimeError:
        mend = "delete its folder and train it again"
        raise InputError(f"{folder / WEIGHTS}: is not of the network in {SPEC}; {mend}") from None
    return spec, net.eval()
