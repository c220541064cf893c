"""Experts opened without a plan: their stacks are their differences from the base, and what does not fit is named."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

from consilience.errors import InputError
from consilience.experts.expert_set import open_experts

Array = npt.NDArray[Any]


def write(folder: Path, tensors: dict[str, Array]) -> str:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return str(folder)


@pytest.fixture
def states() -> dict[str, dict[str, Array]]:
    rng = np.random.default_rng(0)
    base = {"a.weight": rng.standard_normal((7, 5)).astype(np.float16), "same": np.ones(3, np.float32)}
    base |= {"head.weight": rng.standard_normal((2, 5)).astype(np.float32), "steps": np.array([3], np.int64)}
    x = base | {"a.weight": base["a.weight"] + np.float16(0.5), "steps": np.array([4], np.int64)}
    return {"base": base, "x": x, "y": x | {"head.weight": base["head.weight"] * 2}}


def test_stacks_are_the_task_vectors(tmp_path: Path, states: dict[str, dict[str, Array]]) -> None:
    paths = {name: write(tmp_path / name, state) for name, state in states.items()}
    opened = open_experts(paths["base"], {"x": paths["x"], "y": paths["y"]})
    stacks = {stack.name: stack for stack in opened.stacks}
    assert set(stacks) == set(states["base"])
    for name in ("a.weight", "head.weight"):
        want = [states[k][name].astype(np.float64) - states["base"][name].astype(np.float64) for k in "xy"]
        np.testing.assert_allclose(stacks[name].whole(), np.stack(want), atol=1e-6)
        assert stacks[name].row_names == ("x", "y")
    assert not stacks["steps"].rows
    assert stacks["head.weight"].wide
    assert not stacks["a.weight"].wide
    opened.close()


def test_private_tensors_have_no_rows(tmp_path: Path, states: dict[str, dict[str, Array]]) -> None:
    states["y"]["head.weight"] = np.zeros((9, 5), np.float32)
    paths = {name: write(tmp_path / name, state) for name, state in states.items()}
    with pytest.raises(InputError, match=r"head\.weight"):
        open_experts(paths["base"], {"y": paths["y"]})
    opened = open_experts(paths["base"], {"y": paths["y"]}, ["head.*"])
    assert [stack.name for stack in opened.stacks if stack.rows] == ["same", "a.weight"] or [
        stack.name for stack in opened.stacks if stack.rows
    ] == ["a.weight", "same"]


def test_names_are_the_callers(tmp_path: Path, states: dict[str, dict[str, Array]]) -> None:
    paths = {name: write(tmp_path / name, state) for name, state in states.items()}
    with pytest.raises(InputError, match="'base'"):
        open_experts(paths["base"], {"base": paths["x"]})
