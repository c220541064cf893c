import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from consilience.errors import InputError
from consilience.mixing.distill import (
    Distillation,
    FunctionLoss,
    Kind,
    answers_of,
    distill,
    distill_targets,
    learn_weights,
    losses,
    mixture,
)
from consilience.optimizers.anchor import Anchor
from consilience.optimizers.gradient import Gradient
from consilience.optimizers.parameterisation import parameterise
from consilience.optimizers.settings import Descent

KINDS: tuple[Kind, Kind] = ("logits", "probabilities")


def draw(seed: int = 0, experts: int = 3, rows: int = 20, classes: int = 4) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(experts, rows, classes, generator=random, dtype=torch.float64)
    return logits.log_softmax(-1), torch.randint(0, classes, (rows,), generator=random)


def by_hand(answers: Tensor, alpha: Any, kind: Kind) -> Any:
    """ln q as sums over numpy arrays."""
    p = answers.exp().numpy()
    weights = np.asarray(alpha).reshape(-1, 1, 1)
    q = np.exp((weights * np.log(p)).sum(0)) if kind == "logits" else (weights * p).sum(0)
    return np.log(q / q.sum(1, keepdims=True))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.floats(0.01, 2), min_size=3, max_size=3), st.sampled_from(KINDS))
def test_mixtures_are_their_sums(seed: int, alpha: list[float], kind: Kind) -> None:
    answers, _ = draw(seed)
    found = mixture(answers, np.array(alpha), kind)
    np.testing.assert_allclose(found.numpy(), by_hand(answers, alpha, kind), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.exp().sum(1).numpy(), 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_vertex_is_the_expert_and_equal_experts_are_themselves(kind: Kind) -> None:
    answers, _ = draw()
    torch.testing.assert_close(mixture(answers, np.array([[0.0], [1.0], [0.0]]), kind), answers[1])
    same = answers[:1].expand(3, -1, -1)
    torch.testing.assert_close(mixture(same, np.array([0.2, 0.5, 0.3]), kind), answers[0])


def test_outside_the_simplex_probabilities_stay_finite() -> None:
    answers, labels = draw()
    alpha = np.array([[2.0], [-1.5], [0.5]])
    assert torch.isfinite(mixture(answers, alpha, "probabilities")).all()
    terms, slope = FunctionLoss(answers, labels, kind="probabilities")(alpha, 0, gradient=True)
    assert math.isfinite(terms["target"])
    assert slope is not None
    assert np.isfinite(slope).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(KINDS))
def test_the_loss_and_its_slope_are_those_of_the_formula(seed: int, kind: Kind) -> None:
    answers, labels = draw(seed)
    loss = FunctionLoss(answers, labels, kind=kind)
    alpha = np.random.default_rng(seed).dirichlet(np.ones(3))[:, None] * 0.9 + 0.03

    def value(point: Any) -> float:
        return -float(by_hand(answers, point, kind)[np.arange(len(labels)), labels.numpy()].mean())

    terms, slope = loss(alpha, 0, gradient=True)
    assert terms == {"target": pytest.approx(value(alpha), rel=1e-9)}
    assert slope is not None
    assert slope.shape == (3, 1)
    steps = 1e-6 * np.eye(3)[:, :, None]
    differences = [(value(alpha + step) - value(alpha - step)) / 2e-6 for step in steps]
    np.testing.assert_allclose(slope[:, 0], differences, rtol=1e-4, atol=1e-7)
    assert loss(alpha, 0, gradient=False)[1] is None


@pytest.mark.parametrize("kind", KINDS)
def test_many_points_are_evaluated_on_the_rows_of_the_step(kind: Kind) -> None:
    answers, labels = draw(rows=30)
    loss = FunctionLoss(answers, labels, kind=kind, batch=7, seed=3)
    points = [np.array([[a], [0.4], [0.9 - a]]) for a in (-0.1, 0.2, 0.7)]
    for step in (0, 5):
        single = [loss(point, step, gradient=False)[0]["target"] for point in points]
        assert [terms["target"] for terms in loss.at(points, step)] == pytest.approx(single, rel=1e-12)
    assert loss.at(points, 0) != loss.at(points, 5)
    assert loss.at(points, 5) == FunctionLoss(answers, labels, kind=kind, batch=7, seed=3).at(points, 5)
    assert loss.at([], 0) == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_better_expert_gets_the_weight(kind: Kind) -> None:
    answers, labels = draw(rows=200)
    answers[2] = torch.log_softmax(4.0 * torch.nn.functional.one_hot(labels, 4), -1)
    start = parameterise("softmax", np.full((3, 1), 1 / 3), np.array([True]))
    optimizer = Gradient(Descent(learning_rate=0.2, steps=100), start, Anchor(start.start, start.learned, 0.0))
    loss = FunctionLoss(answers, labels, kind=kind, batch=50)
    for number in range(100):
        optimizer.step(loss, number)
    assert optimizer.alpha[2, 0] > 0.9
    assert optimizer.alpha.sum() == pytest.approx(1.0)


def experts() -> list[nn.Module]:
    """Three classifiers that share nothing but their classes."""
    torch.manual_seed(0)
    return [
        nn.Linear(6, 3),
        nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.5), nn.Linear(9, 3)),
        nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2), nn.Flatten(), nn.Linear(8, 3)),
    ]


def inputs(rows: int = 64) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(1))


def test_every_expert_answers_every_row_in_eval_mode() -> None:
    held = experts()
    list(held[1].train().children())[2].eval()
    modes = [part.training for expert in held for part in expert.modules()]
    found = answers_of(held, inputs(), batch=10)
    assert [part.training for expert in held for part in expert.modules()] == modes
    with torch.no_grad():
        expected = torch.stack([expert.eval()(inputs()).log_softmax(-1) for expert in held])
    torch.testing.assert_close(found, expected)


def test_the_students_terms_are_their_formulas() -> None:
    answers, labels = draw(classes=5, experts=2)
    logits, targets = answers[0] + 3.0, answers[1]
    labels[::4] = -1
    found = losses(logits, targets, labels, Distillation(temperature=3.0, label_weight=0.5))
    heated = [np.exp(x.numpy() / 3.0) for x in (targets, answers[0])]
    q, s = (x / x.sum(1, keepdims=True) for x in heated)
    assert float(found["kl"]) == pytest.approx(9.0 * (q * np.log(q / s)).sum(1).mean(), rel=1e-9)
    known = labels >= 0
    expected = -0.5 * answers[0][known].gather(1, labels[known, None]).sum() / len(labels)
    assert float(found["labels"]) == pytest.approx(float(expected), rel=1e-9)
    assert losses(logits, targets).keys() == {"kl"}


def test_at_high_temperature_the_divergence_is_that_of_centred_logits() -> None:
    answers, _ = draw(classes=5, experts=2)
    found = losses(answers[0], answers[1], None, Distillation(temperature=1e4))
    centred = [x - x.mean(1, keepdim=True) for x in answers]
    assert float(found["kl"]) == pytest.approx(float((centred[0] - centred[1]).square().sum(1).mean() / 10), rel=1e-3)


def test_a_student_becomes_the_mixture() -> None:
    """A product of linear experts is a linear expert, which a linear student can be exactly."""
    torch.manual_seed(0)
    pair = [nn.Linear(6, 3), nn.Linear(6, 3)]
    student = nn.Linear(6, 3)
    alpha = np.array([[0.3], [0.7]])
    how = Distillation(steps=300, batch=32, rate=0.05)
    history = distill(student, pair, inputs(), alpha, how).history
    assert len(history) == 300
    assert history[-1]["kl"] < 1e-4 < history[0]["kl"]
    unseen = torch.randn(50, 6, generator=torch.Generator().manual_seed(2))
    expected = mixture(answers_of(pair, unseen), alpha)
    np.testing.assert_allclose(answers_of([student], unseen)[0].numpy(), expected.numpy(), atol=0.02)


def test_experts_of_any_architecture_are_distilled_reproducibly() -> None:
    def train(seed: int) -> tuple[list[dict[str, float]], nn.Module]:
        torch.manual_seed(5)
        student = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Dropout(0.1), nn.Linear(32, 3)).eval()
        held = experts()
        torch.manual_seed(seed)  # must not matter: the settings' seed decides
        how = Distillation(steps=80, batch=32, rate=0.02, seed=4)
        return distill(student, held, inputs(), "equal", how, kind="probabilities").history, student

    (history, student), (again, other) = train(0), train(1)
    assert history == again
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), other.parameters(), strict=True))
    assert not student.training
    assert all(parameter.grad is None for parameter in student.parameters())
    assert np.mean([terms["kl"] for terms in history[-10:]]) < 0.3 * history[0]["kl"]


def test_labels_pull_where_there_are_some() -> None:
    targets, labels = torch.full((64, 3), -math.log(3.0)), torch.full((64,), -1)
    labels[:8] = 2
    for weight, moved in ((0.0, False), (5.0, True)):
        torch.manual_seed(0)
        student = nn.Linear(6, 3)
        how = Distillation(steps=200, batch=0, rate=0.05, label_weight=weight)
        history = distill_targets(student, inputs(), targets, how, labels=labels)
        assert history[0].keys() == {"kl", "labels"}
        assert (float(answers_of([student], inputs()[:8])[0, :, 2].exp().mean()) > 0.5) == moved
    torch.manual_seed(0)
    unlabelled = nn.Linear(6, 3)
    distill_targets(unlabelled, inputs(), targets, replace(how, label_weight=0.0))
    torch.manual_seed(0)
    ignored = nn.Linear(6, 3)
    distill_targets(ignored, inputs(), targets, how, labels=torch.full((64,), -1))
    torch.testing.assert_close(ignored.weight, unlabelled.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_learned_weights_have_the_least_loss_on_the_simplex(kind: Kind) -> None:
    answers, _ = draw(3, experts=2, rows=200)
    labels = mixture(answers, np.array([0.8, 0.2]), kind).argmax(-1)
    found = learn_weights(answers, labels, kind=kind)
    loss = FunctionLoss(answers, labels, kind=kind)
    grid = [loss(np.array([[a], [1 - a]]), 0, gradient=False)[0]["target"] for a in np.linspace(0, 1, 101)]
    assert found.sum() == pytest.approx(1.0)
    assert loss(found[:, None], 0, gradient=False)[0]["target"] <= min(grid) + 1e-3


def test_coefficients_are_equal_given_or_learned() -> None:
    held = experts()
    rows = inputs()
    labels = torch.full((len(rows),), -1)
    labels[::2] = answers_of(held[1:2], inputs())[0, ::2].argmax(-1)
    how = Distillation(steps=2)
    alphas = [distill(nn.Linear(6, 3), held, inputs(), a, how, labels=labels).alpha for a in ("equal", "learned")]
    assert alphas[0].tolist() == [1 / 3] * 3
    assert alphas[1].argmax() == 1
    with pytest.raises(InputError, match="no row has one"):
        distill(nn.Linear(6, 3), held, inputs(), "learned", how)


def test_bad_input_is_refused_in_one_line() -> None:
    answers, labels = draw()
    wide = nn.Linear(6, 4)
    broken = nn.Linear(6, 3)
    nn.init.constant_(broken.weight, math.nan)
    x, targets = inputs(20), answers[0]
    linear = nn.Linear(6, 4)
    refusals: list[tuple[Callable[[], object], str]] = [
        (lambda: answers_of([], x), "no expert or no row"),
        (lambda: answers_of([wide, broken], x), "only experts over the same classes"),
        (lambda: answers_of([broken], x), "expert 0: an answer is not finite"),
        (lambda: mixture(answers, np.ones((3, 2))), r"alpha: \[3, 2\] coefficients for 3 experts"),
        (lambda: mixture(answers, np.ones(3), cast(Any, "logit")), "did you mean 'logits'"),
        (lambda: FunctionLoss(answers, labels[1:]), "does not meet answers"),
        (lambda: FunctionLoss(answers, labels - 1), "from 0 to 3"),
        (lambda: FunctionLoss(answers, labels + 1), "from 0 to 3"),
        (lambda: FunctionLoss(answers, labels, kind=cast(Any, "x")), "kind: 'x' is none of"),
        (lambda: distill_targets(linear, x, targets, Distillation(steps=0)), "steps: 0 is not above 0"),
        (lambda: distill_targets(linear, x, targets, Distillation(temperature=math.nan)), "temperature: nan"),
        (lambda: distill_targets(linear, x, targets, Distillation(label_weight=-1.0)), "label_weight: -1.0"),
        (lambda: distill_targets(linear, x[1:], targets), r"targets: \[20, 4\] do not meet 19 inputs"),
        (lambda: distill_targets(linear, x, targets, labels=labels[1:]), "give one integer a row"),
        (lambda: distill_targets(linear, x, targets, labels=labels + 4), "or -1 for a row without one"),
        (lambda: distill_targets(linear, x * math.inf, targets), "the loss is not finite at step 0"),
    ]
    for refused, text in refusals:
        with pytest.raises(InputError, match=text) as caught:
            refused()
        assert "\n" not in str(caught.value)
