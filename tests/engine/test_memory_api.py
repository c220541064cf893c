"""``cs.merge`` on state dicts: numpy arrays and torch tensors in, the same library out."""

import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file

import consilience as cs

Array = npt.NDArray[Any]
ONE = np.ones(3, np.float32)


def merged(base: Any, experts: Any, **arguments: Any) -> dict[str, Any]:
    out = cs.merge(base, experts, **arguments)
    assert isinstance(out, dict)
    return out


TORCH_TYPES: list[torch.dtype] = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def torch_states(dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"w": (7, 9), "s": (), "none": (0, 2)}
    return [{n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()} for _ in range(3)]


@pytest.mark.parametrize("dtype", TORCH_TYPES, ids=str)
def test_torch_in_torch_out(dtype: torch.dtype) -> None:
    base, a, b = torch_states(dtype)
    out = merged(base, {"a": a, "b": b}, weight={"a": 0.5, "b": 0.25})
    for name, tensor in base.items():
        start = tensor.double()
        expected = start + 0.5 * (a[name].double() - start) + 0.25 * (b[name].double() - start)
        assert isinstance(out[name], torch.Tensor)
        assert out[name].shape == tensor.shape
        torch.testing.assert_close(out[name], expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_bfloat16_is_the_same_in_numpy_and_torch() -> None:
    states = torch_states(torch.bfloat16)

    def to_numpy(tensor: torch.Tensor) -> Array:
        return np.asarray(tensor.view(torch.uint16).numpy()).view(ml_dtypes.bfloat16)

    ours = merged(states[0], {"a": states[1], "b": states[2]}, method="ties", density=0.5)
    arrays = [{n: to_numpy(t) for n, t in state.items()} for state in states]
    theirs = merged(arrays[0], {"a": arrays[1], "b": arrays[2]}, method="ties", density=0.5)
    for name, array in theirs.items():
        assert array.dtype == ml_dtypes.bfloat16
        assert array.shape == tuple(ours[name].shape)
        assert array.tobytes() == to_numpy(ours[name]).tobytes()


def test_state_dicts_and_files_give_the_same_bytes(tmp_path: Path) -> None:
    names = ["base", "a", "b"]
    states = dict(zip(names, torch_states(torch.bfloat16), strict=True))
    for name, state in states.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    paths = {name: tmp_path / f"{name}.safetensors" for name in states}
    arguments: dict[str, Any] = {"method": "dare_ties", "density": 0.4, "seed": 3, "stochastic_rounding": True}
    cs.merge(paths["base"], {n: paths[n] for n in "ab"}, tmp_path / "out.safetensors", **arguments)
    ours = merged(states["base"], {n: states[n] for n in "ab"}, **arguments)
    for name, tensor in load_file(tmp_path / "out.safetensors").items():
        assert torch.equal(tensor, ours[name])


def test_a_module_takes_the_result() -> None:
    torch.manual_seed(0)
    modules = [torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)) for _ in range(3)]
    states = [dict(m.named_parameters()) | dict(m.named_buffers()) for m in modules]  # parameters require gradients
    out = merged(states[0], states[1:])
    modules[0].load_state_dict(out)
    assert out["1.num_batches_tracked"].dtype == torch.int64
    assert not any(tensor.requires_grad for tensor in out.values())


def test_inputs_are_neither_changed_nor_shared_with_the_output() -> None:
    def make() -> dict[str, Any]:
        return {"w": np.arange(6.0).reshape(2, 3), "steps": np.array([3]), "t": np.ones(2, np.float32)}

    base, expert = make(), make()
    expert["w"] += 1
    out = merged(base, [expert])
    for array in out.values():
        array += 100
    for name, array in make().items():
        np.testing.assert_array_equal(base[name], array)
        np.testing.assert_array_equal(expert[name], array + (name == "w"))


def test_any_memory_layout() -> None:
    grid = np.arange(48.0).reshape(6, 8)
    views = {
        "slice": grid[::2, 1::3],
        "reversed": grid[::-1],
        "transposed": grid.T,
        "fortran": np.asfortranarray(grid),
        "broadcast": np.broadcast_to(np.arange(3.0), (4, 3)),
        "scalar": np.array(2.5),
        "empty": np.empty((0, 3)),
    }
    for array in views.values():
        array.setflags(write=False)
    out = merged({n: np.zeros_like(v) for n, v in views.items()}, [views])
    for name, array in views.items():
        np.testing.assert_array_equal(out[name], array)
    tensor = torch.arange(12.0).reshape(3, 4).T[1:]
    assert torch.equal(merged({"w": torch.zeros(3, 3)}, [{"w": tensor}])["w"], tensor)


def test_foreign_byte_order_is_read_right_or_refused() -> None:
    big = np.array([1.0, 2.0], ">f4")
    try:
        out = merged({"w": big}, [{"w": big * 2}])
    except cs.InputError as error:
        assert "'w'" in str(error)  # noqa: PT017 - either answer is right
    else:
        np.testing.assert_array_equal(out["w"], [2.0, 4.0])


def test_order_and_integers_are_the_bases() -> None:
    base = OrderedDict([("z", ONE), ("ids", np.arange(3)), ("a", ONE * 2), ("mask", np.array([True, False]))])
    expert = {"mask": np.array([True, True]), "a": ONE, "ids": np.arange(3) + 5, "z": ONE}
    out = merged(base, [expert], out_dtype="float16")
    assert list(out) == ["z", "ids", "a", "mask"]
    np.testing.assert_array_equal(out["ids"], [0, 1, 2])
    np.testing.assert_array_equal(out["mask"], [True, False])
    assert [a.dtype.name for a in out.values()] == ["float16", "int64", "float16", "bool"]


def test_libraries_may_differ_and_the_base_decides() -> None:
    tensor = torch.ones(3)
    assert isinstance(merged({"w": ONE}, [{"w": tensor}])["w"], np.ndarray)
    assert isinstance(merged({"w": tensor}, [{"w": ONE}])["w"], torch.Tensor)
    assert isinstance(merged(None, [{"w": tensor}, {"w": ONE}], method="linear")["w"], torch.Tensor)


def test_experts_without_a_base_and_by_name() -> None:
    assert merged(None, [{"w": ONE}, {"w": ONE * 3}], method="linear")["w"].tolist() == [2.0] * 3
    weight = {"expert-1": 3.0, "expert-2": 1.0}
    out = merged(None, [{"w": ONE}, {"w": ONE * 3}], method="linear", weight=weight)
    assert out["w"].tolist() == [1.5] * 3
    layers = {f"layers.{i}.w": ONE for i in range(3)}
    gradient = merged({n: ONE * 0 for n in layers}, [layers], weight=(0.0, 1.0))
    assert [a[0] for a in gradient.values()] == [0.0, 0.5, 1.0]


def test_lambda_is_spelled_either_way() -> None:
    for parameters in ({"lambda": 0.5}, {"lambda_": 0.5}):
        assert merged({"w": ONE * 0}, [{"w": ONE}], **parameters)["w"].tolist() == [0.5] * 3


def test_private_tensors_stay_the_bases() -> None:
    base, expert = {"w": ONE, "head.w": ONE}, {"w": ONE * 2, "head.w": ONE * 2, "head.extra": ONE}
    out = merged(base, [expert], private=["head.*"])
    assert {n: a[0] for n, a in out.items()} == {"w": 2.0, "head.w": 1.0}


def nan() -> Array:
    return np.array([1.0, np.nan, np.inf], np.float32)


def huge() -> Array:
    return np.full(3, 3e38, np.float32)


WRONG: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "paths and state dicts": (lambda: cs.merge({"w": ONE}, ["folder"]), ["state dicts and paths"]),
    "a path as base": (lambda: cs.merge("folder", [{"w": ONE}]), ["state dicts and paths"]),
    "out with state dicts": (lambda: cs.merge({"w": ONE}, [{"w": ONE}], "out"), ["out"]),
    "no out with paths": (lambda: cs.merge("base", ["expert"]), ["out"]),
    "no experts": (lambda: cs.merge({"w": ONE}, []), ["models"]),
    "no base": (lambda: cs.merge(None, [{"w": ONE}]), ["base_model", "task_arithmetic"]),
    "method": (lambda: cs.merge({"w": ONE}, [{"w": ONE}], method="dare-ties"), ["dare-ties", "'dare_ties'"]),
    "parameter": (lambda: cs.merge({"w": ONE}, [{"w": ONE}], method="ties", densty=0.1), ["densty", "'density'"]),
    "range": (lambda: cs.merge({"w": ONE}, [{"w": ONE}], method="ties", density=1.1), ["density", "[0, 1]"]),
    "not a number": (lambda: cs.merge({"w": ONE}, [{"w": ONE}], weight=float("nan")), ["weight"]),
    "expert name": (lambda: cs.merge({"w": ONE}, {"math": {"w": ONE}}, weight={"meth": 1}), ["meth", "'math'"]),
    "shared parameter": (
        lambda: cs.merge({"w": ONE}, {"a": {"w": ONE}}, method="ties", normalize={"a": True}),
        ["normalize", "shared"],
    ),
    "two for slerp": (lambda: cs.merge({"w": ONE}, [{"w": ONE}, {"w": ONE}], method="slerp"), ["slerp", "exactly 2"]),
    "zero sum": (
        lambda: cs.merge(None, {"a": {"w": ONE}, "b": {"w": ONE}}, method="linear", weight={"a": 1, "b": -1}),
        ["'w'", "a=1", "b=-1", "sum to zero"],
    ),
    "missing": (lambda: cs.merge({"w": ONE, "v": ONE}, {"math": {"w": ONE}}), ["math", "'v'", "missing"]),
    "extra": (lambda: cs.merge({"w": ONE}, {"math": {"w": ONE, "v": ONE}}), ["math", "'v'", "private"]),
    "shape": (lambda: cs.merge({"w": ONE}, {"math": {"w": np.ones(4)}}), ["math", "'w'", "[4]", "[3]"]),
    "kind": (lambda: cs.merge({"w": ONE}, {"math": {"w": np.ones(3, np.int32)}}), ["math", "'w'", "I32"]),
    "value": (lambda: cs.merge({"w": ONE}, {"math": {"w": [1.0, 2.0]}}), ["math", "'w'", "list"]),
    "numpy type": (lambda: cs.merge({"w": ONE}, {"math": {"w": ONE.astype(complex)}}), ["math", "'w'", "complex128"]),
    "torch type": (
        lambda: cs.merge({"w": torch.ones(2)}, {"math": {"w": torch.ones(2, dtype=torch.complex64)}}),
        ["math", "'w'", "C64"],
    ),
    "output type": (lambda: cs.merge({"w": ONE}, [{"w": ONE}], out_dtype="float8"), ["out_dtype", "float8"]),
    "seed": (lambda: cs.merge({"w": ONE}, [{"w": ONE}], seed=-1), ["seed"]),
    "glob": (lambda: cs.merge({"w": ONE}, [{"w": ONE}], private=["haed.*"]), ["haed.*", "matches no tensor"]),
    "NaN": (lambda: cs.merge({"w": ONE}, {"math": {"w": nan()}}), ["math", "'w'", "2 of its 3"]),
    "NaN in the base": (lambda: cs.merge({"w": nan()}, {"math": {"w": ONE}}), ["base", "'w'", "2 of its 3"]),
    "overflow": (lambda: cs.merge({"w": ONE}, [{"w": huge()}], weight=3.0), ["'w'", "overflow", "F32"]),
    "overflow of half": (lambda: cs.merge({"w": ONE}, [{"w": ONE * 1e5}], out_dtype="float16"), ["'w'", "F16"]),
    "overflow of bfloat16": (
        lambda: cs.merge({"w": np.ones(3)}, [{"w": np.full(3, 1e300)}], out_dtype="bfloat16"),
        ["'w'", "overflow", "BF16"],
    ),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=list(WRONG))
def test_wrong_arguments_say_what_and_where(wrong: tuple[Callable[[], Any], list[str]]) -> None:
    call, words = wrong
    with pytest.raises(cs.InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp"])
def test_nonfinite_values_pass_when_allowed(method: str) -> None:
    """They stay where they are; for slerp they reach the angle, so all of the tensor. NaN has no sign to vote with."""
    base = {"w": np.zeros(4096 * 2), "v": np.zeros(3)}
    expert = {"w": np.linspace(-1, 1, 4096 * 2), "v": np.ones(3)}
    expert["w"][[5, 4095, 6000]] = np.nan, np.inf, -np.inf
    out = merged(base, [expert], method=method, allow_nonfinite=True)
    assert np.isfinite(out["v"]).all()
    assert not np.isfinite(out["w"][[4095, 6000] if method.endswith("ties") else [5, 4095, 6000]]).any()
    if method != "slerp":
        assert np.isfinite(np.delete(out["w"], [5, 4095, 6000])).all()


def test_overflow_passes_when_allowed() -> None:
    out = merged(None, [{"w": np.array([1.0, 1e300])}], method="linear", out_dtype="bfloat16", allow_nonfinite=True)
    assert out["w"].astype(np.float64).tolist() == [1.0, np.inf]


PROBE = """
import sys
import numpy as np
import consilience as cs
cs.merge({"w": np.zeros(3)}, [{"w": np.ones(3)}], method="ties")
# numba itself imports scipy.linalg where it is installed.
heavy = {"torch", "transformers", "peft", "pandas", "scipy.optimize", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""


def test_merging_arrays_imports_nothing_heavy() -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", PROBE], check=True)


def test_slices_modules_and_documents_of_models_in_memory_are_refused_by_name() -> None:
    state = {"w": np.ones(3, np.float32)}
    sliced: dict[str, Any] = {"merge_method": "passthrough"}
    source = {"model": state, "layer_range": [0, 1]}
    modules = {"default": {"models": [{"model": state}]}}
    with pytest.raises(cs.InputError, match="slices are merged from files"):
        cs.merge(sliced | {"slices": [{"sources": [source]}]})
    with pytest.raises(cs.InputError, match="modules are merged from files"):
        cs.merge(sliced | {"modules": modules})
    documents: Any = [{"merge_method": "linear", "models": [{"model": state}]}]
    with pytest.raises(cs.InputError, match="merge_recipe"):
        cs.merge(documents)
