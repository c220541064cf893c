"""NearSwap against mergekit's formula: an interpolation by t / |a - b|, repaired where it is 0 / 0."""

from typing import Any

import numpy as np
import pytest

import consilience as cs


@pytest.mark.parametrize("t", [0.0, 0.01, 3.0])
def test_it_is_the_interpolation_by_t_over_the_difference(t: float) -> None:
    rng = np.random.default_rng(1)
    a = rng.standard_normal((31, 7))
    b = a + 0.02 * rng.standard_normal(a.shape) * (rng.random(a.shape) > 0.3)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.nan_to_num(np.clip(t / np.abs(a - b), 0, 1), nan=1.0)
    merged: Any = cs.merge({"w": a}, {"b": {"w": b}}, method="nearswap", t=t)
    np.testing.assert_allclose(merged["w"], (1 - share) * a + share * b, rtol=0, atol=1e-15)


def test_two_experts_are_too_many() -> None:
    with pytest.raises(cs.InputError, match="exactly 1"):
        cs.merge({"w": np.ones(3)}, {n: {"w": np.ones(3)} for n in "xy"}, method="nearswap")
