"""Arrays as numpy and torch hand them out: other byte orders, masks, complex numbers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import consilience as cs
from consilience.errors import InputError
from tests.real_files.support import Test, cli, real_file, refused

DRAW = np.random.default_rng(0)
BASE, A, B = (DRAW.standard_normal((6, 8)).astype(np.float32) for _ in range(3))
SUM = BASE + 0.5 * (A - BASE) + 0.5 * (B - BASE)
WHEEL = torch.polar(torch.ones(4), torch.arange(4.0))


def other(array: Any) -> Any:
    """Return an array with the same values in the other byte order."""
    return array.astype(array.dtype.newbyteorder())


def through_file(array: Any, root: Path, how: str) -> Any:
    """Return an array of the other byte order as a file gives it."""
    if how == "npz":
        np.savez(root / "x.npz", w=other(array))
        return np.load(root / "x.npz")["w"]
    if how == "memmap":
        path = root / f"{len(list(root.iterdir()))}.bin"
        other(array).tofile(path)
        return np.memmap(path, dtype=array.dtype.newbyteorder(), shape=array.shape, mode="r")
    return np.frombuffer(other(array).tobytes(), array.dtype.newbyteorder()).reshape(array.shape)


merge: Any = cs.merge

ORDERS: dict[str, Callable[[Any, Path], Any]] = {
    "other byte order": lambda x, root: other(x),
    "other byte order, read from an .npz file": lambda x, root: through_file(x, root, "npz"),
    "other byte order, np.memmap": lambda x, root: through_file(x, root, "memmap"),
    "other byte order, np.frombuffer": lambda x, root: through_file(x, root, "buffer"),
    "other byte order, transposed view": lambda x, root: other(np.ascontiguousarray(x.T)).T,
    "other byte order, every other column of more": lambda x, root: other(np.repeat(x, 2, 1))[:, ::2],
    "masked array without a masked value": lambda x, root: np.ma.masked_array(x, np.zeros(x.shape, bool)),
    "masked array that never had a mask": lambda x, root: np.ma.masked_array(x),
}
BEFORE = dict.fromkeys(ORDERS, "wrong numbers") | dict.fromkeys([name for name in ORDERS if "mask" in name], "right")


def each(test: Test) -> Test:
    for name in ORDERS:
        test = real_file(9, family="numpy", option=name, expected="a formula", before=BEFORE[name])(test)
    return pytest.mark.parametrize("name", ORDERS)(test)


@each
def test_values_are_what_numpy_says(tmp_path: Path, name: str) -> None:
    make = ORDERS[name]
    for experts in ({"a": {"w": make(A, tmp_path)}, "b": {"w": B}}, {"a": {"w": A}, "b": {"w": make(B, tmp_path)}}):
        found = merge({"w": BASE}, experts, weight=0.5)["w"]
        np.testing.assert_allclose(found, SUM, rtol=1e-5, atol=1e-6)
    found = merge({"w": make(BASE, tmp_path)}, {"a": {"w": A}, "b": {"w": B}}, weight=0.5)["w"]
    np.testing.assert_allclose(found, SUM, rtol=1e-5, atol=1e-6)


@real_file(9, family="numpy", option="other byte order: float16, float64 and integers", expected="a formula",
           before="wrong numbers")  # fmt: skip
def test_other_types() -> None:
    steps = np.arange(5, dtype=np.int32)
    for dtype in (np.float16, np.float64):
        base, a = (x.astype(dtype) for x in (BASE, A))
        found = merge({"w": other(base), "n": other(steps)}, {"a": {"w": other(a), "n": steps}})
        np.testing.assert_allclose(found["w"], a, rtol=1e-3 if dtype is np.float16 else 1e-12)
        np.testing.assert_array_equal(found["n"], steps)


@real_file(9, family="numpy", option="masked array with masked values", expected="numpy: no value there",
           before="wrong numbers", now="refused, true cause")  # fmt: skip
def test_masked_values() -> None:
    masked = np.ma.masked_array(A, A > 1)
    for base, a in (({"w": BASE}, {"w": masked}), ({"w": masked}, {"w": BASE})):
        with pytest.raises(InputError, match=rf"'w': {int((A > 1).sum())} of its 48 values are masked.*filled"):
            merge(base, {"a": a})
    found = merge({"w": BASE}, {"a": {"w": masked.filled(0.0)}})["w"]
    np.testing.assert_allclose(found, np.where(A > 1, 0, A), rtol=1e-5, atol=1e-6)


@real_file(9, family="torch", option="complex buffer that no expert changes, state dicts", expected="the buffer itself",
           before="wrongly refused")  # fmt: skip
def test_a_complex_buffer_is_kept() -> None:
    base, a = ({"w": torch.tensor(x), "freqs": WHEEL} for x in (BASE, A))
    found = merge(base, {"a": a})
    assert torch.equal(found["freqs"], WHEEL)
    torch.testing.assert_close(found["w"], torch.tensor(A), rtol=1e-5, atol=1e-6)
    arrays = merge({k: v.numpy() for k, v in base.items()}, {"a": {k: v.numpy() for k, v in a.items()}})
    np.testing.assert_array_equal(arrays["freqs"], WHEEL.numpy())


def saved(path: Path, wheel: torch.Tensor, seed: int) -> Path:
    """Save a state dict with a complex tensor, in the format its name ends in."""
    state = {"w": torch.tensor(np.random.default_rng(seed).standard_normal((4, 4)).astype(np.float32)), "freqs": wheel}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


@real_file(9, family="torch", option="complex buffer that no expert changes, .pt files", expected="the buffer itself",
           before="wrongly refused")  # fmt: skip
def test_a_complex_buffer_of_torch_files(tmp_path: Path) -> None:
    base, a = saved(tmp_path / "base.pt", WHEEL, 1), saved(tmp_path / "a.pt", WHEEL, 2)
    assert cli("merge", base, tmp_path / "out.safetensors", "-e", f"a={a}", "--dtype", "bfloat16").code == 0
    found = load_file(tmp_path / "out.safetensors")
    assert torch.equal(found["freqs"], WHEEL)
    assert found["w"].dtype == torch.bfloat16


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@real_file(9, family="torch", option="complex weights that an expert trained; the hint followed", before="silent loss",
           expected="a formula on the real and imaginary parts", now="refused, true cause")  # fmt: skip
def test_complex_weights_are_no_integers(tmp_path: Path, suffix: str) -> None:
    base, a = saved(tmp_path / f"base{suffix}", WHEEL, 1), saved(tmp_path / f"a{suffix}", 2 * WHEEL, 2)
    refused(
        cli("merge", base, tmp_path / "out.safetensors", "-e", f"a={a}"),
        f"a{suffix}",
        "'freqs'",
        "complex",
        "view_as_real",
    )
    assert not (tmp_path / "out.safetensors").exists()
    for name, wheel in (("base", WHEEL), ("a", 2 * WHEEL)):
        saved(tmp_path / f"{name}{suffix}", torch.view_as_real(wheel).contiguous(), 1)
    assert cli("merge", base, tmp_path / "out.safetensors", "-e", f"a={a}", "--set", "weight=0.5").code == 0
    found = torch.view_as_complex(load_file(tmp_path / "out.safetensors")["freqs"])
    torch.testing.assert_close(found, 1.5 * WHEEL)
