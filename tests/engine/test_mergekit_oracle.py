"""The same inputs through mergekit 0.1.5 (whose answers are stored) and through this library."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import consilience as cs

DATA = Path(__file__).parent / "data"


def load_maker() -> Any:
    spec = importlib.util.spec_from_file_location("make_mergekit_oracle", DATA / "make_mergekit_oracle.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKER = load_maker()
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = MAKER.CASES
ORACLE: dict[str, npt.NDArray[Any]] = dict(np.load(DATA / "mergekit_0_1_5.npz"))


def test_inputs_are_those_mergekit_saw() -> None:
    assert str(ORACLE["inputs"]) == MAKER.checksum()


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_mergekit(case: str) -> None:
    method, own, shared = CASES[case]
    models: dict[str, dict[str, Any]] = MAKER.inputs()
    names = ["e0"] if method == "slerp" else ["e0", "e1", "e2"]
    # mergekit's only rescaling is by the L1 norm, which changes nothing where nothing is dropped
    extra: dict[str, Any] = {"rescale": "l1"} if method.startswith("dare") else {}
    merged = cs.merge(models["base"], {n: models[n] for n in names}, method=method, **own, **shared, **extra)
    assert isinstance(merged, dict)
    for name in MAKER.SHAPES:
        expected = ORACLE[f"{case}|{name}"]
        assert merged[name].dtype == expected.dtype == np.float32
        error = merged[name].astype(np.float64) - expected
        assert np.linalg.norm(error) < 1e-6 * np.linalg.norm(expected)
        np.testing.assert_allclose(merged[name], expected, rtol=1e-5, atol=1e-6)
        # and the comparison is not an empty one
        assert np.linalg.norm(expected - models["base"][name]) > 0.01 * np.linalg.norm(expected)


@pytest.mark.parametrize("density", MAKER.DENSITIES)
def test_dare_has_mergekits_statistics(density: float) -> None:
    """Masks differ, so: both keep the stated share, scale the rest by one factor, and restore the L1 norm."""
    tau = MAKER.dare_input()
    share, factor, l1, squared = ORACLE[f"dare|{density}"]
    merged = cs.merge({"w": np.zeros_like(tau)}, [{"w": tau}], method="dare_linear", density=density, rescale="l1")
    assert isinstance(merged, dict)
    out = merged["w"].astype(np.float64)
    kept = out != 0
    spread = np.sqrt(density * (1 - density) / tau.size)
    assert abs(kept.mean() - density) < 5 * spread
    assert abs(share - density) < 5 * spread
    ours = out[kept] / tau[kept]
    assert np.ptp(ours) < 1e-6 * factor  # one factor for all
    assert abs(np.median(ours) - factor) < 0.1 * factor
    np.testing.assert_allclose(abs(out).sum(), abs(tau).sum(dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(l1, abs(tau).sum(dtype=np.float64), rtol=1e-5)
    assert abs(np.square(out).sum() - squared) < 0.15 * squared
