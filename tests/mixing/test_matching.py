"""Matching reports what it did, by independent formulas; what it cannot show it says."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import consilience as cs
from consilience.errors import InputError
from consilience.mixing import repair
from consilience.mixing.alignment import permute
from consilience.mixing.matching import AlignedModel, AlignmentReport, Line, midpoint
from consilience.mixing.symmetry import symmetry_of_axes

AXES: dict[str, Any] = {"0.weight": ["hidden", None], "0.bias": ["hidden"], "2.weight": [None, "hidden"]}


def network(seed: int = 0, width: int = 12) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3)).double()


def inputs(rows: int = 40) -> Tensor:
    return torch.randn(rows, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


def aligned(*arguments: Any, **settings: Any) -> AlignedModel:
    found = cs.align(*arguments, **settings)
    assert isinstance(found, AlignedModel)
    return found


def flat(state: Any) -> Tensor:
    return torch.cat([state[name].flatten() for name in AXES])


@pytest.mark.parametrize("stated", [None, AXES])
def test_figures_are_their_formulas(stated: Any) -> None:
    one, other, x = network(1), network(2), inputs()
    labels = torch.arange(len(x)) % 3
    found = aligned(one, other, inputs=x, labels=labels, axes=stated)
    report, ours, theirs = found.report, flat(one.state_dict()), [flat(s) for s in (other.state_dict(), found.state)]
    cosines = [float(ours @ vector / ours.norm() / vector.norm()) for vector in theirs]
    assert [report.cosine_before, report.cosine] == pytest.approx(cosines)
    distances = [float((ours - vector).square().sum()) for vector in theirs]
    assert [report.distance_before, report.distance] == pytest.approx(distances)
    assert report.distance < report.distance_before
    assert (report.groups, report.units, report.tensors, report.elements) == (1, 12, 3, 12 * 5 + 12 + 36)
    assert report.changed is not None
    assert report.changed < 1e-12

    def loss(state: Any) -> float:
        module = network()
        module.load_state_dict(state)
        with torch.no_grad():
            return float(nn.functional.cross_entropy(module(x), labels))

    line = report.line
    assert line is not None
    ends = [loss(one.state_dict()), loss(other.state_dict())]
    middles = [loss({n: (one.state_dict()[n] + s[n]) / 2 for n in s}) for s in (other.state_dict(), found.state)]
    assert [line.base, line.model, line.midpoint_before, line.midpoint] == pytest.approx([*ends, *middles])
    assert line.barrier == pytest.approx(middles[1] - sum(ends) / 2)
    assert AlignmentReport.from_dict(report.to_dict()) == report


def test_without_labels_the_divergence_from_the_ends_is_measured() -> None:
    one, other, x = network(1), network(2), inputs()
    line = aligned(one, other, inputs=x).report.line
    assert line is not None
    p, q = (module(x).softmax(-1) for module in (one, other))
    mean = (p + q) / 2
    kl = [float((mean * (mean / end).log()).sum(-1).mean().detach()) for end in (p, q)]
    assert line.measure == "divergence"
    assert [line.base, line.model] == pytest.approx(kl)


def test_a_reordered_copy_is_found_and_may_be_merged() -> None:
    module = network()
    order = np.random.default_rng(0).permutation(12)
    state = permute(module.state_dict(), symmetry_of_axes(AXES, module.state_dict()), {"hidden": order})
    found = aligned(module.state_dict(), state, module=module, inputs=inputs())
    assert all(torch.equal(found.state[name], value) for name, value in module.state_dict().items())
    assert found.report.line is not None
    assert found.report.line.barrier_before > found.report.line.barrier == pytest.approx(0, abs=1e-12)
    assert "merge the aligned model" in found.report.verdict
    assert "one order already" in aligned(module, module, inputs=inputs()).report.verdict


def test_verdicts_follow_the_barrier() -> None:
    report = aligned(network(1), network(2), axes=AXES, inputs=inputs()).report
    line = Line("loss", 1.0, 1.0, 3.0, 2.0)
    assert "removes 50% of the barrier" in replace(report, line=line).verdict
    assert "does not help" in replace(report, line=replace(line, midpoint=3.5)).verdict
    assert "as good as the ends" in replace(report, line=replace(line, midpoint=0.9)).verdict
    assert "not measured" in replace(report, line=None).verdict
    assert any("not checked" in text for text in replace(report, changed=None).lines())


def test_networks_with_other_heads_are_matched_on_what_they_share() -> None:
    torch.manual_seed(3)
    other = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 7)).double()
    report = aligned(network(1), other, inputs=inputs()).report
    assert report.tensors == 2
    assert report.line is None
    assert report.unshared == ("2: weight is [7, 12] in expert 1 and [3, 12] in expert 0",)


def deviation(values: Tensor, axes: Any) -> Tensor:
    return values.std(axes, correction=0)


def test_repair_sets_the_statistics_between_the_networks() -> None:
    one, other, x = network(1), network(2), inputs()
    states = [module.state_dict() for module in (one, other)]
    average = midpoint(*states)
    kept = copy.deepcopy(average)
    fixed = network()
    fixed.load_state_dict(repair(network(), average, states, x, weights=[0.25, 0.75]))
    assert all(torch.equal(average[name], value) for name, value in kept.items())
    for depth in (1, 3):
        ends = [module[:depth](x) for module in (one, other)]
        found = fixed[:depth](x)
        for moment in (torch.mean, deviation):
            torch.testing.assert_close(moment(found, 0), 0.25 * moment(ends[0], 0) + 0.75 * moment(ends[1], 0))
    same = repair(one, states[0], [states[0]], x)
    assert all(torch.allclose(same[name], value) for name, value in states[0].items())


def test_repair_handles_convolutions_and_layers_without_bias() -> None:
    def convolution(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 3, 1))

    x = torch.randn(6, 2, 5, 5)
    states = [convolution(seed).state_dict() for seed in (1, 2)]
    fixed = convolution(0)
    fixed.load_state_dict(repair(convolution(0), midpoint(*states), states, x))
    deviations = [deviation(convolution(seed)(x), (0, 2, 3)) for seed in (1, 2)]
    torch.testing.assert_close(deviation(fixed(x), (0, 2, 3)), (deviations[0] + deviations[1]) / 2)


def test_bad_input_is_refused_in_one_line() -> None:
    one, x = network(), inputs()
    state = one.state_dict()
    call: Any = cs.align
    refusals: list[tuple[Callable[[], object], str]] = [
        (lambda: call(state, state), "pass module= and inputs=, or state the axes"),
        (lambda: call(state, "path"), "must be of one kind"),
        (lambda: call(state, {"0.weight": 3}, axes=AXES), "model: is a dict"),
        (lambda: call(state, state, "out", axes=AXES), "out: has no effect on modules and state dicts"),
        (lambda: call("a", "b"), "out: is missing"),
        (lambda: call("a", "b", "c", labels=x), "labels: has no effect on paths"),
        (lambda: call(state, state, axes=AXES, inputs=x), "pass module="),
        (lambda: call(one, network(1), axes=AXES, labels=x), "no effect without inputs"),
        (lambda: call(one, network(1), axes={"0.bias": ["hidden"]}, inputs=x), "no symmetry of it"),
        (lambda: call(one, network(1), axes=AXES, loss=lambda _: math.nan), "base: its loss is nan"),
        (lambda: call(one, network(1, 8), inputs=x), "networks of other widths cannot be aligned"),
        (lambda: repair(one, state, [], x), "give one network or more"),
        (lambda: repair(one, state, [state], x, weights=[1, 2]), "weights: 2 for 1 networks"),
    ]
    for refused, text in refusals:
        with pytest.raises(InputError, match=text) as caught:
            refused()
        assert "\n" not in str(caught.value)
