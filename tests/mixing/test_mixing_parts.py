"""Target rows, batch normalisation, baselines, fine-tuning and the cost model."""

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_nets import Point, fingerprint, labelled, net, points, scattered, squared, towards
from torch import Tensor, nn

from consilience.errors import InputError
from consilience.mixing import (
    ExpertBank,
    LossOf,
    ScoreOf,
    Search,
    Target,
    TargetLoss,
    evaluate,
    fine_tune,
    measure_cost,
    mix_bank,
    recalibrate,
)
from consilience.mixing import baselines as lines
from consilience.mixing.cost import Cost
from consilience.mixing.fine_tune import rate
from consilience.mixing.target import Tensors, as_rows, cross_entropy, draw, noise, run, split, take


@given(st.integers(1, 40), st.integers(0, 50), st.integers(0, 5), st.integers(1, 12))
def test_every_pass_draws_every_row_once(count: int, size: int, seed: int, steps: int) -> None:
    drawn = [draw(count, size, seed, step) for step in range(steps)]
    assert drawn == [draw(count, size, seed, step) for step in range(steps)]
    if size in (0, *range(count, 51)):
        assert drawn == [list(range(count))] * steps
        return
    assert {len(batch) for batch in drawn} == {size}
    flat = [row for batch in drawn for row in batch]
    for turn in range(len(flat) // count):
        assert sorted(flat[turn * count : (turn + 1) * count]) == list(range(count))
    assert max(Counter(flat).values()) - min(Counter(flat)[row] for row in range(count)) <= 1


def test_seeds_and_passes_have_orders_of_their_own() -> None:
    orders = {tuple(draw(12, 11, seed, step)) for seed in range(3) for step in range(3)}
    assert len(orders) == 9


@given(st.integers(2, 30), st.floats(0.01, 0.99), st.integers(0, 3))
def test_rows_are_held_out_once(count: int, share: float, seed: int) -> None:
    rows = Tensors(torch.arange(count), torch.arange(count))
    learn, hold = split(rows, share, seed)
    found = [take(part, range(len(part)))[1].tolist() for part in (learn, hold)]
    assert sorted(found[0] + found[1]) == list(range(count))
    assert len(hold) == min(max(1, round(share * count)), count - 1)


class Lazy:
    """A data set that is no tensor, and draws at random."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]:
        return torch.full((2,), float(index)) + random.random(), index


def test_a_data_set_of_rows_is_collated_and_its_noise_is_the_steps() -> None:
    target = Target(as_rows(Lazy()), batch_size=4)
    inputs, labels = target.batch(0, 1)
    again, _ = target.batch(0, 1)
    assert inputs.shape == (4, 2)
    assert torch.equal(inputs.floor()[:, 0].long(), labels)
    assert torch.equal(inputs, again)
    assert labels.tolist() == draw(10, 4, 0, 1)


def test_noise_is_a_function_of_seed_and_step_and_leaves_generators_alone() -> None:
    def drawn(seed: int, step: int) -> tuple[float, float, float]:
        with noise(seed, step):
            return float(torch.rand(())), float(np.random.random()), random.random()

    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    first = float(torch.rand(())), float(np.random.random()), random.random()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    assert drawn(1, 2) == drawn(1, 2)
    assert not set(drawn(1, 2)) & set(drawn(1, 3)) & set(drawn(2, 2))
    assert (float(torch.rand(())), float(np.random.random()), random.random()) == first


class Keywords(nn.Module):
    """Takes keywords and answers as a language model does."""

    def forward(self, left: Tensor, right: Tensor) -> Any:
        class Output:
            logits = left - right

        return Output()


def test_inputs_may_be_keywords_or_arguments_and_outputs_may_have_logits() -> None:
    one, two = torch.ones(2, 3), torch.full((2, 3), 3.0)
    assert torch.equal(run(Keywords(), {"left": one, "right": two}), one - two)
    assert torch.equal(run(Keywords(), [one, two]), one - two)


def test_cross_entropy_is_summed_in_float64() -> None:
    logits = torch.tensor([[20.0, 0.0], [0.0, 0.0]])
    expected = (np.log1p(np.exp(-20.0)) + np.log(2)) / 2
    value = cross_entropy(logits, torch.tensor([0, 0]))
    assert value.dtype == torch.float64
    assert float(value) == pytest.approx(expected, rel=1e-6)


def test_recalibration_changes_float_buffers_alone() -> None:
    module = net()
    module.load_state_dict(scattered(module, 1)["expert0"])
    module.train()
    module.blocks[1].eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    modes = [part.training for part in module.modules()]
    inputs = [labelled(rows=40, seed=seed)[0] for seed in range(3)]
    recalibrate(module, inputs)
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"blocks.{i}.1.running_{kind}" for i in (0, 1) for kind in ("mean", "var")}
    assert [part.training for part in module.modules()] == modes
    first: Any = module.blocks[0]
    assert first[1].momentum == 0.1
    with torch.no_grad():
        hidden = [first[0](module.embed(x)) for x in inputs]
    assert torch.allclose(first[1].running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0), atol=1e-6)
    assert torch.allclose(first[1].running_var, torch.stack([h.var(0) for h in hidden]).mean(0), atol=1e-6)


def test_a_net_without_batch_normalisation_needs_no_batches() -> None:
    def batches() -> Any:
        raise AssertionError("a batch was drawn")
        yield

    recalibrate(nn.Linear(2, 2), batches())


def test_a_recalibrated_mixture_differs_from_a_blended_one_in_its_statistics() -> None:
    module = net()
    bank = ExpertBank.of(scattered(module, 3), module)
    target = Target(as_rows(labelled()), None, batch_size=8)
    found = {
        bn: mix_bank(bank, TargetLoss(bank, module, target, bn=bn), Search(steps=0)).state
        for bn in ("blend", "recalibrate")
    }  # fmt: skip
    for name, value in found["blend"].items():
        assert torch.equal(value, found["recalibrate"][name]) != ("running" in name), name


def test_fixed_weights() -> None:
    assert lines.uniform(4).tolist() == [0.25] * 4
    assert lines.data_size([1, 3]).tolist() == [0.25, 0.75]
    assert lines.best_single([0.1, 0.9, 0.9]).tolist() == [0, 1, 0]
    assert np.allclose(lines.proxy_softmax([1.0, 2.0], 0.5), [1 / (1 + np.exp(2)), 1 / (1 + np.exp(-2))])
    assert np.allclose(lines.proxy_softmax([1.0, 2.0, 0.0], 1e-3), lines.best_single([1.0, 2.0, 0.0]))
    drawn = lines.random_simplex(5, 1)
    assert drawn.sum() == pytest.approx(1)
    assert (drawn >= 0).all()
    assert np.array_equal(drawn, lines.random_simplex(5, 1))
    assert not np.array_equal(drawn, lines.random_simplex(5, 2))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: lines.data_size([0, 0]),
        lambda: lines.data_size([1, -1]),
        lambda: lines.best_single([]),
        lambda: lines.best_single([float("nan"), 1]),
        lambda: lines.proxy_softmax([1, 2], 0.0),
    ],
)
def test_weights_of_nothing_are_refused(wrong: Any) -> None:
    with pytest.raises(InputError):
        wrong()


def test_the_greedy_soup_takes_what_does_no_harm() -> None:
    states = points([1.0, 0, 0, 0], [0, 1.2, 0, 0], [-9.0, 0, 0, 0])
    bank = ExpertBank.of(states, Point())
    loss = TargetLoss(bank, Point(), towards(torch.tensor([0.5, 0.5, 0, 0], dtype=torch.float64)))
    assert lines.greedy_soup(loss).tolist() == [0.5, 0.5, 0]


def test_the_full_gradient_takes_the_searchs_batches_rate_and_steps() -> None:
    module = net(torch.float64)
    bank = ExpertBank.of(scattered(module, 3), module)
    target = Target(as_rows(labelled(dtype=torch.float64)), None, batch_size=8)
    found = lines.full_gradient(bank, TargetLoss(bank, module, target, seed=2), Search(steps=4, learning_rate=0.7))
    loss, beta = TargetLoss(bank, module, target, seed=2), np.zeros((3, 1))
    for step in range(4):
        alpha = np.exp(beta) / np.exp(beta).sum()
        slope = loss(alpha, step, gradient=True)[1]
        assert slope is not None
        beta -= 0.7 * (alpha * slope - alpha * (alpha * slope).sum())
    assert np.allclose(found.alpha, np.exp(beta) / np.exp(beta).sum(), rtol=1e-9)


def test_the_ensemble_averages_probabilities() -> None:
    module = net(torch.float64)
    states = scattered(module, 3)
    data = labelled(dtype=torch.float64)
    bank = ExpertBank.of(states, module)
    each: list[Tensor] = []
    for state in states.values():
        module.load_state_dict(state)
        with torch.no_grad():
            each.append(module.eval()(data[0]).softmax(-1))
    mean = torch.stack(each).mean(0)
    assert torch.allclose(lines.ensemble_probabilities(bank, module, data), mean)
    found = lines.ensemble(bank, module, data)
    assert found.accuracy == float((mean.argmax(-1) == data[1]).double().mean())
    assert found.loss == pytest.approx(float(nn.functional.nll_loss(mean.log(), data[1])))


def blobs(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return rows whose label is the largest of the first three inputs."""
    torch.manual_seed(seed)
    inputs = torch.randn(rows, 5)
    return inputs, inputs[:, :3].argmax(-1)


@pytest.mark.parametrize("settings", [{}, {"optimizer": "adamw", "warmup": 0.2, "clip": 1.0}])
def test_fine_tuning_learns_and_is_repeatable(settings: dict[str, Any]) -> None:
    module = net(dropout=0.0)
    state = module.state_dict()
    before = fingerprint({"": state})
    train, test = blobs(200, 0), blobs(200, 1)

    def learn() -> Any:
        return fine_tune(module, state, train, test, epochs=6, batch_size=33, learning_rate=0.02, **settings)

    found = learn()
    assert len(found.accuracy) == 7
    assert found.accuracy[-1] > found.accuracy[0] + 0.2
    assert found.train_loss[-1] < found.train_loss[0]
    assert fingerprint({"": state}) == before
    again = learn()
    assert found.test == again.test
    assert all(torch.equal(found.state[name], again.state[name]) for name in state)
    assert evaluate(module, test, found.state) == found.test[-1]


def test_from_the_base_is_fine_tuning_from_it() -> None:
    module = net(dropout=0.0)
    base = scattered(module, 1)["expert0"]
    found = lines.from_base(module, base, blobs(20, 0), blobs(20, 1), epochs=0)
    assert found.accuracy == [evaluate(module, blobs(20, 1), base).accuracy]
    assert torch.equal(found.state["embed.weight"], base["embed.weight"])


def test_no_batch_is_left_with_a_single_row() -> None:
    module = net(dropout=0.0)
    fine_tune(module, module.state_dict(), blobs(33, 0), epochs=1, batch_size=32)


def test_evaluation_is_by_definition() -> None:
    module = net()
    module.train()
    data = labelled(rows=30)
    found = evaluate(module, data, batch_size=7)
    assert module.training
    with torch.no_grad():
        logits = module.eval()(data[0])
    assert found.accuracy == float((logits.argmax(-1) == data[1]).double().mean())
    assert found.loss == pytest.approx(float(nn.functional.cross_entropy(logits, data[1])), rel=1e-6)


def test_rates() -> None:
    assert [rate("constant", 0.0, step, 4) for step in range(4)] == [1.0] * 4
    assert rate("cosine", 0.0, 0, 10) == 1.0
    assert rate("cosine", 0.0, 5, 10) == pytest.approx(0.5)
    assert rate("cosine", 0.0, 10, 10) == pytest.approx(0.0)
    assert [rate("constant", 0.5, step, 4) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "lion"}, "optimizer 'lion' is unknown"),
        ({"learning_rate": 1e30}, "learning_rate: the loss is"),
        ({"train": (torch.zeros(0, 5), torch.zeros(0))}, "has no rows"),
        ({"state": {}}, "does not fit the module"),
    ],
)
def test_fine_tuning_that_cannot_be_is_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    module = net()
    usual: dict[str, Any] = {"state": module.state_dict(), "train": blobs(40, 0), "epochs": 3}
    with pytest.raises(InputError, match=message) as found:
        fine_tune(module, **usual | settings)
    assert "\n" not in str(found.value)


def test_the_cost_model() -> None:
    cost = Cost(forward=2.0, backward=4.0, blend=1.0, slopes=3.0, full=11.0, pair=5.5)
    assert cost.gamma == 2.0
    assert cost.full_step == 10.0
    assert cost.spsa_step() == 6.0
    assert cost.spsa_step(3) == 18.0
    assert cost.break_even == pytest.approx(10 / 6)
    assert cost.measured_break_even == 2.0


def test_costs_are_measured_of_losses_alone() -> None:
    rows = as_rows((torch.zeros(4, 1), torch.zeros(4, 4, dtype=torch.float64)))
    bank = ExpertBank.of(points([1.0, 0, 0, 0], [0, 1.0, 0, 0]), Point())
    cost = measure_cost(TargetLoss(bank, Point(), Target(rows, None, LossOf(squared))), repeat=1)
    assert min(cost.forward, cost.backward, cost.blend, cost.slopes, cost.full, cost.pair) > 0
    with pytest.raises(InputError, match="no gradient"):
        measure_cost(TargetLoss(bank, Point(), Target(rows, None, ScoreOf())))
