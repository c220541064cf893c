"""A routed model on disk: built from a recipe, loaded, changed, and refused where it is damaged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from routed_models import TFIDF, linears, make_experts, recipe_of, write_adapter, write_zoo
from tiny_models import make_llama

import consilience as cs
from consilience.__main__ import run
from consilience.errors import InputError
from consilience.routing.folder.change import add_expert, remove_expert
from consilience.routing.folder.store import Base, Description, read_description
from consilience.routing.settings import Settings

IDS = torch.tensor([[5, 9, 40, 77, 120, 33]])


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_zoo(tmp_path_factory.mktemp("routed"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def files(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    listed = json.loads(found["consilience/files.json"])
    states = {name: (size, content) for name, (size, _time, content) in listed["files"].items()}
    return found | {"consilience/files.json": repr(states).encode()}


def test_what_is_loaded_is_what_was_given(zoo: Path, tmp_path: Path) -> None:
    cs.build_routed(recipe_of(zoo), tmp_path / "out")
    model = cs.load_routed(tmp_path / "out")
    assert model.routing.names == ("e0", "e1", "e2")
    expected = {expert.name: expert for expert in make_experts(make_llama())}
    for expert in model.routing.experts:
        assert expert.factors.keys() == expected[expert.name].factors.keys()
        for module, one in expert.factors.items():
            other = expected[expert.name].factors[module]
            assert torch.equal(one.b @ one.a, other.b @ other.a)
            assert torch.equal(expert.vectors["arrow"][module], expected[expert.name].vectors["arrow"][module])
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_peft_reads_the_experts_of_the_folder(zoo: Path, tmp_path: Path) -> None:
    import peft

    cs.build_routed(recipe_of(zoo), tmp_path / "out")
    routed, plain = cs.load_routed(tmp_path / "out"), make_llama()
    adapted: Any = peft.PeftModel.from_pretrained(plain, str(tmp_path / "out/consilience/experts/e1"))
    with routed.routing.only("e1"):
        assert torch.allclose(logits(routed), logits(adapted), atol=1e-4, rtol=1e-4)


def test_gates_are_trained_and_instructions_made(zoo: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "routing": {"local": "phatgoose", "scale": 20.0, "top_k": 1},
        "gates": {"steps": 3, "batch_size": 2, "precision": "float32"},
        "instructions": TFIDF,
    }
    made = cs.build_routed(recipe_of(zoo, **changes), tmp_path / "out")
    assert made.records["gates"].keys() == {"e0", "e1", "e2"}
    model = cs.load_routed(tmp_path / "out", dtype="float32")
    gates = model.routing.experts[0].vectors["phatgoose"]
    assert gates.keys() == linears(make_llama(), ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")).keys()
    assert all(bool(gate.any()) for gate in gates.values())
    found = model.routing.asked.semantics(["positive or negative?"], model.routing.settings)
    assert int(found.cosines.argmax()) == 1
    assert float(found.scale) == 20.0


def test_settings_of_a_command_are_judged_with_those_of_the_model(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    routing = {"local": "arrow", "scale": "adaptive", "fallback": "mean"}
    out = tmp_path / "out"
    cs.build_routed(recipe_of(zoo, routing=routing, instructions={**TFIDF, "held_in": 3}), out)
    assert read_description(out).settings.fallback == "mean"
    command = ["route", "generate", str(out), "the cat", "--max-new-tokens", "2", "--set"]
    assert run([*command, "fallback=local"]) == 0
    assert run([*command, "most_scale=7"]) == 0
    capsys.readouterr()
    assert run([*command, "scale=3"]) == 2
    assert "--set: fallback: mean needs scale: adaptive" in capsys.readouterr().err


def test_a_description_of_before_there_was_a_fallback_is_read(zoo: Path, tmp_path: Path) -> None:
    cs.build_routed(recipe_of(zoo), tmp_path / "out")
    path = tmp_path / "out/consilience/routing.json"
    value = json.loads(path.read_text())
    assert value["settings"].pop("fallback") == "local"
    path.write_text(json.dumps(value))
    assert read_description(tmp_path / "out").settings.fallback == "local"


def test_mean_activations_are_built(zoo: Path, tmp_path: Path) -> None:
    cs.build_routed(recipe_of(zoo, routing={"local": "average"}), tmp_path / "out")
    model = cs.load_routed(tmp_path / "out")
    assert {"arrow", "average"} == set(model.routing.experts[2].vectors)
    assert torch.isfinite(logits(model)).all()


def test_an_expert_that_comes_changes_no_other(zoo: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"routing": {"local": "arrow", "scale": 5.0}, "instructions": TFIDF}
    out = tmp_path / "out"
    cs.build_routed(recipe_of(zoo, ("e0", "e1"), **changes), out)
    before, vectors = files(out), cs.load_routed(out).routing.asked.semantics.instructions
    logits_before = logits(cs.load_routed(out))
    add_expert(out, "e2", zoo / "adapters" / "e2", data=zoo / "e2.jsonl")
    after = files(out)
    kept = [name for name in before if "/experts/" in f"/{name}"]
    assert kept
    assert all(after[name] == before[name] for name in kept)
    model = cs.load_routed(out)
    assert model.routing.names == ("e0", "e1", "e2")
    for old, new in zip(vectors, model.routing.asked.semantics.instructions, strict=False):
        assert torch.equal(old.embedding, new.embedding)
    with model.routing.without("e2"):
        assert torch.allclose(logits(model), logits_before, atol=1e-4)
    remove_expert(out, "e2")
    assert files(out) == before


def test_the_base_may_move(zoo: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(zoo / "base", tmp_path / "base")
    recipe = recipe_of(zoo) | {"base_model": str(tmp_path / "base")}
    cs.build_routed(recipe, tmp_path / "out")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(InputError, match="is not there any more"):
        cs.load_routed(tmp_path / "out")
    cs.load_routed(tmp_path / "out", base=str(tmp_path / "moved"))
    config = json.loads((tmp_path / "moved/config.json").read_text())
    (tmp_path / "moved/config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    with pytest.raises(InputError, match="is not the base"):
        cs.load_routed(tmp_path / "out", base=str(tmp_path / "moved"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"routing": {"locl": "arrow"}}, "routing: unknown key 'locl'; did you mean 'local'"),
        ({"gates": {"step": 3}}, "gates: unknown key 'step'"),
        ({"rooting": {}}, "unknown key 'rooting'; did you mean 'routing'"),
        ({"routing": {"local": "arrow", "scale": 3}}, "instructions: {describer: none"),
        ({"instructions": {"embeder": "tfidf"}}, "unknown key 'embeder'"),
        ({"base_model": "nowhere/at all"}, "nowhere/at all"),
        ({"models": []}, "models: must name at least one"),
    ],
)
def test_a_wrong_recipe_is_one_line_and_leaves_nothing(
    zoo: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said) as error:
        cs.build_routed(recipe_of(zoo) | changes, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_another_base_is_refused_before_work(zoo: Path, tmp_path: Path) -> None:
    import shutil

    place = shutil.copytree(zoo / "adapters" / "e0", tmp_path / "wide")
    other = make_experts(make_llama(hidden_size=64))[0]
    write_adapter(other, tmp_path / "other")
    shutil.copyfile(tmp_path / "other/adapter_model.safetensors", place / "adapter_model.safetensors")
    recipe = recipe_of(zoo, ("e1",))
    recipe["models"].append({"model": str(place), "name": "wide"})
    with pytest.raises(InputError, match=r"expert 'wide': .*64 outputs"):
        cs.build_routed(recipe, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_the_documented_recipe_is_built(zoo: Path, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs/routing.md").read_text()
    recipe = yaml.safe_load(text[text.index("```yaml") + 7 :].split("```")[0])
    recipe["base_model"] = str(zoo / "base")
    for k, model in enumerate(recipe["models"]):
        model["model"], model["data"] = str(zoo / f"adapters/e{k}"), {"train": str(zoo / f"e{k}.jsonl")}
    recipe["gates"] |= {"steps": 2, "precision": "float32"}
    made = cs.build_routed(recipe, tmp_path / "out")
    assert made.experts == ("code", "math")
    assert made.settings.fallback == "mean"
    assert logits(cs.load_routed(tmp_path / "out")).isfinite().all()


@pytest.mark.parametrize(
    ("names", "changes"),
    [
        (("e0", "e1"), {"held_in": 0}),
        (("e0",), {"held_in": 3}),
        (("e0", "e1"), {"held_in": 3, "describer": "template"}),
    ],
)
def test_an_adaptive_scale_that_cannot_be_fitted_is_refused(
    zoo: Path, tmp_path: Path, names: tuple[str, ...], changes: dict[str, Any]
) -> None:
    recipe = recipe_of(zoo, names, routing={"local": "arrow", "scale": "adaptive"}, instructions=TFIDF | changes)
    if "describer" in changes:
        recipe["models"] = [
            {**model, "data": None, "instruction": f"say {n}"} for n, model in enumerate(recipe["models"])
        ]
    with pytest.raises(InputError, match="scale: adaptive is fitted on examples of two experts at least"):
        cs.build_routed(recipe, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["data", "words"])
def test_what_is_missing_is_said_before_gates_are_trained(
    zoo: Path, tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*_: Any) -> None:
        raise AssertionError("gates were trained")

    monkeypatch.setattr("consilience.routing.local.gate_training.train_gates", train)
    changes: dict[str, Any] = {"routing": {"local": "phatgoose", "scale": 3.0}, "instructions": TFIDF}
    recipe = recipe_of(zoo, **changes)
    cs.build_routed(
        recipe_of(zoo, ("e0", "e1"), **changes | {"routing": {"local": "arrow", "scale": 3.0}}), tmp_path / "r"
    )
    if missing == "data":
        del recipe["models"][2]["data"]
    else:
        recipe["models"][2]["instruction"] = "which describer none does not use"
    with pytest.raises(InputError, match="expert 'e2'"):
        cs.build_routed(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="expert 'e2'"):
        add_expert(tmp_path / "r", "e2", zoo / "adapters/e2")
    assert read_description(tmp_path / "r").experts == ("e0", "e1")


def test_gates_need_rows(zoo: Path, tmp_path: Path) -> None:
    recipe = recipe_of(zoo) | {"routing": {"local": "phatgoose"}}
    models: Any = recipe["models"]
    del models[1]["data"]
    with pytest.raises(InputError, match=r"expert 'e1': phatgoose learns .* data: \{train: FILE.jsonl\}"):
        cs.build_routed(recipe, tmp_path / "out")


@pytest.mark.parametrize(
    "damage",
    [
        lambda value: value | {"experts": ["../../etc"]},
        lambda value: value | {"experts": ["e0", "e0"]},
        lambda value: value | {"experts": []},
        lambda value: value | {"format": 2},
        lambda value: value | {"tensors": "../x.safetensors"},
        lambda value: value | {"base": {"path": 3}},
        lambda value: value | {"settings": {"top_k": -2}},
        lambda value: value | {"more": 1},
    ],
)
def test_a_damaged_description_is_refused(tmp_path: Path, damage: Any) -> None:
    sound = Description(Base("b", "b", {"w.safetensors": 3}, "0"), Settings("arrow"), ("e0", "e1"))
    path = tmp_path / "consilience" / "routing.json"
    path.parent.mkdir()
    path.write_text(json.dumps(sound.to_dict()))
    assert read_description(tmp_path) == sound
    path.write_text(json.dumps(damage(sound.to_dict())))
    with pytest.raises(InputError, match=r"routing\.json"):
        read_description(tmp_path)
