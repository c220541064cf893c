"""How models meet: names of experts, private tensors, ties, and the same answer whatever order a set has."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import consilience as cs
from consilience.checkpoints.open import open_checkpoint
from consilience.errors import InputError
from consilience.experts.expert_set import expert_names
from consilience.experts.ties import says_tied, ties_of

State = dict[str, Any]
EMBED, BODY, HEAD = "model.embed_tokens.weight", "model.layers.0.mlp.weight", "lm_head.weight"


def values(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def model(folder: Path, seed: int, more: State | None = None, config: State | None = None) -> Path:
    """Save a model of embeddings and one layer, and whatever ``more`` holds."""
    folder.mkdir()
    state: State = {EMBED: values(seed, 6, 4), BODY: values(seed + 50, 4, 4)} | (more or {})
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "toy"} | (config or {})), encoding="utf-8")
    return folder


def tensors(folder: Path) -> State:
    return load_file(folder / "model.safetensors")


def heads(out: Path) -> dict[str, State]:
    return {path.stem: load_file(path) for path in sorted((out / "consilience/heads").glob("*"))}


def equal(found: State, wanted: State) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Names.


@pytest.mark.parametrize(
    ("references", "wanted"),
    [
        ([("models/math", None), ("models/code/", None)], ["math", "code"]),
        ([("x/math", None), ("y/math", None), ("z/math", None)], ["x-math", "y-math", "z-math"]),
        ([("x/math", None), ("x/math/", None), ("y/math", None)], ["x-math", "x-math-2", "y-math"]),
        ([("runs/a/checkpoint-100", None), ("runs/b/checkpoint-100", None)], ["a-checkpoint-100", "b-checkpoint-100"]),
        ([("a/x/c", None), ("b/x/c", None), ("b/y/c", None)], ["a-x-c", "b-x-c", "y-c"]),
        ([("one/name@v1", None), ("two/name@v1", None)], ["one-name", "two-name"]),
        ([("a/lr=0.1", None), ("./code", None), ("code/../math/.", None)], ["lr-0-1", "code", "math"]),
        ([("x/math", None), ("y/code", "math")], ["x-math", "math"]),
        ([("math.safetensors", None), ("v1.5", None)], ["math", "v1-5"]),
        ([("org/name@main", None), ("base+org/lora@v2", None)], ["name", "lora"]),
        ([("models/base", None)], ["models-base"]),
    ],
)
def test_names_come_from_paths_and_never_collide(references: list[tuple[str, str | None]], wanted: list[str]) -> None:
    assert expert_names(references, "r.yaml") == wanted


@pytest.mark.parametrize("names", [["a", "a"], ["base", "x"], [""], ["a/b"], ["a\\b"], ["a.b"], ["a=b"], ["a\0"]])
def test_names_that_users_choose_are_checked(names: list[str]) -> None:
    with pytest.raises(InputError, match="choose another"):
        expert_names([("path", name) for name in names], "r.yaml")


def test_lineage_keeps_models_of_one_name_apart(tmp_path: Path) -> None:
    base = model(tmp_path / "base", 0)
    (tmp_path / "experts").mkdir()
    expert = model(tmp_path / "experts" / "base", 1)
    cs.merge(base, [expert], tmp_path / "out")
    document = json.loads((tmp_path / "out/consilience/lineage.json").read_text(encoding="utf-8"))
    prints = {entry["name"]: entry["fingerprint"] for entry in document["models"]}
    assert prints.keys() == {"base", "experts-base"}
    assert len(set(prints.values())) == 2


# ----------------------------------------------------------------------------------------------------------------------
# Private tensors.


def test_heads_travel_with_their_experts(tmp_path: Path) -> None:
    """Shapes may differ: they are not merged, and the base's own stays in the model."""
    base = model(tmp_path / "base", 0, {"classifier.weight": values(9, 2, 4)})
    a = model(tmp_path / "a", 1, {"classifier.weight": values(10, 3, 4), "classifier.bias": values(11, 3)})
    b = model(tmp_path / "b", 2)
    cs.merge(base, {"a": a, "b": b}, tmp_path / "out", private=["classifier.*"])
    found, old = tensors(tmp_path / "out"), tensors(base)
    equal(heads(tmp_path / "out")["a"], {k: v for k, v in tensors(a).items() if k.startswith("classifier")})
    assert heads(tmp_path / "out").keys() == {"a"}
    merged = {name: old[name] + sum(tensors(e)[name] - old[name] for e in (a, b)) for name in (EMBED, BODY)}
    equal(found, merged | {"classifier.weight": old["classifier.weight"]})


def test_every_expert_s_head_is_written_without_a_base(tmp_path: Path) -> None:
    a = model(tmp_path / "a", 1, {"head": values(10, 3)})
    b = model(tmp_path / "b", 2, {"head": values(11, 5), "more": values(12, 2)})
    cs.merge(None, {"a": a, "b": b}, tmp_path / "out", method="linear", private=["head", "more"])
    found = heads(tmp_path / "out")
    equal(found["a"], {"head": tensors(a)["head"]})
    equal(found["b"], {name: tensors(b)[name] for name in ("head", "more")})
    np.testing.assert_array_equal(tensors(tmp_path / "out")["head"], tensors(a)["head"])


def test_an_adapter_s_own_head_travels_too(tmp_path: Path) -> None:
    base = model(tmp_path / "base", 0)
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}', encoding="utf-8")
    factors = {
        "base_model.model.model.layers.0.mlp.lora_A.weight": values(3, 1, 4),
        "base_model.model.model.layers.0.mlp.lora_B.weight": values(4, 4, 1),
        "base_model.model.score.modules_to_save.default.weight": values(5, 2, 4),
    }
    save_file(factors, lora / "adapter_model.safetensors")
    cs.merge(base, {"l": lora}, tmp_path / "out", private=["score.*"])
    a, b, score = factors.values()
    equal(heads(tmp_path / "out")["l"], {"score.weight": score})
    equal(tensors(tmp_path / "out"), tensors(base) | {BODY: tensors(base)[BODY] + b @ a})


def test_only_safetensors_of_the_model_lie_at_the_top(tmp_path: Path) -> None:
    a = model(tmp_path / "a", 1, {"head": values(10, 3)})
    b = model(tmp_path / "b", 2, {"head": values(11, 5)})
    cs.merge(None, {"a": a, "b": b}, tmp_path / "out", method="linear", private=["head"])
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]


# ----------------------------------------------------------------------------------------------------------------------
# Ties.


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        (None, False),
        ({}, False),
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": 1}, False),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"llm_config": {"tie_word_embeddings": True}}, True),
        ({"vision_config": {"tie_word_embeddings": True}}, False),
        ({"text_config": "odd"}, False),
    ],
)
def test_what_a_config_says_about_ties(config: dict[str, Any] | None, tied: bool) -> None:
    assert says_tied(config) is tied


TIED = {"tie_word_embeddings": True}


@pytest.mark.parametrize(
    ("names", "config", "ties"),
    [
        ((EMBED,), TIED, {HEAD: EMBED}),
        (("transformer.wte.weight",), TIED, {HEAD: "transformer.wte.weight"}),
        ((BODY,), TIED, {}),
        ((EMBED,), {}, {}),
        ((EMBED,), {"architectures": ["GemmaForCausalLM"]}, {HEAD: EMBED}),
        ((EMBED,), {"architectures": ["LlamaForCausalLM"]}, {}),
        ((EMBED,), {"architectures": ["GemmaForCausalLM"], "tie_word_embeddings": False}, {}),
        ((HEAD,), {"architectures": ["LlamaForCausalLM"]} | TIED, {EMBED: HEAD}),
        (("wte.weight",), {"architectures": ["GPT2LMHeadModel"]}, {HEAD: "wte.weight"}),
        (
            ("language_model.model.embed_tokens.weight",),
            {"architectures": ["LlavaForConditionalGeneration"], "text_config": TIED},
            {HEAD: "language_model.model.embed_tokens.weight"},
        ),
        (
            ("shared.weight", HEAD),
            {"architectures": ["T5ForConditionalGeneration"], "tie_word_embeddings": False},
            {n: "shared.weight" for n in ("decoder.embed_tokens.weight", "encoder.embed_tokens.weight", HEAD)},
        ),
        (("proj_out.weight",), {"architectures": "odd"}, {}),
    ],
)
def test_what_is_tied_to_what(
    tmp_path: Path, names: tuple[str, ...], config: dict[str, Any], ties: dict[str, str]
) -> None:
    save_file({name: values(0, 6, 4) for name in names}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert ties_of(open_checkpoint(tmp_path)) == ties


def test_a_tied_head_that_is_written_gets_its_embeddings_merged_value(tmp_path: Path) -> None:
    """Even under a filter that speaks of the head, and for random methods: one value for both names."""
    base = model(tmp_path / "base", 0, {HEAD: values(0, 6, 4)}, config=TIED)
    a = model(tmp_path / "a", 1, {HEAD: values(1, 6, 4)}, config=TIED)
    b = model(tmp_path / "b", 2, {HEAD: values(2, 6, 4)}, config=TIED)
    cs.merge(base, [a, b], tmp_path / "out", method="dare_linear", density=0.5, seed=4, weight=0.5)
    found = tensors(tmp_path / "out")
    np.testing.assert_array_equal(found[HEAD], found[EMBED])
    assert not np.array_equal(found[EMBED], tensors(base)[EMBED])


def test_a_base_that_writes_its_head_takes_an_expert_that_does_not(tmp_path: Path) -> None:
    base = model(tmp_path / "base", 0, {HEAD: values(0, 6, 4)}, config=TIED)
    a = model(tmp_path / "a", 1, config=TIED)
    cs.merge(base, [a], tmp_path / "out")
    equal(tensors(tmp_path / "out"), tensors(a) | {HEAD: tensors(a)[EMBED]})


def test_an_untied_base_takes_a_tied_expert_s_embeddings_for_its_head(tmp_path: Path) -> None:
    base = model(tmp_path / "base", 0, {HEAD: values(7, 6, 4)})
    a = model(tmp_path / "a", 1, config=TIED)
    summary = cs.merge(base, [a], tmp_path / "out")
    assert not isinstance(summary, dict)
    equal(tensors(tmp_path / "out"), tensors(a) | {HEAD: tensors(a)[EMBED]})
    assert any("a: lm_head.weight is tied to model.embed_tokens.weight" in note for note in summary.notes)


def test_a_missing_head_is_not_guessed(tmp_path: Path) -> None:
    base = model(tmp_path / "base", 0, {HEAD: values(7, 6, 4)})
    for config in ({}, {"tie_word_embeddings": False}):
        a = model(tmp_path / f"a{len(config)}", 1, config=config)
        with pytest.raises(InputError, match=r"'lm_head\.weight' of .* is missing"):
            cs.merge(base, [a], tmp_path / "out")


def test_an_adapter_on_tied_embeddings_leaves_the_head(tmp_path: Path) -> None:
    base = model(tmp_path / "base", 0, {HEAD: values(0, 6, 4)}, config=TIED)
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}', encoding="utf-8")
    a, b = values(3, 1, 6), values(4, 4, 1)
    stem = "base_model.model.model.embed_tokens.lora_embedding_"
    save_file({f"{stem}A": a, f"{stem}B": b}, lora / "adapter_model.safetensors")
    cs.merge(base, [lora], tmp_path / "out")
    found = tensors(tmp_path / "out")
    np.testing.assert_allclose(found[EMBED], tensors(base)[EMBED] + (b @ a).T, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(found[HEAD], tensors(base)[HEAD])
    assert json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))["tie_word_embeddings"] is False
    assert json.loads((tmp_path / "out/consilience/lineage.json").read_text(encoding="utf-8"))["untied"] == {
        HEAD: EMBED
    }


# ----------------------------------------------------------------------------------------------------------------------
# The whole.


def test_count_in_is_count_out(tmp_path: Path) -> None:
    """Scalars, empty tensors, integers, flags and odd names come through."""
    odd: State = {
        "scalar": np.array(3, np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "flags": np.array([True, False]),
        "ids": np.arange(5),
        "": values(1, 2),
        "name with spaces/and:signs": values(2, 2),
        "übergröße": values(3, 2),
    }
    base, a = model(tmp_path / "base", 0, odd), model(tmp_path / "a", 1, odd)
    cs.merge(base, [a], tmp_path / "out")
    equal(tensors(tmp_path / "out"), tensors(a))


def test_messages_do_not_depend_on_the_order_of_sets(tmp_path: Path) -> None:
    base = model(tmp_path / "base", 0, {f"extra.{i}": values(i, 2) for i in range(20)})
    a = model(tmp_path / "a", 1)
    said: set[str] = set()
    for seed in ("0", "1", "2"):
        command = [sys.executable, "-m", "consilience", "merge", str(base), str(tmp_path / "out"), "-e", f"a={a}"]
        ended = subprocess.run(
            command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONHASHSEED": seed}
        )
        said.add(ended.stderr)
    assert len(said) == 1
    assert "'extra.0'" in said.pop()
