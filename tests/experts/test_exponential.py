"""Exponentials and logarithms of ratios against numpy's in extended precision."""

import numpy as np
import pytest

from consilience.kernels.exponential import exponentials, log_ratio


def test_exponentials_are_right_to_a_few_units() -> None:
    rng = np.random.default_rng(0)
    x = -np.abs(rng.standard_normal(20_000) * 10 ** rng.uniform(-12, 2.7, 20_000))
    x[:6] = [0, -0.0, -1e-300, -707.9, -708.5, -1e300]
    found = x.copy()
    exponentials(found)
    normal = x >= -708
    exact = np.exp(x[normal].astype(np.longdouble))
    assert np.abs(found[normal] / exact - 1).max() < 4e-16
    np.testing.assert_array_equal(found[~normal], 0)


@pytest.mark.parametrize("spread", [1e-12, 1e-5, 0.05, 1.0, 30.0])
def test_logarithms_of_ratios_lose_nothing_near_one(spread: float) -> None:
    rng = np.random.default_rng(1)
    b = rng.random(9000) + 1e-8
    a = b * np.exp(spread * rng.standard_normal(9000))
    found = np.empty_like(a)
    log_ratio(a, b, found)
    wide_a, wide_b = a.astype(np.longdouble), b.astype(np.longdouble)
    exact = np.log1p((wide_a - wide_b) / wide_b) if spread < 1 else np.log(wide_a) - np.log(wide_b)
    assert (np.abs(found - exact) <= 1e-15 * np.abs(exact) + 1e-30).all()
