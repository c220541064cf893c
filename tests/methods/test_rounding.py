"""Adapters merged into float32 models first: the files' rounding is no direction of an expert's."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import consilience as cs
from tests.methods.matrices import Array, draw

SPECTRAL = ["tsv_m", "iso_c", "iso_cts", "wudi", "wudi_v2", "swudi_a", "actmat", "knots", "core_space", "svc"]


def low_rank(shape: tuple[int, int], count: int, size: float, shared: bool) -> list[Array]:
    rights = [0.2 * draw(4, shape[1], seed=10 if shared else 10 + k) for k in range(count)]
    return [size * draw(shape[0], 4, seed=20 + k) @ right for k, right in enumerate(rights)]


def change(base: Array, vectors: list[Array], method: str, kind: npt.DTypeLike, **more: Any) -> Array:
    held = base.astype(kind)
    experts = {f"e{k}": {"w": (held + vector).astype(kind)} for k, vector in enumerate(vectors)}
    out: Any = cs.merge({"w": held}, experts, method=method, **more)
    return out["w"].astype(np.float64) - held


@pytest.mark.parametrize("method", SPECTRAL)
@pytest.mark.parametrize("shape", [(24, 24), (64, 16), (20, 50)])
@pytest.mark.parametrize("shared", [False, True], ids=["apart", "one-A"])
@pytest.mark.parametrize("size", [0.2, 0.01])
def test_models_in_float32_merge_as_in_float64(method: str, shape: tuple[int, int], shared: bool, size: float) -> None:
    base, vectors = draw(*shape, seed=0).astype(np.float32).astype(np.float64), low_rank(shape, 2, size, shared)
    wanted = change(base, vectors, method, np.float64)
    found = change(base, vectors, method, np.float32)
    assert np.linalg.norm(found - wanted) <= 1e-3 * np.linalg.norm(wanted)


@pytest.mark.parametrize("method", ["tsv_m", "wudi", "actmat", "iso_cts"])
def test_full_task_vectors_keep_every_direction(method: str) -> None:
    """Of rank min(m, n): nothing is left out, and float32 files give what float64 files do."""
    base, vectors = draw(30, 18, seed=0), [0.1 * draw(30, 18, seed=k) for k in (1, 2, 3)]
    wanted = change(base, vectors, method, np.float64)
    assert np.linalg.norm(change(base, vectors, method, np.float32) - wanted) <= 1e-3 * np.linalg.norm(wanted)
    assert np.linalg.matrix_rank(wanted, 1e-6) == 18


@pytest.mark.parametrize("method", SPECTRAL)
def test_the_base_itself_and_a_base_of_zeros(method: str) -> None:
    base, vector = draw(12, 9, seed=0), draw(12, 9, seed=1)
    assert np.array_equal(change(base, [0 * base, 0 * base], method, np.float32), 0 * base)
    assert np.isfinite(change(0 * base, [vector, -vector], method, np.float32)).all()


def test_what_ace_lifts_is_no_null_vector() -> None:
    """Past its gate ACE lifts 0.3 of all directions, here 7: more than two adapters of rank 2 have."""
    base = draw(24, 24, seed=0)
    vectors = [size * draw(24, 2, seed=k) @ draw(2, 24, seed=k + 9) for k, size in ((1, 0.1), (2, 0.02))]
    wanted = change(base, vectors, "ace", np.float64, gate=0.0)
    found = change(base, vectors, "ace", np.float32, gate=0.0)
    assert np.linalg.norm(found - wanted) <= 1e-3 * np.linalg.norm(wanted)
