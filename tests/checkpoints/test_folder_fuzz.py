"""Any JSON beside the weights, and any bytes in a pickle or a card, end in a merge or in one line, never in a crash."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import consilience as cs
from consilience.checkpoints import open_checkpoint
from consilience.checkpoints.adapter import open_adapter
from consilience.errors import InputError

WEIGHTS: dict[str, Any] = {"model.layers.0.mlp.weight": np.ones((4, 4), np.float32), "lm_head.weight": np.ones((6, 4))}
FACTORS: dict[str, Any] = {
    "base_model.model.model.layers.0.mlp.lora_A.weight": np.ones((2, 4), np.float32),
    "base_model.model.model.layers.0.mlp.lora_B.weight": np.ones((4, 2), np.float32),
}
CONFIG_KEYS = ["tie_word_embeddings", "text_config", "torch_dtype", "dtype", "quantization_config", "_name_or_path"]
ADAPTER_KEYS = ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "use_dora", "bias"]
INDEX_VALUES = ["x.safetensors", "y.safetensors", "../x.safetensors", "", ".", "..", "x.safetensors\0", "X.safetensors"]

scalars = st.none() | st.booleans() | st.integers(-2, 9) | st.integers() | st.floats() | st.text(max_size=4)
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=4), v, max_size=3), max_leaves=8
)


def some_keys(keys: list[str], value: Any) -> Any:
    return st.fixed_dictionaries({}, optional={key: value for key in keys})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folders")
    for name in ("base", "expert"):
        (root / name).mkdir()
        save_file(WEIGHTS, root / name / "model.safetensors")
    (root / "adapter").mkdir()
    save_file(FACTORS, root / "adapter/adapter_model.safetensors")
    (root / "shards").mkdir()
    for name, key in (("x", "model.layers.0.mlp.weight"), ("y", "lm_head.weight")):
        save_file({key: WEIGHTS[key]}, root / "shards" / f"{name}.safetensors")
    return root


def refusal(action: Callable[[], Any]) -> str:
    """Return what ``action`` was refused with, or nothing; any other error passes through."""
    try:
        action()
    except InputError as error:
        return str(error)
    return ""


@settings(max_examples=30, deadline=None)
@given(config=some_keys(CONFIG_KEYS, values) | st.dictionaries(st.text(max_size=5), values, max_size=3))
@example({"tie_word_embeddings": True})
@example({"torch_dtype": {"torch_dtype": [1]}, "dtype": None, "_name_or_path": "org/name"})
@example({"a" * 70: "x" * 70})
def test_any_config(place: Path, config: dict[str, Any]) -> None:
    text = json.dumps(config)
    for name in ("base", "expert"):
        (place / name / "config.json").write_text(text, encoding="utf-8")
    out = place / "out"
    said = refusal(lambda: cs.merge(place / "base", [place / "expert"], out, out_dtype="bfloat16"))
    assert out.exists() == (not said)
    assert not said or "config.json" in said
    shutil.rmtree(out, ignore_errors=True)


@settings(max_examples=100, deadline=None)
@given(config=some_keys(ADAPTER_KEYS, values) | st.dictionaries(st.text(max_size=5), values, max_size=3))
@example({"rank_pattern": {"mlp": 2}})
@example({"rank_pattern": {"(": 2}})
@example({"rank_pattern": {"a{99999999999}": 2}})
@example({"lora_alpha": 10**400})
@example({"r": 2.0, "lora_alpha": 1})
def test_any_adapter_config(place: Path, config: dict[str, Any]) -> None:
    value = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config
    (place / "adapter/adapter_config.json").write_text(json.dumps(value), encoding="utf-8")
    found: list[Any] = []
    said = refusal(lambda: found.append(open_adapter(place / "adapter")))
    if said:
        assert "adapter_config.json" in said
    else:
        assert all(np.isfinite(pair.scale) and pair.rank == 2 for pair in found[0].pairs.values())


@settings(max_examples=100, deadline=None)
@given(
    index=some_keys(
        ["weight_map"],
        st.dictionaries(st.sampled_from(list(WEIGHTS)), st.sampled_from(INDEX_VALUES) | values, max_size=2) | values,
    )
)
@example({"weight_map": {"model.layers.0.mlp.weight": "x.safetensors", "lm_head.weight": "y.safetensors"}})
def test_any_index(place: Path, index: dict[str, Any]) -> None:
    (place / "shards/model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    found: list[Any] = []
    said = refusal(lambda: found.append(open_checkpoint(place / "shards")))
    if said:
        assert "model.safetensors.index.json" in said
    else:
        assert found[0].tensors.keys() == index["weight_map"].keys()
        found[0].storage.close()


@settings(max_examples=20, deadline=None)
@given(card=st.binary(max_size=60).map(lambda b: b"---\n" + b + b"\n---\n") | st.binary(max_size=60))
@example(b"---\nlicense: [mit, {a: b}]\nlanguage: 3\nlibrary_name: []\nbase_model: {a: 1}\n---\n")
@example(b"---\nlicense: 2001-01-01\n---\n")
def test_any_card(place: Path, card: bytes) -> None:
    (place / "base/config.json").write_text("{}", encoding="utf-8")
    (place / "expert/config.json").write_text("{}", encoding="utf-8")
    for name in ("base", "expert"):
        (place / name / "README.md").write_bytes(card)
    cs.merge(place / "base", [place / "expert"], place / "out")
    shutil.rmtree(place / "out")
    for name in ("base", "expert"):
        (place / name / "README.md").unlink()


@pytest.fixture(scope="module")
def pickles(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """One state dict in torch's two formats."""
    path = tmp_path_factory.mktemp("pickles") / "x.pt"
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.arange(2)}
    found: list[bytes] = []
    for zipped in (True, False):
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
        found.append(path.read_bytes())
    return found[0], found[1]


@settings(max_examples=100, deadline=None)
@given(
    zipped=st.booleans(),
    edits=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=4),
    length=st.none() | st.integers(0, 5000),
)
def test_any_pickle(
    place: Path, pickles: tuple[bytes, bytes], zipped: bool, edits: list[tuple[int, int]], length: int | None
) -> None:
    data = bytearray(pickles[0 if zipped else 1])
    for at, byte in edits:
        data[at % len(data)] = byte
    path = place / "x.pt"
    path.write_bytes(data[:length])

    def read() -> None:
        checkpoint = open_checkpoint(path)
        for name, tensor in checkpoint.tensors.items():
            assert checkpoint.read(name).size == tensor.nbytes

    said = refusal(read)
    assert not said or str(path) in said
