"""Recipes of slices, modules and stages: against mergekit 0.1.5's stored answers, and against plain numpy."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

import consilience as cs
from consilience.__main__ import run
from consilience.checkpoints.open import open_checkpoint
from consilience.engine import merge as merge_module
from consilience.engine.describe import summary_lines, tensor_lines
from consilience.engine.lineage import checkpoint_fingerprints, model_fingerprint

Arrays = dict[str, npt.NDArray[Any]]
DATA = Path(__file__).parent / "data"


def load_maker() -> Any:
    spec = importlib.util.spec_from_file_location("make_slices_oracle", DATA / "make_slices_oracle.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKER = load_maker()
ORACLE: Arrays = dict(np.load(DATA / "mergekit_0_1_5_slices.npz"))
MODELS: dict[str, Arrays] = MAKER.inputs()


def test_inputs_are_those_mergekit_saw() -> None:
    assert str(ORACLE["inputs"]) == MAKER.checksum()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    MAKER.write_models(folder)
    return folder


def weights(out: Path) -> Arrays:
    found: Arrays = {}
    for file in sorted(out.glob("*.safetensors")):
        found |= load_file(file)
    return found


def config(out: Path) -> dict[str, Any]:
    return json.loads((out / "config.json").read_text())


def merge(models: Path, out: Path, text: str, **more: Any) -> Any:
    path = out.with_name(out.name + ".yaml")
    path.write_text(MAKER.recipe_in(models, text))
    return cs.merge_recipe(path, out, **more)


@pytest.mark.parametrize("case", MAKER.CASES)
def test_agrees_with_mergekit(case: str, models: Path, tmp_path: Path) -> None:
    merge(models, tmp_path / "out", MAKER.CASES[case])
    ours = weights(tmp_path / "out")
    theirs = {key.partition("|")[2]: value for key, value in ORACLE.items() if key.startswith(f"{case}|")}
    layers, tied = theirs.pop("config")
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype == np.float32
        np.testing.assert_allclose(ours[name], expected, rtol=1e-5, atol=2e-6, err_msg=name)
    own = config(tmp_path / "out")
    assert own["num_hidden_layers"] == layers == 1 + max(int(n.split(".")[2]) for n in ours if ".layers." in n)
    assert own["tie_word_embeddings"] == tied


# ----------------------------------------------------------------------------------------------------------------------
# Against plain numpy: every tensor from the names of its sources.


def renamed(name: str, layer: int) -> str:
    parts = name.split(".")
    return ".".join([*parts[:2], str(layer), *parts[3:]])


def stacked(*pieces: tuple[str, int, int]) -> Arrays:
    """Return layers (model, first, last + 1) one on another, with the first's embeddings and the last's norm, head."""
    found: Arrays = {"model.embed_tokens.weight": MODELS[pieces[0][0]]["model.embed_tokens.weight"]}
    sources = [(model, layer) for model, first, stop in pieces for layer in range(first, stop)]
    for number, (model, layer) in enumerate(sources):
        inside = {name: value for name, value in MODELS[model].items() if name.startswith(f"model.layers.{layer}.")}
        found |= {renamed(name, number): value for name, value in inside.items()}
    last = MODELS[pieces[-1][0]]
    return found | {name: last[name] for name in ("model.norm.weight", "lm_head.weight") if name in last}


def passthrough(*pieces: tuple[str, int, int]) -> str:
    lines = [f"  - sources: [{{model: {model}, layer_range: [{first}, {stop}]}}]" for model, first, stop in pieces]
    return "\n".join(["merge_method: passthrough", "slices:", *lines, ""])


def assert_equal(ours: Arrays, expected: Arrays) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


@pytest.mark.parametrize(
    "pieces",
    [
        [("base", 0, 4)],
        [("base", 0, 3), ("base", 1, 4)],
        [("base", 2, 3), ("base", 2, 3), ("base", 0, 1)],
        [("shallow", 0, 2), ("deep", 1, 5), ("shallow", 2, 3)],
        [("deep", 0, 1), ("shallow", 0, 3)],
        [("deep", 0, 5), ("deep", 0, 5), ("deep", 0, 5)],
    ],
)
def test_stacks_layers_byte_for_byte(pieces: list[tuple[str, int, int]], models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(models, out, passthrough(*pieces))
    assert_equal(weights(out), stacked(*pieces))
    assert config(out)["num_hidden_layers"] == sum(stop - first for _, first, stop in pieces)


def test_one_slice_of_all_layers_is_the_merge_of_models(models: Path, tmp_path: Path) -> None:
    shared = "merge_method: ties\nbase_model: base\nparameters: {weight: [0.2, 0.9], density: 0.5}\n"
    shared = shared.replace("base_model: base\n", f"base_model: {models / 'base'}\n")
    merge(models, tmp_path / "whole", shared + "models: [{model: x}, {model: y}]\n")
    ranged = ", ".join(f"{{model: {name}, layer_range: [0, 4]}}" for name in ("base", "x", "y"))
    merge(models, tmp_path / "slice", f"{shared}slices: [{{sources: [{ranged}]}}]\n")
    assert_equal(weights(tmp_path / "slice"), weights(tmp_path / "whole"))


def test_gradients_start_again_in_every_slice(models: Path, tmp_path: Path) -> None:
    text = """
merge_method: task_arithmetic
base_model: base
slices:
  - sources: [{model: base, layer_range: [0, 3]}, {model: x, layer_range: [0, 3], parameters: {weight: [0, 1]}}]
  - sources: [{model: base, layer_range: [3, 4]}, {model: x, layer_range: [3, 4], parameters: {weight: [2, 3]}}]
"""
    merge(models, tmp_path / "out", text.replace("base_model: base", f"base_model: {models / 'base'}"))
    ours = weights(tmp_path / "out")
    alphas = {f"model.layers.{layer}.": alpha for layer, alpha in enumerate((0, 0.5, 1, 3))}
    alphas |= {"model.embed_tokens.": 0, "model.norm.": 2, "lm_head.": 2}
    for name, base in MODELS["base"].items():
        alpha = next(value for beginning, value in alphas.items() if name.startswith(beginning))
        exact = base.astype(np.float64) + alpha * (MODELS["x"][name].astype(np.float64) - base)
        np.testing.assert_allclose(ours[name], exact, rtol=1e-6, atol=1e-6, err_msg=name)


def test_sharded_models_and_outputs(models: Path, tmp_path: Path) -> None:
    pieces = [("shallow", 0, 2), ("deep", 1, 5)]
    merge(models, tmp_path / "first", passthrough(("deep", 0, 5)), shard_size=2000)
    assert len(list((tmp_path / "first").glob("model-*.safetensors"))) > 3
    text = passthrough(*pieces).replace("model: deep", f"model: {tmp_path / 'first'}")
    merge(models, tmp_path / "out", text, shard_size=3000)
    assert_equal(weights(tmp_path / "out"), stacked(*pieces))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == stacked(*pieces).keys()


# ----------------------------------------------------------------------------------------------------------------------
# Embeddings and heads that are one tensor.

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def test_tied_models_of_one_kind_stay_tied(models: Path, tmp_path: Path) -> None:
    merge(models, tmp_path / "out", passthrough(("tied", 0, 3), ("tied", 0, 3)))
    assert_equal(weights(tmp_path / "out"), stacked(("tied", 0, 3), ("tied", 0, 3)))
    assert config(tmp_path / "out")["tie_word_embeddings"] is True


def test_the_last_models_head_is_not_lost_where_it_was_tied(models: Path, tmp_path: Path) -> None:
    """mergekit drops it: the last layers' outputs then meet another model's embeddings."""
    merge(models, tmp_path / "out", passthrough(("tied", 0, 2), ("tied-deep", 2, 4)))
    expected = stacked(("tied", 0, 2), ("tied-deep", 2, 4)) | {HEAD: MODELS["tied-deep"][EMBEDDING]}
    assert_equal(weights(tmp_path / "out"), expected)
    assert config(tmp_path / "out")["tie_word_embeddings"] is False
    theirs = {key.partition("|")[2] for key in ORACLE if key.startswith("tied apart|")}
    assert theirs - {"config"} == expected.keys() - {HEAD}


@pytest.mark.parametrize(("first", "last"), [("tied", "deep"), ("deep", "tied")])
def test_a_head_in_only_some_models(first: str, last: str, models: Path, tmp_path: Path) -> None:
    merge(models, tmp_path / "out", passthrough((first, 0, 2), (last, 1, 3)))
    head = MODELS[last].get(HEAD, MODELS[last][EMBEDDING])
    assert_equal(weights(tmp_path / "out"), stacked((first, 0, 2), (last, 1, 3)) | {HEAD: head})
    assert config(tmp_path / "out")["tie_word_embeddings"] is False


def test_models_with_the_same_tied_embeddings_stay_tied(models: Path, tmp_path: Path) -> None:
    merge(models, tmp_path / "copy", passthrough(("tied", 0, 3)))
    text = passthrough(("tied", 0, 2), ("tied-deep", 1, 3)).replace("model: tied-deep", f"model: {tmp_path / 'copy'}")
    merge(models, tmp_path / "out", text)
    assert_equal(weights(tmp_path / "out"), stacked(("tied", 0, 2), ("tied", 1, 3)))
    assert config(tmp_path / "out")["tie_word_embeddings"] is True
    # The resolved recipe spells defaults out, and still means the same.
    cs.merge_recipe(tmp_path / "out" / "consilience" / "recipe.yaml", tmp_path / "again")
    assert_equal(weights(tmp_path / "again"), weights(tmp_path / "out"))


# ----------------------------------------------------------------------------------------------------------------------
# Adapters.


def write_adapter(folder: Path, layers: int, rank: int = 2) -> Arrays:
    """Write a LoRA adapter and return its updates by the tensor's name."""
    random = np.random.RandomState(7)
    factors: Arrays = {}
    updates: Arrays = {}
    for layer in range(layers):
        for module, (out, into) in {
            "self_attn.q_proj": (MAKER.WIDTH, MAKER.WIDTH),
            "mlp.down_proj": (MAKER.WIDTH, MAKER.INNER),
        }.items():
            a, b = (random.standard_normal(shape).astype(np.float32) for shape in ((rank, into), (out, rank)))
            name = f"model.layers.{layer}.{module}"
            factors[f"base_model.model.{name}.lora_A.weight"] = a
            factors[f"base_model.model.{name}.lora_B.weight"] = b
            updates[f"{name}.weight"] = 1.5 * b.astype(np.float64) @ a
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 1.5 * rank, "target_modules": ["q_proj", "down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return updates


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("ranges", [((0, 2), (0, 2)), ((1, 3), (2, 4))])
def test_adapters_are_experts_of_slices(
    alone: bool, ranges: tuple[tuple[int, int], tuple[int, int]], models: Path, tmp_path: Path
) -> None:
    updates = write_adapter(tmp_path / "adapter", 4)
    expert = str(tmp_path / "adapter") if alone else f"{models / 'base'}+{tmp_path / 'adapter'}"
    (first, stop), (own, own_stop) = ranges
    text = f"""
merge_method: task_arithmetic
base_model: {models / "base"}
slices:
  - sources:
      - {{model: {models / "base"}, layer_range: [{first}, {stop}]}}
      - {{model: {expert}, layer_range: [{own}, {own_stop}], parameters: {{weight: 0.5}}}}
"""
    merge(models, tmp_path / "out", text)
    ours, base = weights(tmp_path / "out"), MODELS["base"]
    for name, value in ours.items():
        if ".layers." not in name:
            np.testing.assert_array_equal(value, base[name])
            continue
        layer = int(name.split(".")[2])
        below, above = renamed(name, first + layer), renamed(name, own + layer)
        expected = base[below] + 0.5 * (base[above].astype(np.float64) + updates.get(above, 0.0) - base[below])
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5, err_msg=name)
    assert sum(".layers." in name for name in ours) == 2 * 9


# ----------------------------------------------------------------------------------------------------------------------
# What config.json says of layers.


FULL, LOCAL = "full_attention", "sliding_attention"


def with_config(models: Path, folder: Path, model: str, **values: Any) -> Path:
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(models / model / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config(models / model) | values))
    return folder


def test_lists_with_a_value_per_layer_follow_their_layers(models: Path, tmp_path: Path) -> None:
    kinds = {"x": [FULL, LOCAL, FULL, LOCAL], "deep": [FULL, LOCAL, LOCAL, FULL, FULL]}
    places = {
        name: with_config(
            models, tmp_path / name, name, layer_types=kinds[name], mlp_only_layers=[1, 3], eos_token_id=[2, 3, 4, 5],
        )
        for name in kinds
    }  # fmt: skip
    pieces = [("x", 2, 4), ("deep", 1, 4), ("x", 0, 1)]
    text = passthrough(*pieces)
    for name, place in places.items():
        text = text.replace(f"model: {name},", f"model: {place},")
    summary = merge(models, tmp_path / "out", text)
    assert_equal(weights(tmp_path / "out"), stacked(*pieces))
    found = config(tmp_path / "out")
    assert found["layer_types"] == [FULL, LOCAL, LOCAL, LOCAL, FULL, FULL]
    assert found["mlp_only_layers"] == [1, 2, 4]  # x's 3, deep's 1 and 3
    assert found["eos_token_id"] == [2, 3, 4, 5]
    assert found["num_hidden_layers"] == 6
    assert not summary.warnings


@pytest.mark.parametrize("chosen", [False, True])
def test_kinds_of_layers_that_follow_from_their_numbers(chosen: bool, models: Path, tmp_path: Path) -> None:
    place = with_config(models, tmp_path / "x", "x", sliding_window_pattern=2)
    text = passthrough(("base", 0, 2), ("base", 1, 4)).replace("model: base,", f"model: {place},")
    if chosen:
        text += f"config: {{layer_types: [{FULL}, {LOCAL}, {LOCAL}, {FULL}, {LOCAL}]}}\n"
        merge(models, tmp_path / "out", text)
        assert config(tmp_path / "out")["layer_types"] == [FULL, LOCAL, LOCAL, FULL, LOCAL]
        return
    with pytest.raises(cs.InputError, match=r"sliding_window_pattern 2.*layer 1 would be number 2.*layer_types"):
        merge(models, tmp_path / "out", text)
    assert not list(tmp_path.glob("out*/"))


# ----------------------------------------------------------------------------------------------------------------------
# Models of several stacks of layers.


def write_composite(folder: Path, seed: int, text_layers: int = 3, vision_layers: int = 2) -> Arrays:
    random = np.random.RandomState(seed)
    names = [
        "language_model.model.embed_tokens.weight",
        *(f"language_model.model.layers.{i}.mlp.weight" for i in range(text_layers)),
        "language_model.model.norm.weight",
        "language_model.lm_head.weight",
        "vision_tower.patch_embed.weight",
        *(f"vision_tower.encoder.layers.{i}.mlp.weight" for i in range(vision_layers)),
        *(f"multi_modal_projector.{i}.weight" for i in (0, 2)),
    ]
    tensors: Arrays = {name: random.standard_normal((4, 4)).astype(np.float32) for name in names}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    parts = {"text_config": {"num_hidden_layers": text_layers}, "vision_config": {"num_hidden_layers": vision_layers}}
    (folder / "config.json").write_text(json.dumps(parts))
    return tensors


def test_modules_are_stacked_apart(tmp_path: Path) -> None:
    a, b = write_composite(tmp_path / "a", 1), write_composite(tmp_path / "b", 2, text_layers=4)
    text = f"""
merge_method: linear
modules:
  text_decoder:
    slices:
      - sources: [{{model: {tmp_path / "a"}, layer_range: [0, 2]}}]
      - sources: [{{model: {tmp_path / "b"}, layer_range: [1, 4]}}]
  vision_tower:
    models: [{{model: {tmp_path / "a"}, parameters: {{weight: 3}}}}, {{model: {tmp_path / "b"}}}]
"""
    (tmp_path / "recipe.yaml").write_text(text)
    summary: Any = cs.merge_recipe(tmp_path / "recipe.yaml", tmp_path / "out")
    ours = weights(tmp_path / "out")
    expected = {name: value for name, value in a.items() if not name.startswith("language_model.model.layers")}
    prefix = "language_model.model"
    for layer, (model, own) in enumerate([(a, 0), (a, 1), (b, 1), (b, 2), (b, 3)]):
        expected[f"{prefix}.layers.{layer}.mlp.weight"] = model[f"{prefix}.layers.{own}.mlp.weight"]
    for name in (f"{prefix}.norm.weight", "language_model.lm_head.weight"):
        expected[name] = b[name]
    for name in (name for name in a if name.startswith("vision_tower")):
        expected[name] = ((3 * a[name].astype(np.float64) + b[name]) / 4).astype(np.float32)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-6, err_msg=name)
    found = config(tmp_path / "out")
    assert (found["text_config"]["num_hidden_layers"], found["vision_config"]["num_hidden_layers"]) == (5, 2)
    assert any("multi_modal_projector" in note and "copied from a" in note for note in summary.notes)


def test_slices_of_a_model_of_several_stacks_ask_for_modules(tmp_path: Path) -> None:
    write_composite(tmp_path / "a", 1)
    recipe = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": str(tmp_path / "a"), "layer_range": [0, 2]}]}],
    }
    with pytest.raises(cs.InputError, match=r"text_decoder.*vision_tower.*write modules: \{text_decoder: \{slices"):
        cs.plan_recipe(recipe)


# ----------------------------------------------------------------------------------------------------------------------
# What is said of it, and runs that are stopped.


def test_lineage_and_card_state_the_slices(models: Path, tmp_path: Path) -> None:
    merge(models, tmp_path / "out", passthrough(("x", 0, 3), ("x", 1, 4)))
    lineage = json.loads((tmp_path / "out" / "consilience" / "lineage.json").read_text())
    assert [(each["start"], each["sources"]) for each in lineage["slices"]] == [
        (0, [{"name": "x", "start": 0, "stop": 3}]),
        (3, [{"name": "x", "start": 1, "stop": 4}]),
    ]
    # Layers that are used twice are fingerprinted once.
    own = checkpoint_fingerprints(open_checkpoint(models / "x"))
    assert lineage["models"][0]["fingerprint"] == model_fingerprint(own)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- layers 0-2: x 0-2\n- layers 3-5: x 1-3\n" in card


def test_a_dry_run_lists_layers_in_order_with_their_sources(models: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(MAKER.recipe_in(models, passthrough(*[("deep", 0, 4)] * 3)))
    plan = cs.plan_recipe(path)
    lines = [*summary_lines(plan, 1), *tensor_lines(plan)]
    plan.close()
    layers = [int(line.split(".")[2]) for line in lines if line.startswith("  model.layers.")]
    assert layers == sorted(layers)
    assert set(layers) == set(range(12))
    assert any(line.endswith("<- deep model.layers.3.mlp.up_proj.weight") and ".layers.11." in line for line in lines)
    assert "slice    layers 8-11: deep 0-3" in lines


def test_other_slices_are_other_work(models: Path, tmp_path: Path) -> None:
    digests: set[str] = set()
    for pieces in ([("base", 0, 2)], [("base", 2, 4)], [("x", 0, 2)], [("base", 0, 1), ("base", 1, 2)]):
        path = tmp_path / "recipe.yaml"
        path.write_text(MAKER.recipe_in(models, passthrough(*pieces)))
        plan = cs.plan_recipe(path)
        digests.add(plan.digest)
        plan.close()
    assert len(digests) == 4


def test_stages_that_are_finished_are_not_merged_again(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, out, merged = MAKER.CASES["stages"], tmp_path / "out", list[str]()
    original = merge_module.stream_in

    def counted(plan: Any, work: Any, **more: Any) -> Any:
        merged.append(work.out.name)
        if work.out.name == "high" and len(merged) == 2:
            raise KeyboardInterrupt
        return original(plan, work, **more)

    monkeypatch.setattr(merge_module, "stream_in", counted)
    with pytest.raises(KeyboardInterrupt):
        merge(models, out, text)
    assert not out.exists()
    assert merged == ["low", "high"]
    merge(models, out, text)
    assert merged == ["low", "high", "high", "out"]
    for name, value in weights(out).items():
        np.testing.assert_allclose(value, ORACLE[f"stages|{name}"], rtol=1e-5, atol=2e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.yaml"]
    lineage = json.loads((out / "consilience" / "lineage.json").read_text())
    assert list(lineage["stages"]) == ["low", "high"]
    assert [model["reference"] for model in lineage["models"]] == ["low", "high"]
    cs.merge_recipe(out / "consilience" / "recipe.yaml", tmp_path / "again")
    assert_equal(weights(tmp_path / "again"), weights(out))


def test_documents_may_be_given_as_plain_values(models: Path, tmp_path: Path) -> None:
    documents = [
        {"name": "low", "merge_method": "linear", "models": [{"model": str(models / name)} for name in ("base", "x")]},
        {"merge_method": "linear", "models": [{"model": "low"}, {"model": str(models / "y")}]},
    ]
    cs.merge_recipe(documents, tmp_path / "out")
    for name, value in weights(tmp_path / "out").items():
        first = (MODELS["base"][name].astype(np.float64) + MODELS["x"][name]) / 2
        np.testing.assert_allclose(value, (first + MODELS["y"][name]) / 2, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Bad input: one error each, which names slice and key.


def write_with_tokens(folder: Path, seed: int, tokens: list[str]) -> Path:
    """A model of two layers whose rows of tokens are those of ``tokens``, with their vocabulary."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    names = ("model.embed_tokens.weight", "model.layers.0.w.weight", "model.layers.1.w.weight", "lm_head.weight")
    rows = {name: len(tokens) if "layers" not in name else 4 for name in names}
    arrays = {name: rng.standard_normal((count, 4)).astype(np.float32) for name, count in rows.items()}
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "toy", "num_hidden_layers": 2}')
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    return folder


@pytest.mark.parametrize("last", [["b", "a", "c"], ["a", "b", "c"], ["a", "b"]], ids=["other", "same", "fewer"])
def test_a_head_of_other_tokens_than_the_embeddings_is_told(last: list[str], tmp_path: Path) -> None:
    first = write_with_tokens(tmp_path / "first", 0, ["a", "b", "c"])
    second = write_with_tokens(tmp_path / "second", 1, last)
    pieces = [{"sources": [{"model": str(model), "layer_range": [0, 1]}]} for model in (first, second)]
    recipe = {"merge_method": "passthrough", "slices": pieces}
    if last == ["a", "b"]:
        with pytest.raises(cs.InputError, match=r"'lm_head\.weight' of second, which have 3 and 2 rows"):
            cs.merge_recipe(recipe, tmp_path / "out")
        assert not list(tmp_path.glob("out*"))
        return
    warned: list[str] = []
    cs.merge_recipe(recipe, tmp_path / "out", warned=warned.append)
    told = [text for text in warned if "2 of their token ids mean two tokens, 0 the first" in text]
    assert len(told) == (last[0] == "b")
    if told:
        with pytest.raises(cs.InputError, match="mean two tokens"):
            cs.merge_recipe(recipe, tmp_path / "strict", strict=True)


def test_a_dtype_that_an_option_gives_counts_for_all_slices_and_is_noted(models: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(MAKER.recipe_in(models, passthrough(("x", 0, 2), ("y", 1, 4))))
    summary = cs.merge_recipe(cs.override_recipe(path, out_dtype="float16"), tmp_path / "out")
    expected = {name: value.astype(np.float16) for name, value in stacked(("x", 0, 2), ("y", 1, 4)).items()}
    assert_equal(weights(tmp_path / "out"), expected)
    assert any(note.startswith("out_dtype=float16: ") or "float16" in note for note in summary.notes)


def sources(*each: str) -> str:
    return "sources: [" + ", ".join(f"{{model: {one}}}" for one in each) + "]"


LINEAR, TIES = "merge_method: linear\n", "merge_method: ties\nbase_model: base\n"
BAD: dict[str, tuple[str, tuple[str, ...]]] = {
    "beyond the last layer": (
        LINEAR + f"slices: [{{{sources('x, layer_range: [0, 2]')}}}, {{{sources('x, layer_range: [2, 5]')}}}]",
        ("slices.1.sources.0.layer_range", "[2, 5]", "which has 4"),
    ),
    "a range backwards": (
        LINEAR + f"slices: [{{{sources('x, layer_range: [3, 1]')}}}]",
        ("slices.0.sources.0.layer_range", "[3, 1] holds no layer"),
    ),
    "a range of text": (
        LINEAR + f"slices: [{{{sources('x, layer_range: 0-2')}}}]",
        ("slices.0.sources.0.layer_range", "two whole numbers"),
    ),
    "a range below zero": (
        LINEAR + f"slices: [{{{sources('x, layer_range: [-1, 2]')}}}]",
        ("slices.0.sources.0.layer_range", "[-1, 2]"),
    ),
    "no range": (LINEAR + f"slices: [{{{sources('x')}}}]", ("slices.0.sources.0.layer_range", "add it")),
    "no sources": (LINEAR + "slices: [{sources: []}]", ("slices.0.sources", "at least one")),
    "a typo": (LINEAR + "slices: [{source: []}]", ("'slices.0.source'", "did you mean 'sources'")),
    "unequal lengths": (
        LINEAR + f"slices: [{{{sources('x, layer_range: [0, 2]', 'deep, layer_range: [0, 3]')}}}]",
        ("slices.0", "x 2, deep 3", "as many"),
    ),
    "slices with models": (
        LINEAR + f"models: [{{model: x}}]\nslices: [{{{sources('x, layer_range: [0, 2]')}}}]",
        ("models and slices", "keep one"),
    ),
    "no base in a slice": (
        TIES + f"slices: [{{{sources('base, layer_range: [0, 2]', 'x, layer_range: [0, 2]')}}}, "
        f"{{{sources('x, layer_range: [2, 4]')}}}]",
        ("slices.1", "lack the base", "add it"),
    ),
    "no base at all": (
        f"merge_method: ties\nslices: [{{{sources('x, layer_range: [2, 4]')}}}]",
        ("slices.0", "needs a base_model"),
    ),
    "a base of another slice": (
        TIES + f"slices: [{{base_model: y, {sources('base, layer_range: [0, 2]', 'x, layer_range: [0, 2]')}}}]",
        ("slices.0", "lack the base"),
    ),
    "an unknown model": (
        LINEAR + f"slices: [{{{sources('nowhere, layer_range: [0, 2]')}}}]",
        ("slices.0.sources.0.model", "nowhere"),
    ),
    "a model twice": (
        LINEAR + f"slices: [{{{sources('x, layer_range: [0, 2]', 'x, layer_range: [1, 3]')}}}]",
        ("slices.0", "twice"),
    ),
    "two models to pass through": (
        f"merge_method: passthrough\nslices: [{{{sources('x, layer_range: [0, 2]', 'y, layer_range: [1, 3]')}}}]",
        ("slices.0", "exactly 1 source;", "names 2"),
    ),
    "an unknown parameter": (
        LINEAR + f"slices: [{{{sources('x, layer_range: [0, 2], parameters: {weigth: 1}')}}}]",
        ("slices.0.sources.0.parameters.weigth", "did you mean 'weight'"),
    ),
    "a shared parameter": (
        "method: linear\n" + f"slices: [{{{sources('x, layer_range: [0, 2], parameters: {normalize: true}')}}}]",
        ("slices.0.sources.0.parameters.normalize", "shared"),
    ),
    "a filter for layers of the output": (
        LINEAR + "slices: [{"
        + sources("x, layer_range: [2, 4], parameters: {weight: [{filter: layers.0., value: 1}]}") + "}]",
        ("slices.0.sources.0.parameters.weight", "'layers.0.' matches no tensor"),
    ),
    "a value out of bounds": (
        TIES + "slices: [{parameters: {density: 3}, "
        + sources("base, layer_range: [0, 2]", "x, layer_range: [0, 2]") + "}]",
        ("slices.0.parameters.density", "[0, 1]"),
    ),
    "models of other shapes": (
        LINEAR + f"slices: [{{{sources('x, layer_range: [0, 2]', 'wide, layer_range: [0, 2]')}}}]",
        ("slices.0", "wide", "has shape"),
    ),
    "private": (LINEAR + f"private: [x]\nslices: [{{{sources('x, layer_range: [0, 2]')}}}]", ("private", "slices")),
    "a method that learns": (
        "merge_method: glue\nbase_model: base\nslices: [{"
        + sources("base, layer_range: [0, 2]", "x, layer_range: [0, 2]") + "}]",
        ("slices", "'glue'", "whole models"),
    ),
    "an unknown module": (LINEAR + "modules: {vision: {models: [{model: x}]}}", ("modules.vision", "default")),
    "a module of nothing": (LINEAR + "modules: {default: {}}", ("modules.default", "add it")),
    "a module of models of other depths": (
        LINEAR + "modules: {default: {models: [{model: x}, {model: deep}]}}",
        ("modules.default.models", "x 4, deep 5"),
    ),
    "stages that need each other": (
        f"name: p\n{LINEAR}models: [{{model: q}}]\n---\nname: q\n{LINEAR}models: [{{model: p}}]\n---\n"
        f"{LINEAR}models: [{{model: q}}]",
        ("q -> p -> q",),
    ),
    "a stage for nothing": (
        f"name: p\n{LINEAR}models: [{{model: x}}]\n---\n{LINEAR}models: [{{model: y}}]",
        ("'p' is used by no other",),
    ),
    "two stages of one name": (
        f"name: p\n{LINEAR}models: [{{model: x}}]\n---\nname: p\n{LINEAR}models: [{{model: y}}]",
        ("document 2", "'p' is used twice"),
    ),
    "two outputs": (
        f"{LINEAR}models: [{{model: x}}]\n---\n{LINEAR}models: [{{model: y}}]", ("documents 1 and 2 have no name",),
    ),
    "a typo in a stage": (
        f"name: p\n{LINEAR}models: [{{model: x}}]\n---\n{LINEAR}models: [{{modl: p}}]",
        ("document 2", "'models.0.modl'", "did you mean 'model'"),
    ),
    "a stage that is too shallow": (
        f"name: p\n{LINEAR}models: [{{model: x}}]\n---\n{LINEAR}slices: [{{{sources('p, layer_range: [0, 9]')}}}]",
        ("slices.0.sources.0.layer_range", "of p, which has 4"),
    ),
    "a list that is empty": ("[]", ("holds no recipe",)),
    "documents that are empty": ("---\n---", ("holds no recipe",)),
    "a name for two models": (
        LINEAR + "modules: {default: {models: [{model: x, name: q}, {model: y, name: q}]}}", ("'q' is used twice;",),
    ),
    "a stage's name with a slash": (f"name: p/q\n{LINEAR}models: [{{model: x}}]", ("name", "'p/q'", "rename")),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text, says = BAD[case]
    if "wide" in text:
        wide = {name: np.repeat(value, 2, axis=-1) for name, value in MODELS["y"].items()}
        (tmp_path / "wide").mkdir()
        save_file(wide, tmp_path / "wide" / "model.safetensors", {"format": "pt"})
        (tmp_path / "wide" / "config.json").write_text(json.dumps(config(models / "y")))
        text = text.replace("model: wide,", f"model: {tmp_path / 'wide'},")
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    text = text.replace("base_model: base\n", f"base_model: {models / 'base'}\n")
    path.write_text(MAKER.recipe_in(models, text.replace("base_model: y,", f"base_model: {models / 'y'},") + "\n"))
    assert run(["merge", str(path), str(out)]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) <= 2
    assert lines[0].startswith("consilience: ")
    for said in (str(path), *says):
        assert said in " ".join(lines)
    assert not out.exists()
    assert not list(tmp_path.glob("out*"))
