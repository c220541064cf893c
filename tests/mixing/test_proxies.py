import math
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from consilience.errors import InputError
from consilience.mixing.proxies import (
    h_score,
    leep,
    log_me,
    proxy_scores,
    zero_shot_accuracy,
    zero_shot_loss,
)


def draw(n: int, d: int, classes: int, signal: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features whose class means are ``signal`` apart, and labels in which every class occurs."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    means = torch.randn(classes, d, generator=random, dtype=torch.float64)
    return signal * means[labels] + torch.randn(n, d, generator=random, dtype=torch.float64), labels


def evidence(features: Tensor, target: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The log marginal likelihood as the density of y ~ N(0, I/b + FF'/a), by one explicit n x n covariance."""
    n = len(features)
    covariance = torch.eye(n, dtype=torch.float64) / b + features @ features.T / a
    return torch.distributions.MultivariateNormal(torch.zeros(n, dtype=torch.float64), covariance).log_prob(target)


def greatest_evidence(features: Tensor, target: Tensor) -> float:
    """Maximise the density over ln a and ln b by a quasi-Newton method that knows nothing of the fixed point."""
    logs = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([logs], lr=0.5, max_iter=300, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        loss = -evidence(features, target, logs[0].exp(), logs[1].exp())
        loss.backward()
        return loss

    search.step(closure)
    return -closure().item()


@pytest.mark.parametrize(("n", "d"), [(40, 5), (30, 30), (12, 25)])
def test_log_me_is_the_greatest_evidence(n: int, d: int) -> None:
    features, labels = draw(n, d, 3, 0.7)
    expected = np.mean([greatest_evidence(features, (labels == c).to(torch.float64)) / n for c in range(3)])
    assert log_me(features, labels) == pytest.approx(expected, abs=1e-6)


def naive_log_me(features: Any, labels: Any) -> float:
    """The same fixed point with the explicit d x d matrix A, its inverse and its determinant."""
    n, d = features.shape
    scores: list[float] = []
    for c in np.unique(labels):
        y, a, b = (labels == c).astype(float), 1.0, 1.0
        eigenvalues = np.linalg.eigvalsh(features.T @ features)
        for _ in range(500):
            m = b * np.linalg.inv(a * np.eye(d) + b * features.T @ features) @ features.T @ y
            gamma = (b * eigenvalues / (a + b * eigenvalues)).sum()
            a, b = gamma / (m @ m), (n - gamma) / ((features @ m - y) ** 2).sum()
            if a > 1e8 * b:  # an uninformative class: the maximum is at m = 0
                break
        matrix = a * np.eye(d) + b * features.T @ features
        m = b * np.linalg.solve(matrix, features.T @ y)
        value = n / 2 * np.log(b) + d / 2 * np.log(a) - n / 2 * np.log(2 * np.pi)
        value -= b / 2 * ((features @ m - y) ** 2).sum() + a / 2 * m @ m + np.linalg.slogdet(matrix)[1] / 2
        scores.append(value / n)
    return float(np.mean(scores))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(20, 40), st.integers(2, 8), st.floats(0.3, 3.0))
def test_log_me_agrees_with_explicit_matrices(seed: int, n: int, d: int, signal: float) -> None:
    features, labels = draw(n, d, 3, signal, seed)
    # Where a class is all but uninformative a / b creeps, and is left at a change of 1e-3.
    assert log_me(features, labels) == pytest.approx(naive_log_me(features.numpy(), labels.numpy()), abs=1e-3)


def test_log_me_does_not_depend_on_rotations_or_names_of_classes() -> None:
    features, labels = draw(50, 6, 3, 1.0)
    rotation, _ = torch.linalg.qr(draw(6, 6, 2, 0.0, 3)[0])
    expected = log_me(features, labels)
    assert log_me(features @ rotation, labels) == pytest.approx(expected, rel=1e-9)
    assert log_me(features, (labels + 5) * 7) == pytest.approx(expected, rel=1e-9)


def test_features_that_fit_exactly_have_a_finite_and_high_score() -> None:
    features, labels = draw(30, 4, 2, 0.5)
    exact = torch.cat((features, torch.nn.functional.one_hot(labels)), 1)
    assert math.isfinite(log_me(exact, labels))
    assert log_me(exact, labels) > log_me(features, labels) + 1


@pytest.mark.parametrize("score", [log_me, h_score])
def test_stronger_features_score_higher(score: Any) -> None:
    values = [score(*draw(200, 8, 4, signal)) for signal in (0.0, 0.5, 1.0, 2.0)]
    assert values == sorted(values)
    assert values[-1] > values[0]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(2, 5))
def test_h_score_is_the_trace_of_numpy_covariances(seed: int, d: int, classes: int) -> None:
    features, labels = draw(40, d, classes, 1.0, seed)
    f, y = features.numpy(), labels.numpy()
    means = np.stack([f[y == c].mean(0) for c in y])
    between, whole = (np.atleast_2d(np.cov(x.T, bias=True)) for x in (means, f))
    found = h_score(features, labels)
    assert found == pytest.approx(np.trace(np.linalg.pinv(whole) @ between), rel=1e-8)
    assert 0 <= found <= min(d, classes - 1) + 1e-9


def test_h_score_ignores_directions_without_variance_and_any_invertible_map() -> None:
    features, labels = draw(60, 4, 3, 1.0)
    expected = h_score(features, labels)
    repeated = torch.cat((features, features[:, :2] * 3, torch.full((60, 1), 7.0)), 1)
    assert h_score(repeated, labels) == pytest.approx(expected, rel=1e-8)
    assert h_score(features @ draw(4, 4, 2, 0.0, 9)[0] + 2.0, labels) == pytest.approx(expected, rel=1e-8)


def test_perfectly_separated_classes_reach_the_bound_of_the_h_score() -> None:
    labels = torch.arange(12) % 4
    assert h_score(torch.nn.functional.one_hot(labels).to(torch.float32), labels) == pytest.approx(3.0)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(1, 6))
def test_leep_is_its_double_sum(seed: int, classes: int, outputs: int) -> None:
    logits, labels = draw(24, outputs, classes, 2.0, seed)
    p, y, n = logits.softmax(1).numpy(), labels.numpy(), 24
    total = 0.0
    for i in range(n):
        inner = 0.0
        for z in range(outputs):
            joint = sum(p[j, z] for j in range(n) if y[j] == y[i]) / n
            inner += joint / (sum(p[j, z] for j in range(n)) / n) * p[i, z]
        total += math.log(inner) / n
    assert leep(torch.from_numpy(p), labels) == pytest.approx(total, rel=1e-10)
    assert total <= 1e-12


def test_leep_is_zero_for_decisive_predictions_and_the_labels_entropy_for_empty_ones() -> None:
    labels = torch.arange(12) % 3
    decisive = torch.nn.functional.one_hot((labels + 1) % 3, 5).to(torch.float64)  # two classes are never predicted
    assert leep(decisive, labels) == pytest.approx(0.0, abs=1e-12)
    assert leep(torch.full((12, 4), 0.25), labels) == pytest.approx(-math.log(3))


def test_zero_shot_scores_are_their_definitions() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0]])
    labels = torch.tensor([0, 1, 1])
    expected = -np.mean([math.log(math.exp(z[y]) / sum(map(math.exp, z))) for z, y in zip(logits, labels, strict=True)])
    assert zero_shot_loss(logits, labels) == pytest.approx(expected)
    assert zero_shot_loss(logits.log_softmax(1), labels) == pytest.approx(expected)
    assert zero_shot_accuracy(logits, labels) == pytest.approx(2 / 3)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def nets() -> tuple[list[Net], Tensor, Tensor]:
    torch.manual_seed(0)
    inputs, labels = draw(40, 6, 3, 1.0)
    return [Net().eval() for _ in range(3)], inputs.to(torch.float32), labels


def test_every_expert_is_scored_with_its_own_state() -> None:
    experts, inputs, labels = nets()
    states = [expert.state_dict() for expert in experts]
    with torch.no_grad():
        hidden = [expert.body(inputs) for expert in experts]
        logits = [expert(inputs) for expert in experts]
    expected = {
        "logme": [log_me(f, labels) for f in hidden],
        "h_score": [h_score(f, labels) for f in hidden],
        "leep": [leep(z.to(torch.float64).softmax(1), labels) for z in logits],
        "loss": [-zero_shot_loss(z, labels) for z in logits],
        "accuracy": [zero_shot_accuracy(z, labels) for z in logits],
    }
    module = Net()
    for proxy, values in expected.items():
        found = proxy_scores(module, states, inputs, labels, cast(Any, proxy), batch=7)
        np.testing.assert_allclose(found, values, rtol=1e-4)


def test_features_may_be_named_or_computed() -> None:
    experts, inputs, labels = nets()
    states = [expert.state_dict() for expert in experts]
    named = proxy_scores(Net(), states, inputs, labels, features="head")
    computed = proxy_scores(Net(), states, inputs, labels, features=lambda module, x: cast(Net, module).body(x))
    np.testing.assert_allclose(named, computed)
    first = proxy_scores(Net(), states, inputs, labels, features="body.0")
    np.testing.assert_allclose(first, log_me(inputs, labels))


def test_the_module_gets_its_state_and_modes_back() -> None:
    experts, inputs, labels = nets()
    module = Net().train()
    module.body[0].eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    proxy_scores(module, [expert.state_dict() for expert in experts], inputs, labels)
    with pytest.raises(InputError, match="expert 0: its state does not fit"):
        proxy_scores(module, [{"nothing": torch.zeros(1)}], inputs, labels)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module.training
    assert not module.body[0].training
    assert module.body[3].training


def test_bad_input_is_refused_in_one_line() -> None:
    features, labels = draw(10, 3, 2, 1.0)
    experts, inputs, targets = nets()
    states = [experts[0].state_dict()]
    refusals: list[tuple[Any, str]] = [
        (lambda: log_me(features, labels * 0), "only class 0 occurs"),
        (lambda: log_me(features, labels[:-1]), "does not meet"),
        (lambda: log_me(features, labels - 1), "integers from 0"),
        (lambda: log_me(features, labels * 0.5), "integers from 0"),
        (lambda: h_score(features * torch.inf, labels), "not finite"),
        (lambda: zero_shot_loss(features, labels + 3), "4 is not one of the expert's 3 classes"),
        (lambda: proxy_scores(Net(), states, inputs, targets, cast(Any, "log_me")), "did you mean 'logme'"),
        (lambda: proxy_scores(Net(), [], inputs, targets), "none to score"),
        (lambda: proxy_scores(Net(), states, inputs[:0], targets[:0]), "target set is empty"),
        (lambda: proxy_scores(Net(), states, inputs, targets, features="neck"), "the module has no 'neck'"),
    ]
    for refused, text in refusals:
        with pytest.raises(InputError, match=text) as caught:
            refused()
        assert "\n" not in str(caught.value)
