"""The networks against published parameter counts and torch's own layers, and what is kept of them on disk."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from consilience.errors import InputError
from suites.vision import nets
from suites.vision.images import DataSet, Images
from suites.vision.nets import NetSpec
from suites.vision.vit import Layer

RESNET = NetSpec("resnet", 4, depth=8)
MOBILENET = NetSpec("mobilenet_v2", 0.125)
VIT = NetSpec("vit", 16, depth=2, patch=7, heads=4)
each_spec = pytest.mark.parametrize("spec", [RESNET, MOBILENET, VIT], ids=lambda spec: spec.kind)


def _count(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def _coloured(spec: NetSpec, size: int = 32) -> NetSpec:
    return replace(spec, channels=3, size=size, mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.mark.parametrize(("depth", "count"), [(20, 269_722), (56, 853_018), (110, 1_727_962)])
def test_resnets_have_the_published_number_of_parameters(depth: int, count: int) -> None:
    # The counts of the CIFAR-10 networks with parameter-free shortcuts: 0.27, 0.85 and 1.7 million in the paper.
    net = nets.build(_coloured(NetSpec("resnet", 16, depth=depth)))
    assert _count(net) == count
    layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == depth


def test_mobilenet_has_the_published_number_of_parameters() -> None:
    # The paper's ImageNet network has 3,504,872; its head of 1,000 classes is 1,281,000 of them, ours of ten 12,810.
    net = nets.build(_coloured(NetSpec("mobilenet_v2", 1.0)))
    assert _count(net) == 3_504_872 - 1_281_000 + 12_810


def test_a_transformer_layer_is_torchs_own() -> None:
    torch.manual_seed(0)
    ours = Layer(16, 4)
    theirs = nn.TransformerEncoderLayer(16, 4, 32, 0.0, "gelu", batch_first=True, norm_first=True)
    named: dict[str, nn.Module] = {
        "self_attn.out_proj": ours.projection,
        "linear1": ours.up,
        "linear2": ours.down,
        "norm1": ours.norm1,
        "norm2": ours.norm2,
    }
    state = {f"{name}.{key}": value for name, module in named.items() for key, value in module.state_dict().items()}
    state |= {f"self_attn.in_proj_{key}": value for key, value in ours.qkv.state_dict().items()}
    theirs.load_state_dict(state)
    x = torch.randn(3, 7, 16)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)


@each_spec
@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 3)])
def test_logits_are_the_head_of_the_features(spec: NetSpec, size: int, channels: int) -> None:
    spec = replace(spec, size=size, channels=channels, mean=(0.5,) * channels, std=(0.5,) * channels, classes=7)
    spec = replace(spec, patch=size // 4) if spec.patch else spec
    net = nets.build(spec).eval()
    images = spec.inputs(torch.randint(0, 256, (5, channels, size, size), dtype=torch.uint8))
    features, head = nets.features(net, images), net.get_submodule("head")
    assert features.shape == (5, head.in_features)
    assert torch.allclose(head(features), net(images), atol=1e-6)
    assert net(images).shape == (5, 7)


@each_spec
def test_an_image_does_not_see_the_others_of_its_batch(spec: NetSpec) -> None:
    net = nets.build(spec).eval()
    images = torch.randn(6, 1, 28, 28)
    together = net(images)
    alone = torch.cat([net(image[None]) for image in images])
    assert torch.allclose(together, alone, atol=1e-5)


@each_spec
def test_a_seed_gives_weights_and_leaves_the_random_state_alone(spec: NetSpec) -> None:
    before = torch.random.get_rng_state()
    first, again, other = (nets.build(spec, seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@each_spec
def test_a_kept_network_is_the_same_function(spec: NetSpec, tmp_path: Path) -> None:
    net = nets.build(spec, 5).eval()
    nets.save_net(tmp_path, spec, net.state_dict())
    found, loaded = nets.load_net(tmp_path)
    assert found == spec
    images = torch.randn(2, 1, 28, 28)
    assert torch.equal(net(images), loaded(images))
    assert not loaded.training


def _data(size: int = 28) -> DataSet:
    images = torch.arange(4 * size * size, dtype=torch.int64).remainder(256).to(torch.uint8).view(4, 1, size, size)
    part = Images(images, torch.arange(4))
    return DataSet("x", tuple("0123456789"), part, part)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("resnet21", {}, "a resnet has 6n + 2 layers"),
        ("resnett20", {}, "did you mean 'resnet20'?"),
        ("mobilenet_v220", {}, "no such network"),
        ("vit8", {"patch": 5}, "images of 28 pixels do not divide into it"),
        ("vit8", {"width": 30}, "does not divide into 4 heads"),
        ("vit0", {}, "at least 1 of each"),
        ("resnet20", {"width": 7.5}, "a whole number of channels"),
        ("mobilenet_v2", {"width": -1}, "must be above 0"),
    ],
)
def test_networks_that_cannot_be_are_one_line(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        nets.spec_for(name, _data(), **options)
    assert said in str(caught.value)


def test_a_specification_fits_its_data_set() -> None:
    spec = nets.spec_for("vit8", _data())
    assert (spec.kind, spec.depth, spec.size, spec.channels, spec.classes) == ("vit", 8, 28, 1, 10)
    scaled = _data().train.images.double() / 255
    assert spec.mean == pytest.approx((float(scaled.mean()),), abs=1e-4)
    assert nets.spec_for("resnet110", _data()).depth == 110
    assert nets.spec_for("mobilenet_v2", _data(), width=0.25).width == 0.25


def test_damaged_folders_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"net\.json: cannot be read"):
        nets.load_net(tmp_path)
    nets.save_net(tmp_path, RESNET, nets.build(RESNET).state_dict())
    spec = json.loads((tmp_path / "net.json").read_text())
    (tmp_path / "net.json").write_text(json.dumps(spec | {"width": 8}))
    with pytest.raises(InputError, match=r"is not of the network in net\.json"):
        nets.load_net(tmp_path)
    (tmp_path / "net.json").write_text(json.dumps(spec | {"kind": "lenet"}))
    with pytest.raises(InputError, match=r"net\.json: kind"):
        nets.load_net(tmp_path)
    (tmp_path / "net.json").write_text(json.dumps(spec | {"layers": 3}))
    with pytest.raises(InputError, match=r"net\.json: layers"):
        nets.load_net(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(InputError, match=r"model\.safetensors: cannot be read"):
        nets.read_state(tmp_path)
