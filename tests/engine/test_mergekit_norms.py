"""mergekit 0.1.5's methods of norms and angles: the same inputs through it (answers are stored) and through us."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import consilience as cs

DATA = Path(__file__).parent / "data"


def load_maker() -> Any:
    spec = importlib.util.spec_from_file_location("make_mergekit_norms", DATA / "make_mergekit_norms.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKER = load_maker()
CASES: dict[str, tuple[str, list[str], dict[str, Any], bool]] = MAKER.CASES
ORACLE: dict[str, npt.NDArray[Any]] = dict(np.load(DATA / "mergekit_norms_0_1_5.npz"))


def test_inputs_are_those_mergekit_saw() -> None:
    assert str(ORACLE["inputs"]) == MAKER.checksum()


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_mergekit(case: str) -> None:
    """To 1e-5 of each merged task vector's norm."""
    method, names, parameters, based = CASES[case]
    models: dict[str, dict[str, Any]] = MAKER.inputs()
    merged = cs.merge(models["base"] if based else None, {n: models[n] for n in names}, method=method, **parameters)
    assert isinstance(merged, dict)
    for name in MAKER.SHAPES:
        expected = ORACLE[f"{case}|{name}"]
        assert merged[name].dtype == expected.dtype == np.float32
        size = np.linalg.norm(expected.astype(np.float64) - models["base"][name])
        assert np.linalg.norm(merged[name].astype(np.float64) - expected) < 1e-5 * size
        assert size > 0.01 * np.linalg.norm(expected)  # the comparison is not an empty one
