"""A matrix put together from rows of others reads like one that a file holds."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from consilience.checkpoints.checkpoint import MemoryStorage, TensorInfo
from consilience.checkpoints.dtypes import DTYPES
from consilience.checkpoints.rows import Matrix, Rows, RowStorage, widest

KINDS: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}


def matrix(kind: str, *shape: int, seed: int = 0) -> tuple[Matrix, Any]:
    values = np.random.default_rng(seed).standard_normal(shape).astype(KINDS[kind])
    storage = MemoryStorage({"x": values.reshape(-1).view(np.uint8)})
    return (storage, TensorInfo("x", DTYPES[kind], shape)), values


@pytest.mark.parametrize(("base_kind", "row_kind"), [("F32", "F32"), ("BF16", "F32"), ("BF16", "F16"), ("F16", "F64")])
def test_rows_are_replaced_and_added(base_kind: str, row_kind: str) -> None:
    base, below = matrix(base_kind, 5, 3)
    source, above = matrix(row_kind, 4, 3, seed=1)
    rows = Rows(np.array([1, 4, 5, 6]), np.array([2, 0, 3, 1]), (source,))
    storage = RowStorage(base, (7, 3), rows)
    kind = KINDS[storage.info.dtype.name]
    wanted = np.concatenate([below, np.zeros((2, 3), below.dtype)]).astype(kind)
    wanted[[1, 4, 5, 6]] = above[[2, 0, 3, 1]].astype(kind)
    raw = wanted.reshape(-1).view(np.uint8)
    np.testing.assert_array_equal(storage.view(storage.info), raw)
    for start in range(0, raw.size, 5):
        for size in (0, 1, 7, 40):
            out = np.empty(min(size, raw.size - start), np.uint8)
            storage.read(storage.info, start, out)
            np.testing.assert_array_equal(out, raw[start : start + out.size])


def test_rows_of_several_are_averaged_and_vectors_have_rows_of_one() -> None:
    base, below = matrix("F32", 4)
    (one, first), (two, second) = matrix("F32", 6, seed=1), matrix("F32", 6, seed=2)
    storage = RowStorage(base, (6,), Rows(np.array([4, 5]), np.array([4, 5]), (one, two)))
    mean = ((first.astype(np.float64) + second) / 2).astype(np.float32)
    found = storage.view(storage.info).view(np.float32)
    np.testing.assert_array_equal(found, np.concatenate([below, mean[4:]]))


def test_the_widest_type_holds_all() -> None:
    names = [("BF16", "BF16", "BF16"), ("BF16", "F16", "F32"), ("F16", "F32", "F32"), ("F64", "BF16", "F64")]
    for one, other, wanted in names:
        assert widest([DTYPES[one], DTYPES[other]]).name == wanted
