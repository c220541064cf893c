"""``consilience inspect`` knows coefficients files by all their names, and draws them."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from consilience.__main__ import run
from consilience.coefficients import Coefficients, make_groups, save_coefficients


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    folder = tmp_path / "merged"
    tensors = [(f"layers.{i}.{part}.weight", 64) for i in range(3) for part in ("attn", "mlp")]
    groups = make_groups(tensors, "tensor", lambda name: 2 if "mlp" in name else 1)
    alpha = np.linspace(0, 1, 18).reshape(2, 9)
    facts = {"method": "expert_merging", "steps": 12, "alphabar": [0.3, 0.3]}
    save_coefficients(folder / "consilience", Coefficients(("math", "code"), groups, alpha, facts=facts))
    save_file({name: np.ones((8, 8), np.float32) for name, _ in tensors}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "toy"}')
    return folder


@pytest.mark.parametrize("name", ["", "coefficients.json", "coefficients.safetensors"])
def test_inspect_says_what_coefficients_are(merged: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(merged / "consilience" / name)
    assert run(["inspect", path]) == 0
    text = capsys.readouterr().out
    for words in ["coefficients of 2 experts", "9 coefficients per expert in 6 groups", "steps: 12", "first third"]:
        assert words in text
    assert run(["inspect", path, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == "coefficients"
    assert facts["experts"] == ["math", "code"]
    assert facts["alpha"]["code"]["max"] == 1.0
    assert "group_list" not in facts
    assert run(["inspect", path, "--json", "--tensors"]) == 0
    groups = json.loads(capsys.readouterr().out)["group_list"]
    assert [value for group in groups for value in group["alpha"]["math"]] == np.linspace(0, 1, 18)[:9].tolist()
    assert run(["inspect", path, "--tensors"]) == 0
    assert "layers.2.mlp.weight  64 parameters" in capsys.readouterr().out


def test_a_merged_model_says_one_line_more(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(merged)]) == 0
    found = capsys.readouterr().out.splitlines()
    assert run(["inspect", str(merged), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == "model"
    assert facts.pop("coefficients") == {"experts": ["math", "code"], "groups": 6, "coefficients": 9, "learned": 9}
    for path in (merged / "consilience").iterdir():
        path.unlink()
    assert run(["inspect", str(merged)]) == 0
    before = capsys.readouterr().out.splitlines()
    assert [line for line in found if line not in before] == [
        "  coefficients: experts math, code; groups 6; coefficients 9; learned 9"
    ]
    assert [line for line in found if line in before] == before
    assert run(["inspect", str(merged), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == facts


def test_plot_draws_a_png(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = merged.parent / "picture.png"
    assert run(["inspect", str(merged / "consilience"), "--plot", str(file)]) == 0
    assert file.read_bytes().startswith(b"\x89PNG")
    assert "coefficients of 2 experts" in capsys.readouterr().out


WRONG = {
    "a model": (["{merged}", "--plot", "{out}/x.png"], "not a coefficients file; name {merged}/consilience"),
    "a weight file": (["{merged}/model.safetensors", "--plot", "{out}/x.png"], "not a coefficients file"),
    "nothing": (["{out}/gone", "--plot", "{out}/x.png"], "not a coefficients file"),
    "a long name": (["n" * 5000], "n"),
    "another format": (["{merged}/consilience", "--plot", "{out}/x.jpg"], ".png"),
    "no folder": (["{merged}/consilience", "--plot", "{out}/no/x.png"], "no folder"),
    "a fingerprint": (["{merged}/consilience", "--fingerprint"], "--fingerprint"),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=list(WRONG))
def test_wrong_requests_are_one_line(
    merged: Path, wrong: tuple[list[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(merged.parent.rglob("*"))
    arguments = [a.format(merged=merged, out=merged.parent) for a in wrong[0]]
    assert run(["inspect", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert wrong[1].format(merged=merged) in said.err
    assert sorted(merged.parent.rglob("*")) == before


def test_damage_is_one_line_by_either_name(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (merged / "consilience" / "coefficients.json").write_text('{"format": 1}')
    for path in (merged, merged / "consilience", merged / "consilience" / "coefficients.safetensors"):
        assert run(["inspect", str(path)]) == 2
        assert "coefficients.json: experts: Field required" in capsys.readouterr().err


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "--help"]) == 0
    assert "Example: consilience inspect merged/consilience --plot" in capsys.readouterr().out
