from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_nets import State, fingerprint, net, scattered
from torch import Tensor, nn

from consilience.coefficients.coefficients import Alpha
from consilience.errors import InputError
from consilience.mixing import ExpertBank

GROUPINGS = ["global", "block", "module", "tensor", r"re:\.(weight|bias)$"]


def coefficients(bank: ExpertBank, count: int, seed: int = 0) -> list[Alpha]:
    generator = np.random.default_rng(seed)
    return [generator.standard_normal((len(bank.names), bank.count)) for _ in range(count)]


def explicit(states: Mapping[str, State], weights: Alpha, name: str) -> Tensor:
    """Sum in float64, an expert at a time."""
    return sum(
        (float(w) * state[name].double() for w, state in zip(weights, states.values(), strict=True)), torch.tensor(0.0)
    )


@given(experts=st.integers(1, 5), rows=st.integers(1, 4), grouping=st.sampled_from(GROUPINGS), based=st.booleans())
@settings(max_examples=25, deadline=None)
def test_blends_are_the_explicit_sums(experts: int, rows: int, grouping: str, based: bool) -> None:
    module = net(torch.float64)
    states = scattered(module, experts)
    base = scattered(module, experts + 1)[f"expert{experts}"] if based else None
    bank = ExpertBank.of(states, module, grouping=grouping, base=base)
    room = bank.room(rows + 1)
    chosen = coefficients(bank, rows)
    blends = bank.blends(chosen, room)
    assert blends.parameters.data_ptr() == room.parameters.data_ptr()
    for row, alpha in enumerate(chosen):
        for slot in bank.layout.parameters:
            weights = alpha[:, slot.index]
            expected = explicit(states, weights, slot.name)
            if base is not None:
                expected = expected + (1 - weights.sum()) * base[slot.name]
            assert torch.allclose(slot.of(blends.parameters[row]), expected, rtol=1e-12, atol=1e-12)


def test_every_tensor_has_its_group_and_tied_ones_lie_once() -> None:
    module = net()
    bank = ExpertBank.of(scattered(module, 2), module, grouping="block")
    assert [group.name for group in bank.layout.groups] == ["embed", "blocks.0", "blocks.1"]
    assert bank.numel == sum(value.numel() for value in module.parameters())
    names = [slot.names for slot in bank.layout.parameters]
    assert ("blocks.0.0.weight", "head.weight") in names
    assert {slot.name: slot.index for slot in bank.layout.buffers} == {
        "blocks.0.1.running_mean": 1, "blocks.0.1.running_var": 1,
        "blocks.1.1.running_mean": 2, "blocks.1.1.running_var": 2,
    }  # fmt: skip
    spans = [(span.start, span.stop) for span in bank.layout.spans]
    assert spans[0][0] == 0
    assert spans[-1][1] == bank.numel
    assert all(a[1] == b[0] for a, b in pairwise(spans))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_expert_comes_back_to_the_bit(dtype: torch.dtype) -> None:
    module = net(dtype)
    states = scattered(module, 1)
    bank = ExpertBank.of(states, module, grouping="tensor")
    found = bank.state(np.ones((1, bank.count)))
    assert list(found) == list(module.state_dict())
    for name, value in states["expert0"].items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
    module.load_state_dict(found)


def test_equal_experts_are_every_mixture_of_theirs() -> None:
    module = net()
    one = scattered(module, 1)["expert0"]
    bank = ExpertBank.of({name: one for name in "abc"}, module)
    for weights in np.random.default_rng(0).dirichlet(np.ones(3), 5):
        for name, value in bank.state(bank.table(weights)).items():
            assert torch.allclose(value.float(), one[name].float(), rtol=1e-6, atol=1e-6)
    assert bank.spectrum().sigma_max_centred == pytest.approx(0, abs=1e-6)


def test_integer_buffers_are_copied_and_float_buffers_blended() -> None:
    module = net(torch.float64)
    states = scattered(module, 3)
    bank = ExpertBank.of(states, module)
    weights = np.array([0.2, 0.3, 0.5])
    found = bank.state(bank.table(weights))
    counter, variance = "blocks.0.1.num_batches_tracked", "blocks.1.1.running_var"
    assert found[counter].dtype == torch.int64
    assert int(found[counter]) == 10
    assert torch.allclose(found[variance], explicit(states, weights, variance))


def test_variances_stay_positive_outside_the_hull() -> None:
    module = net()
    states = scattered(module, 2)
    bank = ExpertBank.of(states, module)
    found = bank.state(bank.table([-3.0, 4.0]))
    for name, value in found.items():
        if name.endswith("running_var"):
            least = torch.minimum(states["expert0"][name], states["expert1"][name])
            assert bool((value >= least).all())


def test_a_state_is_of_its_own_and_experts_are_never_written_to() -> None:
    module = net()
    states = scattered(module, 2)
    before, own = fingerprint(states), fingerprint({"": module.state_dict()})
    bank = ExpertBank.of(states, module)
    kept = bank.matrix.clone()
    found = bank.state(bank.table([0.5, 0.5]))
    for value in found.values():
        value.zero_()
    assert fingerprint(states) == before
    assert fingerprint({"": module.state_dict()}) == own
    assert torch.equal(bank.matrix, kept)


def test_slopes_are_inner_products_with_each_expert() -> None:
    module = net(torch.float64)
    states = scattered(module, 3)
    for base in (None, module.state_dict()):
        bank = ExpertBank.of(states, module, grouping="module", base=base)
        gradient = torch.randn(bank.numel, dtype=torch.float64)
        expected = np.zeros((3, bank.count))
        for k, state in enumerate(states.values()):
            for slot in bank.layout.parameters:
                vector = state[slot.name] - (0 if base is None else base[slot.name])
                expected[k, slot.index] += float((vector * slot.of(gradient)).sum())
        assert np.allclose(bank.slopes(gradient), expected)


def test_the_largest_singular_value_is_that_of_the_matrix() -> None:
    module = net(torch.float64)
    bank = ExpertBank.of(scattered(module, 4), module, base=module.state_dict())
    found = bank.spectrum()
    experts = bank.matrix[:4].numpy()
    assert found.sigma_max == pytest.approx(np.linalg.norm(experts, 2))
    assert found.sigma_max_centred == pytest.approx(np.linalg.norm(experts - experts.mean(0), 2))


def test_with_groups_the_matrix_is_block_diagonal() -> None:
    module = net(torch.float64)
    bank = ExpertBank.of(scattered(module, 3), module, grouping="module")
    whole = np.zeros((bank.numel, 3 * bank.count))
    for span in bank.layout.spans:
        part = slice(span.start, span.stop)
        whole[part, 3 * span.index : 3 * span.index + 3] = bank.matrix[:, part].numpy().T
    assert bank.spectrum().sigma_max == pytest.approx(np.linalg.norm(whole, 2))


def test_a_small_spread_is_not_lost_beside_a_large_mean() -> None:
    module = nn.Linear(200, 50, bias=False)
    torch.manual_seed(0)
    common = torch.randn(50, 200) * 100
    states = {name: {"weight": common + 2.0**-12 * torch.randn(50, 200)} for name in "abc"}
    bank = ExpertBank.of(states, module)
    exact = bank.matrix.double().numpy()
    expected = np.linalg.norm(exact - exact.mean(0), 2)
    assert bank.spectrum().sigma_max_centred == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("based", [False, True])
def test_distances_from_the_mean(based: bool) -> None:
    module = net(torch.float64)
    bank = ExpertBank.of(scattered(module, 3), module, grouping="block", base=module.state_dict() if based else None)
    spectrum = bank.spectrum()
    alpha = bank.table([0.5, 0.7, 0.1 if based else -0.2])
    alpha[:2, 1] += [0.3, 0.5 if based else -0.3]
    mean = bank.matrix[:3].mean(0)
    expected = float((bank.blends([alpha]).parameters[0] - mean).norm())
    assert spectrum.distance(alpha) == pytest.approx(expected)
    assert spectrum.spread**2 == pytest.approx(float((bank.matrix[:3] - mean).square().sum()) / 3)


def broken(**changes: Any) -> dict[str, State]:
    states = scattered(net(), 2)
    for name, value in changes.items():
        key = name.replace("__", ".")
        if value is None:
            del states["expert1"][key]
        else:
            states["expert1"][key] = value(states["expert1"].get(key))
    return states


def nan_at_0(value: Tensor) -> Tensor:
    value = value.clone()
    value.view(-1)[0] = float("nan")
    return value


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ({}, "there are none"),
        (broken(embed__weight=None), "expert 'expert1': has no 'embed.weight'"),
        (broken(blocks__0__1__num_batches_tracked=None), "has no 'blocks.0.1.num_batches_tracked'"),
        (broken(extra=lambda _: torch.zeros(1)), "has 'extra', which the module has not"),
        (broken(embed__weight=lambda value: value.T), r"'embed.weight' is \[5, 6\], and the module's is \[6, 5\]"),
        (broken(embed__weight=lambda value: value.to(torch.int8)), "is torch.int8, not floating point"),
        (broken(embed__bias=nan_at_0), "'embed.bias' holds NaN or Inf"),
        (broken(head__weight=lambda value: value + 1), "are one tensor in the module and differ here"),
    ],
)
def test_experts_that_do_not_fit_are_refused_in_one_line(states: dict[str, State], message: str) -> None:
    with pytest.raises(InputError, match=message) as found:
        ExpertBank.of(states, net())
    assert "\n" not in str(found.value)


def test_a_tied_tensor_may_be_stored_under_either_name() -> None:
    states = broken(head__weight=None)
    bank = ExpertBank.of(states, net())
    assert "head.weight" in bank.state(bank.table([0.5, 0.5]))


@pytest.mark.parametrize("module", [nn.ReLU(), nn.ParameterList([torch.zeros(2, dtype=torch.complex64)])])
def test_modules_without_real_weights_are_refused(module: nn.Module) -> None:
    with pytest.raises(InputError, match="module: "):
        ExpertBank.of({"a": module.state_dict()}, module)


def test_points_of_another_shape_are_refused() -> None:
    module = net()
    bank = ExpertBank.of(scattered(module, 2), module)
    with pytest.raises(ValueError, match="shape"):
        bank.blends([np.ones((3, 1))])
    with pytest.raises(ValueError, match="room"):
        bank.blends([np.ones((2, 1))] * 2, bank.room(1))
