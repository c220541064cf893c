"""mergekit 0.1.5's trimming and selecting methods: its stored answers beside this library's."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import consilience as cs
from consilience.methods import load

DATA = Path(__file__).parent / "data"


def load_maker() -> Any:
    spec = importlib.util.spec_from_file_location("make_mergekit_trims", DATA / "make_mergekit_trims.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKER = load_maker()
CASES: dict[str, tuple[str, float, dict[str, Any], dict[str, Any], int]] = MAKER.CASES
ORACLE: dict[str, npt.NDArray[Any]] = dict(np.load(DATA / "mergekit_0_1_5_trims.npz"))


def test_inputs_are_those_mergekit_saw() -> None:
    assert str(ORACLE["inputs"]) == MAKER.neighbour().checksum()


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_mergekit(case: str) -> None:
    """In a recipe of mergekit's form, so by mergekit's defaults; within what rounding to float32 leaves."""
    method, factor, own, shared, count = CASES[case]
    models: dict[str, dict[str, Any]] = MAKER.inputs(factor)
    names = MAKER.EXPERTS[:count]
    parameters = dict(load(method).mergekit) | shared | own
    merged: Any = cs.merge(models["base"], {n: models[n] for n in names}, method=method, **parameters)
    for name, base in models["base"].items():
        expected = ORACLE[f"{case}|{name}"]
        assert merged[name].dtype == expected.dtype == np.float32
        change = expected.astype(np.float64) - base
        error = merged[name].astype(np.float64) - expected
        rounding = np.linalg.norm(np.spacing(np.abs(base))) / 4
        largest = max(np.linalg.norm(models[n][name].astype(np.float64) - base) for n in names)
        assert np.linalg.norm(error) < max(1e-5 * largest if factor >= 1 else 0, rounding)
        assert np.linalg.norm(change) > 0.01 * largest  # and the comparison is not an empty one
