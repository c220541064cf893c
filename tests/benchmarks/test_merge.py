"""The harness: what it would run, the reference it checks against, and the page it writes."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import floors, merge, mergekit_env, oracle, provenance, results, synthetic
from benchmarks.synthetic import SIZES


def test_the_floor_writes_as_much_as_one_input(tmp_path: Path) -> None:
    made = synthetic.generate(SIZES["tiny"], tmp_path / "set")
    out = tmp_path / "out"
    floors.main(["--fsync", str(out), *map(str, made.experts.values())])
    assert out.stat().st_size == (made.base / "model.safetensors").stat().st_size


def test_the_bare_loop_is_the_linear_reference(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from benchmarks import floor_torch

    made = synthetic.generate(SIZES["tiny"], tmp_path / "set")
    out = tmp_path / "out"
    out.mkdir()
    floor_torch.main(str(out / "model.safetensors"), *map(str, made.experts.values()))
    found = oracle.agreement("linear", out, made.base, list(made.experts.values()), {})
    assert not found.missing
    # Double rounding (fp32, then bf16) moves next to nothing.
    assert found.differing < 1e-3
    assert found.error == pytest.approx(found.rounding, rel=1e-3)


def test_ties_by_hand() -> None:
    base = np.zeros(4)
    experts = [np.array([4.0, -3.0, 1.0, 0.5]), np.array([2.0, 5.0, -1.0, 0.1]), np.array([-1.0, 0.5, 3.0, 2.0])]
    # Half kept: [4 -3 0 0], [2 5 0 0], [0 0 3 2]; signs + + + +; means of the agreeing entries.
    assert oracle.merged("ties", base, experts, {"density": 0.5, "weight": 0.3}).tolist() == [3.0, 5.0, 3.0, 2.0]


def test_slerp_of_perpendicular_vectors() -> None:
    middle = oracle.merged("slerp", np.array([1.0, 0.0]), [np.array([0.0, 1.0])], {"t": 0.5})
    assert middle == pytest.approx([0.5**0.5, 0.5**0.5])


def test_recipes_name_the_same_inputs() -> None:
    experts = {"a": Path("/models/a"), "b": Path("/models/b")}
    ties = mergekit_env.recipe("ties", Path("/models/base"), experts, {"weight": 0.3, "density": 0.5})
    assert "base_model: /models/base" in ties
    assert ties.count("weight: 0.3") == ties.count("density: 0.5") == 2
    linear = mergekit_env.recipe("linear", Path("/models/base"), experts, {"weight": 1.0})
    assert "/models/base" not in linear


def test_the_command_line_is_the_documented_one(tmp_path: Path) -> None:
    made = synthetic.SyntheticSet(SIZES["tiny"], tmp_path)
    command = list(map(str, merge.consilience_command(made, "slerp", tmp_path / "out", "--dry-run")))
    assert command[1:4] == ["merge", str(tmp_path / "base"), str(tmp_path / "out")]
    assert command[4:] == ["-e", f"a={tmp_path / 'a'}", "--method", "slerp", "--set", "t=0.5", "--dry-run"]


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        merge.parse(["--sizes", "3b"])
    assert "known are 0.5b, 1.5b, 7b" in capsys.readouterr().err


def test_a_page_survives_saving_and_missing_rows(tmp_path: Path) -> None:
    def row(tool: str, job: str, method: str, *seconds: float, failure: str = "") -> results.Row:
        many = (100.0,) * len(seconds)
        return results.Row(tool, job, "0.5b", method, seconds, seconds, many, (0.0,) * len(seconds), failure)

    made = results.Results(
        date="2026-01-02T03:04:05+00:00",
        machine=provenance.machine(tmp_path),
        versions={"python": "3.11"},
        settings={"repeat": "3"},
        parameters={"0.5b": 493_958_144},
        rows=(
            row("floor", "torch", "", 5.0, 6.0, 7.0),
            row("consilience", "merge", "linear", 3.0, 3.5, 2.5),
            row("consilience", "merge", "ties", 9.0),
            row("mergekit", "merge", "linear", 15.0),
            row("mergekit", "merge", "ties", failure="exit status 1: no"),
        ),
        checks=(results.Check("consilience", "linear", 0.05, 0.05, 0.0),),
    )
    path = results.save(made, tmp_path)
    assert results.load(path) == made
    text = (tmp_path / "merge.md").read_text(encoding="utf-8")
    assert "| linear | 3.00 (2.50-3.50) | 0.50 | <= 0.8, met | 15.00 | 5.00 |" in text
    assert "| ties | 9.00 | 1.50 | <= 1.2, missed | - | - |" in text
    assert "Failed: mergekit merge 0.5b ties (exit status 1: no)." in text
