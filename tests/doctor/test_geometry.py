"""Identities of displacement, against vectors that are at hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from consilience.doctor.theory.geometry import Geometry

vectors = st.integers(1, 5).flatmap(
    lambda k: st.tuples(
        arrays(np.float64, (k, 7), elements=st.floats(-10, 10)), arrays(np.float64, (k,), elements=st.floats(0.1, 1))
    )
)


def _geometry(tau: np.ndarray, base: np.ndarray | None = None) -> Geometry:
    base = np.ones(tau.shape[1]) if base is None else base
    return Geometry(tau @ tau.T, tau @ base, float(base @ base))


@given(vectors)
def test_three_forms_of_displacement_agree(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    tau, p = drawn[0], drawn[1] / drawn[1].sum()
    geometry, mean = _geometry(tau), p @ tau
    direct = sum(p[k] * np.square(mean - tau[k]).sum() for k in range(len(p)))
    pairs = 0.5 * sum(p[j] * p[k] * np.square(tau[j] - tau[k]).sum() for j in range(len(p)) for k in range(len(p)))
    scale = 1 + np.square(tau).sum()
    assert geometry.displacement(p) == pytest.approx(direct, abs=1e-9 * scale)
    assert geometry.displacement(p) == pytest.approx(pairs, abs=1e-9 * scale)
    assert p @ geometry.moves(p) == pytest.approx(direct, abs=1e-9 * scale)


@given(vectors, arrays(np.float64, (7,), elements=st.floats(-10, 10)))
def test_what_is_common_to_all_moves_nothing(drawn: tuple[np.ndarray, np.ndarray], common: np.ndarray) -> None:
    tau, p = drawn[0], drawn[1] / drawn[1].sum()
    scale = 1 + np.square(tau).sum() + np.square(common).sum()
    assert _geometry(tau + common).displacement(p) == pytest.approx(_geometry(tau).displacement(p), abs=1e-9 * scale)
    assert _geometry(np.repeat(tau[:1], len(p), 0)).displacement(p) == pytest.approx(0, abs=1e-9 * scale)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_orthogonal_task_vectors_of_one_length(count: int) -> None:
    geometry, p = _geometry(3.0 * np.eye(count, 9)), np.full(count, 1 / count)
    expected = (1 - 1 / count) * 9.0
    assert geometry.displacement(p) == pytest.approx(expected)
    assert geometry.moves(p) == pytest.approx(np.full(count, expected))
    assert geometry.common == pytest.approx(1 / count)
    assert geometry.sigma_max == pytest.approx(3.0)
    assert geometry.cosines == pytest.approx(np.eye(count))


@given(vectors)
def test_singular_values_are_numpy_s(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    tau = drawn[0]
    scale = 1 + float(np.linalg.norm(tau))
    assert _geometry(tau).sigma_max == pytest.approx(np.linalg.norm(tau, 2), abs=1e-6 * scale)
    away = tau - tau.mean(0)
    assert _geometry(tau).sigma_max_centred == pytest.approx(np.linalg.norm(away, 2), abs=1e-6 * scale)


@given(vectors)
def test_cosines_with_the_base(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    tau, base = drawn[0], np.arange(1.0, 8.0)
    expected = [(base + t) @ base / (np.linalg.norm(base + t) * np.linalg.norm(base)) for t in tau]
    assert _geometry(tau, base).base_cosines == pytest.approx(np.array(expected), abs=1e-6)


def test_weights_that_do_not_sum_to_one_move_experts_all_the_same() -> None:
    tau = np.array([[1.0, 0.0], [0.0, 2.0]])
    assert _geometry(tau).moves(np.array([0.3, 0.3])) == pytest.approx(np.array([0.7**2 + 0.6**2, 0.3**2 + 1.4**2]))


def test_nothing_has_no_angle() -> None:
    geometry = _geometry(np.zeros((2, 3)), np.zeros(3))
    assert not geometry.cosines.any()
    assert geometry.base_cosines.tolist() == [1.0, 1.0]
    assert geometry.common == 0.0
