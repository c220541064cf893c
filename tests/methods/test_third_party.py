"""A package of somebody else's brings a method of each kind: installed, it is listed, planned, run and recorded."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

PACKAGE = Path(__file__).parent / "third_party"
DOCS = Path(__file__).resolve().parents[2] / "docs" / "methods" / "own.md"
State = dict[str, npt.NDArray[Any]]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with the package as an installer leaves it: its modules, and its entry points beside them."""
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    site = tmp_path / "site"
    shutil.copytree(PACKAGE / "own_methods", site / "own_methods", ignore=shutil.ignore_patterns("__pycache__"))
    info = site / f"own_methods-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    ((group, points),) = project["entry-points"].items()
    lines = [f"[{group}]", *(f"{name} = {target}" for name, target in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return site


@pytest.fixture
def models(tmp_path: Path) -> dict[str, State]:
    rng = np.random.default_rng(3)
    base = {"w": rng.standard_normal((33, 17)), "b": rng.standard_normal(5)}
    states = {"base": {n: a.astype(np.float16) for n, a in base.items()}}
    for name in ("x", "y"):
        states[name] = {n: (a + 0.01 * rng.standard_normal(a.shape)).astype(np.float16) for n, a in base.items()}
    for name, state in states.items():
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    return {name: {n: a.astype(np.float64) for n, a in state.items()} for name, state in states.items()}


def consilience(site: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "consilience", *arguments]
    run = subprocess.run(command, cwd=site.parent, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


EXPERTS = ("-e", "x=x", "-e", "y=y")


def test_both_kinds_are_listed_with_their_schema(site: Path) -> None:
    listed = {method["name"]: method for method in json.loads(consilience(site, "methods", "--json"))}
    assert list(listed["signed_square"]["parameters"]) == ["weight", "size"]
    assert list(listed["top_direction"]["parameters"]) == ["lambda", "others"]


def test_an_elementwise_method(site: Path, models: dict[str, State]) -> None:
    arguments = ("merge", "base", "out", *EXPERTS, "--method", "signed_square", "--set", "x.weight=0.5")
    plan = consilience(site, *arguments, "--dry-run")
    assert "weight=x:0.5 y:1, size=0.01" in plan
    said = consilience(site, *arguments)
    merged = load_file(site.parent / "out" / "model.safetensors")
    for name, base in models["base"].items():
        x, y = (models[expert][name] - base for expert in ("x", "y"))
        expected = base + (0.5 * x * abs(x) + y * abs(y)) / 0.01
        np.testing.assert_allclose(merged[name], expected, rtol=2e-3, atol=2e-3)
    assert "x: " in said
    assert "below one unit in the last place" in said
    lineage = json.loads((site.parent / "out" / "consilience" / "lineage.json").read_text())
    assert lineage["method"] == "signed_square"
    assert lineage["recipe"]["parameters"]["size"] == 0.01


def test_a_matrix_method(site: Path, models: dict[str, State]) -> None:
    recipe = (
        "merge_method: top_direction\nbase_model: base\nmodels: [{model: x}, {model: y}]\nparameters: {lambda: 2}\n"
    )
    (site.parent / "recipe.yaml").write_text(recipe)
    assert "lambda=2, others=mean" in consilience(site, "merge", "recipe.yaml", "out", "--dry-run")
    said = consilience(site, "merge", "recipe.yaml", "out")
    merged = load_file(site.parent / "out" / "model.safetensors")
    means = {n: (models["x"][n] + models["y"][n]) / 2 - base for n, base in models["base"].items()}
    u, s, v = np.linalg.svd(means["w"])
    expected = models["base"]["w"] + 2 * s[0] * np.outer(u[:, 0], v[0])
    np.testing.assert_allclose(merged["w"], expected, rtol=1e-3, atol=2e-3)
    np.testing.assert_allclose(merged["b"], models["base"]["b"] + 2 * means["b"], rtol=1e-3, atol=2e-3)
    assert "verified" in said
    lineage = json.loads((site.parent / "out" / "consilience" / "lineage.json").read_text())
    assert lineage["method"] == "top_direction"


@pytest.mark.parametrize("name", ["signed_square", "top_direction"])
def test_the_page_shows_the_package(name: str) -> None:
    code = (PACKAGE / "own_methods" / f"{name}.py").read_text()
    assert code.split("\n\n", 1)[1].strip() in DOCS.read_text()
