from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from consilience.errors import InputError
from consilience.mixing.shared_parts import graft, mix_shared, shared_parts


class Net(nn.Module):
    """A stem, blocks, and a head; experts differ in depth, classes and biases."""

    def __init__(self, depth: int = 2, classes: int = 3, bias: bool = True) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, bias=bias), nn.BatchNorm2d(4))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) for _ in range(depth))
        self.head = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x).relu()
        return self.head(x.mean((2, 3)))


def state(seed: int, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return Net(**options).state_dict()


def test_the_longest_shared_modules_are_found() -> None:
    states = [state(0), state(1, depth=3), state(2, classes=5)]
    found = shared_parts(states)
    assert found.parts == ("stem", "blocks.0", "blocks.1")
    expected = {n for n in states[0] if n.startswith(("stem.", "blocks.0.", "blocks.1."))}
    assert set(found.names) == expected
    assert set(found.unshared) == {"blocks.2.0", "blocks.2.1", "head"}
    assert found.unshared["head"] == "weight is [5, 4] in expert 2 and [3, 4] in expert 0"
    assert found.unshared["blocks.2.0"] == "weight is missing in expert 0, 2"
    assert found.numel == sum(states[0][name].numel() for name in expected)
    assert found.totals == tuple(sum(v.numel() for v in s.values()) for s in states)
    lines = found.describe()
    assert lines[0].startswith("shared: stem, blocks.0, blocks.1: 21 tensors")
    assert len(lines) == 4


def test_a_module_is_shared_whole_or_not_at_all() -> None:
    found = shared_parts([state(0), state(1, bias=False)])
    assert found.parts == ("stem.1", "blocks", "head")
    assert found.unshared == {"stem.0": "bias is missing in expert 1"}
    assert "stem.0.weight" not in found.names


def test_experts_of_one_architecture_share_everything() -> None:
    found = shared_parts([state(0), state(1)])
    assert found.parts == ("",)
    assert found.names == tuple(state(0))
    assert not found.unshared


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-1, 2), min_size=3, max_size=3), st.integers(0, 2))
def test_shared_tensors_are_mixed_and_the_rest_is_the_kept_experts(alpha: list[float], keep: int) -> None:
    states = [state(0), state(1, depth=3), state(2, classes=5)]
    mixed, found = mix_shared(states, np.array(alpha), keep)
    assert list(mixed) == list(states[keep])
    for name, value in mixed.items():
        if name in found.names and value.is_floating_point():
            expected = sum(a * s[name].numpy().astype(np.float64) for a, s in zip(alpha, states, strict=True))
            np.testing.assert_allclose(value.numpy(), expected, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(value, states[keep][name])
    shapes: tuple[dict[str, Any], ...] = ({}, {"depth": 3}, {"classes": 5})
    Net(**shapes[keep]).load_state_dict(mixed)


def test_grafted_experts_load_into_one_architecture_and_mix_like_any() -> None:
    states = [state(0), state(1, depth=3), state(2, classes=5)]
    grafted, found = graft(states, 1)
    for own, new in zip(states, grafted, strict=True):
        Net(depth=3).load_state_dict(new)
        assert all(new[name] is (own[name] if name in found.names else states[1][name]) for name in new)
    alpha = np.array([0.2, 0.5, 0.3])
    blended = {n: sum(a * s[n] for a, s in zip(alpha, grafted, strict=True)) for n in grafted[0]}
    for name, value in mix_shared(states, alpha, 1)[0].items():
        if value.is_floating_point():
            torch.testing.assert_close(torch.as_tensor(blended[name]), value)


def test_a_vertex_is_the_expert_bit_for_bit_and_inputs_are_unchanged() -> None:
    states = [{n: v.to(torch.bfloat16) if v.is_floating_point() else v for n, v in state(k).items()} for k in range(3)]
    before = [{n: v.clone() for n, v in s.items()} for s in states]
    mixed, _ = mix_shared(states, np.array([[0.0], [1.0], [0.0]]), 1)
    assert all(torch.equal(mixed[n], v) and mixed[n].dtype == v.dtype for n, v in states[1].items())
    assert all(torch.equal(s[n], v) for s, b in zip(states, before, strict=True) for n, v in b.items())


def test_bad_input_is_refused_in_one_line() -> None:
    one = state(0)
    other = {f"body.{name}": value for name, value in one.items()}
    wider = {"0.weight": torch.zeros(3, 2), "n": torch.tensor(1)}
    refusals: list[tuple[Callable[[], object], str]] = [
        (lambda: shared_parts([one]), "1 given; two or more"),
        (lambda: shared_parts([one, other]), "no module is the same in all of them .stem.0: weight is missing"),
        (lambda: shared_parts([wider, wider | {"0.weight": torch.zeros(2, 2)}]), r"\[2, 2\] in expert 1 and \[3, 2\]"),
        (lambda: shared_parts([wider, wider | {"0.weight": torch.zeros(3, 2).long()}]), "torch.int64 in expert 1"),
        (lambda: shared_parts([{}, {}]), "there are no tensors"),
        (lambda: graft([one, one], 2), "there is no expert 2"),
        (lambda: mix_shared([one, one], np.ones(3), 0), "3 coefficients for 2 experts"),
        (lambda: mix_shared([one, one], np.array([1.0, np.nan]), 0), "one finite number"),
    ]
    for refused, text in refusals:
        with pytest.raises(InputError, match=text) as caught:
            refused()
        assert "\n" not in str(caught.value)
