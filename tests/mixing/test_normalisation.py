import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from consilience.errors import InputError
from consilience.mixing.normalisation import (
    Normalisation,
    fold,
    fold_all,
    normalised_alike,
    pad_input,
    read_normalisation,
)

IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 1 / 255)
HALF = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 1 / 255)
#: The zero of HALF on another scale.
WIDE = Normalisation((0.5, 0.5, 0.5), (0.25, 0.125, 0.5), 1 / 255)


def pixels(shape: Sequence[int] = (4, 3, 8, 8), seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.float64)


def normalised(inputs: Tensor, how: Normalisation) -> Tensor:
    """The definition, not the affine form that the code folds."""
    mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (how.mean, how.std))
    return (how.rescale * inputs - mean) / std


def answers(module: nn.Module, state: dict[str, Tensor], inputs: Tensor) -> Tensor:
    held = copy.deepcopy(module)
    held.load_state_dict(state)
    with torch.no_grad():
        return held.eval()(inputs)


def stem(**options: Any) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 6, 3, **options), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)).double()


def ready(module: nn.Sequential) -> nn.Sequential:
    module(normalised(pixels(), HALF))  # gives lazy layers their shapes
    return module


positive = st.floats(0.1, 2.0)
channels = st.lists(st.tuples(st.floats(-1.0, 1.0), positive), min_size=3, max_size=3)


@st.composite
def normalisations(draw: st.DrawFn) -> Normalisation:
    values = draw(channels)
    return Normalisation(
        tuple(m for m, _ in values), tuple(s for _, s in values), draw(st.sampled_from([1.0, 1 / 255]))
    )


@settings(max_examples=25, deadline=None)
@given(normalisations(), normalisations(), st.sampled_from(["valid", "circular", "reflect", "groups", "linear"]))
def test_a_folded_expert_gives_its_answers_from_the_common_input(
    own: Normalisation, common: Normalisation, kind: str
) -> None:
    torch.manual_seed(1)
    first = {
        "valid": lambda: nn.Conv2d(3, 6, 3, stride=2),
        "circular": lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular"),
        "reflect": lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"),
        "groups": lambda: nn.Conv2d(3, 6, 2, groups=3),
        "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 6)),
    }[kind]()
    module = nn.Sequential(first, nn.Tanh()).double()
    state = module.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    folded = fold(module, state, own, common)
    assert folded.fill is None
    expected = answers(module, state, normalised(pixels(), own))
    found = answers(module, folded.state, normalised(pixels(), common))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    assert all(torch.equal(state[name], value) for name, value in before.items())


def test_zero_padding_is_refused_where_the_zero_moves_and_exact_where_it_does_not() -> None:
    module = ready(stem(padding=1))
    state = module.state_dict()
    with pytest.raises(InputError, match="layer '0': it pads with zeros"):
        fold(module, state, IMAGENET, HALF)
    with pytest.raises(InputError, match="layer '0': it pads with zeros"):
        fold(ready(stem(padding="same")), state, IMAGENET, HALF)
    folded = fold(module, state, WIDE, HALF)
    assert folded.fill is None
    expected = answers(module, state, normalised(pixels(), WIDE))
    torch.testing.assert_close(answers(module, folded.state, normalised(pixels(), HALF)), expected)


def test_padding_with_the_experts_zero_makes_the_border_exact() -> None:
    padded, bare = ready(stem(padding=(1, 2))), stem()
    state = padded.state_dict()
    ready_bare = nn.Sequential(*bare.children())
    ready_bare(pad_input(normalised(pixels(), HALF), (0.0, 0.0, 0.0), (1, 2)))
    folded = fold(padded, state, IMAGENET, HALF, border="fill")
    assert folded.fill is not None
    expected = answers(padded, state, normalised(pixels(), IMAGENET))
    inputs = normalised(pixels(), HALF)
    torch.testing.assert_close(answers(ready_bare, folded.state, pad_input(inputs, folded.fill, (1, 2))), expected)
    # The layer's own zeros would have been wrong, at the border alone.
    conv = [
        answers(nn.Sequential(net[0]), {"0.weight": s["0.weight"], "0.bias": s["0.bias"]}, x)
        for net, s, x in (
            (padded, state, normalised(pixels(), IMAGENET)),
            (padded, folded.state, inputs),
        )
    ]
    torch.testing.assert_close(conv[0][..., 1:-1, 2:-2], conv[1][..., 1:-1, 2:-2])
    assert (conv[0] - conv[1])[..., 0, :].abs().max() > 1e-2


def test_the_fill_is_the_mean_pixel_of_the_expert() -> None:
    """Zero after the expert's own normalisation is its mean pixel; the fill is that pixel in the common one."""
    folded = fold(ready(stem(padding=1)), ready(stem(padding=1)).state_dict(), IMAGENET, HALF, border="fill")
    mean = torch.tensor(IMAGENET.mean, dtype=torch.float64).view(1, 3, 1, 1) * 255
    assert folded.fill == pytest.approx(normalised(mean, HALF).flatten().tolist())


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(0, 3), st.integers(0, 3))
def test_padding_keeps_the_input_and_sets_the_rest(size: int, high: int, wide: int) -> None:
    inputs = pixels((2, 2, size, size))
    out = pad_input(inputs, (0.1, -7.0), (high, wide))
    assert out.shape == (2, 2, size + 2 * high, size + 2 * wide)
    assert torch.equal(out[:, :, high : high + size, wide : wide + size], inputs)
    for channel, value in enumerate((0.1, -7.0)):
        border = out[:, channel].clone()
        border[:, high : high + size, wide : wide + size] = value
        assert (border == value).all()


def with_norm() -> nn.Module:
    torch.manual_seed(2)
    module = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()).double()
    for _ in range(3):
        module.train()(torch.randn(8, 3, 8, 8, dtype=torch.float64))
    return module.eval()


def test_a_layer_without_bias_gives_the_shift_to_the_batch_norm_behind_it() -> None:
    module = with_norm()
    state = module.state_dict()
    with pytest.raises(InputError, match="layer '0': it has no bias"):
        fold(module, state, IMAGENET, HALF)
    with pytest.raises(InputError, match="norm: '2' is not a BatchNorm"):
        fold(module, state, IMAGENET, HALF, norm="2")
    folded = fold(module, state, IMAGENET, HALF, norm="1")
    expected = answers(module, state, normalised(pixels(), IMAGENET))
    torch.testing.assert_close(answers(module, folded.state, normalised(pixels(), HALF)), expected)
    module.load_state_dict(state)
    in_training = module.train()(normalised(pixels(), IMAGENET))
    module.load_state_dict(folded.state)
    torch.testing.assert_close(module.train()(normalised(pixels(), HALF)), in_training)


def test_experts_of_different_input_can_be_blended_after_folding() -> None:
    module = ready(stem())
    states, own = [module.state_dict(), ready(stem(stride=1)).state_dict()], [IMAGENET, HALF]
    folded = fold_all(module, states, own, HALF)
    for state, how, part in zip(states, own, folded, strict=True):
        expected = answers(module, state, normalised(pixels(), how))
        torch.testing.assert_close(answers(module, part.state, normalised(pixels(), HALF)), expected)
    assert all(torch.equal(folded[1].state[name], value) for name, value in states[1].items())
    padded = ready(stem(padding=1))
    with pytest.raises(InputError, match="no one padding is right for a blend"):
        fold_all(padded, [padded.state_dict()] * 2, own, HALF, border="fill")
    shared = fold_all(padded, [padded.state_dict()] * 2, [HALF, WIDE], IMAGENET, border="fill")  # one zero, two scales
    assert shared[0].fill == pytest.approx(shared[1].fill)


def test_low_precision_states_keep_their_dtype() -> None:
    module = ready(stem())
    folded = fold(module, {name: value.to(torch.bfloat16) for name, value in module.state_dict().items()}, HALF, WIDE)
    assert folded.state["0.weight"].dtype == torch.bfloat16


def test_normalisations_are_read_from_metadata() -> None:
    full = {
        "do_normalize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "do_resize": True,
        "size": {"height": 224, "width": 224},
        "resample": 2,
    }
    read = read_normalisation(full)
    assert (read.mean, read.std, read.rescale) == (IMAGENET.mean, IMAGENET.std, 1 / 255)
    assert dict(read.geometry) == {"do_resize": True, "size": {"height": 224, "width": 224}, "resample": 2}
    off = read_normalisation(full | {"do_normalize": False, "do_rescale": False, "do_resize": False})
    assert off == Normalisation((0.0,), (1.0,))
    assert read_normalisation({"image_mean": 0.5, "image_std": [0.5, 0.25]}).mean == (0.5, 0.5)


def test_alike_is_told_from_different_and_geometry_is_refused() -> None:
    rescaled = Normalisation((127.5,) * 3, (127.5,) * 3)
    assert normalised_alike([HALF, rescaled, Normalisation((0.5,), (0.5,), 1 / 255)])
    assert not normalised_alike([HALF, WIDE])
    sized = [Normalisation((0.5,), (0.5,), 1.0, (("size", size),)) for size in (224, 384)]
    with pytest.raises(InputError, match="expert 1: size is 384 but 224 in expert 0"):
        normalised_alike(sized)


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        ({}, "image_mean is None"),
        ({"image_mean": [0.5, "a"], "image_std": 1.0}, "image_mean is"),
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 2}, "image_mean has 3 values and image_std 2"),
        ({"image_mean": 0.5, "image_std": 0.0}, "must be above 0"),
        ({"image_mean": 0.5, "image_std": float("nan")}, "image_std is nan"),
        ({"do_normalize": False, "rescale_factor": "x"}, "rescale_factor is 'x'"),
    ],
)
def test_bad_metadata_are_refused(metadata: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        read_normalisation(metadata)


def test_bad_layers_and_channels_are_refused() -> None:
    module = ready(stem())
    state = module.state_dict()
    with pytest.raises(InputError, match="layer: '1' is not a convolution"):
        fold(module, state, IMAGENET, HALF, layer="1")
    with pytest.raises(InputError, match="2 values for an input of 3 channels"):
        fold(module, state, Normalisation((0.5, 0.4), (0.5, 0.5)), HALF)
    linear = nn.Sequential(nn.Linear(10, 2))
    with pytest.raises(InputError, match="10 inputs are not 3 channels"):
        fold(linear, linear.state_dict(), IMAGENET, HALF)
