"""The commands keep their contracts: what they print, and that looking touches nothing."""

import json
import shutil
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
    names = ["embed.weight", *(f"layers.{i}.{part}.weight" for i in range(12) for part in ("attn", "mlp"))]
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
    # Gradients are linear in depth: layer 2 of 0..11 has t = 2 / 11; tensors outside layers have t = 0.
    assert f"weight=one:{2 / 11:g} two:0.25" in by_name["layers.2.mlp.weight"]
    assert "weight=one:1 two:2" in by_name["layers.11.attn.weight"]
    assert "weight=one:0 two:2" in by_name["embed.weight"]
    assert "F32->BF16" in by_name["embed.weight"]
    values = 25 * 64
    # The summary comes first, then the tensors, in the order of layers.
    first = next(number for number, line in enumerate(lines) if line.startswith("  "))
    (cost,) = (line for line in lines[:first] if line.startswith("cost"))
    assert f"read {3 * values * 4 / 1e9:.2f} GB" in cost
    assert "memory" in cost
    assert " s with " in cost
    assert any(line.startswith("tensors  25: 25 merged") for line in lines[:first])
    assert all(line.startswith("  ") for line in lines[first:])
    assert [line.split()[0] for line in lines[first:]] == [
        "embed.weight",
        *(f"layers.{i}.{part}.weight" for i in range(12) for part in ("attn", "mlp")),
    ]


def test_check_says_ok_or_why_not_as_json(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = ["check", str(models / "base"), "-e", f"one={models}/one", "--method", "ties", "--json"]
    assert run(good) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["ok"] is True
    assert facts["tensors"] == facts["merged"] == 25
    assert facts["bytes_written"] > 25 * 64 * 4
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
    assert run(["inspect", str(out), "--fingerprint", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["fingerprint"] == facts["lineage"]["fingerprint"]
    assert facts["fingerprint"] in printed
    assert facts["dtypes"] == {"BF16": 25}
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


def test_what_the_dtype_swallows_is_told_above_one_per_cent_with_what_to_do(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = np.full(1000, 1.0, np.float32)
    for name, count in (("few", 9), ("many", 11)):  # of 1000 changed entries, below 2^-7, bfloat16's unit at 1
        tau = np.full(1000, 0.5, np.float32)
        tau[:count] = 1e-4
        save_file({"w": base + tau}, models / f"{name}.safetensors")
    save_file({"w": base}, models / "b.safetensors")
    arguments = ["merge", f"{models}/b.safetensors", f"{models}/o.safetensors", "--dtype", "bfloat16"]
    assert run([*arguments, "-e", f"{models}/few.safetensors", "-e", f"{models}/many.safetensors"]) == 0
    printed = capsys.readouterr().out
    assert "many: 1.1% of its task vector's entries" in printed
    assert "few:" not in printed
    assert printed.count("--dtype float32") == 1


def only_object(text: str) -> dict[str, Any]:
    """Return the one JSON object that standard output is; NaN is none of JSON's."""
    (line,) = text.splitlines()
    return json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_json_is_one_object_on_standard_output(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["merge", f"{models}/base", f"{models}/out", "-e", f"{models}/one", "-e", f"{models}/two", "--json"]
    assert run([*arguments, "--set", "two.weight=0.25", "--dry-run"]) == 0
    plan = only_object(capsys.readouterr().out)
    assert plan["ok"] is True
    assert plan["out"] == f"{models}/out"
    assert plan["bytes_read"] == 3 * 25 * 64 * 4
    assert [tensor["name"] for tensor in plan["tensor_list"]][:6] == [
        "embed.weight", *(f"layers.{i}.{part}.weight" for i in (0, 1) for part in ("attn", "mlp")),
        "layers.2.attn.weight",
    ]  # fmt: skip
    assert plan["tensor_list"][0] == {
        "name": "embed.weight", "shape": [8, 8], "dtype": "F32", "out_dtype": "F32", "merged": True,
        "parameters": {"weight": {"one": 1.0, "two": 0.25}, "lambda": 1.0, **{
            key: value for key, value in plan["tensor_list"][0]["parameters"].items() if key not in ("weight", "lambda")
        }},
    }  # fmt: skip
    assert not (models / "out").exists()
    assert run(arguments) == 0
    said = capsys.readouterr()
    merged = only_object(said.out)
    lineage = json.loads((models / "out/consilience/lineage.json").read_text())
    assert (merged["ok"], merged["kind"], merged["out"]) == (True, "model", f"{models}/out")
    assert merged["fingerprint"] == lineage["output"]["fingerprint"]
    assert merged["tensors"] == merged["merged"] == 25
    assert run(["inspect", f"{models}/out", "--json"]) == 0
    assert only_object(capsys.readouterr().out)["parameters"] == 25 * 64
    assert run(["check", *arguments[1:2], *arguments[3:]]) == 0
    assert only_object(capsys.readouterr().out)["ok"] is True


def test_json_has_no_nan(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An expert equal to the base has no rounding error relative to its task vector."""
    shutil.copytree(models / "base", models / "same")
    assert run(["merge", f"{models}/base", f"{models}/out", "-e", f"{models}/same", "--json"]) == 0
    assert only_object(capsys.readouterr().out)["rounding"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["merge", "base", "out", "-e", "gone"], "gone"),
        (["merge", "base", "out", "-e", "one", "--set", "wieght=1", "--dry-run"], "'weight'"),
        (["check", "base", "-e", "one", "--method", "tise"], "'ties'"),
        (["inspect", "gone"], "gone"),
        (["train", "base", "out", "gone.jsonl", "--steps", "1", "--learning-rate", "1"], "gone.jsonl"),
        (["merge", "--no-such-option"], "--help"),
    ],
)
def test_errors_are_an_object_too(
    models: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    assert run([*arguments, "--json"]) == 2
    said = capsys.readouterr()
    found = only_object(said.out)
    assert (found["ok"], found["status"]) == (False, 2)
    assert words in found["error"]
    assert said.err == f"consilience: {found['error']}\n"


def write_lora(folder: Path, config: dict[str, Any], factors: dict[str, tuple[int, int, int]]) -> None:
    """Write a PEFT adapter; ``factors`` has (rank, inputs, outputs) by module."""
    folder.mkdir()
    value = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 4, "lora_alpha": 8} | config
    (folder / "adapter_config.json").write_text(json.dumps(value))
    tensors = {"base_model.model.head.weight": np.ones((3, 6), np.float32)}
    for module, (rank, inputs, outputs) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = np.ones((rank, inputs), np.float32)
        tensors[f"base_model.model.{module}.lora_B.weight"] = np.ones((outputs, rank), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("stabilised", [False, True])
def test_inspect_says_what_an_adapter_is(tmp_path: Path, stabilised: bool, capsys: pytest.CaptureFixture[str]) -> None:
    factors = {f"layers.{i}.{part}": (16 if (i, part) == (1, "v") else 4, 6, 5) for i in (0, 1) for part in ("q", "v")}
    config = {"modules_to_save": ["head"], "rank_pattern": {"1.v": 16}, "alpha_pattern": {"1.v": 64}}
    write_lora(tmp_path / "lora", config | {"use_rslora": stabilised, "revision": "v2"}, factors)
    assert run(["inspect", f"{tmp_path}/lora", "--json"]) == 0
    adapter = only_object(capsys.readouterr().out)["adapter"]
    assert adapter["base"] == "org/base"
    assert adapter["targets"] == {"q": 2, "v": 2}
    assert adapter["ranks"] == {"4": 3, "16": 1}
    assert adapter["alphas"] == {"8.0": 3, "64.0": 1}
    assert adapter["scales"] == pytest.approx([4.0, 16.0] if stabilised else [2.0, 4.0])
    assert adapter["whole"] == ["head.weight"]
    assert run(["inspect", f"{tmp_path}/lora"]) == 0
    text = capsys.readouterr().out
    for words in (
        "base: org/base@v2", "targets: 4 modules (q 2, v 2)", "rank: 4 (3 modules), 16 (1 modules)",
        "alpha: 8 (3 modules), 64 (1 modules)", "saved modules: head.weight", 'rank_pattern: {"1.v": 16}',
    ):  # fmt: skip
        assert words in text
    assert ("alpha / sqrt(r)" in text) is stabilised


def test_evaluate_help_and_version_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["--version"], ["merge", "--help"], ["evaluate", "--help"]):
        assert run(arguments) == 0
        assert capsys.readouterr().out.strip()


def test_an_interruption_is_an_object_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("consilience.cli.listing.method_facts", interrupted)
    assert run(["methods", "--json"]) == 130
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert (found["ok"], found["status"]) == (False, 130)
    assert said.err == f"consilience: {found['error']}\n"
