"""Methods of norms and angles against their formulas on whole vectors, in extended precision, and at the extremes."""

import itertools
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import consilience as cs
from consilience.api import build_recipe
from consilience.engine.summary import Summary
from consilience.methods.karcher import karcher_mean
from tests.methods.matrices import CONFIG, draw, write

Array = npt.NDArray[Any]
REAL = np.longdouble
#: One element, vectors, rows shorter and longer than a reduction leaf, a convolution.
SHAPES: list[tuple[int, ...]] = [(1,), (), (7,), (4099,), (31, 17), (3, 5000), (1, 40), (40, 1), (4, 3, 2, 5)]


def merged(base: Array | None, rows: list[Array], method: str, **arguments: Any) -> Array:
    states = {f"e{k}": {"w": row} for k, row in enumerate(rows)}
    out: Any = cs.merge(None if base is None else {"w": base}, states, method=method, **arguments)
    return out["w"]


def models(shape: tuple[int, ...], count: int, seed: int = 0, spread: float = 0.3) -> tuple[Array, list[Array]]:
    """Return a base and experts in float64 whose task vectors have a part in common."""
    rng = np.random.default_rng(seed)
    base, shared = rng.standard_normal(shape), rng.standard_normal(shape)
    return np.asarray(base), [
        np.asarray(base + spread * (k + 1) * (shared + rng.standard_normal(shape))) for k in range(count)
    ]


def norm(x: Array) -> Any:
    return np.sqrt((x.astype(REAL) ** 2).sum())


def arc(a: Array, b: Array, t: float) -> Array:
    """Slerp of two vectors."""
    a, b = a.astype(REAL), b.astype(REAL)
    sizes = norm(a) * norm(b)
    cosine = np.clip((a * b).sum() / sizes, -1, 1) if sizes else REAL(1)
    if 1 - cosine * cosine <= 1e-12:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def multislerp(rows: list[Array], weights: list[float]) -> Array:
    """As published: the weighted mean in the tangent space at the weighted mean, along the exponential map."""
    units = [row.astype(REAL) / norm(row) for row in rows]
    total = np.sum([w * u for w, u in zip(weights, units, strict=True)], axis=0)
    mean = total / norm(total)
    tangent = np.sum([w * (u - (u * mean).sum() * mean) for w, u in zip(weights, units, strict=True)], axis=0)
    step = norm(tangent)
    found = mean * np.cos(step) + (tangent * np.sin(step) / step if step else 0)
    return np.asarray(found * sum(w * norm(row) for w, row in zip(weights, rows, strict=True)))


def karcher(rows: list[Array], steps: int) -> Array:
    """The fixed-point iteration on the vectors themselves."""
    units = [row.astype(REAL) / norm(row) for row in rows]
    mean = np.sum(units, axis=0) / len(units)
    mean = mean / norm(mean)
    for _ in range(steps):
        tangent = np.zeros_like(mean)
        for unit in units:
            dot = np.clip((mean * unit).sum(), -1, 1)
            angle = np.arccos(dot)
            if angle >= 1e-5:
                tangent = tangent + angle / np.sin(angle) * (unit - dot * mean) / len(units)
        size = norm(tangent)
        if size < 1e-5:
            break
        mean = np.cos(size) * mean + np.sin(size) * tangent / size
    return np.asarray(mean * sum(map(norm, rows)) / len(rows))


def stock(taus: list[Array], clamped: bool = False) -> Array:
    cosines = [
        (a.astype(REAL) * b).sum() / (norm(a) * norm(b)) if a.any() and b.any() else REAL(0)
        for a, b in itertools.combinations(taus, 2)
    ]
    cosine, count = sum(cosines) / len(cosines), len(taus)
    denominator = 1 + (count - 1) * cosine
    t = count * cosine / denominator if denominator > 1e-6 else REAL(0)
    return np.asarray((max(t, REAL(0)) if clamped else t) * np.mean([tau.astype(REAL) for tau in taus], axis=0))


def close(found: Array, expected: Array, tolerance: float = 1e-12) -> None:
    assert found.shape == expected.shape
    assert norm(found - expected) <= tolerance * norm(expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("based", [True, False])
def test_nuslerp_has_one_angle_per_tensor_row_or_column(shape: tuple[int, ...], based: bool) -> None:
    base, rows = models(shape, 2)
    a, b = [row - base for row in rows] if based else rows
    t, weight = 1.7 / 2.0, {"e0": 0.3, "e1": 1.7}

    def expected(axis: int) -> Array:
        pairs = np.stack([np.moveaxis(x, axis, -1) for x in (a, b)])
        flat = pairs.reshape(2, -1, pairs.shape[-1])
        found = np.stack([arc(x, y, t) for x, y in zip(*flat, strict=True)]).reshape(pairs.shape[1:])
        return np.moveaxis(found, -1, axis)

    given = base if based else None
    start = base if based else 0
    close(merged(given, rows, "nuslerp", weight=weight), start + arc(a, b, t))
    last = merged(given, rows, "nuslerp", weight=weight, nuslerp_flatten=False)
    close(last, start + (expected(-1) if shape else arc(a, b, t)))
    first = merged(given, rows, "nuslerp", weight=weight, nuslerp_flatten=False, nuslerp_row_wise=True)
    close(first, start + (expected(0) if shape else arc(a, b, t)))


@pytest.mark.parametrize("shape", [(40, 1000), (3, 20000), (2, 3, 4097)])
def test_sums_across_rows_of_many_segments(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns fewer and more than a strip has elements; strips of one segment and of two."""
    _, (a, b) = models(shape, 2)
    flat = [x.reshape(shape[0], -1).T for x in (a, b)]
    expected = np.stack([arc(x, y, 0.5) for x, y in zip(*flat, strict=True)]).T.reshape(shape)
    monkeypatch.setattr("consilience.engine.grams.STRIP", 8192)
    monkeypatch.setattr("consilience.engine.stream.STRIP", 8192)
    for segment in (4096, 8192):
        monkeypatch.setattr("consilience.engine.plan.SEGMENT", segment)
        found = merged(None, [a, b], "nuslerp", nuslerp_flatten=False, nuslerp_row_wise=True, threads=2)
        close(found, expected, 1e-9)  # some columns of two elements are nearly opposite


@pytest.mark.parametrize("shape", [(4099,), (31, 17), (4, 3, 2, 5)])
@pytest.mark.parametrize("based", [True, False])
def test_multislerp_is_the_published_mean_in_the_tangent_space(shape: tuple[int, ...], based: bool) -> None:
    base, rows = models(shape, 4)
    vectors = [row - base for row in rows] if based else rows
    weights = [0.1, 0.5, 0.3, 0.7]
    shares = [w / sum(weights) for w in weights]
    names = {f"e{k}": w for k, w in enumerate(weights)}
    given, start = (base, base) if based else (None, 0)
    close(merged(given, rows, "multislerp", weight=names), start + multislerp(vectors, shares))
    found = merged(given, rows, "multislerp", weight=names, normalize_weights=False)
    close(found, start + multislerp(vectors, weights))


@pytest.mark.parametrize("shape", [(4099,), (31, 17), (4, 3, 2, 5)])
@pytest.mark.parametrize("steps", [0, 1, 10])
def test_karcher_is_the_iteration_on_whole_tensors(shape: tuple[int, ...], steps: int) -> None:
    base, rows = models(shape, 3, spread=1.5)
    close(merged(None, rows, "karcher", max_iter=steps), karcher(rows, steps))
    close(merged(base, rows, "karcher", max_iter=steps), karcher([base, *rows], steps))


def test_karcher_ends_where_the_logarithms_cancel() -> None:
    rng = np.random.default_rng(3)
    units = [row / np.linalg.norm(row) for row in rng.standard_normal((5, 9)) + 1.0]
    mean = karcher_mean(np.array([[a @ b for b in units] for a in units]), 200, 1e-12) @ units
    assert abs(np.linalg.norm(mean) - 1) < 1e-12
    dots = [unit @ mean for unit in units]
    logarithms = [np.arccos(d) / np.sqrt(1 - d * d) * (u - d * mean) for u, d in zip(units, dots, strict=True)]
    assert np.linalg.norm(np.sum(logarithms, axis=0)) < 1e-10


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("ratio", ["signed", "clamped"])
def test_model_stock_has_one_ratio_per_tensor_or_filter(shape: tuple[int, ...], count: int, ratio: str) -> None:
    base, rows = models(shape, count)
    rows[1] = np.asarray(2 * base - rows[1])  # some that disagree
    taus = [row - base for row in rows]
    close(merged(base, rows, "model_stock", ratio=ratio), base + stock(taus, ratio == "clamped"), 1e-11)
    filters = shape[0] if len(shape) > 1 else 1
    rowwise = [
        stock(list(part), ratio == "clamped") for part in np.stack(taus).reshape(count, filters, -1).swapaxes(0, 1)
    ]
    found = merged(base, rows, "model_stock", filter_wise=True, ratio=ratio)
    close(found, base + np.stack(rowwise).reshape(shape), 1e-11)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("size", [1e-37, 1e-12, 1e30])
def test_angles_do_not_depend_on_magnitudes(dtype: Any, size: float) -> None:
    """What is true of models is true of models times a power of two, where squares overflow and vanish too."""
    scale = 2.0 ** round(np.log2(size) * (7.5 if dtype is np.float64 else 1))
    base, rows = models((30, 17), 2)
    base, rows = base.astype(dtype), [row.astype(dtype) for row in rows]
    narrow = base.dtype == ml_dtypes.bfloat16
    for method, arguments in (
        ("slerp", {"t": 0.3}),
        ("nuslerp", {"nuslerp_flatten": False}),
        ("nuslerp", {}),
        ("multislerp", {}),
        ("karcher", {}),
        ("model_stock", {}),
        ("model_stock", {"filter_wise": True}),
    ):
        few = rows[:1] if method == "slerp" else rows
        plain = merged(base, few, method, **arguments).astype(np.float64)
        large = merged((base * scale).astype(dtype), [(row * scale).astype(dtype) for row in few], method, **arguments)
        assert large.dtype == base.dtype
        lost = np.finfo(np.float32).smallest_subnormal / scale if size < 1 and dtype is not np.float64 else 0
        error = np.abs(large.astype(np.float64) / scale - plain)
        assert (error <= np.abs(plain) * (2e-2 if narrow else 1e-5) + (1 << 17 if narrow else 8) * lost).all(), (
            method,
            arguments,
        )


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
@pytest.mark.parametrize(("dtype", "small", "large"), [(np.float32, 1e-30, 1e30), (np.float64, 1e-150, 1e150)])
def test_norms_that_are_far_apart(method: str, dtype: Any, small: float, large: float) -> None:
    """Every direction counts alike: the long model's is not all there is."""
    rng = np.random.default_rng(4)
    a, b = (rng.standard_normal(500) for _ in "ab")
    rows = [(small * a).astype(dtype), (large * b).astype(dtype)]
    found = merged(None, rows, method).astype(np.float64) / large
    direction = a / np.linalg.norm(a) + b / np.linalg.norm(b)
    expected = 0.5 * np.linalg.norm(b) * direction / np.linalg.norm(direction)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_tensors_of_zeros() -> None:
    a, zero = np.arange(1.0, 7.0), np.zeros(6)
    np.testing.assert_allclose(merged(zero, [a], "slerp", t=0.25), 0.25 * a, rtol=1e-15)
    np.testing.assert_allclose(merged(None, [zero, a], "nuslerp"), 0.5 * a, rtol=1e-15)
    np.testing.assert_allclose(merged(a, [a, 3 * a], "nuslerp"), 2 * a, rtol=1e-15)  # one task vector is zero
    np.testing.assert_allclose(merged(None, [zero, a], "karcher"), 0.5 * a, rtol=1e-14)
    np.testing.assert_allclose(merged(None, [zero, a], "multislerp"), 0.5 * a, rtol=1e-14)
    np.testing.assert_array_equal(merged(a, [a, 2 * a], "model_stock"), a)  # zeros count as orthogonal
    for method in ("nuslerp", "karcher", "multislerp"):
        np.testing.assert_array_equal(merged(None, [zero, zero], method), zero)
    for method in ("multislerp", "model_stock", "karcher"):
        np.testing.assert_allclose(merged(a, [a, a, a], method), a, rtol=1e-14)
    rows = np.stack([a, zero]), np.stack([zero, a])
    for row_wise in (True, False):
        found = merged(None, list(rows), "nuslerp", nuslerp_flatten=False, nuslerp_row_wise=row_wise)
        factor = np.sqrt(0.5) if row_wise else 0.5  # columns are at right angles, of rows one is zero
        np.testing.assert_allclose(found, factor * (rows[0] + rows[1]), rtol=1e-14)


def test_nonfinite_values_that_are_let_through_make_no_zeros_of_others() -> None:
    rows = [np.array([1.0, np.nan, 2.0]), np.array([3.0, 4.0, np.inf]), np.array([5.0, 6.0, 7.0])]
    for method, count in (("slerp", 2), ("nuslerp", 2), ("multislerp", 3), ("karcher", 3), ("model_stock", 3)):
        base = np.ones(3) if method in ("slerp", "model_stock") else None
        found = merged(base, rows[: count - (method == "slerp")], method, allow_nonfinite=True)
        assert not np.isfinite(found[1]), method
        linear = {"slerp": 1.0, "nuslerp": 2.0, "multislerp": 3.0}.get(method, np.nan)  # no angle: as for zeros
        np.testing.assert_allclose(found[0], linear)


def test_directions_that_cancel() -> None:
    a = np.arange(1.0, 7.0)
    np.testing.assert_allclose(merged(None, [a, -a], "nuslerp", weight={"e0": 3, "e1": 1}), 0.5 * a, rtol=1e-14)
    np.testing.assert_allclose(merged(None, [3 * a, -a], "multislerp"), a, rtol=1e-14)
    np.testing.assert_allclose(merged(None, [5 * a, -a, a, -a], "multislerp"), a, rtol=1e-14)
    assert np.isfinite(merged(None, [a, -a], "karcher")).all()
    np.testing.assert_array_equal(merged(0 * a, [a, -a], "model_stock"), 0 * a)  # 1 + c = 0


@pytest.mark.parametrize("angle", [3e-5, 1e-3, 0.1])
def test_nearly_opposite_float32_vectors_keep_their_direction(angle: float) -> None:
    """Halfway between a and nearly -a lies what they do not share, times a large number."""
    a, b = np.zeros(64, np.float32), np.zeros(64, np.float32)
    a[0], b[0], b[1] = 1, -np.cos(angle), np.sin(angle)
    found = merged(None, [a, b], "nuslerp").astype(np.float64)
    close(found, arc(a, b, 0.5), 1e-3)
    assert found[1] > 0.99


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    method=st.sampled_from(["nuslerp", "multislerp", "karcher"]),
    kind=st.sampled_from(["float32", "bfloat16", "float64"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_mean_is_as_long_as_the_models_and_between_them(
    shape: tuple[int, ...], method: str, kind: str, seed: int
) -> None:
    """Equal models give themselves; a mean of directions has the mean norm."""
    dtype: Any = ml_dtypes.bfloat16 if kind == "bfloat16" else np.dtype(kind)
    _, rows = models(shape, 2 if method == "nuslerp" else 3, seed)
    rows = [np.asarray(row.astype(dtype)) for row in rows]
    same = merged(None, [rows[0]] * len(rows), method)
    assert same.dtype == dtype
    tolerance = {"float32": 3e-7, "bfloat16": 0.01, "float64": 1e-14}[kind]
    np.testing.assert_allclose(same.astype(np.float64), rows[0].astype(np.float64), rtol=tolerance)
    doubles = [row.astype(np.float64) for row in rows]
    found = norm(merged(None, rows, method).astype(np.float64))
    if method == "karcher":
        assert abs(found - np.mean([norm(row) for row in doubles])) <= 2 * tolerance * found
    else:
        assert found <= max(norm(row) for row in doubles) * (1.5 if method == "nuslerp" else 1 + 2 * tolerance)


def merge_files(recipe: Any, out: Path) -> Summary:
    summary = cs.merge_recipe(recipe, out)
    assert isinstance(summary, Summary)
    return summary


LORA: list[tuple[str, dict[str, Any]]] = [
    ("nuslerp", {}),
    ("nuslerp", {"nuslerp_flatten": False}),
    ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("multislerp", {}),
    ("karcher", {}),
    ("model_stock", {}),
    ("model_stock", {"filter_wise": True}),
]


def test_adapters_merge_as_the_models_they_make(tmp_path: Path) -> None:
    """By every method and vector; a passthrough of an adapter, or of BASE+ADAPTER, is that model."""
    name, module = "model.layers.0.self_attn.q_proj.weight", "base_model.model.model.layers.0.self_attn.q_proj"
    base = draw(24, 20, seed=0).astype(np.float32)
    folders: dict[str, dict[str, str]] = {"adapters": {}, "full": {}}
    root = str(write(tmp_path / "base", {name: base}, "{}"))
    for k in range(2):
        b, a = draw(24, 3, seed=k).astype(np.float32), draw(3, 20, seed=10 + k).astype(np.float32)
        factors = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        adapter = write(tmp_path / f"adapter-{k}", factors, CONFIG, "adapter_model.safetensors")
        folders["adapters"][f"e{k}"] = str(adapter)
        folders["full"][f"e{k}"] = str(write(tmp_path / f"full-{k}", {name: base + 2 * b @ a}, "{}"))

    def result(method: str, start: str | None, experts: dict[str, str], arguments: dict[str, Any]) -> Array:
        cs.merge_recipe(build_recipe(method, start, experts, arguments), tmp_path / "out", force=True)
        return load_file(tmp_path / "out" / "model.safetensors")[name]

    for method, arguments in LORA:
        found, expected = (result(method, root, folders[which], arguments) for which in ("adapters", "full"))
        assert np.linalg.norm(found - expected) < 3e-6 * np.linalg.norm(expected)
        if method != "karcher" and not arguments:
            cs.merge_recipe(
                build_recipe(method, root, folders["adapters"], {}), tmp_path / "merged", as_adapter="cat", force=True
            )
            parts = load_file(tmp_path / "merged" / "adapter_model.safetensors")
            update = parts[f"{module}.lora_B.weight"].astype(np.float64) @ parts[f"{module}.lora_A.weight"]
            assert np.linalg.norm(base + update - expected) < 3e-6 * np.linalg.norm(expected)
    recipe = build_recipe("passthrough", root, {"e0": folders["adapters"]["e0"]}, {"scale": 2.0})
    with pytest.raises(cs.InputError, match="of the base by 2"):
        cs.merge_recipe(recipe, tmp_path / "no", as_adapter="cat")
    one, whole = folders["adapters"]["e0"], load_file(Path(folders["full"]["e0"]) / "model.safetensors")[name]
    for start, model in ((root, one), (None, f"{root}+{one}")):
        np.testing.assert_allclose(result("passthrough", start, {"x": model}, {}), whole, rtol=1e-5, atol=1e-5)


def test_passthrough_copies_bytes_or_scales_by_name_and_depth(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    names = [f"model.layers.{k}.{part}.weight" for k in range(3) for part in ("o_proj", "down_proj")]
    tensors = {n: rng.standard_normal((5, 7)).astype(np.float32) for n in names}
    model = write(tmp_path / "model", tensors, "{}")
    (tmp_path / "copy.yaml").write_text(f"merge_method: passthrough\nmodels: [{{model: {model}}}]\ndtype: float32\n")
    summary = merge_files(tmp_path / "copy.yaml", tmp_path / "copy")
    assert summary.merged == 0
    assert not any("the result is the base" in note for note in summary.notes)
    for n, value in load_file(tmp_path / "copy" / "model.safetensors").items():
        assert value.tobytes() == tensors[n].tobytes()
    (tmp_path / "scaled.yaml").write_text(
        f"""
merge_method: passthrough
models:
  - model: {model}
    parameters:
      scale:
        - filter: o_proj
          value: 0.0
        - value: [1.0, 2.0]
"""
    )
    summary = merge_files(tmp_path / "scaled.yaml", tmp_path / "scaled")
    found = load_file(tmp_path / "scaled" / "model.safetensors")
    for n, value in tensors.items():
        scale = 0.0 if "o_proj" in n else 1 + int(n.split(".")[2]) / 2
        np.testing.assert_allclose(found[n], scale * value, rtol=1e-6)
    assert summary.merged == 5  # the first layer's down_proj is as it was
    half = cs.merge(None, {"x": {"w": tensors[names[0]]}}, method="passthrough", out_dtype="bfloat16")
    assert isinstance(half, dict)
    np.testing.assert_array_equal(half["w"], tensors[names[0]].astype(ml_dtypes.bfloat16))
    bad = {"w": np.array([1.0, np.nan], np.float32)}
    with pytest.raises(cs.InputError, match="NaN"):
        cs.merge(None, {"x": bad}, method="passthrough")


@pytest.mark.parametrize(
    ("method", "count", "based", "words"),
    [
        ("passthrough", 2, False, "exactly 1"),
        ("nuslerp", 1, False, "exactly 2"),
        ("nuslerp", 3, True, "exactly 2"),
        ("model_stock", 1, True, "at least 2"),
        ("model_stock", 2, False, "needs a base_model"),
    ],
)
def test_numbers_of_models(method: str, count: int, based: bool, words: str) -> None:
    base, rows = models((3,), count)
    with pytest.raises(cs.InputError, match=words):
        merged(base if based else None, rows, method)


@pytest.mark.parametrize("method", ["nuslerp", "multislerp"])
def test_weights_that_sum_to_zero(method: str) -> None:
    base, rows = models((3,), 2)
    with pytest.raises(cs.InputError, match="sum to zero"):
        merged(base, rows, method, weight={"e0": 1.0, "e1": -1.0})


def test_a_base_among_the_models_counts_once(tmp_path: Path) -> None:
    """As in mergekit: Karcher's mean has it as one of the models whether it is listed or not, NuSLERP's not at all."""
    base, rows = models((6, 4), 2)
    paths = [write(tmp_path / n, {"w": x}, "{}") for n, x in zip(("base", "a", "b"), (base, *rows), strict=True)]

    def result(method: str, start: bool, listed: list[Path]) -> Array:
        entries = "".join(f"\n  - model: {path}" for path in listed)
        text = f"merge_method: {method}\nmodels:{entries}\n" + (f"base_model: {paths[0]}\n" if start else "")
        (tmp_path / "r.yaml").write_text(text)
        cs.merge_recipe(tmp_path / "r.yaml", tmp_path / "out", force=True)
        return load_file(tmp_path / "out" / "model.safetensors")["w"]

    for method in ("karcher", "nuslerp", "multislerp", "model_stock"):
        np.testing.assert_array_equal(result(method, True, paths), result(method, True, paths[1:]))
    np.testing.assert_array_equal(result("karcher", True, paths[1:]), result("karcher", False, paths))
    assert (result("karcher", False, paths[1:]) != result("karcher", True, paths[1:])).any()


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock_reports_what_the_dtype_swallows(tmp_path: Path, filter_wise: bool) -> None:
    """Orthogonal task vectors: nothing of them is left in bfloat16, and the summary says so of both."""
    rng = np.random.default_rng(6)
    shape = (64, 512)
    base = (1 + 0.1 * rng.random(shape)).astype(ml_dtypes.bfloat16)
    unit = np.float32(2.0**-7)
    experts = [(base.astype(np.float32) + unit * rng.choice([-1, 1], shape)).astype(ml_dtypes.bfloat16) for _ in "ab"]
    folders = [tmp_path / n for n in ("base", "a", "b")]
    for folder, values in zip(folders, (base, *experts), strict=True):
        folder.mkdir()
        save_file({"w": values}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
    recipe = build_recipe(
        "model_stock", str(folders[0]), {"a": str(folders[1]), "b": str(folders[2])}, {"filter_wise": filter_wise}
    )
    summary = merge_files(recipe, tmp_path / "out")
    taus = [x.astype(np.float64) - base.astype(np.float64) for x in experts]
    for loss, tau in zip(summary.below_unit, taus, strict=True):
        if filter_wise:
            rows = [stock(list(part)) for part in np.stack(taus).swapaxes(0, 1)]
            t = np.array([np.vdot(row, x) for row, x in zip(rows, np.mean(taus, 0), strict=True)]).astype(float)
            t = t / (np.mean(taus, 0) ** 2).sum(1)
            assert loss.entries == pytest.approx((abs(t[:, None] * tau / 2) < unit).mean(), abs=1e-6)
        assert loss.entries > 0.95
    if not filter_wise:
        assert any("the result is the base: all updates are below half a unit" in note for note in summary.notes)
