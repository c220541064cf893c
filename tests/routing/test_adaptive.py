"""The adaptive scale against what a logistic regression must satisfy."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from consilience.errors import InputError
from consilience.routing.instructions.adaptive import NARROWEST, WIDEST, Adaptive, bisect, fit_adaptive

COSINES = st.lists(st.floats(-1, 1), min_size=1, max_size=12)


def classes(inside: Tensor, outside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values, Platt's targets, and weights by which both classes count alike."""
    n, m = len(inside), len(outside)
    targets = torch.tensor([(n + 1) / (n + 2)] * n + [1 / (m + 2)] * m, dtype=torch.float64)
    weights = torch.tensor([1 / (2 * n)] * n + [1 / (2 * m)] * m, dtype=torch.float64)
    return torch.cat([inside, outside]), targets, weights


def loss(inside: Tensor, outside: Tensor, threshold: float, width: float) -> float:
    values, targets, weights = classes(inside, outside)
    z = (values - threshold) / width
    return float(torch.nn.functional.binary_cross_entropy_with_logits(z, targets, weights, reduction="sum"))


def drawn(mean: float, spread: float, count: int, seed: int) -> Tensor:
    return mean + spread * torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(COSINES, COSINES)
def test_no_other_threshold_and_width_have_a_smaller_loss(inside: list[float], outside: list[float]) -> None:
    own = torch.tensor(inside, dtype=torch.float64), torch.tensor(outside, dtype=torch.float64)
    found = fit_adaptive(*own)
    best = loss(*own, found.threshold, found.width)
    assert NARROWEST * 0.999 <= found.width <= WIDEST * 1.001
    for slope in (1 / found.width, 0.9 / found.width, 1.1 / found.width, 1.0, 5.0, 20.0, 100.0):
        if not 1 / WIDEST <= slope <= 1 / NARROWEST:
            continue
        for shift in (-0.3, -0.01, 0.0, 0.01, 0.3):
            assert loss(*own, found.threshold + shift, 1 / slope) >= best - 1e-9


def test_the_gradient_vanishes_between_the_bounds() -> None:
    inside, outside = drawn(0.5, 0.2, 300, 0), drawn(0.2, 0.2, 200, 1)
    found = fit_adaptive(inside, outside)
    assert NARROWEST < found.width < WIDEST
    values, targets, weights = classes(inside, outside)
    excess = weights * (torch.sigmoid((values - found.threshold) / found.width) - targets)
    assert abs(float(excess.sum())) < 1e-9
    assert abs(float(excess @ values)) < 1e-9


def test_a_shift_of_all_cosines_shifts_the_threshold_alone() -> None:
    inside, outside = drawn(0.5, 0.2, 40, 2), drawn(0.1, 0.2, 40, 3)
    one, other = fit_adaptive(inside, outside), fit_adaptive(inside + 0.25, outside + 0.25)
    assert other.threshold == pytest.approx(one.threshold + 0.25, abs=1e-6)
    assert other.width == pytest.approx(one.width, rel=1e-6)


def test_a_known_sigmoid_is_found_again() -> None:
    values = torch.linspace(-1, 1, 4001, dtype=torch.float64)
    share = torch.sigmoid((values - 0.3) / 0.1)
    picked = torch.rand(4001, generator=torch.Generator().manual_seed(4), dtype=torch.float64) < share
    inside, outside = values[picked], values[~picked]
    found = fit_adaptive(inside, outside)
    # Both classes weigh alike, which moves the threshold by the width times the log of their ratio.
    moved = 0.1 * float(torch.log(torch.tensor(len(inside) / len(outside))))
    assert found.threshold == pytest.approx(0.3 + moved, abs=0.02)
    assert found.width == pytest.approx(0.1, rel=0.1)


def test_held_in_prompts_get_the_most_and_far_ones_little() -> None:
    inside, outside = drawn(0.7, 0.05, 30, 5), drawn(0.15, 0.05, 30, 6)
    found = fit_adaptive(inside, outside)
    assert (found.wrong_inside, found.wrong_outside, found.examples) == (0.0, 0.0, 30)
    again = torch.cat([drawn(0.7, 0.05, 50, 7)[:, None], torch.zeros(50, 2).double()], 1)
    assert bool((found.scale(again, 100.0) > 80).all())
    far = torch.cat([drawn(0.1, 0.05, 50, 8)[:, None], torch.full((50, 2), -0.9).double()], 1)
    assert bool((found.scale(far, 100.0) < 20).all())


def test_where_nothing_tells_them_apart_it_says_so() -> None:
    found = fit_adaptive(drawn(0.5, 0.1, 500, 9), drawn(0.5, 0.1, 500, 10))
    assert found.wrong_inside == pytest.approx(0.5, abs=0.06)
    assert found.wrong_outside == pytest.approx(0.5, abs=0.06)
    shares = found.scale(torch.tensor([[0.3], [0.5], [0.7]]), 1.0)
    assert bool((shares > 0.3).all())
    assert bool((shares < 0.7).all())


def test_outside_above_inside_is_all_wrong() -> None:
    found = fit_adaptive(torch.full((20,), 0.1), torch.full((20,), 0.9))
    assert (found.wrong_inside, found.wrong_outside) == (1.0, 1.0)
    assert found.width == pytest.approx(WIDEST)


@given(st.floats(-1, 1), st.floats(0.02, 1), st.floats(0, 200), st.lists(st.floats(-1, 1), min_size=1, max_size=5))
def test_the_scale_rises_with_the_top_cosine_from_zero_to_its_most(
    threshold: float, width: float, most: float, row: list[float]
) -> None:
    found = Adaptive(threshold, width, 0.0, 0.0, 1)
    cosines = torch.tensor([row, [max(row)] * len(row), [max(row) + 0.1] * len(row)])
    a, top, higher = found.scale(cosines, most).tolist()
    assert a == top
    assert 0 <= a <= higher <= most * (1 + 1e-6)
    assert found.scale(torch.tensor([[threshold]]), most).item() == pytest.approx(most / 2, rel=1e-5, abs=1e-6)


def test_bisection_stops_at_the_ends() -> None:
    assert bisect(lambda x: x - 0.3, 0, 1) == pytest.approx(0.3)
    assert bisect(lambda x: x + 5, 0, 1) == pytest.approx(0)
    assert bisect(lambda x: x - 5, 0, 1) == pytest.approx(1)


def test_it_is_stored_in_plain_values() -> None:
    found = Adaptive(0.25, 0.05, 0.1, 0.2, 7)
    assert Adaptive.from_dict(found.to_dict(), "x") == found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"width": 0.0}, "width that is not positive"),
        ({"threshold": float("nan")}, "something else than numbers"),
        ({"threshold": "0.2"}, "something else than numbers"),
        ({"more": 1}, "must have threshold, width"),
    ],
)
def test_a_damaged_record_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Adaptive.from_dict(Adaptive(0.25, 0.05, 0.1, 0.2, 7).to_dict() | change, "routing.json")
