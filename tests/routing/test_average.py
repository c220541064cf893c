"""Mean activations against hooks on a merged model, row by row."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from own_tasks import MAKE, TARGETS, nats, own_expert, own_tasks
from routed_models import make_experts, merge_into

from consilience.errors import InputError
from consilience.routing.install import install
from consilience.routing.local.average import Mean, average_activations
from consilience.routing.settings import Settings

kinds = pytest.mark.parametrize("kind", ["llama", "t5"])


def by_hand(kind: str, rows: list[Any]) -> dict[str, Any]:
    """Merge the expert into the weights; take means over tokens, then over rows, and divide by the length."""
    model, expert = MAKE[kind](), own_expert(kind)
    merge_into(model, [expert], [1.0])
    seen: dict[str, list[Any]] = {name: [] for name in expert.factors}
    modules = dict(model.named_modules())
    for name in seen:
        modules[name].register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0][0].double()))
    with torch.no_grad():
        for one in rows:
            nats(model, one)
    means = {name: torch.stack([u.mean(0) for u in parts]).mean(0).numpy() for name, parts in seen.items()}
    return {name: mean / np.sqrt((mean**2).sum()) for name, mean in means.items()}


@kinds
def test_vectors_are_the_mean_activations_of_the_merged_expert(kind: str) -> None:
    model, tasks = MAKE[kind](), own_tasks(kind)
    model.train()
    before = {name: (id(m), m.training) for name, m in model.named_modules()}
    seen: list[tuple[int, int]] = []
    found = average_activations(
        model, "own", own_expert(kind).factors, tasks, progress=lambda done, total: seen.append((done, total))
    )
    assert before == {name: (id(m), m.training) for name, m in model.named_modules()}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert seen == [(i, 7) for i in range(1, 8)]
    expected = by_hand(kind, [one for task in tasks for one in task.sequences])
    assert set(found) == set(expected)
    for name, vector in found.items():
        assert vector.dtype == torch.float32
        np.testing.assert_allclose(vector.numpy(), expected[name], atol=2e-5)


def test_rows_are_shared_among_the_tasks() -> None:
    tasks, factors = own_tasks("llama"), own_expert("llama").factors
    few = average_activations(MAKE["llama"](), "own", factors, tasks, rows=2)
    pairs = [(one, other) for one in tasks[0].sequences for other in tasks[1].sequences]
    fits = [all(np.allclose(few[n], e, atol=2e-5) for n, e in by_hand("llama", list(pair)).items()) for pair in pairs]
    assert sum(fits) == 1


def test_other_experts_of_a_routed_model_do_not_count() -> None:
    model, tasks, factors = MAKE["llama"](), own_tasks("llama"), own_expert("llama").factors
    expected = average_activations(model, "own", factors, tasks)
    install(model, make_experts(model, 3, TARGETS["llama"]), Settings("arrow"))
    found = average_activations(model, "own", factors, tasks)
    assert all(torch.equal(found[name], vector) for name, vector in expected.items())


@given(st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=6), st.integers(1, 4), st.integers(0, 2**31 - 1))
def test_a_streamed_mean_is_the_mean(rows: list[list[int]], width: int, seed: int) -> None:
    """Rows of several calls of some tokens each; a row without tokens does not count."""
    random, mean, means = np.random.default_rng(seed), Mean.of_nothing(width), list[Any]()
    for calls in rows:
        parts = [random.normal(size=(tokens, width)).astype(np.float32) for tokens in calls]
        for part in parts:
            mean.see(torch.from_numpy(part)[None])
        mean.end_row()
        if sum(calls):
            means.append(np.concatenate(parts).astype(np.float64).mean(0))
    assert mean.rows == len(means)
    expected = np.mean(means, 0) if means else np.zeros(width)
    np.testing.assert_allclose(mean.value.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_what_does_not_suit_is_one_line() -> None:
    tasks, factors, model = own_tasks("llama"), own_expert("llama").factors, MAKE["llama"]()
    with pytest.raises(InputError, match="expert 'own': has no rows of its own; give it a data file"):
        average_activations(model, "own", factors, [])
    with pytest.raises(InputError, match="rows: 0 must be a whole number of at least 1"):
        average_activations(model, "own", factors, tasks, rows=0)
    with pytest.raises(InputError, match="adapts 'q', which the base does not have"):
        average_activations(model, "own", {"q": next(iter(factors.values()))}, tasks)
