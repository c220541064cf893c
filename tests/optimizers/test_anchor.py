import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_losses import tensor

from consilience.optimizers.anchor import Anchor

NUMBER = st.floats(-2, 2)


def make(value: object, gamma: float = 1.0, norm: str = "paper", learned: object = None) -> Anchor:
    at = tensor(value)
    mask = torch.ones(at.shape[1], dtype=torch.bool) if learned is None else torch.as_tensor(learned)
    return Anchor(at, mask, gamma, "code" if norm == "code" else "paper")


@pytest.mark.parametrize("norm", ["paper", "code"])
def test_nothing_is_paid_at_the_anchor(norm: str) -> None:
    anchor = make([[0.3, 0.1], [0.2, 0.7], [0.0, -1.0]], 5.0, norm)
    assert float(anchor.penalty(anchor.value)) == 0.0


@given(NUMBER)
def test_a_common_offset_costs_its_size(offset: float) -> None:
    anchor = make(np.linspace(-1, 1, 12).reshape(3, 4))
    assert float(anchor.penalty(anchor.value + offset)) == pytest.approx(abs(offset), abs=1e-12)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 99))
def test_the_codes_norm_is_the_papers_times_experts(experts: int, count: int, seed: int) -> None:
    value, alpha = np.random.default_rng(seed).standard_normal((2, experts, count))
    paper, code = make(value, 0.8), make(value, 0.8, "code")
    assert float(code.penalty(tensor(alpha))) == pytest.approx(experts * float(paper.penalty(tensor(alpha))))


def test_fixed_coefficients_do_not_count() -> None:
    anchor = make(np.zeros((2, 3)), 6.0, learned=[True, False, True])
    alpha = tensor([[1.0, 100.0, 0.0], [0.0, 100.0, 1.0]])
    assert float(anchor.penalty(alpha)) == pytest.approx(6.0 * 2 / 4)


def test_an_anchor_of_nothing_is_zero() -> None:
    anchor = make(np.zeros((2, 1)), learned=[False])
    assert float(anchor.penalty(tensor([[1.0], [2.0]]))) == 0.0


@given(NUMBER, NUMBER, st.floats(0, 3))
def test_shrinking_minimises_distance_plus_penalty(point: float, at: float, step: float) -> None:
    anchor = make([[at, at]], 1.4)
    found = tensor([[point, point]])
    anchor.shrink(found, tensor([step, step]))
    grid = np.append(np.linspace(-8, 8, 4001), at)

    def cost(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return 0.5 * (x - point) ** 2 + step * anchor.slope * np.abs(x - at)

    assert float(np.min(cost(grid))) >= float(np.max(cost(found.numpy()))) - 1e-12


def test_shrinking_lands_on_the_anchor_to_the_bit() -> None:
    anchor = make([[0.1, 0.3, 0.7]], 3.0)
    found = tensor([[0.1 + 0.9, 0.3 - 0.9, 0.7]])
    anchor.shrink(found, 1.0)
    assert torch.equal(found, anchor.value)
