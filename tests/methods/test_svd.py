"""Singular triples and polar factors of float32 matrices, read off Gram matrices, against LAPACK's in float64."""

import numpy as np
import pytest

from consilience.methods.svd import leading, orthogonal, polar
from tests.methods.matrices import Array, draw


def falling(height: int, width: int, ratio: float, seed: int = 0) -> Array:
    u, _, v = np.linalg.svd(draw(height, width, seed=seed), full_matrices=False)
    return ((u * ratio ** np.arange(len(v))) @ v).astype(np.float32)


@pytest.mark.parametrize("shape", [(40, 40), (90, 25), (25, 90), (7, 1), (1, 7)])
@pytest.mark.parametrize("ratio", [1.0, 0.9, 0.7])
@pytest.mark.parametrize("count", [1, 5, 1000])
def test_triples_are_lapacks(shape: tuple[int, int], ratio: float, count: int) -> None:
    matrix = falling(*shape, ratio)
    u, s, v = leading(matrix, None, count)
    exact = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    above = int((exact > exact[0] * max(shape) * np.finfo(np.float32).eps).sum())
    assert len(s) == min(count, above)
    assert u.dtype == s.dtype == v.dtype == np.float32
    np.testing.assert_allclose(s, exact[: len(s)], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(u.T @ u, np.eye(len(s)), atol=2e-5)
    np.testing.assert_allclose(v @ v.T, np.eye(len(s)), atol=2e-5)
    rest = np.linalg.norm(matrix - (u * s) @ v, 2)
    assert rest <= (exact[len(s)] if len(s) < len(exact) else 0) + 1e-5


def test_what_is_zero_has_no_triples() -> None:
    u, s, v = leading(np.zeros((4, 6), np.float32), None, 3)
    assert (u.shape, s.shape, v.shape) == ((4, 0), (0,), (0, 6))


@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-6, 0.0])
def test_polar_factors_are_lapacks(spread: float) -> None:
    """Of columns that depend on each other but for rounding it is the root on their range: P^T P projects."""
    columns = draw(30, 6, seed=3).astype(np.float32)
    columns[:, 5] = columns[:, 4] + np.float32(spread) * columns[:, 5]
    found = polar(columns)
    assert found.dtype == np.float32
    ones = np.eye(6)
    if spread <= 1e-6:
        ones[4:, 4:] = 0.5
    np.testing.assert_allclose(found.T @ found, ones, atol=1e-4)
    if spread >= 1e-3:
        u, _, v = np.linalg.svd(columns.astype(np.float64), full_matrices=False)
        np.testing.assert_allclose(found, u @ v, atol=1e-4)
    # it makes the most of the columns, which every polar factor does: tr(P^T A) is the sum of the singular values
    assert np.trace(found.T @ columns) == pytest.approx(np.linalg.svd(columns, compute_uv=False).sum(), rel=1e-5)


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-6])
def test_the_product_of_two_polar_factors_is_lapacks(spread: float) -> None:
    """Columns that nearly depend on each other, too; those that do but for rounding have no direction of their own."""
    u, v = draw(40, 6, seed=1).astype(np.float32), draw(6, 25, seed=2).astype(np.float32)
    s = np.arange(6, 0, -1).astype(np.float32)
    u[:, 5] = u[:, 4] + np.float32(spread) * u[:, 5]
    left, right = orthogonal(u, s, v)
    assert left.dtype == right.dtype == np.float32
    (a, _, b), (c, _, d) = (np.linalg.svd(one.astype(np.float64), full_matrices=False) for one in (u, v))
    kept = 6 if spread > 1e-6 else 5
    np.testing.assert_allclose(left @ right, (a[:, :kept] @ b[:kept] * s) @ (c @ d), atol=1e-5 / max(spread, 1e-2))


@pytest.mark.parametrize("decay", [0.999, 0.95, 0.8])
@pytest.mark.parametrize("shape", [(60, 200), (200, 60)])
def test_float32_is_as_exact_as_full_decompositions_in_float32(shape: tuple[int, int], decay: float) -> None:
    """TSV-M of five experts: no further from float64 than the published way, five SVDs and two more, in float32."""

    def published(vectors: list[Array]) -> Array:
        share = min(shape) // len(vectors)
        parts = [np.linalg.svd(one, full_matrices=False) for one in vectors]
        u, v = (np.concatenate(side, axis) for side, axis in (([p[0][:, :share] for p in parts], 1),
                                                              ([p[2][:share] for p in parts], 0)))  # fmt: skip
        s = np.concatenate([p[1][:share] for p in parts])
        (a, _, b), (c, _, d) = np.linalg.svd(u, full_matrices=False), np.linalg.svd(v, full_matrices=False)
        return (a @ b * s) @ (c @ d)

    vectors = [falling(*shape, decay, seed=k) for k in range(5)]
    exact = published([one.astype(np.float64) for one in vectors])
    triples = [leading(one, None, min(shape) // 5) for one in vectors]
    left, right = orthogonal(
        np.concatenate([t[0] for t in triples], 1), np.concatenate([t[1] for t in triples]),
        np.concatenate([t[2] for t in triples]),
    )  # fmt: skip
    ours = np.linalg.norm(left @ right - exact)
    assert ours <= 1.5 * np.linalg.norm(published(vectors) - exact)
    assert ours <= 1e-4 * np.linalg.norm(exact)
