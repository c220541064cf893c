"""A stack against numpy: blocks, whole matrices, factors and sums of full models, adapters and both."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilience.checkpoints import DTYPES, MemoryStorage, TensorInfo
from consilience.checkpoints.adapter import LoraPair
from consilience.errors import InputError
from consilience.experts.model import Source
from consilience.experts.stack import Stack


def dense(values: Any) -> Source:
    """Return a float32 array as a model's tensor."""
    array = np.ascontiguousarray(values, np.float32)
    return Source(MemoryStorage({"w": array.reshape(-1).view(np.uint8)}), TensorInfo("w", DTYPES["F32"], array.shape))


def low_rank(b: Any, a: Any, scale: float) -> Source:
    """Return factors [m, r] and [r, n] as an adapter's update."""
    parts = {name: np.ascontiguousarray(value, np.float32) for name, value in (("b", b), ("a", a))}
    storage = MemoryStorage({name: value.reshape(-1).view(np.uint8) for name, value in parts.items()})
    infos = {name: TensorInfo(name, DTYPES["F32"], value.shape) for name, value in parts.items()}
    return Source(pair_storage=storage, pair=LoraPair("w", infos["a"], infos["b"], scale, transposed=False))


def drawn(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def case(m: int = 33, n: int = 700) -> tuple[Stack, Any]:
    """Return a stack of a full model, an adapter and the base itself, and its task vectors by numpy."""
    base, full = drawn(m, n), drawn(m, n, seed=1)
    b, a = drawn(m, 3, seed=2), drawn(3, n, seed=3)
    stack = Stack("w", (m, n), dense(base), (dense(full), low_rank(b, a, 0.5), Source()), ("x", "y", "z"))
    return stack, np.stack([full - base, 0.5 * (b @ a), np.zeros_like(base)])


def test_whole_and_blocks() -> None:
    stack, want = case()
    np.testing.assert_allclose(stack.whole(), want, atol=1e-5)
    seen = 0
    for start, stop, vectors, base in stack.blocks(1400, 7000, align=700):
        assert (start % 700, stop % 700) == (0, 0)
        np.testing.assert_allclose(vectors, want.reshape(3, -1)[:, start:stop], atol=1e-5)
        np.testing.assert_array_equal(base, drawn(33, 700).reshape(-1)[start:stop])
        seen += stop - start
    assert seen == 5600


def test_factors_are_kept_apart() -> None:
    stack, want = case()
    ((row, left, right, scale),) = stack.factors()
    assert row == 1
    np.testing.assert_allclose(scale * left @ right, want[1], atol=1e-5)
    assert not stack.low_rank
    assert not stack.untouched


@given(st.integers(1, 60), st.integers(1, 900))
def test_gram(m: int, n: int) -> None:
    stack, want = case(m, n)
    flat = want.reshape(3, -1).astype(np.float64)
    np.testing.assert_allclose(stack.gram(), flat @ flat.T, rtol=1e-4, atol=1e-3)


def test_the_sums_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, _ = case(700, 900)
    whole = stack.gram()
    monkeypatch.setattr("consilience.experts.block.LARGEST_BLOCK", 1 << 13)
    np.testing.assert_array_equal(stack.gram(), whole)


def test_nan_is_counted_and_named() -> None:
    broken = drawn(4, 5)
    broken[1, 2:4] = np.nan
    stack = Stack("w", (4, 5), dense(drawn(4, 5)), (dense(broken),), ("x",))
    for read in (stack.whole, stack.gram):
        with pytest.raises(InputError, match=r"^x: tensor 'w': 2 of its 20 values are NaN or Inf; repair the model$"):
            read()
    assert np.isnan(stack.whole(check=False)).sum() == 2
