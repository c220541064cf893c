from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_losses import tensor

from consilience.errors import InputError
from consilience.optimizers.parameterisation import Kind, parameterise

KINDS = get_args(Kind)
STARTS: dict[str, Any] = {
    "real": st.floats(-3, 3),
    "box": st.floats(0, 1),
    "sigmoid": st.floats(1e-6, 1 - 1e-6),
    "softplus": st.floats(1e-6, 30),
    "softmax": st.floats(1e-6, 1),
    "affine": st.floats(-3, 3),
}


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), experts=st.integers(1, 4))
def test_the_start_comes_back(kind: Kind, data: st.DataObject, experts: int) -> None:
    alpha = np.array(
        data.draw(st.lists(st.lists(STARTS[kind], min_size=3, max_size=3), min_size=experts, max_size=experts))
    )
    mapped = parameterise(kind, alpha, np.ones(3, bool))
    np.testing.assert_allclose(mapped.coefficients(mapped.initial()), mapped.start.numpy(), rtol=1e-9, atol=1e-12)
    if kind not in ("softmax", "affine"):
        assert np.array_equal(mapped.start.numpy(), alpha)


@pytest.mark.parametrize("kind", ["real", "box"])
def test_a_plain_map_is_the_identity(kind: Kind) -> None:
    mapped = parameterise(kind, np.array([[0.1, 0.3]]), np.ones(2, bool))
    w = tensor([[0.25, 0.5]])
    assert mapped.plain
    assert torch.equal(mapped.alpha(w), w)


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("sigmoid", 0.0, 1.0), ("softplus", 0.0, np.inf), ("softmax", 0.0, 1.0)]
)
@given(seed=st.integers(0, 50))
def test_coefficients_stay_in_the_maps_range(kind: Kind, low: float, high: float, seed: int) -> None:
    mapped = parameterise(kind, np.full((3, 5), 0.3), np.ones(5, bool))
    alpha = mapped.coefficients(5 * tensor(np.random.default_rng(seed).standard_normal((3, 5))))
    assert not mapped.plain
    assert ((alpha > low) & (alpha < high)).all()


@pytest.mark.parametrize("kind", ["softmax", "affine"])
@given(seed=st.integers(0, 50))
def test_coefficients_sum_to_one_over_experts(kind: Kind, seed: int) -> None:
    w, start = np.random.default_rng(seed).standard_normal((2, 4, 6))
    mapped = parameterise(kind, np.abs(start) + 0.01, np.ones(6, bool))
    np.testing.assert_allclose(mapped.coefficients(tensor(w)).sum(0), 1.0, rtol=1e-12)
    np.testing.assert_allclose(mapped.start.numpy().sum(0), 1.0, rtol=1e-12)


def test_the_affine_map_is_the_nearest_point_of_the_plane() -> None:
    mapped = parameterise("affine", np.zeros((3, 1)), np.ones(1, bool))
    w = np.array([[2.0], [-1.0], [0.5]])
    off = mapped.coefficients(tensor(w)) - w
    np.testing.assert_allclose(off, off.mean())


def test_a_box_clamps_in_place() -> None:
    mapped = parameterise("box", np.full((1, 3), 0.5), np.ones(3, bool))
    w = tensor([[-0.2, 0.4, 1.7]])
    mapped.project(w)
    assert w.tolist() == [[0.0, 0.4, 1.0]]


@pytest.mark.parametrize("kind", KINDS)
def test_fixed_coefficients_bypass_the_map(kind: Kind) -> None:
    # A sigmoid cannot reach -2 and 3, and a column with -2 and 3 sums to 1 only by accident.
    start = np.array([[0.3, -2.0, 0.2], [0.6, 4.0, 0.2]])
    mapped = parameterise(kind, start, np.array([True, False, True]))
    w = mapped.initial() + 0.7
    assert torch.isfinite(w).all()
    assert np.array_equal(mapped.coefficients(w)[:, 1], start[:, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_fixed_coefficients_have_no_gradient(kind: Kind) -> None:
    mapped = parameterise(kind, np.array([[0.3, 0.0], [0.6, 0.0]]), np.array([True, False]))
    w = mapped.initial().requires_grad_()
    (gradient,) = torch.autograd.grad((mapped.alpha(w) * tensor([[1.0, 1.0], [2.0, 2.0]])).sum(), w)
    assert torch.isfinite(gradient).all()
    assert not gradient[:, 1].any()
    assert gradient[:, 0].any()


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        ("sigmoid", 1.0, "1; choose a value above 0 and below 1"),
        ("sigmoid", 0.0, "0; choose a value above 0 and below 1"),
        ("softplus", -0.5, "-0.5; choose a value above 0"),
        ("softmax", 0.0, "0; choose a value above 0"),
        ("box", 1.5, "1.5; choose a value in [0, 1]"),
        ("box", float("nan"), "nan; choose a value in [0, 1]"),
        ("real", float("nan"), "nan; choose a value that is finite"),
        ("affine", float("inf"), "inf; choose a value that is finite"),
    ],
)
def test_a_start_out_of_range_is_refused(kind: Kind, value: float, said: str) -> None:
    with pytest.raises(InputError) as caught:
        parameterise(kind, np.array([[0.3, value]]), np.ones(2, bool))
    assert str(caught.value) == f"alphabar: {kind} coefficients cannot start at {said}"
    parameterise(kind, np.array([[0.3, value]]), np.array([True, False]))
