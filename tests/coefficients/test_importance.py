"""Importance and chunk counts against their formulas, and the laws they obey."""

import math
import subprocess
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from consilience.coefficients import Coefficients, constant, expand, make_groups
from consilience.coefficients.importance import allocate, allocation_groups, importance
from consilience.errors import InputError

norms = st.one_of(st.just(0.0), st.floats(1e-3, 1e3))
shares = st.lists(st.one_of(st.just(0.0), st.floats(1e-9, 1.0)), min_size=1, max_size=30)
kappas = st.floats(0, 50)


def named(values: list[float]) -> dict[str, float]:
    return {f"g{i}": value for i, value in enumerate(values)}


@st.composite
def problems(draw: st.DrawFn) -> tuple[Coefficients, dict[str, Any]]:
    held = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    tensors = [(f"b.{i % 2}.t{i}", n) for i, n in enumerate(held)]
    chunks = draw(st.integers(0, 4))
    groups = make_groups(tensors, draw(st.sampled_from(["tensor", "block", "global"])), lambda name: chunks)
    experts = draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    alpha = rng.normal(size=(experts, sum(g.chunks for g in groups)))
    coefficients = Coefficients(tuple("abc"[:experts]), groups, alpha)
    return coefficients, {
        name: np.array(draw(st.lists(norms, min_size=experts, max_size=experts))) for name, _ in tensors
    }


@given(problems())
def test_importance_is_the_papers_formula(problem: tuple[Coefficients, dict[str, Any]]) -> None:
    coefficients, l1 = problem
    mass: dict[str, float] = {}
    for group in coefficients.groups:
        mass[group.name] = 0.0
        for name, numel in group.tensors:
            for k in range(len(coefficients.experts)):
                # s n of the tensor, spread over its elements, each with its own coefficient.
                for piece in coefficients.pieces[name]:
                    elements = piece.stop - piece.start
                    mass[group.name] += abs(coefficients.alpha[k, piece.index]) * l1[name][k] / numel * elements
    total = sum(mass.values())
    found = importance(coefficients, l1)
    assert list(found) == [g.name for g in coefficients.groups]
    assert sum(found.values()) == pytest.approx(1)
    assert min(found.values()) >= 0
    for name, value in found.items():
        assert value == pytest.approx(mass[name] / total if total else 1 / len(found), rel=1e-9, abs=1e-12)


@given(problems(), st.sampled_from([1e-300, 1e-9, 3.0, 1e9, 1e290]))
def test_importance_does_not_see_a_common_scale(problem: tuple[Coefficients, dict[str, Any]], scale: float) -> None:
    coefficients, l1 = problem
    found = importance(coefficients, l1)
    scaled_tau = importance(coefficients, {name: value * scale for name, value in l1.items()})
    scaled_alpha = importance(coefficients.with_alpha(coefficients.alpha * -scale), l1)
    for other in (scaled_tau, scaled_alpha):
        assert other == pytest.approx(found, rel=1e-9, abs=1e-12)


@given(problems(), st.randoms())
def test_importance_moves_with_the_groups(problem: tuple[Coefficients, dict[str, Any]], random: Any) -> None:
    coefficients, l1 = problem
    order = list(range(len(coefficients.groups)))
    random.shuffle(order)
    groups = [coefficients.groups[i] for i in order]
    shuffled = allocation_groups(groups, {g.name: g.chunks for g in groups})
    found = importance(expand(coefficients, shuffled), l1)
    assert list(found) == [g.name for g in groups]
    assert found == pytest.approx(importance(coefficients, l1), rel=1e-9, abs=1e-12)


def test_norms_per_piece_weigh_the_chunks() -> None:
    groups = make_groups([("x", 4), ("y", 4)], "tensor", lambda name: 2 if name == "x" else 1)
    coefficients = Coefficients(("a",), groups, np.array([[1.0, 0.0, 1.0]]))
    assert importance(coefficients, {"x": [8.0], "y": [4.0]}) == pytest.approx({"x": 0.5, "y": 0.5})
    assert importance(coefficients, {"x": [[0.0, 8.0]], "y": [4.0]}) == pytest.approx({"x": 0.0, "y": 1.0})
    assert importance(coefficients, {"x": [[8.0, 0.0]], "y": [[4.0]]}) == pytest.approx({"x": 2 / 3, "y": 1 / 3})


def test_nothing_to_tell_groups_apart() -> None:
    coefficients = constant(["a"], make_groups([("x", 4), ("y", 2)], "tensor"), [0.0])
    assert importance(coefficients, {"x": [1.0], "y": [2.0]}) == {"x": 0.5, "y": 0.5}
    assert importance(constant(["a"], (), [1.0]), {}) == {}


@pytest.mark.parametrize(
    "l1",
    [{"x": [1.0]}, {"y": [1.0]}, {"x": [1.0, 2.0], "y": [1.0]}, {"x": [-1.0], "y": [1.0]}, {"x": [np.nan], "y": [1.0]}],
)
def test_wrong_norms_are_refused(l1: dict[str, Any]) -> None:
    coefficients = constant(["a"], make_groups([("x", 4), ("y", 2)], "tensor"), [1.0])
    with pytest.raises(ValueError, match=r"'[xy]'"):
        importance(coefficients, l1)


@given(values=shares, budget=st.floats(0, 20), kappa=st.integers(0, 6))
def test_chunk_counts_are_the_formulas(values: list[float], budget: float, kappa: int) -> None:
    """In exact arithmetic; counts may differ only where the exact value is an integer, but for rounding."""
    exact = [Fraction(value) ** kappa for value in values]
    total = sum(exact) or Fraction(1)
    if not any(exact):
        exact, total = [Fraction(1)] * len(values), Fraction(len(values))
    found = allocate(named(values), budget, kappa)
    for count, power in zip(found.values(), exact, strict=True):
        wanted = Fraction(budget) * len(values) * power / total
        slack = Fraction(1, 10**8)
        assert math.floor(wanted - slack) <= count <= math.floor(wanted + slack)
        assert count >= 0


@given(values=shares, budget=st.floats(0, 20), kappa=kappas | st.just(math.inf))
def test_no_more_chunks_than_the_budget(values: list[float], budget: float, kappa: float) -> None:
    found = allocate(named(values), budget, kappa)
    assert sum(found.values()) <= budget * len(values) + 2e-9 * len(values)


@given(count=st.integers(1, 400), budget=st.one_of(st.integers(0, 1000), st.sampled_from([10**6, 10**9, 2**40])))
def test_uniform_is_floor_of_the_budget(count: int, budget: int) -> None:
    rng = np.random.default_rng(count)
    importances = named(rng.random(count).tolist())
    assert set(allocate(importances, budget, 0).values()) == {budget}
    if 1 <= budget < 10**6:
        assert set(allocate(importances, budget - 0.01, 0).values()) == {budget - 1}


@pytest.mark.parametrize("count", [49, 98, 103, 107, 161, 187, 196, 206, 210])
def test_uniform_survives_the_products_that_round_below_one(count: int) -> None:
    assert set(allocate(named([1 / count] * count), 1.0, 0).values()) == {1}
    assert set(allocate(named([1 / count] * count), 1.0, 1).values()) == {1}
    assert set(allocate(named([0.0] * count), 1.0, 0).values()) == {1}


@given(values=shares, budget=st.floats(0, 0.999))
def test_a_uniform_budget_below_one_is_nothing(values: list[float], budget: float) -> None:
    assert set(allocate(named(values), budget, 0).values()) == {0}


@given(values=shares, budget=st.floats(0.1, 20), pair=st.tuples(kappas, kappas))
def test_a_larger_kappa_never_lowers_the_tops_count(
    values: list[float], budget: float, pair: tuple[float, float]
) -> None:
    top = f"g{max(range(len(values)), key=values.__getitem__)}"
    less, more = (allocate(named(values), budget, kappa)[top] for kappa in sorted(pair))
    assert less <= more


@given(values=st.lists(st.floats(0.1, 1.0), min_size=1, max_size=30), budget=st.floats(0.1, 20))
def test_in_the_limit_the_most_important_takes_all(values: list[float], budget: float) -> None:
    top = max(range(len(values)), key=values.__getitem__)
    everything = math.floor(budget * len(values) + 1e-9)
    expected = [everything if i == top else 0 for i in range(len(values))]
    assert list(allocate(named(values), budget, math.inf).values()) == expected
    others = [v for i, v in enumerate(values) if i != top]
    assume(not others or max(others) < 0.9 * values[top])
    # Near the limit the sum of the powers is 1 to the last bit.
    assert list(allocate(named(values), budget, 1e4).values()) == expected


def test_ties_at_infinity_go_to_the_first() -> None:
    assert allocate({"a": 0.1, "b": 0.45, "c": 0.45}, 1.0, math.inf) == {"a": 0, "b": 3, "c": 0}


@given(values=shares, budget=st.floats(0.1, 20), kappa=kappas, random=st.randoms())
def test_counts_move_with_the_groups(values: list[float], budget: float, kappa: float, random: Any) -> None:
    importances = named(values)
    keys = list(importances)
    random.shuffle(keys)
    found = allocate(importances, budget, kappa)
    other = allocate({key: importances[key] for key in keys}, budget, kappa)
    assert list(other) == keys
    # Sums in another order round otherwise, which may move a count that is on the edge.
    assert max(abs(found[key] - other[key]) for key in keys) <= 1
    assert sum(found[key] != other[key] for key in keys) <= 1


@pytest.mark.parametrize("scale", [1e-300, 5e-324, 1e300])
def test_powers_neither_overflow_nor_vanish(scale: float) -> None:
    assert allocate({"a": scale, "b": scale, "c": 0.0}, 1.0, 400.0) == {"a": 1, "b": 1, "c": 0}


def test_groups_without_importance_get_nothing() -> None:
    assert allocate({"a": 0.0, "b": 1.0}, 3.0, 0.5) == {"a": 0, "b": 6}
    assert allocate({"a": 0.0, "b": 0.0}, 3.0, 0.5) == {"a": 3, "b": 3}
    assert allocate({}, 1.0, 1.0) == {}


@pytest.mark.parametrize(("budget", "kappa"), [(-1, 1), (math.nan, 1), (math.inf, 1), (1, -0.5), (1, math.nan)])
def test_a_wrong_budget_or_kappa_is_one_line(budget: float, kappa: float) -> None:
    with pytest.raises(InputError, match="write a number >= 0"):
        allocate({"a": 1.0}, budget, kappa)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_a_wrong_importance_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="'b'"):
        allocate({"a": 1.0, "b": value}, 1.0, 1.0)


@given(
    held=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    grouping=st.sampled_from(["tensor", "block", "global"]),
    data=st.data(),
)
def test_groups_are_cut_as_allocated(held: list[int], grouping: str, data: st.DataObject) -> None:
    tensors = [(f"b.{i % 2}.t{i}", n) for i, n in enumerate(held)]
    groups = make_groups(tensors, grouping, lambda name: 3)
    counts = {g.name: data.draw(st.integers(0, 40)) for g in groups}
    assert allocation_groups(groups, counts) == make_groups(tensors, grouping, counts.__getitem__)


def test_one_chunk_everywhere_is_layer_wise() -> None:
    groups = make_groups([("x", 4), ("y", 2)], "tensor")
    assert allocation_groups(groups, allocate({"x": 0.9, "y": 0.1}, 1.0, 0)) == groups
    with pytest.raises(ValueError, match="'y'"):
        allocation_groups(groups, {"x": 1})


PROBE = """
import sys
import consilience.coefficients.importance, consilience.coefficients.picture, consilience.coefficients.listing
heavy = {"torch", "matplotlib", "scipy", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""


def test_nothing_heavy_is_imported() -> None:
    subprocess.run([sys.executable, "-c", PROBE], check=True)


def test_the_whole_way_of_expert_merging_pp() -> None:
    """Layer-wise coefficients -> importance -> chunks -> the same merge, in more coefficients."""
    tensors = [(f"model.layers.{i}.mlp.{n}_proj.weight", 100) for i in range(7) for n in ("gate", "up", "down")]
    start = constant(["a", "b"], make_groups(tensors, "tensor"), [0.3, 0.3])
    rng = np.random.default_rng(0)
    found = importance(start, {name: rng.random(2) * 100 for name, _ in tensors})
    counts = allocate(found, 1.1, 1.0)
    chunked = expand(start, allocation_groups(start.groups, counts))
    assert 0 in counts.values()
    assert max(counts.values()) > 1
    assert chunked.count == sum(max(1, m) for m in counts.values())
    assert chunked.learned.sum() == sum(counts.values()) <= 1.1 * len(tensors)
    assert (chunked.alpha == 0.3).all()


@pytest.mark.parametrize("kappa", [1, 2, 3])
@pytest.mark.parametrize("count", [3, 7, 10, 30])
def test_counts_that_are_whole_survive_rounding(count: int, kappa: int) -> None:
    powers = [number**kappa for number in range(1, count + 1)]
    importances = named([number / 7 for number in range(1, count + 1)])
    assert list(allocate(importances, sum(powers) / count, kappa).values()) == powers


def test_a_whole_budget_survives_rounding_at_infinity() -> None:
    assert math.floor(0.29 * 100) == 28
    assert max(allocate(named([1.0] * 100), 0.29, math.inf).values()) == 29
