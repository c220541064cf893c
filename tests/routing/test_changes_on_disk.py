"""Routed models on disk while they change: two runs at once, runs that were killed, files that were harmed."""

import fcntl
import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from routed_models import TFIDF, make_expert, recipe_of, write_adapter, write_zoo
from safetensors.torch import load_file, save_file
from tiny_models import make_llama

import consilience as cs
from consilience.__main__ import run
from consilience.errors import InputError, MachineError
from consilience.routing.folder import change as changes
from consilience.routing.folder import store
from consilience.routing.folder.change import add_expert, remove_expert
from consilience.routing.folder.store import read_description
from consilience.workdir import Workdir, foreign_files


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_zoo(tmp_path_factory.mktemp("changing"))


@pytest.fixture
def routed(zoo: Path, tmp_path: Path) -> Path:
    """A routed model of two experts with instructions."""
    recipe = recipe_of(zoo, ("e0", "e1"), routing={"local": "arrow", "scale": 3.0}, instructions=TFIDF)
    cs.build_routed(recipe, tmp_path / "routed")
    return tmp_path / "routed"


def ours(folder: Path) -> set[str]:
    place = folder / "consilience"
    return {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}


def add_e2(zoo: Path, folder: Path) -> None:
    add_expert(folder, "e2", zoo / "adapters/e2", data=zoo / "e2.jsonl")


def test_one_change_at_a_time(zoo: Path, routed: Path) -> None:
    before = ours(routed)
    descriptor = os.open(routed / "consilience", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        for change in (lambda: add_e2(zoo, routed), lambda: remove_expert(routed, "e1")):
            with pytest.raises(InputError, match="another run is changing it"):
                change()
    finally:
        os.close(descriptor)
    assert ours(routed) == before
    add_e2(zoo, routed)
    assert read_description(routed).experts == ("e0", "e1", "e2")


@pytest.mark.parametrize("step", ["write_instructions", "write_expert", "write_description"])
def test_a_full_disk_leaves_the_model_as_it_was(
    zoo: Path, routed: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, original = ours(routed), getattr(store, step)

    def full(*args: Any) -> None:
        original(*args) if step != "write_description" else None
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store, step, full)
        with pytest.raises(MachineError, match=r"routed: cannot be written .*No space left"):
            add_e2(zoo, routed)
    assert ours(routed) == before
    add_e2(zoo, routed)
    assert cs.load_routed(routed).routing.names == ("e0", "e1", "e2")


def test_what_a_killed_run_left_goes_with_the_next_change(zoo: Path, routed: Path) -> None:
    shutil.copytree(routed / "consilience/experts/e1", routed / "consilience/experts/gone")
    (routed / "consilience/instructions-0123456789abcdef.safetensors").write_bytes(b"old")
    (routed / "consilience/routing.json.new").write_text("{")
    kept = routed / "consilience/unfinished/later/state.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"hours of training")
    with pytest.raises(InputError, match="lies in the routed model itself; copy it elsewhere"):
        add_expert(routed, "again", routed / "consilience/experts/gone", data=zoo / "e1.jsonl")
    assert (routed / "consilience/experts/gone/adapter_config.json").is_file()
    add_e2(zoo, routed)
    remove_expert(routed, "e1")
    made = read_description(routed)
    assert kept.read_bytes() == b"hours of training"
    assert {path.name for path in (routed / "consilience/experts").iterdir()} == {"e0", "e2"}
    files = {path for path in ours(routed) if "/" not in path}
    assert files == {"routing.json", "files.json", str(made.tensors)}


def test_what_somebody_keeps_in_a_routed_model_outlives_changes_and_force(zoo: Path, routed: Path) -> None:
    place = routed / "consilience/experts"
    (place / "e1/notes.txt").write_text("mine")
    (place / "mine").mkdir()
    (place / "mine/thesis.txt").write_text("mine")
    config = place / "e0/adapter_config.json"
    config.write_text(config.read_text() + "\n")
    add_e2(zoo, routed)
    remove_expert(routed, "e1")
    theirs = ["consilience/experts/" + name for name in ("e0/adapter_config.json", "e1/notes.txt", "mine/thesis.txt")]
    assert foreign_files(routed) == theirs
    add_expert(routed, "e1", zoo / "adapters/e1", data=zoo / "e1.jsonl")
    assert foreign_files(routed) == theirs
    assert (place / "e1/notes.txt").read_text() == "mine"
    assert cs.load_routed(routed).routing.names == ("e0", "e2", "e1")


def test_what_a_killed_change_had_found_foreign_stays_so(
    zoo: Path, routed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = routed / "consilience/experts/e0/adapter_config.json"
    notes.write_text(notes.read_text() + "\n")
    with monkeypatch.context() as patch:
        patch.setattr(changes, "_finish", lambda folder, mark: None)  # killed before it
        add_e2(zoo, routed)
    assert (routed / "consilience/change.json").is_file()
    remove_expert(routed, "e1")
    assert foreign_files(routed) == ["consilience/experts/e0/adapter_config.json"]


def test_a_build_whose_adapters_changed_after_a_kill_is_done_again(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(zoo, tmp_path / "zoo")
    recipe, out = recipe_of(tmp_path / "zoo", ("e0", "e1")), tmp_path / "routed"

    def fall(self: Workdir) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Workdir, "remove", fall)
        with pytest.raises(KeyboardInterrupt):
            cs.build_routed(recipe, out)
    weights = tmp_path / "zoo/adapters/e0/adapter_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
    with pytest.raises(InputError, match="exists and is not empty"):
        cs.build_routed(recipe, out)
    cs.build_routed(recipe, out, force=True)
    assert (out / "consilience/experts/e0/adapter_model.safetensors").read_bytes() == weights.read_bytes()
    assert not list(tmp_path.glob("routed.*"))


def test_an_adapter_that_changes_during_a_build_is_named(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(zoo, tmp_path / "zoo")
    weights = tmp_path / "zoo/adapters/e0/adapter_model.safetensors"
    write = store.write_expert

    def changed(*arguments: Any) -> None:
        save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
        write(*arguments)

    monkeypatch.setattr(store, "write_expert", changed)
    with pytest.raises(InputError, match=r"adapter_model.safetensors: changed while it was being used"):
        cs.build_routed(recipe_of(tmp_path / "zoo", ("e0", "e1")), tmp_path / "routed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["zoo"]


@pytest.mark.parametrize("harm", ["rolled", "nan", "short"])
def test_instructions_that_were_harmed_are_refused(routed: Path, harm: str) -> None:
    path = routed / "consilience" / str(read_description(routed).tensors)
    if harm == "short":
        path.write_bytes(path.read_bytes()[:-4])
    else:
        tensors = load_file(path)
        tensors["experts"] = tensors["experts"].roll(1, 0) if harm == "rolled" else tensors["experts"] / 0
        save_file(tensors, path)
    with pytest.raises(InputError, match=rf"{path.name}: has changed since it was written"):
        cs.load_routed(routed)
    with pytest.raises(InputError, match="has changed since"):
        remove_expert(routed, "e1")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("records", []),
        ("records", {"gates": ["e0"]}),
        ("records", {"gates": {"e0": {}}}),
        ("instructions", []),
        ("instructions", {"experts": "e0"}),
        ("instructions", {"experts": [1, 2]}),
        ("instructions", {"experts": [{"name": "e1", "text": ""}, {"name": "e0", "text": ""}]}),
    ],
)
def test_a_harmed_description_is_refused_by_every_command(zoo: Path, routed: Path, key: str, value: Any) -> None:
    path = routed / "consilience/routing.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    for change in (lambda: add_e2(zoo, routed), lambda: remove_expert(routed, "e1"), lambda: cs.load_routed(routed)):
        with pytest.raises(InputError, match=rf"routing\.json: {key} are not"):
            change()


def test_a_vector_of_another_length_is_refused(routed: Path) -> None:
    path = routed / "consilience/experts/e1/vectors.safetensors"
    vectors = load_file(path)
    name = next(iter(vectors))
    save_file({**vectors, name: torch.ones(3)}, path)
    with pytest.raises(InputError, match=r"expert 'e1': .* arrow vector has 3 values and the layer \d+ inputs"):
        cs.load_routed(routed)


@pytest.mark.parametrize(
    "name", ["base", "own", "uniform", "routed", "collapsed", " ", " a", "a=b", "a/b", "..", "é" * 150]
)
def test_names_that_mean_something_else_are_refused(zoo: Path, routed: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="expert"):
        add_expert(routed, name, zoo / "adapters/e2", data=zoo / "e2.jsonl")
    recipe = recipe_of(zoo)
    recipe["models"][1]["name"] = name
    with pytest.raises(InputError):
        cs.build_routed(recipe, tmp_path / "out")
    assert read_description(routed).experts == ("e0", "e1")


def test_an_empty_instruction_is_refused(zoo: Path, routed: Path) -> None:
    with pytest.raises(InputError, match="instruction: is empty"):
        add_expert(routed, "e2", zoo / "adapters/e2", data=zoo / "e2.jsonl", instruction=" ")


def test_another_base_of_the_same_size_is_refused(zoo: Path, routed: Path, tmp_path: Path) -> None:
    other = shutil.copytree(zoo / "base", tmp_path / "tuned")
    weights = load_file(other / "model.safetensors")
    save_file({name: value * 1.5 for name, value in weights.items()}, other / "model.safetensors", {"format": "pt"})
    assert (other / "model.safetensors").stat().st_size == (zoo / "base/model.safetensors").stat().st_size
    with pytest.raises(InputError, match="is not the base"):
        cs.load_routed(routed, base=str(other))
    path = routed / "consilience/routing.json"
    value = json.loads(path.read_text())
    assert value["base"].pop("sampled")
    path.write_text(json.dumps(value))
    cs.load_routed(routed)


def test_inputs_in_the_place_of_the_result_are_refused(zoo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    rows = shutil.copyfile(zoo / "e0.jsonl", out / "e0.jsonl")
    recipe = recipe_of(zoo)
    recipe["models"][0]["data"] = {"train": str(rows)}
    with pytest.raises(InputError, match=r"holds the input .*e0\.jsonl"):
        cs.build_routed(recipe, out, force=True)
    (out / "recipe.yaml").write_text(json.dumps(recipe_of(zoo)))
    with pytest.raises(InputError, match=r"holds the input .*recipe\.yaml"):
        cs.build_routed(out / "recipe.yaml", out, force=True)
    assert {path.name for path in out.iterdir()} == {"e0.jsonl", "recipe.yaml"}


def test_wrong_input_on_the_second_try_costs_no_training(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {
        "routing": {"local": "phatgoose"},
        "gates": {"steps": 2, "batch_size": 2, "precision": "float32"},
    }
    recipe, asked = recipe_of(zoo, **changes), list[str]()
    rows = shutil.copyfile(zoo / "e2.jsonl", tmp_path / "e2.jsonl")
    recipe["models"][2]["data"] = {"train": str(rows)}
    from consilience.routing.local import gate_training

    original = gate_training.train_gates

    def interrupted(model: Any, name: str, *args: Any) -> Any:
        asked.append(name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return original(model, name, *args)

    monkeypatch.setattr(gate_training, "train_gates", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cs.build_routed(recipe, tmp_path / "out")
    saved = {path: path.read_bytes() for path in (tmp_path / "out.partial/gates").rglob("*") if path.is_file()}
    assert saved
    rows.rename(tmp_path / "away")
    with pytest.raises(InputError, match=r"e2\.jsonl"):
        cs.build_routed(recipe, tmp_path / "out")
    assert {path: path.read_bytes() for path in saved} == saved
    (tmp_path / "away").rename(rows)
    cs.build_routed(recipe, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_a_folder_that_a_killed_merge_had_only_begun_is_taken_over(zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial/consilience").mkdir(parents=True)
    cs.merge(zoo / "base", {"e0": zoo / "adapters/e0"}, tmp_path / "out", method="linear")
    assert not (tmp_path / "out.partial").exists()


def test_a_flag_of_another_layout_changes_nothing(zoo: Path, tmp_path: Path) -> None:
    """PEFT sets ``fan_in_fan_out`` by each layer's class, and routed layers are linear."""
    place = write_adapter(make_expert(make_llama(), "square", 4, targets=("q_proj",)), tmp_path / "square")
    recipe = recipe_of(zoo, ("e0",))
    recipe["models"].append({"model": str(place), "name": "square"})
    cs.build_routed(recipe, tmp_path / "plain")
    config = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps(config | {"fan_in_fan_out": True}))
    cs.build_routed(recipe, tmp_path / "out")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        one, two = (cs.load_routed(tmp_path / name)(input_ids=ids).logits for name in ("plain", "out"))
    assert torch.equal(one, two)


def test_others_may_read_what_was_built(routed: Path) -> None:
    found = {oct(path.stat().st_mode & 0o777) for path in (routed / "consilience").rglob("*") if path.is_file()}
    mask = os.umask(0)
    os.umask(mask)
    assert found == {oct(0o666 & ~mask)}


@pytest.mark.parametrize(
    ("device", "why"),
    [("foo", "torch knows none of this name"), ("meta", "torch cannot use it"), ("cuda:99", "torch cannot use it")],
)
def test_a_device_that_cannot_be_used_is_one_line(
    routed: Path, device: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["route", "generate", str(routed), "the cat", "--device", device]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"consilience: device = {device!r}: {why}")
    assert error.count("\n") == 1


def test_prompts_of_stdin_must_be_text(
    routed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for given, status in ((b"the cat\r\n\na mat\x0bof cats\n", 0), (b"the cat\xff\n", 2)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        assert run(["route", "generate", str(routed), "-", "--max-new-tokens", "1", "--json"]) == status
    said = capsys.readouterr()
    *answers, refusal = map(json.loads, said.out.splitlines())
    assert [answer["prompt"] for answer in answers] == ["the cat", "a mat\x0bof cats"]
    assert not refusal["ok"]
    assert said.err == "consilience: stdin: byte 7 is not UTF-8; convert the prompts to UTF-8\n"


def test_a_page_that_cannot_be_written_is_said_before_the_model_runs(
    routed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode, **_: mode != os.W_OK)
    assert run(["route", "explain", str(routed), "the cat", "--html", str(tmp_path / "page.html")]) == 2
    said = capsys.readouterr()
    assert "page.html: cannot be written; name another file" in said.err
    assert not said.out
