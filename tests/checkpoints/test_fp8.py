"""Scaled 8-bit floats read as floats: against torch's formula, through merges, and what is refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import consilience as cs
from consilience.checkpoints import DTYPES, MemoryStorage, TensorInfo, open_checkpoint
from consilience.checkpoints.fp8 import read_as_floats
from consilience.checkpoints.scaled_floats import ScaledFloats
from consilience.checkpoints.values import values
from consilience.engine.lineage import checkpoint_fingerprints
from consilience.errors import InputError

State = dict[str, torch.Tensor]
KINDS = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
NAME = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"


def numbers(shape: tuple[int, int], kind: torch.dtype = torch.float8_e4m3fn, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(kind)


def scales(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) * 0.1 + 0.01


def dequantised(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The formula by torch: every scale repeated over its block, what hangs over cut off."""
    spread = scale.float().repeat_interleave(block[0], 0)[: weight.shape[0]]
    return weight.float() * spread.repeat_interleave(block[1], 1)[:, : weight.shape[1]]


def grid(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    block=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    kind=st.sampled_from(sorted(KINDS)),
    scale_kind=st.sampled_from([torch.float32, torch.bfloat16]),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    wide=st.booleans(),
)
def test_any_range_of_any_shape(
    shape: tuple[int, int],
    block: tuple[int, int],
    kind: str,
    scale_kind: torch.dtype,
    cut: tuple[float, float],
    wide: bool,
) -> None:
    weight, scale = numbers(shape, KINDS[kind]), scales(grid(shape, block)).to(scale_kind)
    held = {"w": weight.view(torch.uint8), "s": scale.view(torch.uint8)}
    storage = MemoryStorage({name: value.numpy().reshape(-1) for name, value in held.items()})
    stored = TensorInfo("w", DTYPES[kind], shape)
    beside = TensorInfo("s", DTYPES["F32" if scale_kind == torch.float32 else "BF16"], tuple(scale.shape))
    tensor = TensorInfo("w", DTYPES["BF16"], shape, codec=ScaledFloats(stored, beside, block))
    start, stop = sorted(int(part * weight.numel()) for part in cut)
    out = np.empty(stop - start, np.float64 if wide else np.float32)
    values(storage, tensor, start, stop, out)
    np.testing.assert_array_equal(
        out, dequantised(weight, scale, block).flatten()[start:stop].numpy().astype(out.dtype)
    )


def write(folder: Path, tensors: State, config: Mapping[str, Any], dtype: str = "bfloat16") -> Path:
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"dtype": dtype, "quantization_config": config}))
    return folder


def fine_grained(folder: Path, shape: tuple[int, int], seed: int = 0, block: int = 128, **parts: Any) -> torch.Tensor:
    """Write a model of one matrix in blocks and a norm; return what the matrix stands for."""
    weight, scale = numbers(shape, seed=seed), scales(grid(shape, (block, block)), seed)
    tensors: State = {NAME: weight, f"{NAME}_scale_inv": scale, NORM: torch.ones(shape[1]).bfloat16() + seed}
    tensors = {name: value for name, value in (tensors | parts).items() if value is not None}
    write(folder, tensors, {"quant_method": "fp8", "weight_block_size": [block, block]})
    return dequantised(weight, scale, (block, block))


def compressed(strategy: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy} | more
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}


LAYOUTS: dict[str, tuple[dict[str, Any], str, tuple[int, ...], tuple[int, int]]] = {
    "blocks": ({"quant_method": "fp8", "weight_block_size": [16, 8]}, "weight_scale_inv", (2, 3), (16, 8)),
    "blocks by default": ({"quant_method": "fp8"}, "weight_scale_inv", (1, 1), (128, 128)),
    "one huge block": ({"quant_method": "fp8", "weight_block_size": [10**30, 8]}, "weight_scale_inv", (1, 3), (20, 8)),
    "no blocks": ({"quant_method": "fp8", "weight_block_size": None}, "weight_scale_inv", (), (20, 20)),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, "weight_scale", (20, 1), (1, 20)),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "FP8"}, "weight_scale", (), (20, 20)),
    "compressed, one": (compressed("tensor"), "weight_scale", (1,), (20, 20)),
    "compressed, channel": (compressed("channel"), "weight_scale", (20, 1), (1, 20)),
    "compressed, block": (compressed("block", block_structure=[16, 8]), "weight_scale", (2, 3), (16, 8)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path: Path, layout: str) -> None:
    config, name, shape, block = LAYOUTS[layout]
    weight, scale = numbers((20, 20)), scales(shape)
    module = NAME.removesuffix("weight")
    tensors = {
        NAME: weight,
        module + name: scale,
        module + "input_scale": torch.ones(()),
        NORM: torch.ones(20).bfloat16(),
    }
    write(tmp_path / "m", tensors, config)
    (tmp_path / "m" / "hf_quant_config.json").write_text("{}")
    cs.merge(None, {"m": tmp_path / "m"}, out=tmp_path / "out", method="linear", out_dtype="float32")
    want = dequantised(weight, scale.reshape(grid((20, 20), block)), block)
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert sorted(out) == sorted([NAME, NORM])
    assert torch.equal(out[NAME], want)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"dtype": "float32"}
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()


@pytest.mark.parametrize("shape", [(192, 320), (320, 192), (128, 256)])
def test_merging_with_plain_experts(tmp_path: Path, shape: tuple[int, int]) -> None:
    base, one = (fine_grained(tmp_path / name, shape, seed) for seed, name in enumerate(("base", "fp8")))
    other = base + torch.randn(shape, generator=torch.Generator().manual_seed(9)) * 0.01
    save = {NAME: other.bfloat16(), NORM: torch.ones(shape[1]).bfloat16()}
    write(tmp_path / "plain", save, {}).joinpath("config.json").write_text('{"dtype": "bfloat16"}')
    experts = {"a": tmp_path / "fp8", "b": tmp_path / "plain"}
    summary: Any = cs.merge(tmp_path / "base", experts, out=tmp_path / "out", method="task_arithmetic", weight=0.5)
    want = base + (0.5 * (one - base) + 0.5 * (other.bfloat16().float() - base))
    out = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(out[NAME].float(), want.bfloat16().float(), rtol=2**-7, atol=1e-6)
    assert {value.dtype for value in out.values()} == {torch.bfloat16}
    assert sorted(out) == sorted([NAME, NORM])
    said = [note for note in summary.notes if "F8_E4M3" in note]
    assert len(said) == 2
    assert "1 weights are stored as FP8 with block scales (F8_E4M3) and read as floats" in said[0]


def test_the_merge_of_its_floats_is_the_same(tmp_path: Path) -> None:
    """An FP8 model merges, and has fingerprints, as the float32 model that it stands for."""
    for seed, name in enumerate(("base", "x")):
        plain = fine_grained(tmp_path / name, (192, 320), seed)
        norm = load_file(tmp_path / name / "model.safetensors")[NORM]
        write(tmp_path / f"{name}-floats", {NAME: plain, NORM: norm}, {})
    for ending in ("", "-floats"):
        models = [tmp_path / f"{name}{ending}" for name in ("base", "x")]
        cs.merge(models[0], {"x": models[1]}, out=tmp_path / f"out{ending}", method="ties", density=0.3,
                 out_dtype="bfloat16")  # fmt: skip
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "out-floats"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    read = read_as_floats(open_checkpoint(tmp_path / "x"))
    assert checkpoint_fingerprints(read) == checkpoint_fingerprints(open_checkpoint(tmp_path / "x-floats"))
    diagnosed = [cs.diagnose(_recipe(tmp_path, e)).together for e in ("", "-floats")]
    assert diagnosed[0] == diagnosed[1]


def _recipe(tmp_path: Path, ending: str) -> dict[str, Any]:
    return {
        "method": "task_arithmetic",
        "base_model": str(tmp_path / f"base{ending}"),
        "models": [{"model": str(tmp_path / f"x{ending}")}],
    }


BAD: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no scale": ({f"{NAME}_scale_inv": None}, (NAME, "weight_scale_inv' is missing")),
    "a scale of other blocks": ({f"{NAME}_scale_inv": torch.ones(3, 2)}, ("[3, 2]", "[2, 3] (blocks of 128 x 128)")),
    "NaN in a scale": (
        {f"{NAME}_scale_inv": torch.tensor([[1, 1, 1], [1, torch.nan, 1]])},
        ("x: tensor", "_scale_inv': 1 of its 6 values are NaN or Inf"),
    ),
    "NaN in a weight": (
        {NAME: torch.full((192, 320), torch.nan).to(torch.float8_e4m3fn)},
        ("x: tensor", "up_proj.weight': 61440 of its 61440 values are NaN or Inf"),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(tmp_path: Path, case: str) -> None:
    parts, words = BAD[case]
    fine_grained(tmp_path / "base", (192, 320))
    fine_grained(tmp_path / "x", (192, 320), 1, **parts)
    with pytest.raises(InputError) as raised:
        cs.merge(tmp_path / "base", {"x": tmp_path / "x"}, out=tmp_path / "out", method="task_arithmetic")
    assert all(word in str(raised.value) for word in words), str(raised.value)
    assert not (tmp_path / "out").exists()


UNKNOWN: dict[str, tuple[dict[str, Any], State]] = {
    "no config": ({}, {}),
    "a method of another name": ({"quant_method": "quark"}, {}),
    "modelopt's other layouts": ({"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}, {}),
    "a rotation": (compressed("tensor") | {"transform_config": {"config_groups": {"u": {}}}}, {}),
    "groups": (compressed("group", group_size=16), {}),
    "asymmetric": (compressed("tensor", symmetric=False), {}),
    "4 bits": (compressed("tensor", num_bits=4), {}),
    "whole numbers as scales": (compressed("tensor"), {f"{NAME}_scale": torch.ones(1, dtype=torch.int64)}),
    "a zero point": (compressed("tensor"), {f"{NAME}_zero_point": torch.zeros(1)}),
    "a cache in 8 bits": (compressed("tensor"), {"model.layers.0.self_attn.k_scale": torch.ones(1)}),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_other_layouts_stay_refused(tmp_path: Path, case: str) -> None:
    config, parts = UNKNOWN[case]
    for seed, name in enumerate(("base", "x")):
        tensors = {NAME: numbers((16, 16), seed=seed), f"{NAME}_scale": torch.ones(1)} | parts
        write(tmp_path / name, tensors, config)
    with pytest.raises(InputError, match=r"quantised|stored as|unquantised"):
        cs.merge(tmp_path / "base", {"x": tmp_path / "x"}, out=tmp_path / "out", method="task_arithmetic")
