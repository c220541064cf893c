"""``--sweep``: every point of the grid is the merge that its values give alone; finished ones stay; scores are true."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import consilience as cs
from consilience.__main__ import run
from tests.learned.tiny_experts import read_state, sentences, write_adapter, write_base, write_expert, write_rows

Folder = Path


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """Three small models and a recipe, in the current folder."""
    rng = np.random.default_rng(0)
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        arrays = {f"layers.{i}.w": rng.standard_normal((6, 6)).astype(np.float32) for i in range(3)}
        save_file(arrays, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"model_type": "toy"}')
    (tmp_path / "r.yaml").write_text(
        "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: a, parameters: {weight: 0.3}}, {model: b}]\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights(folder: Path) -> dict[str, Any]:
    return {n: v.astype(np.float64) for n, v in load_file(folder / "model.safetensors").items()}


def merged(a: float, b: float) -> dict[str, Any]:
    base, one, two = (weights(Path(name)) for name in ("base", "a", "b"))
    return {n: v + a * (one[n] - v) + b * (two[n] - v) for n, v in base.items()}


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_grid_is_all_merges_of_its_values(toy: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["merge", "r.yaml", "sw", "--sweep", "weight=0.2,0.4", "--sweep", "lambda=1,-0.5"]) == 0
    said = capsys.readouterr()
    names = [
        "01-weight=0.2-lambda=1",
        "02-weight=0.2-lambda=-0.5",
        "03-weight=0.4-lambda=1",
        "04-weight=0.4-lambda=-0.5",
    ]
    assert sorted(path.name for path in Path("sw").iterdir()) == sorted([*names, "results.json"])
    for name, (weight, scale) in zip(names, [(0.2, 1), (0.2, -0.5), (0.4, 1), (0.4, -0.5)], strict=True):
        for tensor, value in merged(scale * weight, scale * weight).items():
            np.testing.assert_allclose(weights(Path("sw") / name)[tensor], value, rtol=1e-5, atol=1e-5)
        lineage = json.loads((Path("sw") / name / "consilience/lineage.json").read_text())
        assert [one["option"] for one in lineage["overrides"]][:1] == [f"--sweep weight={weight:g}"]
        assert name in said.out
        assert f"{name}: merging" in said.err
    results = json.loads(Path("sw/results.json").read_text())
    assert [point["values"] for point in results["points"]][1] == {"weight": 0.2, "lambda": -0.5}
    assert results["best"] is None


def test_values_of_one_expert_gradients_methods_and_seeds(toy: Folder) -> None:
    result = cs.sweep("r.yaml", "sw", {"method": ["linear", "task_arithmetic"], "a.weight": [[0.0, 1.0], 0.5]})
    second = Path("sw") / result.points[3].name
    for tensor, value in merged(0.5, 1.0).items():
        np.testing.assert_allclose(weights(second)[tensor], value, rtol=1e-5, atol=1e-5)
    third = weights(Path("sw") / result.points[2].name)
    np.testing.assert_allclose(third["layers.1.w"], merged(0.5, 1.0)["layers.1.w"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(third["layers.0.w"], merged(0.0, 1.0)["layers.0.w"], rtol=1e-5, atol=1e-5)
    seeds = cs.sweep({"method": "dare_linear", "base_model": "base", "models": [{"model": "a"}],
                      "parameters": {"density": 0.5}}, "seeds", {"seed": [0, 1]})  # fmt: skip
    one, two = (weights(Path("seeds") / point.name) for point in seeds.points)
    assert any((one[name] != two[name]).any() for name in one)


def test_a_rerun_keeps_what_is_finished_and_continues(toy: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["merge", "r.yaml", "sw", "--sweep", "weight=0.2,0.4"]
    assert run(words) == 0
    first = snapshot(Path("sw/01-weight=0.2"))
    for path in sorted(Path("sw/02-weight=0.4").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    Path("sw/02-weight=0.4").rmdir()
    capsys.readouterr()
    assert run([*words[:-1], "weight=0.2,0.4,0.6"]) == 0  # longer at its end: the first two stay what they were
    said = capsys.readouterr().err
    assert "01-weight=0.2: is there already" in said
    assert "02-weight=0.4: merging" in said
    assert snapshot(Path("sw/01-weight=0.2")) == first
    for tensor, value in merged(0.6, 0.6).items():
        np.testing.assert_allclose(weights(Path("sw/03-weight=0.6"))[tensor], value, rtol=1e-5, atol=1e-5)


def test_merges_of_changed_inputs_are_not_taken_for_finished(toy: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["merge", "r.yaml", "sw", "--sweep", "weight=0.2,0.4", "-q"]
    assert run(words) == 0
    before = snapshot(Path("sw"))
    save_file({n: v.astype(np.float32) + 1 for n, v in weights(Path("a")).items()}, "a/model.safetensors")
    assert run(words) == 2
    assert "not what this sweep would merge now" in capsys.readouterr().err
    assert snapshot(Path("sw")) == before
    assert run([*words, "--force"]) == 0
    for tensor, value in merged(0.4, 0.4).items():
        np.testing.assert_allclose(weights(Path("sw/02-weight=0.4"))[tensor], value, rtol=1e-5, atol=1e-5)
    assert run(words) == 0  # and now they are finished


def test_a_forced_sweep_that_stopped_before_its_first_merge_is_not_finished(
    toy: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands there is still the old merge, though the list of results names the new work."""
    words = ["merge", "r.yaml", "sw", "--sweep", "weight=0.2", "-q"]
    assert run(words) == 0
    save_file({n: v.astype(np.float32) + 1 for n, v in weights(Path("a")).items()}, "a/model.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr("consilience.sweeps.merge_recipe", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run([*words, "--force"]) == 130
    assert run(words) == 2
    assert run([*words, "--force"]) == 0
    for tensor, value in merged(0.2, 0.2).items():
        np.testing.assert_allclose(weights(Path("sw/01-weight=0.2"))[tensor], value, rtol=1e-5, atol=1e-5)


def test_a_dry_run_lists_the_points_and_touches_nothing(toy: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(toy)
    assert run(["merge", "r.yaml", "sw", "--sweep", "weight=0.2,0.4", "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [point["name"] for point in found["points"]] == ["01-weight=0.2", "02-weight=0.4"]
    assert found["bytes_written"] == sum(point["bytes_written"] for point in found["points"]) >= 2 * 3 * 36 * 4
    assert run(["merge", "r.yaml", "sw", "--sweep", "weight=0.2,0.4", "--dry-run"]) == 0
    assert "sw/02-weight=0.4" in capsys.readouterr().out
    assert snapshot(toy) == before


def test_a_grid_of_options_and_of_files(toy: Folder) -> None:
    words = ["merge", "base/model.safetensors", "sw", "-e", "a/model.safetensors", "-e", "b/model.safetensors"]
    assert run([*words, "--sweep", "weight=0.2,0.4", "--set", "b.weight=0.7", "-q"]) == 0
    found = load_file("sw/01-weight=0.2.safetensors")
    # What --set gives one expert wins over a value for all, as it does beside a recipe.
    for tensor, value in merged(0.2, 0.7).items():
        np.testing.assert_allclose(found[tensor], value, rtol=1e-5, atol=1e-5)
    assert run([*words, "--sweep", "weight=0.2,0.4", "--set", "b.weight=0.7", "-q"]) == 0


def test_what_is_set_for_one_expert_stays_where_a_value_for_all_is_swept(toy: Folder) -> None:
    assert run(["merge", "r.yaml", "sw", "--sweep", "weight=0.2,0.4", "--set", "a.weight=0.7", "-q"]) == 0
    for name, weight in (("01-weight=0.2", 0.2), ("02-weight=0.4", 0.4)):
        for tensor, value in merged(0.7, weight).items():
            np.testing.assert_allclose(weights(Path("sw") / name)[tensor], value, rtol=1e-5, atol=1e-5)
    # The recipe's own 0.3 is replaced, as by --set.
    assert run(["merge", "r.yaml", "plain", "--sweep", "weight=0.2", "-q"]) == 0
    for tensor, value in merged(0.2, 0.2).items():
        np.testing.assert_allclose(weights(Path("plain/01-weight=0.2"))[tensor], value, rtol=1e-5, atol=1e-5)


def test_values_that_are_close_are_two_points_and_are_shown_in_full(toy: Folder) -> None:
    assert run(["merge", "r.yaml", "sw", "--sweep", "weight=0.1234567,0.1234568", "-q"]) == 0
    assert run(["merge", "r.yaml", "seeds", "--sweep", "seed=1234567,1234568", "-q"]) == 0
    assert sorted(path.name for path in Path("sw").glob("0*")) == ["01-weight=0.1234567", "02-weight=0.1234568"]
    assert sorted(path.name for path in Path("seeds").glob("0*")) == ["01-seed=1234567", "02-seed=1234568"]


def test_numpy_s_numbers_are_swept_as_python_s(toy: Folder) -> None:
    grid: dict[str, Any] = {"weight": np.linspace(0.25, 0.5, 2), "seed": [np.int64(3)]}
    found = cs.sweep("r.yaml", "sw", grid)
    assert [point.values for point in found.points] == [{"weight": 0.25, "seed": 3}, {"weight": 0.5, "seed": 3}]
    for tensor, value in merged(0.5, 0.5).items():
        np.testing.assert_allclose(weights(Path("sw/02-weight=0.5-seed=3"))[tensor], value, rtol=1e-5, atol=1e-5)


WRONG: list[tuple[list[str], list[str]]] = [
    (["--sweep", "wieght=0.1,0.2"], ["--sweep wieght=0.1", "'weight'"]),
    (["--sweep", "weight=0.1,much"], ["--sweep weight=much", "number"]),
    (["--sweep", "weight=0.1,0.1"], ["weight", "twice"]),
    (["--sweep", "weight"], ["--sweep", "KEY=VALUE"]),
    (["--sweep", "weight=[0.1"], ["--sweep weight", "YAML"]),
    (["--sweep", "weight=0.1", "--sweep", "weight=0.2"], ["weight", "twice"]),
    (["--sweep", "weight=0.1", "--set", "weight=0.2"], ["weight", "--set"]),
    (["--sweep", "method=ties,tise"], ["method=tise", "'ties'"]),
    (["--sweep", "density=0.1,0.2"], ["density", "no effect"]),
    (["--sweep", "seed=0,-1"], ["seed=-1"]),
    (["--sweep", "weight=" + ",".join(map(str, range(1001)))], ["1001", "1000"]),
    # Counted before they are listed: 10^24 points would fill the memory.
    ([w for k in "abcdefgh" for w in ("--sweep", f"{k}=" + ",".join(map(str, range(1000))))], [str(10**24), "1000"]),
    (["--sweep", "dtype=float16", "--dtype", "bfloat16"], ["--sweep dtype", "--dtype"]),
    (["--sweep", "method=linear", "--method", "ties"], ["--sweep method", "--method"]),
    (["--sweep", "seed=1,2", "--seed", "3"], ["--sweep seed", "--seed"]),
    (["--sweep", "weight=1,2", "--set", "a.weight=3", "--set", "b.weight=4"], ["--sweep weight=1", "changes nothing"]),
    (["--sweep", "weight=0.1", "--tensorboard", "log"], ["--tensorboard"]),
    (["--sweep", "weight=0.1", "--tasks", "gone.jsonl"], ["gone.jsonl"]),
    (["--sweep", "weight=0.1", "--max-examples", "3"], ["--max-examples", "--tasks"]),
    (["--sweep", "weight=0.1", "--device", "cuda"], ["--device", "no effect"]),
    (["--tasks", "gone.jsonl"], ["--tasks", "--sweep"]),
]


@pytest.mark.parametrize(("words", "says"), WRONG, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_refused_before_any_work(
    toy: Folder, words: list[str], says: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(toy)
    assert run(["merge", "r.yaml", "new/sw", *words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert [word for word in says if word not in said.err] == []
    assert snapshot(toy) == before
    assert not Path("new").exists()


def test_nothing_is_left_where_the_first_merge_fails(toy: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = load_file("a/model.safetensors")
    arrays["layers.0.w"][0, 0] = np.nan
    save_file(arrays, "a/model.safetensors")
    assert run(["merge", "r.yaml", "new/sw", "--sweep", "weight=0.2,0.4"]) == 2
    assert "NaN" in capsys.readouterr().err
    assert not Path("new").exists()


def test_what_stands_at_out_is_refused(toy: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    (toy / "mine").mkdir()
    (toy / "mine/thesis.txt").write_text("mine")
    for place, words in (("base", "holds the input"), ("mine", "no sweep is in it"), ("r.yaml", "r.yaml")):
        assert run(["merge", "r.yaml", place, "--sweep", "weight=0.2", "--force"]) == 2
        assert words in capsys.readouterr().err
    assert run(["merge", "r.yaml", "sw", "--sweep", "weight=0.2", "-q"]) == 0
    assert run(["merge", "r.yaml", "sw", "--sweep", "weight=0.5", "-q"]) == 2
    assert "of another sweep" in capsys.readouterr().err


def test_scores_are_those_of_evaluate_and_the_best_is_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONSILIENCE_CACHE", str(tmp_path / "cache"))
    base = write_base(Path("base"))
    write_expert(Path("a"), base, 1, scale=0.5)
    write_rows(Path("one.jsonl"), [{"text": text} for text in sentences(1, 6)])
    write_rows(Path("two.jsonl"), [{"text": text} for text in sentences(2, 6)])
    words = ["merge", "base", "sw", "-e", "a", "--sweep", "weight=0.001,0.5,1.5"]
    assert run([*words, "--tasks", "one=one.jsonl", "--tasks", "two=two.jsonl"]) == 0
    lines = capsys.readouterr().out.splitlines()
    losses: dict[str, float] = {}
    for name in ("01-weight=0.001", "02-weight=0.5", "03-weight=1.5"):
        found = cs.evaluate(f"sw/{name}", ["one=one.jsonl", "two=two.jsonl"], cache=False, progress=False)
        values = [result.loss.value for result in found.results if result.loss is not None]
        losses[name] = sum(values) / 2
        (row,) = (line for line in lines if f" {name} " in line)
        assert row.split()[-3:] == [f"{value:.4f}" for value in (*values, losses[name])]
        assert row.startswith("*") is (
            losses[name] == min(losses.values()) and name == min(losses, key=lambda n: losses[n])
        )
    results = json.loads(Path("sw/results.json").read_text())
    assert results["best"] == min(losses, key=lambda name: losses[name])
    assert results["metric"] == "loss"
    assert results["points"][1]["scores"]["two"]["loss"] == pytest.approx(
        2 * losses["02-weight=0.5"] - results["points"][1]["scores"]["one"]["loss"]
    )


def test_adapters_are_swept_as_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = write_base(Path("base"))
    for seed, name in ((1, "a"), (2, "b")):
        write_adapter(Path(name), base, seed)
    result = cs.sweep({"method": "task_arithmetic", "base_model": "base", "models": [{"model": "a"}, {"model": "b"}]},
                      "sw", {"a.weight": [0.5, 2.0]}, as_adapter="cat")  # fmt: skip
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    a, b = (read_state(Path(name)) for name in ("a", "b"))
    for point, weight in zip(result.points, (0.5, 2.0), strict=True):
        config = json.loads((Path("sw") / point.name / "adapter_config.json").read_text())
        found = read_state(Path("sw") / point.name)
        scale = config["lora_alpha"] / config["r"]
        update = scale * found[f"{stem}.lora_B.weight"].double() @ found[f"{stem}.lora_A.weight"].double()
        one, two = (2 * one[f"{stem}.lora_B.weight"].double() @ one[f"{stem}.lora_A.weight"].double() for one in (a, b))
        np.testing.assert_allclose(update, weight * one + two, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_train_prints_its_record_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_base(Path("base"))
    write_rows(Path("rows.jsonl"), [{"prompt": text, "response": "w1"} for text in sentences(1, 6)])
    words = ["train", "base", "out", "rows.jsonl", "--steps", "2", "--learning-rate", "1e-3", "--json"]
    assert run(words) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["ok"], record["out"], record["steps"]) == (True, "out", 2)
    assert record["final_loss"] == json.loads(next(Path("out").rglob("training.json")).read_text())["final_loss"]


def test_python_s_errors_name_its_arguments(toy: Folder) -> None:
    wrong: list[tuple[Any, str]] = [
        ({}, "grid: names no values"), ({"weight": []}, "grid weight"), ({"wieght": [1]}, "wieght=1"),
        ([1, 2], "grid: is a list"), ({3: [1]}, "key 3 is a int"),
    ]  # fmt: skip
    for grid, words in wrong:
        with pytest.raises(cs.InputError, match=words):
            cs.sweep("r.yaml", "sw", grid)
