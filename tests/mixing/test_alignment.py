import copy
from collections.abc import Callable
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor, nn

from consilience.errors import InputError
from consilience.mixing.alignment import Aligned, align, assign, permute
from consilience.mixing.symmetry import Symmetry, symmetry_of_axes
from consilience.mixing.symmetry_trace import symmetry_of_module


class Residual(nn.Module):
    """A block whose shortcut is nothing, a convolution, or (option A) strided pixels and zero channels."""

    def __init__(self, inputs: int, outputs: int, shortcut: str = "none") -> None:
        super().__init__()
        stride = 1 if shortcut == "none" else 2
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.down = nn.Conv2d(inputs, outputs, 1, 2) if shortcut == "conv" else None
        self.extra = outputs - inputs if shortcut == "pad" else 0

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.down is not None:
            x = self.down(x)
        if self.extra:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))
        out += x
        return F.relu(out)


class Squeeze(nn.Module):
    """Depthwise convolution, squeeze and excitation, linear bottleneck, residual."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.depth, self.bn2 = nn.Conv2d(inner, 2 * inner, 3, padding=1, groups=inner), nn.BatchNorm2d(2 * inner)
        self.squeeze, self.excite = nn.Linear(2 * inner, 5), nn.Linear(5, 2 * inner)
        self.project = nn.Conv2d(2 * inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.bn2(self.depth(F.hardswish(self.bn1(self.expand(x))))))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3))))))
        return x + self.project(y * gate[:, :, None, None])


class Dense(nn.Module):
    """Reads all that came before, concatenated."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(1, inputs), nn.Conv2d(inputs, growth, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.conv(F.gelu(self.norm(x)))), 1)


class Scaled(nn.Module):
    """A residual block of tokens with a scale a channel, written as ViT's and ConvNeXt's are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 9), nn.Linear(9, width)
        self.scale = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.down(F.gelu(self.up(self.norm(x))))


class Odd(nn.Module):
    """Operations under which channels cannot change places: all of them must be left alone."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.one(x))
        if self.kind == "shuffle":
            y = y.view(len(y), 2, 4, *y.shape[2:]).transpose(1, 2).reshape(y.shape)
        if self.kind == "flip":
            y = y.flip(1)
        if self.kind == "cumulative":
            y = y.cumsum(1)
        if self.kind == "ramp":
            y = y * torch.arange(8.0).view(8, 1, 1)
        if self.kind == "in place":
            y[:, :4] *= 2.0
        if self.kind == "part":
            y[:, :4].mul_(2.0)
        if self.kind == "norm":
            y = F.group_norm(y, 2)
        if self.kind == "grouped":
            y = F.conv2d(y, torch.ones(8, 4, 1, 1, dtype=y.dtype), groups=2)
        if self.kind == "roles":
            y = torch.cat((y[:, :4], y[:, 4:].exp()), 1)
        return self.two(y)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.blocks = nn.Conv2d(3, 6, 4, 4), nn.Sequential(Scaled(6), Scaled(6))
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.patches(x).flatten(2).transpose(1, 2))).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 64, 9), nn.LayerNorm(9), nn.GELU(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 4)
    )


def flattened() -> nn.Module:
    convolution = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.PReLU(8), nn.MaxPool2d(2))
    return nn.Sequential(*convolution, nn.Flatten(), nn.Dropout(), nn.Linear(72, 4))


def residual(shortcut: str) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), Residual(6, 6),
        Residual(6, 10, shortcut), Residual(10, 10), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 4),
    )  # fmt: skip


def narrow() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), Squeeze(6, 8), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(54, 4))


def dense() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), Dense(5, 4), Dense(9, 4), nn.Flatten(2), nn.AdaptiveAvgPool1d(2), nn.Flatten()
    )


#: Architecture and how many groups it has, counted by hand.
NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "mlp": (mlp, 2),
    "flattened": (flattened, 1),
    "stream": (lambda: nn.Sequential(*list(residual("conv").children())[:4]), 1),  # its stream is its output
    "resnet": (lambda: residual("conv"), 5),  # two streams, three blocks
    "padded": (lambda: residual("pad"), 5),  # the first stream goes on inside the second; its new channels are a group
    "squeezed": (narrow, 3),  # stream, expanded, squeezed
    "dense": (dense, 0),  # every channel reaches the output
    "tokens": (Tokens, 3),
}


def ready(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A network in float64 whose every tensor is random, running statistics included."""
    torch.manual_seed(seed)
    module = make().double().eval()
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5 if name.endswith("running_var") else torch.randn_like(value) / 3)
    return module


def example(seed: int = 7) -> Tensor:
    return torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def shuffled(symmetry: Symmetry, seed: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {group.name: random.permutation(group.size) for group in symmetry.groups}


def answer(module: nn.Module, state: dict[str, Tensor]) -> Tensor:
    held = copy.deepcopy(module)
    held.load_state_dict(state)
    with torch.no_grad():
        return held.eval()(example())


@pytest.mark.parametrize("name", NETS)
def test_a_permuted_network_computes_the_same(name: str) -> None:
    make, groups = NETS[name]
    module = ready(make)
    symmetry = symmetry_of_module(module, example())
    assert len(symmetry.groups) == groups
    state = module.state_dict()
    expected = answer(module, state)
    for seed in range(3):
        moved = permute(state, symmetry, shuffled(symmetry, seed))
        torch.testing.assert_close(answer(module, moved), expected, rtol=1e-9, atol=1e-9)
        assert groups == 0 or any(not torch.equal(moved[n], value) for n, value in state.items())


KINDS = ["shuffle", "flip", "cumulative", "ramp", "in place", "part", "norm", "grouped", "roles"]


@pytest.mark.parametrize("kind", KINDS)
def test_channels_that_cannot_change_places_are_left(kind: str) -> None:
    module = ready(lambda: Odd(kind))
    symmetry = symmetry_of_module(module, example())
    sizes = [group.size for group in symmetry.groups]
    # Written to in place are the first four alone; of two halves with unlike functions, each is a group.
    assert sizes == {"roles": [4, 4], "in place": [4], "part": [4]}.get(kind, [])
    moved = permute(module.state_dict(), symmetry, shuffled(symmetry, 1))
    torch.testing.assert_close(answer(module, moved), answer(module, module.state_dict()), rtol=1e-9, atol=1e-9)


def test_tensors_with_two_names_move_under_both() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(192, 6)
            self.one, self.two, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.two(self.one(self.first(x.flatten(1)).tanh()).tanh()))

    module = ready(Tied)
    symmetry = symmetry_of_module(module, example())
    assert [group.size for group in symmetry.groups] == [6]  # the shared weight ties all three layers' units
    moved = permute(module.state_dict(), symmetry, shuffled(symmetry))
    assert torch.equal(moved["one.weight"], moved["two.weight"])
    torch.testing.assert_close(answer(module, moved), answer(module, module.state_dict()))


@pytest.mark.parametrize("padded_first", [False, True])
def test_a_layer_used_twice_is_moved_only_as_both_uses_allow(padded_first: bool) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Linear(192, 8), nn.Linear(192, 5)
            self.shared, self.last = nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)
            given = [self.wide(x), F.pad(self.narrow(x), (0, 3))]
            one, two = (self.shared(y).tanh() for y in (given[::-1] if padded_first else given))
            return self.last(one + two)

    module = ready(Twice)
    symmetry = symmetry_of_module(module, example())
    # Five inputs of the shared layer are also the narrow layer's; where it reads zeros the wide layer's three are left.
    assert sorted(group.size for group in symmetry.groups) == [5, 6]
    moved = permute(module.state_dict(), symmetry, shuffled(symmetry))
    torch.testing.assert_close(answer(module, moved), answer(module, module.state_dict()), rtol=1e-9, atol=1e-9)


def transformer(kind: str) -> nn.Module:
    import transformers as t

    wide: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    makers: dict[str, Callable[[], Any]] = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**wide, num_key_value_heads=2, vocab_size=50)),
        "tied": lambda: t.Qwen3ForCausalLM(
            t.Qwen3Config(**wide, num_key_value_heads=2, head_dim=8, vocab_size=50, tie_word_embeddings=True)
        ),
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, bos_token_id=0, eos_token_id=0)
        ),
        "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**wide, vocab_size=50)),
        "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**wide, image_size=8, patch_size=4)),
    }
    torch.manual_seed(0)
    module = makers[kind]()
    module.config.use_cache = False
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.3)
    return module.double().eval()


#: Residual stream, heads (two queries to a key where there are half as many keys), feed-forward units, BERT's pooler.
#: ViT's stream stays: its class token is repeated along the batch as a parameter of its own.
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("llama", [2, 2, 32, 48, 48]),
        pytest.param("tied", [2, 2, 32, 48, 48], marks=pytest.mark.slow),
        pytest.param("gpt2", [4, 4, 32, 128, 128], marks=pytest.mark.slow),
        pytest.param("bert", [4, 4, 32, 32, 48, 48], marks=pytest.mark.slow),
        pytest.param("vit", [4, 4, 48, 48], marks=pytest.mark.slow),
    ],
)
def test_a_permuted_transformer_computes_the_same(kind: str, sizes: list[int]) -> None:
    module: Any = transformer(kind)
    inputs = torch.randn(2, 3, 8, 8).double() if kind == "vit" else torch.randint(0, 50, (2, 7))
    symmetry = symmetry_of_module(module, inputs)
    assert sorted(group.size for group in symmetry.groups) == sizes
    state = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.no_grad():
        expected = module(inputs).logits
        module.load_state_dict(permute(state, symmetry, shuffled(symmetry)))
        found = module(inputs).logits
    assert not torch.equal(module.state_dict()[symmetry.names[0]], state[symmetry.names[0]])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # rotary angles are in float32


def test_a_statistic_over_channels_of_unlike_roles_keeps_them_apart() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(192, 8), nn.Linear(1, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x.flatten(1))
            return self.two(torch.cat((y[:, :4], y[:, 4:].exp()), 1).mean(1, keepdim=True))

    module = ready(Halves)
    symmetry = symmetry_of_module(module, example())
    assert [group.size for group in symmetry.groups] == [4, 4]
    moved = permute(module.state_dict(), symmetry, shuffled(symmetry))
    torch.testing.assert_close(answer(module, moved), answer(module, module.state_dict()), rtol=1e-9, atol=1e-9)


def test_axes_of_several_parts_are_stated_for_all_layers_at_once() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.ModuleList([nn.Linear(192, 4), nn.Linear(192, 3)])
            self.inner, self.last = nn.ModuleList([nn.Linear(9, 6), nn.Linear(9, 6)]), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)
            one, two = (layer(x).tanh() for layer in self.first)
            given = torch.cat((two, x[:, :2], one), 1)
            return self.last(self.inner[0](given).tanh()) + self.last(self.inner[1](given).tanh())

    module = ready(Joined)
    axes: dict[str, Any] = {
        "first.*.weight": ["made.*", None],
        "first.*.bias": ["made.*"],
        "inner.*.weight": ["read", ["made.1", 2, "made.0"]],
        "inner.*.bias": ["read"],
        "last.weight": [None, "read"],
    }
    symmetry = symmetry_of_axes(axes, module.state_dict())
    assert {group.name: group.size for group in symmetry.groups} == {"made.0": 4, "made.1": 3, "read": 6}
    moved = permute(module.state_dict(), symmetry, shuffled(symmetry))
    torch.testing.assert_close(answer(module, moved), answer(module, module.state_dict()), rtol=1e-9, atol=1e-9)
    for entry, text in ((["made.1", 2], "parts stated for it have 5"), (["none", 9], "no axis of its own")):
        with pytest.raises(InputError, match=text):
            symmetry_of_axes(axes | {"inner.*.weight": ["read", entry]}, module.state_dict())


def test_the_derived_groups_are_the_stated_ones() -> None:
    module = ready(flattened)
    state = module.state_dict()
    axes = {
        "0.weight": ("c", None, None, None),
        "6.weight": (None, "c"),
        **{name: ("c",) for name in ("0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "2.weight")},
    }
    stated, found = symmetry_of_axes(axes, state), symmetry_of_module(module, example())
    assert found.groups[0].places.keys() == stated.groups[0].places.keys()
    assert all(np.array_equal(found.groups[0].places[key], held) for key, held in stated.groups[0].places.items())
    assert stated.uncompared == {"1.running_mean", "1.running_var"}


@pytest.mark.parametrize("name", [name for name, (_, groups) in NETS.items() if groups])
def test_aligning_a_permuted_copy_gives_the_original_back(name: str) -> None:
    module = ready(NETS[name][0])
    symmetry = symmetry_of_module(module, example())
    state = module.state_dict()
    found = align(state, permute(state, symmetry, shuffled(symmetry, 5)), symmetry)
    assert all(torch.equal(found.state[n], value) for n, value in state.items())
    assert found.distance == 0.0
    assert found.distance_before > 0.0


@pytest.mark.parametrize("seed", range(3))
def test_other_networks_come_closer_and_compute_the_same(seed: int) -> None:
    module, other = ready(NETS["padded"][0]), ready(NETS["padded"][0], seed + 1)
    symmetry = symmetry_of_module(module, example())
    reference, state = module.state_dict(), other.state_dict()
    found = align(reference, state, symmetry, seed=seed)
    names = [n for n in symmetry.names if n not in symmetry.uncompared]
    distances = [sum(float((reference[n] - s[n]).square().sum()) for n in names) for s in (state, found.state)]
    assert (found.distance_before, found.distance) == pytest.approx(tuple(distances))
    assert found.distance < found.distance_before
    torch.testing.assert_close(answer(other, found.state), answer(other, state), rtol=1e-9, atol=1e-9)
    # No single group can be improved any more.
    for group in symmetry.groups:
        swapped = dict(found.permutations)
        swapped[group.name] = swapped[group.name].copy()
        swapped[group.name][:2] = swapped[group.name][:2][::-1]
        worse = permute(state, symmetry, swapped)
        assert sum(float((reference[n] - worse[n]).square().sum()) for n in names) >= found.distance - 1e-9


def test_groups_take_turns_until_none_improves() -> None:
    reference = ready(NETS["resnet"][0])
    symmetry = symmetry_of_module(reference, example())
    others = [ready(NETS["resnet"][0], seed).state_dict() for seed in range(1, 5)]
    once, ended = ([align(reference.state_dict(), s, symmetry, sweeps=n).distance for s in others] for n in (1, 100))
    assert all(few >= many for few, many in zip(once, ended, strict=True))
    assert sum(once) > sum(ended)


def test_a_fine_tuned_copy_keeps_its_order() -> None:
    module = ready(NETS["resnet"][0])
    symmetry = symmetry_of_module(module, example())
    state = module.state_dict()
    near = {n: v + 0.01 * torch.randn_like(v) if v.is_floating_point() else v for n, v in state.items()}
    found = align(state, near, symmetry)
    assert all(np.array_equal(order, np.arange(len(order))) for order in found.permutations.values())
    assert all(torch.equal(found.state[n], value) for n, value in near.items())


def test_one_group_on_two_axes_is_recovered_and_never_worsened() -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner, self.last = nn.Linear(192, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x.flatten(1))
            return self.last(y + self.inner(y).tanh())

    module = ready(Stream)
    symmetry = symmetry_of_module(module, example())
    assert {key for key in symmetry.groups[0].places if key[0] == "inner.weight"} == {
        ("inner.weight", 0),
        ("inner.weight", 1),
    }
    state = module.state_dict()
    found = align(state, permute(state, symmetry, shuffled(symmetry, 2)), symmetry)
    assert found.distance == 0.0
    for seed in range(1, 5):
        worse: Aligned = align(state, ready(Stream, seed).state_dict(), symmetry)
        assert worse.distance <= worse.distance_before


def test_low_precision_states_are_moved_not_rounded() -> None:
    module = ready(mlp).to(torch.bfloat16)
    symmetry = symmetry_of_module(ready(mlp), example())
    state = module.state_dict()
    found = align(state, permute(state, symmetry, shuffled(symmetry)), symmetry)
    assert all(torch.equal(found.state[n], value) and value.dtype == torch.bfloat16 for n, value in state.items())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6).flatmap(lambda n: arrays(np.float64, (n, n), elements=st.integers(-9, 9).map(float))))
def test_assignments_are_the_best_of_all(similarity: Any) -> None:
    rows = range(len(similarity))
    found = assign(similarity)
    assert sorted(found.tolist()) == list(rows)
    best = max(sum(similarity[i, p[i]] for i in rows) for p in permutations(rows))
    assert similarity[rows, found].sum() == best


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(20, 60))
def test_planted_assignments_are_found(seed: int, n: int) -> None:
    """Prices u_i + v_j prove the planted permutation best: it alone reaches them."""
    random = np.random.default_rng(seed)
    planted = random.permutation(n)
    loss = random.random((n, n)) + 1e-3
    loss[np.arange(n), planted] = 0.0
    similarity = 10 * random.standard_normal((n, 1)) + 10 * random.standard_normal((1, n)) - loss
    assert np.array_equal(assign(similarity), planted)


def test_bad_input_is_refused_in_one_line() -> None:
    module = ready(mlp)
    state = module.state_dict()
    symmetry = symmetry_of_module(module, example())

    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else -x

    wider = {name: torch.cat((value, value)) for name, value in state.items()}
    refusals: list[tuple[Callable[[], object], str]] = [
        (lambda: symmetry_of_module(Branching(), example()), "module: cannot be traced"),
        (lambda: symmetry_of_axes({"9.weight": (None,)}, state), "'9.weight' is not in the state"),
        (lambda: symmetry_of_axes({"1.weight": ("a",)}, state), "'1.weight' has 2 axes and 1 are stated"),
        (lambda: symmetry_of_axes({"1.bias": ("a",), "4.bias": ("a",)}, state), "no multiple of the 7 units of 'a'"),
        (lambda: permute(state, symmetry, {"q": np.arange(3)}), "there is no group 'q'"),
        (lambda: permute(state, symmetry, {"p0": np.zeros(9, np.int64)}), "needs every number below 9 once"),
        (lambda: align(state, state, Symmetry(())), "no hidden units were found"),
        (lambda: align(state, {}, symmetry), "expert: '.*' is missing or too small"),
        (lambda: align(wider, state, symmetry), r"'1.bias' is \[9\] but \[18\] in the reference"),
        (lambda: align({}, state, symmetry), r"'1.bias' is \[9\] but missing in the reference"),
    ]
    for refused, text in refusals:
        with pytest.raises(InputError, match=text) as caught:
            refused()
        assert "\n" not in str(caught.value)
