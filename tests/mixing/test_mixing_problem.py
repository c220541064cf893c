from typing import Any

import numpy as np
import pytest
import torch
from tiny_nets import fingerprint, labelled, net, scattered
from torch import Tensor, nn
from torch.func import functional_call

from consilience.coefficients.coefficients import Alpha
from consilience.errors import InputError
from consilience.mixing import ExpertBank, LossOf, RemoteScore, ScoreOf, Student, Target, TargetLoss
from consilience.mixing.target import accuracy, as_rows, cross_entropy
from consilience.optimizers.anchor import Anchor
from consilience.optimizers.gradient import Backward
from consilience.optimizers.parameterisation import parameterise

EXACT = torch.float64


def problem(grouping: str = "global", experts: int = 3, **settings: Any) -> TargetLoss:
    module = net(EXACT)
    bank = ExpertBank.of(scattered(module, experts), module, grouping=grouping)
    target = Target(as_rows(labelled(dtype=EXACT)), as_rows(labelled(dtype=EXACT, seed=1)), batch_size=8)
    return TargetLoss(bank, module, target, seed=3, **settings)


def loaded(loss: TargetLoss, alpha: Alpha) -> nn.Module:
    module = net(EXACT)
    module.load_state_dict(loss.bank.state(alpha))
    return module.eval()


def random_alpha(loss: TargetLoss) -> Alpha:
    table = np.random.default_rng(0).dirichlet(np.ones(len(loss.bank.names)), loss.bank.count)
    return table.T.copy()


@pytest.mark.parametrize("grouping", ["global", "tensor"])
def test_values_are_those_of_a_loaded_blend(grouping: str) -> None:
    loss = problem(grouping)
    alpha = random_alpha(loss)
    inputs, labels = loss.target.batch(3, 5)
    expected = nn.functional.cross_entropy(loaded(loss, alpha)(inputs), labels)
    assert loss.at([alpha], 5)[0]["target"] == pytest.approx(float(expected.detach()), rel=1e-12)
    assert loss(alpha, 5, gradient=False)[0] == loss.at([alpha], 5)[0]


def test_points_are_evaluated_in_any_number_on_the_same_rows() -> None:
    loss = problem(together=2)
    alphas = [loss.bank.table(weights) for weights in np.eye(3)] + [random_alpha(loss)]
    together = loss.at(alphas, 1)
    assert together == [loss.at([alpha], 1)[0] for alpha in alphas]
    assert loss.counts.forwards == 8
    assert loss.room.room == 2


def test_parameters_are_views_of_the_blends_and_the_module_is_left_alone() -> None:
    module = net()
    before = fingerprint({"": module.state_dict()})
    bank = ExpertBank.of(scattered(module, 2), module)
    blends = bank.blends([bank.table([0.5, 0.5]), bank.table([1.0, 0.0])])
    student = Student(module, bank)
    low = blends.parameters[1].data_ptr()
    shown = student.show(blends, 1)
    for value in shown.parameters():
        assert low <= value.data_ptr() < low + 4 * bank.numel
    expert = net()
    expert.load_state_dict(scattered(module, 2)["expert0"])
    inputs, _ = labelled()
    assert torch.equal(shown.eval()(inputs), expert.eval()(inputs))
    assert shown.get_parameter("head.weight") is shown.get_parameter("blocks.0.0.weight")
    assert fingerprint({"": module.state_dict()}) == before


@pytest.mark.parametrize("grouping", ["global", "block", "tensor"])
@pytest.mark.parametrize("bn", ["blend", "batch"])
def test_the_gradient_is_autograds_through_the_softmax(grouping: str, bn: Any) -> None:
    loss = problem(grouping, bn=bn)
    bank = loss.bank
    beta = torch.randn(3, bank.count, dtype=EXACT, generator=torch.Generator().manual_seed(0)).requires_grad_()
    alpha = torch.softmax(beta, 0)
    module = net(EXACT).train(bn == "batch")
    for part in module.modules():
        part.training = part.training and isinstance(part, nn.BatchNorm1d)
    parts: list[Tensor] = []
    for slot in bank.layout.parameters:
        rows = [alpha[k, slot.index] * bank.matrix[k, slot.start : slot.stop] for k in range(3)]
        parts.append(torch.stack(rows).sum(0))
    theta = torch.cat(parts)
    state = bank.state(alpha.detach().numpy())
    values = {slot.name: slot.of(theta) for slot in bank.layout.parameters}
    values |= {name: state[name].clone() for name, _ in module.named_buffers()}
    inputs, labels = loss.target.batch(3, 2)
    expected = cross_entropy(functional_call(module, values, (inputs,)), labels)
    slope, flat = torch.autograd.grad(expected, (beta, theta))

    mapped = parameterise("softmax", np.full((3, bank.count), 1 / 3), np.ones(bank.count, bool))
    anchor = Anchor(mapped.start, mapped.learned, 0.0)
    terms, found = Backward(mapped, anchor)(loss, beta.detach(), 2)
    assert terms["target"] == pytest.approx(float(expected.detach()), rel=1e-12)
    assert torch.allclose(found, slope, rtol=1e-9, atol=1e-12)

    by_hand = np.zeros((3, bank.count))
    for span in bank.layout.spans:
        part, shares = slice(span.start, span.stop), alpha.detach().numpy()[:, span.index]
        jacobian = np.diag(shares) - np.outer(shares, shares)
        by_hand[:, span.index] = jacobian @ (bank.matrix[:, part].numpy() @ flat[part].numpy())
    assert np.allclose(found.numpy(), by_hand, rtol=1e-9, atol=1e-12)


class Recorder:
    """Records what a loss or score sees: the batch, and the next number of every generator."""

    def __init__(self) -> None:
        self.seen: list[tuple[bytes, bytes, float, float]] = []

    def __call__(self, module: nn.Module, inputs: Tensor, labels: Tensor) -> float:
        import random

        drawn = float(torch.rand(())), float(np.random.random()) + random.random()
        self.seen.append((inputs.numpy().tobytes(), labels.numpy().tobytes(), *drawn))
        return drawn[0]


def test_both_points_see_one_batch_and_one_state_of_the_generators() -> None:
    recorder = Recorder()
    module = net(EXACT)
    bank = ExpertBank.of(scattered(module, 3), module)
    rows = as_rows(labelled(dtype=EXACT))
    target = Target(rows, None, ScoreOf(recorder), 8, augment=lambda x: x + torch.randn_like(x))
    loss = TargetLoss(bank, module, target, seed=3)
    before = torch.get_rng_state()
    loss.at([bank.table(weights) for weights in np.eye(3)[:2]], 7)
    loss(bank.table(np.eye(3)[2]), 7, gradient=False)
    loss.at([bank.table(np.eye(3)[2])], 8)
    assert recorder.seen[0] == recorder.seen[1] == recorder.seen[2]
    assert all(a != b for a, b in zip(recorder.seen[0], recorder.seen[3], strict=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_is_common_to_the_points_of_a_step() -> None:
    loss = problem(training=True)
    alpha = random_alpha(loss)
    one, other = loss.at([alpha, alpha.copy()], 4)
    assert one == other
    assert loss.at([alpha], 5) != [one]
    assert loss.at([alpha], 4) == [one]
    quiet = problem(training=False)
    assert quiet.at([alpha], 4) != [one]


@pytest.mark.parametrize("bn", ["blend", "batch", "recalibrate"])
def test_evaluations_change_no_buffer(bn: Any) -> None:
    loss = problem(bn=bn, training=True)
    alpha = random_alpha(loss)
    loss(alpha, 0, gradient=True)
    expected = loss.bank.state(alpha)
    for name, value in loss.student.module.named_buffers():
        assert torch.equal(value, expected[name]), name


def test_batch_statistics_are_those_of_the_minibatch() -> None:
    loss = problem(bn="batch")
    alpha = random_alpha(loss)
    inputs, labels = loss.target.batch(3, 0)
    module = loaded(loss, alpha)
    for part in module.modules():
        part.training = isinstance(part, nn.BatchNorm1d)
    expected = nn.functional.cross_entropy(module(inputs), labels)
    assert loss.at([alpha], 0)[0]["target"] == pytest.approx(float(expected.detach()), rel=1e-12)


def test_scores_and_remote_models_need_no_gradient() -> None:
    module = net(EXACT)
    bank = ExpertBank.of(scattered(module, 2), module)
    rows = as_rows(labelled(dtype=EXACT))
    alpha = bank.table([0.4, 0.6])
    scored = TargetLoss(bank, module, Target(rows, rows, ScoreOf(), 8))
    inputs, labels = scored.target.batch(0, 0)
    own = net(EXACT)
    own.load_state_dict(bank.state(alpha))
    right = float((own.eval()(inputs).argmax(-1) == labels).double().mean())
    assert scored.at([alpha], 0) == [{"target": -right}]
    assert accuracy(own, inputs, labels) == right
    with pytest.raises(InputError, match="a score has no gradient"):
        scored(alpha, 0, gradient=True)

    def norm(state: dict[str, Tensor]) -> float:
        return -float(state["embed.weight"].norm())

    remote = TargetLoss(bank, module, Target(None, None, RemoteScore(norm)))
    assert remote.at([alpha], 0)[0]["target"] == pytest.approx(float(own.embed.weight.detach().norm()))
    assert remote.validate(alpha) == remote.at([alpha], 0)[0]["target"]
    assert remote.counts.forwards == 2
    with pytest.raises(InputError, match="has no rows"):
        TargetLoss(bank, module, Target(None))


@pytest.mark.parametrize("bn", ["blend", "batch", "recalibrate"])
def test_validation_is_the_loss_of_what_is_delivered(bn: Any) -> None:
    loss = problem(bn=bn, recalibration=3)
    alpha = random_alpha(loss)
    module = net(EXACT)
    module.load_state_dict(loss.state(alpha))
    inputs, labels = labelled(dtype=EXACT, seed=1)
    expected = nn.functional.cross_entropy(module.eval()(inputs), labels)
    assert loss.validate(alpha) == pytest.approx(float(expected.detach()), rel=1e-12)


def test_a_loss_that_is_not_finite_is_one_line() -> None:
    module = net(EXACT)
    bank = ExpertBank.of(scattered(module, 2), module)
    target = Target(as_rows(labelled(dtype=EXACT)), None, LossOf(lambda outputs, labels: outputs.sum() / 0))
    with pytest.raises(InputError, match="the loss is"):
        TargetLoss(bank, module, target).at([bank.table([0.5, 0.5])], 0)


class Recurrent(nn.Module):
    """Keeps lists of its own weights, as torch's recurrent layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.GRU(5, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cells(x[:, None])[0][:, 0]


def attention() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    return nn.Sequential(nn.Linear(5, 4), nn.Unflatten(1, (1, 4)), layer, nn.Flatten(), nn.Linear(4, 6))


def normed() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(5, 6))


@pytest.mark.parametrize("make", [Recurrent, attention, normed])
def test_modules_of_any_kind_become_their_blend(make: Any) -> None:
    torch.manual_seed(0)
    module = make()
    bank = ExpertBank.of(scattered(module, 3), module)
    loss = TargetLoss(bank, module, Target(as_rows(labelled()), None, batch_size=0))
    alpha = bank.table([0.5, 0.2, 0.3])
    inputs, labels = labelled()
    module.load_state_dict(bank.state(alpha))
    expected = nn.functional.cross_entropy(module.eval()(inputs), labels)
    assert loss.at([alpha], 0)[0]["target"] == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.autograd.backward(expected)
    flat = torch.cat([dict(module.named_parameters())[slot.name].grad.reshape(-1) for slot in bank.layout.parameters])
    slope = loss(alpha, 0, gradient=True)[1]
    assert slope is not None
    assert np.allclose(slope[:, 0], (bank.matrix @ flat).numpy(), rtol=1e-4, atol=1e-6)
