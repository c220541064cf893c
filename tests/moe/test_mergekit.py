"""What mergekit-moe 0.1.5 makes of the same recipes, recorded by data/make_mergekit_mixture.py."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import consilience as cs
from tests.moe.data.make_mergekit_mixture import CASES, OUT, recipe
from tests.moe.dense import hf

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.parametrize("case", CASES)
def test_tensors_are_mergekit_s(case: str, tmp_path: Path) -> None:
    cs.merge_recipe(recipe(case, tmp_path), tmp_path / "out")
    # Experts are one tensor a layer in mergekit's files of Mixtral and Qwen3-MoE, as in transformers' memory.
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours: dict[str, Any] = {name: value.numpy() for name, value in model.state_dict().items()}
    ours |= load_file(tmp_path / "out" / "model.safetensors")
    stored = np.load(OUT)
    compared = [name for name in stored.files if name.startswith(f"{case}/")]
    assert any("gate.weight" in name for name in compared)
    for name in compared:
        found, expected = ours[name.removeprefix(f"{case}/")], stored[name]
        if "gate.weight" in name:
            assert np.abs(found - expected).max() < 2e-6
            assert np.abs(expected).max() > 0.1
        else:
            assert np.array_equal(found, expected), name
