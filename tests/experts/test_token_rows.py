"""Views that gather rows: any range of bytes is that of the matrix that a plain loop over rows makes."""

import ml_dtypes
import numpy as np
import pytest

from consilience.checkpoints.adapter import LoraPair
from consilience.checkpoints.checkpoint import MemoryStorage, TensorInfo, raw
from consilience.checkpoints.dtypes import DTYPES
from consilience.experts.model import Source
from consilience.experts.token_rows import AVERAGED, MEAN, RowMap, TokenRows

TYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}


def matrix(seed: int, rows: int, columns: int, dtype: str, rank: int = 0) -> tuple[Source, np.ndarray]:
    """Return a stored matrix (with a low-rank update) and its values in float64."""
    random = np.random.RandomState(seed)
    shape = (rows, columns) if columns > 1 else (rows,)
    values = random.standard_normal(shape).astype(TYPES[dtype])
    arrays = {"w": values.reshape(-1).view(np.uint8)}
    info = TensorInfo("w", DTYPES[dtype], shape)
    if not rank:
        return Source(MemoryStorage(arrays), info), values.astype(np.float64).reshape(rows, -1)
    a, b = (random.standard_normal(s).astype(np.float32) for s in ((rank, columns), (rows, rank)))
    arrays |= {"a": a.reshape(-1).view(np.uint8), "b": b.reshape(-1).view(np.uint8)}
    storage = MemoryStorage(arrays)
    factors = [TensorInfo(name, DTYPES["F32"], part.shape) for name, part in (("a", a), ("b", b))]
    pair = LoraPair("w", *factors, scale=0.5, transposed=False)
    full = values.astype(np.float64) + 0.5 * b.astype(np.float64) @ a.astype(np.float64)
    return Source(storage, info, storage, pair), full


@pytest.mark.parametrize(("columns", "rank"), [(1, 0), (3, 0), (8, 0), (3, 2), (8, 2)])
@pytest.mark.parametrize("seed", range(12))
def test_any_range_is_what_a_loop_gathers(columns: int, rank: int, seed: int) -> None:
    random = np.random.RandomState(seed)
    sizes = random.randint(1, 10, random.randint(1, 4)).tolist()
    dtypes = random.choice(sorted(TYPES), len(sizes)) if seed % 3 else ["BF16"] * len(sizes)
    parts = [matrix(k, n, columns, t, rank * (k == 0)) for k, (n, t) in enumerate(zip(sizes, dtypes, strict=True))]
    part = random.randint(MEAN if seed % 2 else 0, len(sizes), random.randint(1, 15))
    at = np.array([random.randint(sizes[k]) if k >= 0 else 0 for k in part])
    tokens = (part != MEAN) & (random.rand(part.size) < 0.7)
    pairs = tuple((k, 0) for k in range(len(sizes)))
    rows = RowMap(part, at, tokens, {int(i): pairs for i in np.flatnonzero(part == AVERAGED)})
    expected = np.zeros((part.size, columns))
    for i, (k, row) in enumerate(zip(part, at, strict=True)):
        expected[i] = parts[k][1][row] if k >= 0 else np.mean([v[0] for _, v in parts], axis=0) if k == AVERAGED else 0
    expected[part == MEAN] = expected[tokens].mean(axis=0) if tokens.any() else 0
    storage = TokenRows([source for source, _ in parts], rows)
    info = storage.info
    whole = storage.view(info)
    values = whole.view(TYPES[info.dtype.name]).astype(np.float64)
    tolerance = 1e-6 if info.dtype.bits < 64 else 1e-13
    np.testing.assert_allclose(values, expected.reshape(-1), rtol=tolerance, atol=tolerance)
    if not rank and (part >= 0).all():
        np.testing.assert_array_equal(values, expected.reshape(-1))  # no value is rounded
    for _ in range(20):
        start, stop = sorted(random.randint(0, info.numel + 1, 2).tolist())
        size = info.dtype.itemsize
        np.testing.assert_array_equal(whole[start * size : stop * size], raw(storage, info, start, stop))


def test_only_whole_rows_of_a_block_are_read() -> None:
    source, values = matrix(0, 1000, 16, "F32")
    assert source.storage is not None
    reads: list[int] = []
    plain = source.storage.read
    source.storage.read = lambda tensor, start, out: (reads.append(out.size), plain(tensor, start, out))[1]  # type: ignore[method-assign]
    order = np.r_[np.arange(500, 1000), np.arange(500)]
    storage = TokenRows([source], RowMap(np.zeros(1000, np.int64), order, np.ones(1000, bool), {}))
    np.testing.assert_array_equal(
        raw(storage, storage.info, 400 * 16, 600 * 16).view(np.float32).reshape(-1, 16),
        values[order][400:600].astype(np.float32),
    )
    assert reads == [100 * 64, 100 * 64]  # neighbours in one read


@pytest.mark.parametrize(
    ("part", "at", "same"),
    [
        ([0, 0, 0], [0, 1, 2], True),
        ([0, 0, 0], [0, 2, 1], False),
        ([0, 0], [0, 1], False),
        ([0, 0, -1], [0, 1, 2], False),
    ],
)
def test_what_changes_nothing_is_known(part: list[int], at: list[int], same: bool) -> None:
    rows = RowMap(np.array(part), np.array(at), np.ones(len(part), bool), {})
    assert rows.is_identity(0, 3) is same
