"""Training one small network: the schedule, the order of images, and that it learns and repeats itself."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from consilience.errors import MachineError
from consilience.progress import CallbackProgress
from suites.vision import nets, training
from suites.vision.nets import NetSpec
from suites.vision.training import Schedule

SPEC = NetSpec("resnet", 4, depth=8, size=8, classes=2)
SCHEDULE = Schedule(4, 0.1, "sgd", 1e-4, "float32", batch=16)


def _easy(count: int = 96) -> tuple[Tensor, Tensor]:
    """Two classes: bright on the left, or on the right."""
    labels = torch.arange(count) % 2
    images = 0.3 * torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images[labels == 0, :, :, :4] += 1
    images[labels == 1, :, :, 4:] += 1
    return images, labels


@pytest.mark.parametrize("spec", [SPEC, NetSpec("vit", 16, depth=2, patch=4, heads=2, size=8, classes=2)])
@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_an_easy_task_is_learned(spec: NetSpec, precision: str) -> None:
    net = nets.build(spec)
    images, labels = _easy()
    base = Schedule(4, 0.1, "sgd", 0.0, "bfloat16" if precision == "bfloat16" else "float32", batch=16)
    schedule = base if spec.kind == "resnet" else Schedule(15, 3e-3, "adamw", 0.01, base.precision, batch=16)
    told: list[tuple[int, int, float]] = []
    losses = training.train(
        net, images, labels, schedule, seed=[0], progress=CallbackProgress(lambda *facts: told.append(facts), ["loss"])
    )
    assert training.accuracy(net, images, labels) > 0.95
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert [done for done, _, _ in told] == list(range(1, len(losses) + 1))
    assert not net.training
    assert all(parameter.is_contiguous() for parameter in net.parameters())


def test_a_seed_decides_every_byte() -> None:
    states: list[dict[str, Tensor]] = []
    for seed in (1, 1, 2):
        net = nets.build(SPEC)
        training.train(net, *_easy(), SCHEDULE, seed=[seed])
        states.append(net.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


@given(st.integers(1, 300), st.integers(2, 64), st.integers(0, 3), st.integers(0, 99))
def test_every_epoch_sees_every_image_once_in_equal_batches(count: int, size: int, epochs: int, seed: int) -> None:
    order = training.batches(count, size, epochs, [seed])
    parts = len(order) // epochs if epochs else 0
    for epoch in range(epochs):
        own = order[epoch * parts : (epoch + 1) * parts]
        assert sorted(torch.cat(own).tolist()) == list(range(count))
        lengths = [len(rows) for rows in own]
        assert max(lengths) <= size
        assert max(lengths) - min(lengths) <= 1


@given(st.integers(1, 2000), st.floats(1e-5, 10))
def test_the_learning_rate_rises_to_its_peak_and_falls_to_nothing(steps: int, peak: float) -> None:
    rates = [training.rate(step, steps, peak) for step in range(steps)]
    top = rates.index(max(rates))
    assert max(rates) == pytest.approx(peak)
    assert all(b >= a for a, b in pairwise(rates[: top + 1]))
    assert all(b <= a for a, b in pairwise(rates[top:]))
    assert min(rates) >= 0
    if steps >= 50:
        assert rates[-1] < 0.01 * peak


def test_a_loss_that_is_no_number_stops_the_run() -> None:
    images, labels = _easy()
    images[3] = float("nan")
    with pytest.raises(MachineError, match="the loss is nan at step"):
        training.train(nets.build(SPEC), images, labels, SCHEDULE, seed=[0])


def test_accuracy_counts_and_leaves_the_mode_alone() -> None:
    class Echo(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.one_hot(x, 4).float()

    labels = torch.arange(10) % 4
    guesses = labels.clone()
    guesses[:3] = (guesses[:3] + 1) % 4
    net = Echo().train()
    assert training.accuracy(net, guesses, labels, batch=4) == pytest.approx(0.7)
    assert net.training


def test_every_kind_of_network_has_its_schedules() -> None:
    for kind in ("resnet", "mobilenet_v2", "vit"):
        base, expert = (training.schedule_for(kind, base=own) for own in (True, False))
        assert base.learning_rate >= expert.learning_rate
        assert training.schedule_for(kind, base=True, epochs=7).epochs == 7
