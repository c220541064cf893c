"""The terms of the loss against numpy, and what holds of them for any numbers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.errors import InputError
from consilience.learned.expert_merging import ExpertMerging, expert_merging
from consilience.methods.signature import Range, parameters_of, settings_of
from consilience.objectives import over_logits as module
from consilience.objectives import registry
from consilience.objectives.alignment import (
    Hidden,
    Logits,
    hidden_distance,
    logit_divergence,
    logit_loss,
    soft_cross_entropy,
)
from consilience.objectives.entropy import Entropy, prediction_entropy
from consilience.objectives.objective import Objective
from consilience.objectives.target import Target, target_loss
from consilience.objectives.term import Compared, Term
from consilience.student.outputs import Head, Outputs, token_blocks

Array = Any


def log_softmax(z: Array) -> Array:
    z = np.asarray(z, np.longdouble)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def kl(expert: Array, ours: Array, temperature: float) -> Array:
    p, q = log_softmax(np.asarray(expert) / temperature), log_softmax(np.asarray(ours) / temperature)
    return temperature**2 * (np.exp(p) * (p - q)).sum(-1)


def made(seed: int, *shape: int, size: float = 3.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape) * size)


SEEDS, SIZES = st.integers(0, 2**32 - 1), st.integers(1, 9)


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS, n=SIZES, vocabulary=st.integers(2, 20), temperature=st.floats(0.1, 10), size=st.floats(0.01, 100))
def test_logit_losses(seed: int, n: int, vocabulary: int, temperature: float, size: float) -> None:
    ours, expert = made(seed, n, vocabulary, size=size), made(seed + 1, n, vocabulary, size=size)
    divergence = logit_divergence(ours, expert, temperature).numpy()
    np.testing.assert_allclose(divergence, kl(expert, ours, temperature), rtol=1e-9, atol=1e-9)
    assert (divergence > -1e-12).all()
    p, q = log_softmax(expert.numpy() / temperature), log_softmax(ours.numpy() / temperature)
    cross = -(temperature**2) * (np.exp(p) * q).sum(-1)
    np.testing.assert_allclose(soft_cross_entropy(ours, expert, temperature), cross, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(logit_divergence(ours, ours + 3.0, temperature), 0, atol=1e-9)


def test_logit_losses_of_extreme_logits_are_finite() -> None:
    ours, expert = torch.tensor([[3e4, -3e4, 0.0]]), torch.tensor([[-3e4, 3e4, 0.0]])
    for loss in (logit_divergence, soft_cross_entropy):
        leaf = ours.clone().requires_grad_(True)
        value = loss(leaf, expert, 0.5).sum()
        (slope,) = torch.autograd.grad(value, leaf)
        assert torch.isfinite(value)
        assert torch.isfinite(slope).all()


def test_kinds_of_logit_loss_by_name() -> None:
    assert logit_loss("kl") is logit_divergence
    assert logit_loss("cross_entropy") is soft_cross_entropy


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS, n=SIZES, width=st.integers(1, 12), scale=st.floats(1e-3, 1e3))
def test_hidden_distances(seed: int, n: int, width: int, scale: float) -> None:
    ours, expert = made(seed, n, width, size=scale), made(seed + 1, n, width, size=scale)
    square = (ours.numpy() - expert.numpy()) ** 2
    np.testing.assert_allclose(hidden_distance(ours, expert, "l2"), square.sum(-1), rtol=1e-12)
    np.testing.assert_allclose(hidden_distance(ours, expert, "mse"), square.mean(-1), rtol=1e-12)
    variance = made(seed + 2, width).square() * scale**2
    expected = (square / (variance.numpy() + 1e-6 * variance.numpy().mean())).mean(-1)
    found = hidden_distance(ours, expert, "variance", variance)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    # Whatever the model's scale.
    again = hidden_distance(ours * 7, expert * 7, "variance", variance * 49)
    np.testing.assert_allclose(again, found, rtol=1e-9)


def test_a_channel_that_is_constant_for_the_expert_weighs_finitely() -> None:
    found = hidden_distance(torch.ones(1, 2), torch.zeros(1, 2), "variance", torch.tensor([0.0, 1.0]))
    assert float(found) == pytest.approx((1 / 5e-7 + 1) / 2, rel=1e-3)


def test_half_precision_states_are_compared_in_float32() -> None:
    ours, expert = torch.full((1, 4), 1.0).bfloat16(), torch.full((1, 4), 1.0 + 1 / 128).bfloat16()
    for theirs in (expert, expert.float()):
        found = hidden_distance(ours, theirs, "l2")
        assert found.dtype == torch.float32
        assert float(found) == 4 / 128**2
    assert hidden_distance(ours.double(), expert.double(), "l2").dtype == torch.float64


def test_a_variance_is_asked_for() -> None:
    with pytest.raises(ValueError, match="variance"):
        hidden_distance(torch.ones(1, 2), torch.ones(1, 2), "variance")


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS, n=SIZES, vocabulary=st.integers(2, 20), size=st.floats(0.0, 50))
def test_entropy(seed: int, n: int, vocabulary: int, size: float) -> None:
    z = made(seed, n, vocabulary, size=size)
    logs = log_softmax(z.numpy())
    found = prediction_entropy(z)
    np.testing.assert_allclose(found, -(np.exp(logs) * logs).sum(-1), rtol=1e-9, atol=1e-12)
    assert ((found > -1e-12) & (found < np.log(vocabulary) + 1e-9)).all()
    np.testing.assert_allclose(prediction_entropy(torch.zeros(1, vocabulary)), np.log(vocabulary), rtol=1e-6)


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS, n=SIZES, vocabulary=st.integers(2, 20))
def test_target_loss(seed: int, n: int, vocabulary: int) -> None:
    z = made(seed, n, vocabulary)
    targets = torch.from_numpy(np.random.default_rng(seed).integers(-1, vocabulary, n))
    logs = log_softmax(z.numpy())
    expected = [0.0 if t < 0 else float(-logs[i, t]) for i, t in enumerate(targets.tolist())]
    np.testing.assert_allclose(target_loss(z, targets), expected, rtol=1e-9, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# Sums of terms.

WIDTH, VOCABULARY, POSITIONS = 5, 11, 17


def outputs(seed: int, head: Head, *, leaf: bool = False) -> Outputs:
    states, block = made(seed, POSITIONS, WIDTH, size=1.0), made(seed + 50, POSITIONS, WIDTH, size=1.0)
    if leaf:
        states.requires_grad_(True)
        block.requires_grad_(True)
    return Outputs(states, {1: block, 3: block * 2}, head)


def head_of(seed: int) -> Head:
    return Head(made(seed, VOCABULARY, WIDTH, size=1.0), made(seed + 1, VOCABULARY, size=1.0))


ALL = Objective(terms=(Logits(1.0, 2.0), Hidden(1.0, hidden_distance="l2"), Entropy(1.0), Target(1.0)))


def test_terms_are_weighted_sums_over_positions() -> None:
    ours, expert = outputs(0, head_of(3)), outputs(1, head_of(5))
    weights = made(9, POSITIONS).abs()
    targets = torch.from_numpy(np.random.default_rng(0).integers(-1, VOCABULARY, POSITIONS))
    found = ALL.losses(Compared(ours, expert, targets, weights, {}, VOCABULARY))
    w = weights.numpy()

    def logits(one: Outputs) -> Array:
        assert one.head.weight is not None
        assert one.head.bias is not None
        return one.states.numpy() @ one.head.weight.numpy().T + one.head.bias.numpy()

    z, logs = logits(ours), log_softmax(logits(ours))
    labelled = targets.numpy() >= 0
    square = (ours.blocks[1].numpy() - expert.blocks[1].numpy()) ** 2
    expected = {
        "logit": (w * kl(logits(expert), z, 2.0)).sum(),
        "entropy": -(w * (np.exp(logs) * logs).sum(-1)).sum(),
        "target": -(w * logs[np.arange(POSITIONS), targets.numpy()])[labelled].sum(),
        "hidden": (w * (square.sum(-1) + 4 * square.sum(-1)) / 2).sum(),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-9), name


def test_blocks_of_tokens_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, targets = made(9, POSITIONS).abs(), torch.arange(POSITIONS) % VOCABULARY
    found: list[list[torch.Tensor]] = []
    for limit in (1 << 20, 4 * VOCABULARY * 3, 1):
        monkeypatch.setattr(module, "token_blocks", lambda n, v, limit=limit: token_blocks(n, v, limit))
        head = Head(*(side.requires_grad_(True) for side in (made(3, VOCABULARY, WIDTH), made(4, VOCABULARY))))
        ours = outputs(0, head, leaf=True)
        terms = ALL.losses(Compared(ours, outputs(1, head_of(5)), targets, weights, {}, VOCABULARY))
        leaves: Any = [ours.states, ours.blocks[1], head.weight, head.bias]
        total: Any = sum(terms.values())
        found.append([total.detach(), *torch.autograd.grad(total, leaves)])
    for one in found[1:]:
        for a, b in zip(one, found[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("limits", [(1 << 20, 1 << 20), (4 * VOCABULARY * 3, 4 * VOCABULARY * 2), (1, 1)])
def test_slopes_at_a_frozen_head_are_taken_at_once(monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int]) -> None:
    """Each position goes through each head once, and values and slopes are those of the whole made by autograd."""
    weights, targets = made(9, POSITIONS).abs(), torch.arange(POSITIONS) % VOCABULARY
    seen: list[int] = []

    class Counted(Head):
        def __call__(self, states: Any) -> Any:
            seen.append(len(states))
            return super().__call__(states)

    head = Counted(made(3, VOCABULARY, WIDTH), made(4, VOCABULARY))
    expert = outputs(1, Counted(made(5, VOCABULARY, WIDTH), made(6, VOCABULARY)))
    monkeypatch.setattr(module, "token_blocks", lambda n, v, own=limits[0]: token_blocks(n, v, own))
    monkeypatch.setattr(module, "PART_BYTES", limits[1])
    for term in (Logits(1.0, 2.0), Logits(1.0, 1.0, "cross_entropy"), Target(1.0), Entropy(1.0)):
        ours = outputs(0, head, leaf=True)
        seen.clear()
        total = term.loss(Compared(ours, expert, targets, weights, {}, VOCABULARY))
        (slope,) = torch.autograd.grad(3 * total, ours.states)
        assert sum(seen) == POSITIONS * (2 if isinstance(term, Logits) else 1)
        leaf = ours.states.detach().clone().requires_grad_()
        p, q = Head.__call__(head, leaf), Head.__call__(expert.head, expert.states)
        half_p, half_q = (p / 2).log_softmax(-1), (q / 2).softmax(-1)
        p = p.log_softmax(-1)
        apart = 4 * (half_q * (half_q.log() - half_p)).sum(-1)
        plain = {
            "logit": apart if term == Logits(1.0, 2.0) else -(q.softmax(-1) * p).sum(-1),
            "target": -p[torch.arange(POSITIONS), targets],
            "entropy": -(p.exp() * p).sum(-1),
        }[term.name]
        expected = (plain * weights).sum()
        (right,) = torch.autograd.grad(3 * expected, leaf)
        torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(slope, right, rtol=1e-10, atol=1e-10)
        with torch.no_grad():
            again = term.loss(Compared(ours, expert, targets, weights, {}, VOCABULARY))
        torch.testing.assert_close(again, total.detach(), rtol=1e-12, atol=1e-12)


def test_a_block_of_tokens_is_never_empty_and_covers_all() -> None:
    for count, vocabulary, limit in ((7, 10, 1), (7, 10, 80), (1, 10**9, 1), (8, 10, 10**9)):
        cuts = list(token_blocks(count, vocabulary, limit))
        assert [i for cut in cuts for i in range(count)[cut]] == list(range(count))
        assert all(cut.stop > cut.start for cut in cuts)


def test_states_that_are_logits_need_no_head() -> None:
    ours = Outputs(made(0, POSITIONS, VOCABULARY), {}, Head(None))
    expert = Outputs(made(1, POSITIONS, VOCABULARY), {}, Head(None))
    at = Compared(ours, expert, torch.zeros(0), torch.ones(POSITIONS).double(), {}, VOCABULARY)
    terms = Objective().losses(at)
    assert float(terms["logit"]) == pytest.approx(kl(expert.states, ours.states, 1.0).sum(), rel=1e-9)


def test_terms_without_a_weight_are_not_computed() -> None:
    objective = Objective(terms=(Logits(0.0), Hidden(0.0), Entropy(2.0)))
    assert objective.weights == {"entropy": 2.0}
    assert not objective.reads_experts
    at = Compared(outputs(0, head_of(3)), None, torch.zeros(0), torch.ones(POSITIONS), {}, VOCABULARY)
    assert list(objective.losses(at)) == ["entropy"]
    assert Objective(terms=(Hidden(1.0),)).reads_experts


@dataclass(frozen=True)
class Length(Term):
    """The states' squared norm: an objective from outside."""

    length_weight: Annotated[float, Range(0), "weight of the states' squared norm"] = 0.0

    name: ClassVar[str] = "length"

    def loss(self, compared: Compared) -> torch.Tensor:
        return (compared.student.states.square().sum(-1) * compared.weights).sum()


def test_a_further_objective_is_a_class_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "TERMS", (*registry.TERMS, f"{__name__}:Length"))
    shown = parameters_of(ExpertMerging)
    names = list(shown)
    assert names[names.index("target_weight") + 1 :][:2] == ["length_weight", "mean"]
    assert (shown["length_weight"].default, shown["length_weight"].range) == (0.0, Range(0))
    values = {name: parameter.default for name, parameter in shown.items()} | {"logit_weight": 0.0, "beta": (1.0,)}
    with pytest.raises(InputError, match="target_weight, length_weight: all are 0"):
        settings_of(ExpertMerging, values).objective.check()
    objective = settings_of(ExpertMerging, values | {"length_weight": 0.5}).objective
    assert objective.weights == {"length": 0.5}
    ours, weights = outputs(0, head_of(3)), made(9, POSITIONS).abs()
    found = objective.losses(Compared(ours, None, torch.zeros(0), weights, {}, VOCABULARY))
    assert list(found) == ["length"]
    assert float(found["length"]) == pytest.approx(float((weights.numpy() * (ours.states.numpy() ** 2).sum(1)).sum()))


def aligned(**changes: Any) -> ExpertMerging:
    values = {name: parameter.default for name, parameter in expert_merging.parameters.items()}
    return settings_of(ExpertMerging, values | {"hidden_weight": 1.0} | changes)


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "nothing to minimise": (lambda: aligned(logit_weight=0.0, hidden_weight=0.0).objective.check(), "all are 0"),
    "no block": (lambda: aligned(hidden_layers=("last",)).objective.layers, "hidden_layers"),
    "an empty block": (lambda: aligned(hidden_layers=("",)).objective.layers, "hidden_layers"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings(name: str) -> None:
    call, words = WRONG[name]
    with pytest.raises(InputError, match=words):
        call()


def test_layers_by_number() -> None:
    assert aligned(hidden_layers=("7,15", "3")).objective.layers == (7, 15, 3)
    assert aligned(hidden_layers=("middle",)).objective.layers == "middle"
    assert aligned(hidden_weight=0.0).objective.layers == ()


def test_the_optimizers_own_settings_reach_it() -> None:
    found = aligned(optimizer="spsa", mu=0.2, directions=3, sigma=0.4, population=7, learning_rate=0.5).descent
    assert (found.spsa.mu, found.spsa.directions) == (0.2, 3)
    assert (found.cma.sigma, found.cma.population) == (0.4, 7)
    assert (found.rule, found.learning_rate) == ("adam", 0.5)
