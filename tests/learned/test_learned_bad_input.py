"""Wrong data, settings and coefficients for learned methods: one line, exit status 2, nothing left behind.

Every case runs the command line's entry in process, in a copy of the models, and compares the whole folder before and
after. Failures of the machine keep OUT.partial, and the same command goes on from there.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_experts import (
    read_state,
    recipe_of,
    sentences,
    write_recipe,
    write_rows,
    write_state,
    write_tokenizer,
)

from consilience.__main__ import run
from consilience.api import learn, merge, merge_recipe
from consilience.coefficients import constant, load_coefficients, make_groups, save_coefficients
from consilience.errors import InputError
from consilience.progress import NullProgress

Recipe = dict[str, Any]


@pytest.fixture
def place(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the models to break, as the current folder."""
    shutil.copytree(zoo, tmp_path / "models")
    monkeypatch.chdir(tmp_path / "models")
    return tmp_path / "models"


def good(**keys: Any) -> Recipe:
    """A recipe of two experts, by relative paths, that learns for two steps."""
    parameters = {"steps": 2, "precision": "float32"} | keys.pop("parameters", {})
    return recipe_of(Path(), {"a": Path("a"), "lora": Path("lora")}, parameters=parameters, **keys)


def snapshot(place: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(place)): p.read_bytes() if p.is_file() else None for p in sorted(place.rglob("*"))}


def command(recipe: Recipe, *more: str) -> list[str]:
    write_recipe(Path("recipe.yaml"), recipe)
    return ["merge", "recipe.yaml", "made/out", "-q", "--threads", "1", *more]


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("consilience: ")
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def parameters(**values: Any) -> Callable[[], Recipe]:
    return lambda: good(parameters=values)


def rows(*lines: str) -> Callable[[], Recipe]:
    """Replace the second expert's calibration file."""

    def arrange() -> Recipe:
        Path("rows/lora.jsonl").write_text("".join(lines))
        return good()

    return arrange


def without_data() -> Recipe:
    recipe = good()
    del recipe["models"][1]["data"]
    return recipe


def without_calibration() -> Recipe:
    recipe = good()
    recipe["models"][1]["data"] = {"train": "rows/lora.jsonl"}
    return recipe


def without_rows() -> Recipe:
    Path("rows/lora.jsonl").unlink()
    return good()


def overlapping() -> Recipe:
    text = json.loads(Path("rows/a.jsonl").read_text().splitlines()[1])["prompt"]
    write_rows(Path("rows/test.jsonl"), [*sentences(50, 2), text.upper().replace(" ", "  ")])
    recipe = good()
    recipe["models"][0]["data"]["validation"] = "rows/test.jsonl"
    return recipe


def other_tokenizer() -> Recipe:
    write_tokenizer(Path("a"), [f"w{i}" for i in reversed(range(93))])
    return good()


def longer_template() -> Recipe:
    """The same ids, and then some: a prefix is not enough."""
    write_tokenizer(Path("a"))
    for folder, ending in (("base", ""), ("a", " w1")):
        text = "{% for m in messages %}{{ m['content'] }}{% endfor %}" + ending
        path = Path(folder) / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": text}))
    return good()


def broken_tokenizer() -> Recipe:
    Path("a/tokenizer_config.json").write_text("{")
    return good()


def no_tokenizer() -> Recipe:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        Path("base", name).unlink()
    return good()


def lone_files() -> Recipe:
    recipe = good(base_model="base/model.safetensors")
    recipe["models"] = [{"model": "a/model.safetensors", "data": recipe["models"][0]["data"]}]
    return recipe


def no_model_type() -> Recipe:
    for folder in ("base", "a"):
        Path(folder, "config.json").write_text('{"model_type": "none"}')
    return good()


def nan_in_an_expert() -> Recipe:
    state = read_state(Path("a"))
    state["model.norm.weight"][3] = torch.nan
    write_state(Path("a"), state)
    return good()


def image_rows() -> Recipe:
    write_rows(Path("rows/lora.jsonl"), [{"prompt": "w1 w2", "image": "cat.png"}])
    return good()


def messages_without_a_template() -> Recipe:
    write_rows(Path("rows/lora.jsonl"), [{"messages": [{"role": "user", "content": "w1"}]}])
    return good()


def filtered() -> Recipe:
    return good(parameters={"gamma": [{"filter": "mlp", "value": 1.0}, {"value": 2.0}]})


def gradient() -> Recipe:
    return good(parameters={"alphabar": [0.1, 0.3]})


def own_shared_parameter() -> Recipe:
    recipe = good()
    recipe["models"][0]["parameters"] = {"gamma": 1.0}
    return recipe


def found(change: Callable[[Path], Any] | None = None, experts: tuple[str, ...] = ("a", "lora")) -> Path:
    """Coefficients for the base's tensors."""
    sizes = [(name, value.numel()) for name, value in read_state(Path("base")).items()]
    path = Path("found")
    save_coefficients(path, constant(experts, make_groups(sizes, "block"), [0.2] * len(experts)))
    if change is not None:
        change(path)
    return path


def applying(change: Callable[[Path], Any] | None = None, **more: Any) -> Callable[[], Recipe]:
    def arrange() -> Recipe:
        found(change, **more)
        return good(merge_method="coefficients", parameters={}, coefficients="found") | {"parameters": {}}

    return arrange


def document(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def edit(path: Path) -> None:
        value = json.loads((path / "coefficients.json").read_text())
        change(value)
        (path / "coefficients.json").write_text(json.dumps(value))

    return edit


def of_another_architecture(value: dict[str, Any]) -> None:
    value["groups"][0]["tensors"][0][1] += 1


def of_other_tensors(value: dict[str, Any]) -> None:
    value["groups"][0]["tensors"][0][0] = "lm_heed.weight"


def cut(path: Path) -> None:
    file = path / "coefficients.safetensors"
    file.write_bytes(file.read_bytes()[:-3])


def not_finite(path: Path) -> None:
    file = path / "coefficients.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-8] + np.array([np.nan]).tobytes())


def for_ties() -> Recipe:
    return applying()() | {"merge_method": "ties"}


def private() -> Recipe:
    return applying()() | {"private": ["lm_head*"]}


def no_key() -> Recipe:
    return {k: v for k, v in applying()().items() if k != "coefficients"}


#: What is arranged, and what the line must say.
CASES: dict[str, tuple[Callable[[], Recipe], tuple[str, ...]]] = {
    "no data": (without_data, ("recipe.yaml", "lora", "calibration")),
    "no calibration": (without_calibration, ("recipe.yaml", "lora", "calibration")),
    "no file": (without_rows, ("rows/lora.jsonl", "no such file")),
    "empty file": (rows(""), ("rows/lora.jsonl", "no rows")),
    "malformed row": (rows('{"prompt": "w1"}\n', '{"prompt": \n'), ("rows/lora.jsonl:2", "JSON")),
    "unknown key in a row": (rows('{"promt": "w1"}\n'), ("rows/lora.jsonl:1", "promt")),
    "blank row": (rows('{"prompt": "w1"}\n', "\n", '{"prompt": "w1"}\n'), ("rows/lora.jsonl:2", "blank")),
    "overlap with validation": (overlapping, ("rows/a.jsonl", "1 of 5", "rows/test.jsonl", "line 2")),
    "other tokenizer": (other_tokenizer, ("token id 3", "'w92' in a", "'w0' in base", "lm_head.weight")),
    "longer chat template": (longer_template, ("a", "tokenizer", "rows/a.jsonl:1")),
    "broken tokenizer": (broken_tokenizer, ("a", "tokenizer")),
    "no tokenizer": (no_tokenizer, ("base", "tokenizer")),
    "base not a folder": (lone_files, ("base/model.safetensors", "folder")),
    "unknown architecture": (no_model_type, ("base", "does not load")),
    "NaN in an expert": (nan_in_an_expert, ("a", "model.norm.weight", "1 of its 16", "NaN")),
    "messages without a template": (messages_without_a_template, ("rows/lora.jsonl:1", "chat template")),
    "an image for a language model": (image_rows, ("image",)),
    "no such block": (parameters(hidden_layers=9), ("hidden_layers", "9", "1 to 2")),
    "block 0": (parameters(hidden_layers=[1, 0]), ("hidden_layers", "1 to 2")),
    "no number": (parameters(hidden_layers=["last"]), ("hidden_layers", "last")),
    "all weights zero": (parameters(logit_weight=0, hidden_weight=0), ("logit_weight", "0")),
    "no labels": (parameters(target_weight=1), ("target_weight", "response")),
    "sigmoid above 1": (parameters(coefficients="sigmoid", alphabar=1.5), ("alphabar", "sigmoid", "1.5")),
    "softplus of 0": (parameters(coefficients="softplus", alphabar=0), ("alphabar", "softplus")),
    "everything excluded": (parameters(exclude=["*"]), ("exclude", "nothing to learn")),
    "bad exclude": (parameters(exclude=["re:("]), ("exclude", "regular expression")),
    "bad grouping": (parameters(grouping="re:("), ("grouping", "regular expression")),
    "unknown grouping": (parameters(grouping="layer"), ("grouping", "layer")),
    "filters": (filtered, ("gamma", "same for all tensors")),
    "gradient over depth": (gradient, ("alphabar", "same for all tensors")),
    "shared parameter on a model": (own_shared_parameter, ("gamma", "shared")),
    "unknown parameter": (parameters(gama=1), ("gama", "'gamma'")),
    "unknown preset": (parameters(preset="internvl"), ("preset", "internvl2.5")),
    "negative weight": (parameters(beta=-1), ("beta",)),
    "no number of steps": (parameters(steps=2.5), ("steps", "whole number")),
    "too large steps": (
        parameters(learning_rate=1e30, optimizer="sgd", steps=3, gamma=0, schedule="constant"),
        ("not finite",),
    ),
    "coefficients of other experts": (applying(experts=("a", "b")), ("found", "'b'")),
    "coefficients of fewer experts": (applying(experts=("a",)), ("lora", "found")),
    "coefficients of another architecture": (applying(document(of_another_architecture)), ("found", "architecture")),
    "coefficients of other tensors": (applying(document(of_other_tensors)), ("lm_heed", "'lm_head.weight'")),
    "cut coefficients": (applying(cut), ("coefficients.safetensors",)),
    "coefficients that are not finite": (applying(not_finite), ("coefficients.safetensors", "NaN")),
    "coefficients without their papers": (
        applying(lambda path: (path / "coefficients.json").unlink()),
        ("coefficients.json",),
    ),
    "coefficients of nothing": (applying(lambda path: shutil.rmtree(path)), ("found",)),
    "no coefficients key": (no_key, ("coefficients", "recipe.yaml")),
    "coefficients for another method": (for_ties, ("coefficients", "ties")),
    "coefficients of a private tensor": (private, ("private", "lm_head.weight")),
}


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_is_one_line_and_leaves_nothing(place: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    arrange, says = CASES[name]
    arguments = command(arrange())
    before = snapshot(place)
    assert run(arguments) == 2
    message = complaint(capsys)
    assert [part for part in says if part not in message] == [], message
    assert snapshot(place) == before


def test_the_good_recipe_is_good(place: Path) -> None:
    """Else the table would prove nothing."""
    before = snapshot(place)
    assert run(command(good())) == 0
    assert {k.split("/")[0] for k in snapshot(place).keys() - before.keys()} == {"made", "recipe.yaml"}
    assert sorted(p.name for p in Path("made").iterdir()) == ["out"]
    assert run(["merge", "recipe.yaml", "dry", "--dry-run"]) == 0
    assert not Path("dry").exists()


def test_calibration_of_an_unknown_expert(place: Path) -> None:
    before = snapshot(place)
    with pytest.raises(InputError, match=r"'lore'.*'lora'"):
        merge("base", {"lora": "lora"}, "out", method="expert_merging", calibration={"lore": "rows/lora.jsonl"})
    assert snapshot(place) == before


def test_state_dicts_cannot_be_run(place: Path) -> None:
    states = [dict(read_state(Path(name))) for name in ("base", "a")]
    with pytest.raises(InputError, match="needs folders"):
        merge(states[0], {"a": states[1]}, method="expert_merging")


def test_learning_nothing(place: Path) -> None:
    with pytest.raises(InputError, match="learns nothing"):
        learn(write_recipe(Path("recipe.yaml"), good(merge_method="ties") | {"parameters": {}}))


def test_an_occupied_out_is_known_before_any_work(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = command(good())
    Path("made/out").mkdir(parents=True)
    Path("made/out/thesis.txt").write_text("years of work")
    before = snapshot(place)
    assert run(arguments) == 2
    assert "made/out" in complaint(capsys)
    assert snapshot(place) == before


def test_another_run_in_the_same_place_is_left_alone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = command(good())
    ours = Path("made/out.partial")
    (ours / "learning").mkdir(parents=True)
    (ours / "work.json").write_text('{"format": 1, "digest": "another"}')
    (ours / "learning" / "state.safetensors").write_text("hours of work")
    before = snapshot(place)
    descriptor = os.open("made/out.partial", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert run(arguments) == 2
    assert "another run" in complaint(capsys)
    assert snapshot(place) == before
    os.close(descriptor)


# ----------------------------------------------------------------------------------------------------------------------
# Failures of the machine.


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def failing_after(calls: int, real: Callable[..., Any], error: type[BaseException] | None = None) -> Callable[..., Any]:
    """A function that works so many times and then fails, as on a full disk or as ``error``."""
    left = [calls]

    def write(*arguments: Any, **more: Any) -> Any:
        if not left[0]:
            if error is not None:
                raise error("cannot allocate")
            full_disk()
        left[0] -= 1
        return real(*arguments, **more)

    return write


def same_as_undisturbed(recipe: Recipe) -> None:
    merge_recipe(write_recipe(Path("recipe.yaml"), recipe), "expected", threads=1)
    for name in ("model.safetensors", "consilience/coefficients.safetensors"):
        assert Path("made/out", name).read_bytes() == Path("expected", name).read_bytes()
    assert sorted(p.name for p in Path("made").iterdir()) == ["out"]


STATE = "consilience.learned.loop.write_file"
ANSWERS = "consilience.student.teachers.write_file"


@pytest.mark.parametrize(("what", "calls"), [(STATE, 0), (STATE, 2), (ANSWERS, 0), (ANSWERS, 1)])
def test_a_full_disk_keeps_what_was_done(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str, calls: int
) -> None:
    from consilience.workdir import write_file

    monkeypatch.setattr("consilience.learned.loop.SAVE_EVERY", -1.0)
    recipe = good(parameters={"steps": 4, "hidden_layers": ["1", "2"]})
    with monkeypatch.context() as patch:
        patch.setattr(what, failing_after(calls, write_file))
        assert run(command(recipe)) == 1
    message = complaint(capsys)
    assert os.strerror(errno.ENOSPC) in message
    assert "run the same command again" in message
    assert not Path("made/out").exists()
    kept = [p.name for p in Path("made/out.partial").rglob("*.safetensors")]
    assert len(kept) == (calls if what == ANSWERS else 2 + (calls > 0))
    assert not list(Path("made/out.partial").glob("*.safetensors"))
    assert run(command(recipe)) == 0
    same_as_undisturbed(recipe)


def test_a_full_disk_while_merging_keeps_what_was_learned(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = good()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing_after(3, os.pwrite))
        assert run(command(recipe)) == 1
    complaint(capsys)
    state = Path("made/out.partial/learning/state.safetensors")
    when = state.stat().st_mtime_ns
    seen: dict[str, list[int]] = {}

    class Steps(NullProgress):
        def phase(self, title: str, total: int | None = None, unit: str = "steps") -> None:
            self.title = title

        def advance(self, count: int = 1, text: str = "", /, **figures: float) -> None:
            seen.setdefault(self.title, []).extend([count] if count else [])

    learn(Path("recipe.yaml"), Path("made/out"), threads=1, progress=Steps())
    assert seen["learning"] == [2]  # both steps at once: they were done before
    assert state.stat().st_mtime_ns == when
    assert run(command(recipe)) == 0
    same_as_undisturbed(recipe)


def test_out_of_memory_says_what_takes_less(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from consilience.learned.problem import Problem

    evaluate: Any = Problem.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(Problem, "evaluate", failing_after(1, evaluate, MemoryError))
        assert run(command(good())) == 1
    message = complaint(capsys)
    assert "batch_tokens" in message
    assert Path("made/out.partial").is_dir()
    assert run(command(good())) == 0


def test_an_interrupt_keeps_the_state(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from consilience.learned.problem import Problem

    monkeypatch.setattr("consilience.learned.loop.SAVE_EVERY", -1.0)
    evaluate: Any = Problem.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(Problem, "evaluate", failing_after(1, evaluate, KeyboardInterrupt))
        assert run(command(good())) == 130
    assert "interrupted" in complaint(capsys)
    assert Path("made/out.partial/learning/state.safetensors").is_file()
    assert run(command(good())) == 0
    same_as_undisturbed(good())


# ----------------------------------------------------------------------------------------------------------------------
# What was changed between an interrupted run and its rerun.


def test_other_coefficients_do_not_continue_a_merge_of_the_first(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same values cut at other places are other bytes, though every list of values is the same."""
    monkeypatch.setattr("consilience.engine.plan.SEGMENT", 64)
    sizes = [(name, value.numel()) for name, value in read_state(Path("base")).items()]
    recipe = write_recipe(Path("recipe.yaml"), applying()())
    for number, names in enumerate((sizes, sizes[:-1])):  # the last tensor's absence moves every chunk
        groups = make_groups(names, "global", lambda name: 3)
        made = constant(("a", "lora"), groups, [0.2, 0.2])
        save_coefficients(Path("found"), made.with_alpha(np.arange(6.0).reshape(2, 3) / 10))
        if number == 0:
            with monkeypatch.context() as patch:
                patch.setattr(os, "pwrite", failing_after(60, os.pwrite))
                assert run(["merge", "recipe.yaml", "out", "-q", "--threads", "1"]) == 1
    assert run(["merge", "recipe.yaml", "out", "-q", "--threads", "1"]) == 0
    merge_recipe(recipe, "expected")
    assert Path("out/model.safetensors").read_bytes() == Path("expected/model.safetensors").read_bytes()


def test_a_changed_adapter_config_is_learned_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = good(parameters={"steps": 3, "alphabar": 0.1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing_after(3, os.pwrite))
        assert run(command(recipe)) == 1
    path = Path("lora/adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 1}))
    assert run(command(recipe)) == 0
    same_as_undisturbed(recipe)


def test_the_facts_beside_the_coefficients_say_where_they_come_from(place: Path) -> None:
    assert run(command(good(seed=4))) == 0
    facts = load_coefficients(Path("made/out")).facts
    assert facts["method"] == "expert_merging"
    assert facts["seed"] == 4
    assert facts["steps"] == 2
    assert [facts["calibration"][name]["rows"] for name in ("a", "lora")] == [5, 5]
    assert len(facts["history"]) == 2
