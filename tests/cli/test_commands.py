"""The commands keep their contracts: what they print, and that looking touches nothing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from consilience.__main__ import run
from consilience.engine.summary import Summary


@pytest.fixture
def models(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    names = ["embed.weight", *(f"layers.{i}.{part}.weight" for i in range(5) for part in ("attn", "mlp"))]
    for folder in ("base", "one", "two"):
        (tmp_path / folder).mkdir()
        save_file(
            {n: rng.standard_normal((8, 8)).astype(np.float32) for n in names}, tmp_path / folder / "model.safetensors"
        )
        (tmp_path / folder / "config.json").write_text('{"model_type": "toy"}')
    return tmp_path


def snapshot(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def test_methods_json_lists_name_data_parameters_and_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["methods", "--json"]) == 0
    facts: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert {"linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp"} <= {
        fact["name"] for fact in facts
    }
    assert all({"name", "data", "parameters", "source"} <= fact.keys() for fact in facts)


def test_a_dry_run_prints_the_resolved_plan_and_touches_nothing(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = models / "recipe.yaml"
    recipe.write_text(
        f"""
merge_method: task_arithmetic
base_model: {models}/base
models:
  - {{model: {models}/one, parameters: {{weight: [0.0, 1.0]}}}}
  - {{model: {models}/two, parameters: {{weight: [{{filter: mlp, value: 0.25}}, {{value: 2}}]}}}}
dtype: bfloat16
"""
    )
    before = snapshot(models)
    assert run(["merge", str(recipe), str(models / "out"), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert snapshot(models) == before
    by_name = {line.split()[0]: line for line in lines if line.startswith("  ")}
    # Gradients are linear in depth: layer 2 of 0..4 has t = 0.5; tensors outside layers have t = 0.
    assert "weight=one:0.5 two:0.25" in by_name["layers.2.mlp.weight"]
    assert "weight=one:1 two:2" in by_name["layers.4.attn.weight"]
    assert "weight=one:0 two:2" in by_name["embed.weight"]
    assert "F32->BF16" in by_name["embed.weight"]
    values = 11 * 64
    assert f"read {3 * values * 4 / 1e9:.2f} GB" in lines[-1]
    assert "memory" in lines[-1]
    assert " s with " in lines[-1]


def test_check_says_ok_or_why_not_as_json(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = ["check", str(models / "base"), "-e", f"one={models}/one", "--method", "ties", "--json"]
    assert run(good) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["ok"] is True
    assert facts["tensors"] == facts["merged"] == 11
    assert facts["bytes_written"] > 11 * 64 * 4
    assert run([*good, "--set", "densty=0.3"]) == 2
    facts = json.loads(capsys.readouterr().out)
    assert facts["ok"] is False
    assert "density" in facts["error"]


def test_merge_prints_a_summary_and_inspect_confirms_its_fingerprint(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = models / "out"
    arguments = ["merge", str(models / "base"), str(out), "-e", f"one={models}/one", "-e", f"two={models}/two"]
    assert run([*arguments, "--set", "weight=0.5", "--set", "two.weight=0.25", "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert "verified" in printed
    assert "below one unit in the last place" in printed
    assert run(["inspect", str(out), "--fingerprint", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["fingerprint"] == facts["lineage"]["fingerprint"]
    assert facts["fingerprint"] in printed
    assert facts["dtypes"] == {"BF16": 11}
    recipe = (out / "consilience" / "recipe.yaml").read_text()
    assert run(["merge", str(out / "consilience" / "recipe.yaml"), str(models / "again"), "-q"]) == 0, recipe
    assert (models / "again/model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_the_summary_measures_what_the_output_dtype_swallows(models: Path) -> None:
    import consilience as cs

    base = {"w": np.full(1000, 1.0, np.float32)}
    tau = np.concatenate([np.full(250, 0.5), np.full(250, 1e-4), np.zeros(500)]).astype(np.float32)
    for name, value in (("b", base["w"]), ("e", base["w"] + tau)):
        save_file({"w": value}, models / f"{name}.safetensors")
    summary = cs.merge(
        models / "b.safetensors", {"e": models / "e.safetensors"}, models / "o.safetensors", out_dtype="bfloat16"
    )
    assert isinstance(summary, Summary)
    (lost,) = summary.below_unit
    # One unit in the last place of bfloat16 at 1.0 is 2^-7: half of the 500 changed entries lie below it.
    assert lost.entries == pytest.approx(0.5)
    assert lost.mass == pytest.approx(250 * 1e-4 / (250 * 1e-4 + 250 * 0.5), rel=1e-2)
    # The swallowed entries are the whole rounding error.
    assert summary.rounding == pytest.approx(np.sqrt(250 * 1e-8 / (250 * 1e-8 + 250 * 0.25)), rel=1e-2)


def test_evaluate_help_and_version_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["--version"], ["merge", "--help"], ["evaluate", "--help"]):
        assert run(arguments) == 0
        assert capsys.readouterr().out.strip()
