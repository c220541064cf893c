"""RegMean++ against least squares on a model that is put together block by block, and against RegMean."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_experts import MODULES, sentences, write_adapter, write_base, write_expert, write_rows, write_tokenizer
from typer.testing import CliRunner

import consilience as cs
from consilience.cli.app import app
from consilience.engine import merge as engine
from consilience.engine.summary import Summary
from consilience.learned.inputs import leaders
from consilience.learned.statistics import collect_statistics
from consilience.student.stepping import Stepper

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two experts that leave embeddings and head alone, an adapter, and rows of unlike lengths."""
    out = tmp_path_factory.mktemp("regmean_pp")
    base = write_base(out / "base", num_hidden_layers=3)
    for seed, name in enumerate("ab"):
        write_expert(out / name, base, seed + 1, only=lambda name: "layers" in name)
        write_tokenizer(out / name)
    modules = [*MODULES, "model.layers.2.self_attn.o_proj"]
    write_adapter(out / "lora", base, 3, modules=modules)
    for seed, name in enumerate(("a", "b", "lora")):
        write_rows(out / "rows" / f"{name}.jsonl", sentences(seed, 12))
    return out


def rows_of(place: Path, names: str | tuple[str, ...]) -> dict[str, str]:
    return {name: str(place / "rows" / f"{name}.jsonl") for name in names}


def recipe_of(place: Path) -> dict[str, Any]:
    models = [{"model": str(place / n), "name": n, "data": {"calibration": rows_of(place, "ab")[n]}} for n in "ab"]
    return {"merge_method": "regmean_pp", "base_model": str(place / "base"), "models": models}


def merge(place: Path, out: Path, names: str | tuple[str, ...] = "ab", **settings: Any) -> Weights:
    experts = {name: str(place / name) for name in names}
    arguments: dict[str, Any] = {"method": "regmean_pp", "calibration": rows_of(place, names)} | settings
    cs.merge(str(place / "base"), experts, out, **arguments)
    return load_file(out / "model.safetensors")


def model_of(place: Path, weights: Weights) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float64).eval()
    model.load_state_dict({name: value.double() for name, value in weights.items()})
    return model


def ids_of(place: Path, name: str) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(place / "base")
    texts = (place / "rows" / f"{name}.jsonl").read_text().splitlines()
    return [tokenizer(json.loads(text)["prompt"]).input_ids for text in texts]


def weights_of(place: Path, name: str) -> Weights:
    base = load_file(place / "base" / "model.safetensors")
    if name != "lora":
        return load_file(place / name / "model.safetensors")
    factors = load_file(place / "lora" / "adapter_model.safetensors")
    for key in factors:
        if key.endswith("lora_A.weight"):
            target = key.removeprefix("base_model.model.").replace("lora_A.", "")
            base[target] = base[target] + 2.0 * factors[key.replace("lora_A", "lora_B")] @ factors[key]
    return base


def recorder(inputs: list[Any]) -> Any:
    """A hook that keeps what a layer is given, of one row."""
    return lambda _module, given: inputs.append(given[0][0])


def by_least_squares(place: Path, names: str | tuple[str, ...], layers: int = 3) -> Weights:
    """Block by block: a model of merged blocks, one expert's block, and the base; every layer by ``lstsq`` in float64.

    min_W sum_k 1/n_k || X_k (W - W_k)^T ||^2 is least squares on the rows of all X_k / sqrt(n_k), one below another.
    """
    experts = {name: weights_of(place, name) for name in names}
    merged = load_file(place / "base" / "model.safetensors")
    outside = [name for name in merged if "layers" not in name]
    merged |= {name: torch.stack([own[name] for own in experts.values()]).mean(0) for name in outside}
    for index in range(layers):
        block = [name for name in merged if f"layers.{index}." in name]
        seen: dict[str, dict[str, Any]] = {}
        for name, own in experts.items():
            model = model_of(place, merged | {key: own[key] for key in block})
            parts: dict[str, list[Any]] = {}
            for key in block:
                layer = model.get_submodule(key.removesuffix(".weight"))
                if isinstance(layer, torch.nn.Linear):
                    layer.register_forward_pre_hook(recorder(parts.setdefault(key, [])))
            with torch.no_grad():
                for row in ids_of(place, name):
                    model(torch.tensor([row]))
            seen[name] = {key: torch.cat(value).numpy() for key, value in parts.items()}
        for key in block:
            own = {name: weights[key].double().numpy() for name, weights in experts.items()}
            if key not in seen[names[0]]:
                merged[key] = torch.from_numpy(np.mean(list(own.values()), 0))
                continue
            shares = {name: seen[name][key] / len(seen[name][key]) ** 0.5 for name in names}
            inputs = np.concatenate(list(shares.values()))
            outputs = np.concatenate([shares[name] @ own[name].T for name in names])
            merged[key] = torch.from_numpy(np.linalg.lstsq(inputs, outputs, rcond=None)[0].T)
    return merged


@pytest.mark.parametrize("names", ["ab", ("a", "lora")])
def test_every_block_is_least_squares_behind_merged_blocks(place: Path, tmp_path: Path, names: Any) -> None:
    found = merge(place, tmp_path / "out", names, off_diagonal=1.0, ridge=0.0)
    expected = by_least_squares(place, names)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=2e-4, err_msg=name)


def test_the_first_block_is_regmeans_and_the_others_are_not(place: Path, tmp_path: Path) -> None:
    found = merge(place, tmp_path / "out")
    folders: dict[str, str] = {}
    for name in "ab":
        collect_statistics(place / name, place / "rows" / f"{name}.jsonl", tmp_path / name, progress=False)
        folders[name] = str(tmp_path / name)
    experts = {name: str(place / name) for name in "ab"}
    cs.merge(str(place / "base"), experts, tmp_path / "plain", method="regmean", statistics=folders)
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    for name, value in plain.items():
        if "layers" not in name or "layers.0." in name or "norm" in name:
            np.testing.assert_allclose(found[name], value, atol=1e-5, err_msg=name)
        else:
            assert float((found[name] - value).norm()) > 1e-3 * float(value.norm()), name


def test_the_result_is_nearer_to_the_experts_behind_merged_blocks(place: Path, tmp_path: Path) -> None:
    """Of the last layer, on what it is given in the merged model: what each minimises."""
    found = merge(place, tmp_path / "out", off_diagonal=1.0, ridge=0.0)
    mean = {n: (weights_of(place, "a")[n] + weights_of(place, "b")[n]) / 2 for n in found}
    key, losses = "model.layers.2.self_attn.q_proj.weight", dict[str, float]()
    for name in "ab":
        own, inputs = weights_of(place, name)[key].double(), list[Any]()
        model = model_of(place, found)
        layer = model.get_submodule(key.removesuffix(".weight"))
        layer.register_forward_pre_hook(recorder(inputs))
        with torch.no_grad():
            for row in ids_of(place, name):
                model(torch.tensor([row]))
        x = torch.cat(inputs)
        for which, weights in (("found", found), ("mean", mean)):
            error = (x @ (weights[key].double() - own).T).square().sum() / len(x)
            losses[which] = losses.get(which, 0.0) + float(error)
    assert losses["found"] < losses["mean"]


def test_gram_matrices_a_few_at_a_time_and_rows_one_by_one_change_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = merge(place, tmp_path / "whole")
    monkeypatch.setattr("consilience.learned.sequential.BYTES", 1)
    parts = merge(place, tmp_path / "parts", batch_tokens=1)
    for name, value in whole.items():
        np.testing.assert_allclose(parts[name], value, atol=2e-5, err_msg=name)


def test_lineage_says_which_rows(place: Path, tmp_path: Path) -> None:
    merge(place, tmp_path / "out", samples=4)
    held = json.loads((tmp_path / "out" / "consilience" / "lineage.json").read_text())["statistics"]
    assert [one["rows"] for one in held] == [4, 4]
    assert [one["model"] for one in held] == [str(place / name) for name in "ab"]
    assert all("folder" not in one for one in held)


def test_an_interrupted_merge_collects_nothing_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(place)

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(engine, "check_unchanged", fail)
    with pytest.raises((cs.MachineError, OSError)):
        cs.merge_recipe(recipe, tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(Stepper, "through", fail)
    summary = cs.merge_recipe(recipe, tmp_path / "out")
    assert isinstance(summary, Summary)
    assert summary.resumed_segments > 0
    monkeypatch.undo()
    for name, value in merge(place, tmp_path / "whole").items():
        assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], value)
    recipe["models"].reverse()  # other work: collected anew
    cs.merge_recipe(recipe, tmp_path / "out", force=True)


def test_an_interrupted_collection_goes_on_with_the_next_block(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three blocks and two experts the sixth part is interrupted: a rerun makes the last block's two."""
    calls = list[int]()

    def stopped(layers: Any, run: Any) -> dict[str, str]:
        calls.append(len(layers))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return leaders(layers, run)

    monkeypatch.setattr("consilience.learned.sequential.leaders", stopped)
    with pytest.raises(KeyboardInterrupt):
        cs.merge_recipe(recipe_of(place), tmp_path / "out")
    cs.merge_recipe(recipe_of(place), tmp_path / "out")
    assert len(calls) == 6 + 2
    monkeypatch.undo()
    for name, value in merge(place, tmp_path / "whole").items():
        assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], value)


def test_the_command_line(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    recipe = recipe_of(place)
    path.write_text(yaml.safe_dump(recipe))
    found = CliRunner().invoke(app, ["merge", str(path), str(tmp_path / "out"), "--dry-run"])
    assert found.exit_code == 0, found.output
    assert "statistics (collected before the merge, block by block)\n  rows: a 12, b 12" in found.output
    found = CliRunner().invoke(app, ["merge", str(path), str(tmp_path / "out")])
    assert found.exit_code == 0, found.output
    assert "others=mean" in found.output
    assert not (tmp_path / "out.partial").exists()


def test_what_it_cannot_do_is_refused(place: Path, tmp_path: Path) -> None:
    experts, base = {name: str(place / name) for name in "ab"}, str(place / "base")
    settings: dict[str, Any] = {"method": "regmean_pp"}
    with pytest.raises(cs.InputError, match="a: method 'regmean_pp' needs calibration rows"):
        cs.merge(base, experts, tmp_path / "out", **settings)
    with pytest.raises(cs.InputError, match="method 'regmean_pp' reads no statistics"):
        cs.merge(base, experts, tmp_path / "out", statistics={"a": "x"}, **settings)
    state = load_file(place / "base" / "model.safetensors")
    with pytest.raises(cs.InputError, match="runs the model, so it needs folders"):
        cs.merge(state, {"a": weights_of(place, "a")}, **settings)
    settings["calibration"] = rows_of(place, "ab")
    with pytest.raises(cs.InputError, match="takes no steps"):
        cs.merge_recipe(recipe_of(place), tmp_path / "out", tensorboard=tmp_path / "log")
    other = tmp_path / "other"
    shutil.copytree(place / "a", other)
    write_tokenizer(other, [f"x{i}" for i in range(93)])
    with pytest.raises(cs.InputError, match="its tokenizer gives other token ids"):
        cs.merge(base, experts | {"a": str(other)}, tmp_path / "out", **settings)
    assert not list(tmp_path.glob("out*"))


def test_experts_without_linear_layers_are_refused_before_rows_are_read(place: Path, tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "other", place / "base", 9, modules=["lm_head"])
    settings: dict[str, Any] = {"method": "regmean_pp", "calibration": {"x": rows_of(place, "ab")["a"]}}
    with pytest.raises(cs.InputError, match="no expert changes a linear layer of its blocks"):
        cs.merge(str(place / "base"), {"x": str(other)}, tmp_path / "out", **settings)
    assert not list(tmp_path.glob("out*"))


SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OPT: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "word_embed_proj_dim": 32, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("Gemma3TextConfig", SIZES | {"sliding_window": 4}),
        ("OPTConfig", OPT),
        pytest.param("Cohere2Config", SIZES | {"sliding_window": 4}, marks=pytest.mark.slow),
        pytest.param("MixtralConfig", SIZES | {"num_local_experts": 4}, marks=pytest.mark.slow),
        pytest.param("BloomConfig", {"vocab_size": 64, "hidden_size": 32, "n_layer": 3, "n_head": 4},
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_blocks_run_alone_as_they_run_in_the_model(name: str, sizes: dict[str, Any]) -> None:
    """Masks and positions that differ between blocks, positions that come before them, biases in attention."""
    import transformers

    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**sizes)).eval()
    ids, mask = torch.randint(3, 64, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    stepper = Stepper(model, "here")
    stepper.probe(inputs)
    inputs["input_ids"] = ids.flip(0)  # states of other rows than the model was shown
    given: list[Any] = []
    stepper.blocks[2].register_forward_pre_hook(lambda _m, args: given.append(args[0]))
    with torch.no_grad():
        model(**inputs, use_cache=False)
    states = stepper.through(1, inputs, stepper.through(0, inputs, stepper.first(inputs)))
    torch.testing.assert_close(states, given[0])


def test_a_plan_without_its_statistics_is_not_run(place: Path, tmp_path: Path) -> None:
    plan = cs.plan_recipe(recipe_of(place))
    try:
        with pytest.raises(cs.InputError, match="has not learned from its rows yet"):
            engine.run_merge(plan, tmp_path / "out")
        program: Any = next(t.program for t in plan.tensors if t.name == "model.layers.0.mlp.down_proj.weight")
        with pytest.raises(cs.InputError, match="its statistics are not collected yet"):
            program.function(None, **program.parameters)
    finally:
        plan.close()
    from consilience.doctor.trying import wanted

    with pytest.raises(cs.InputError, match="regmean_pp learns"):
        wanted("regmean_pp")


def test_blocks_that_need_what_others_hand_on_are_refused() -> None:
    """T5's first block makes the position bias of all."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    model: Any = T5EncoderModel(T5Config(d_model=16, d_ff=24, d_kv=8, num_heads=2, num_layers=2, vocab_size=32)).eval()
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8, 9]])}
    model.forward = lambda use_cache, own=model.forward, **given: own(**given)
    with pytest.raises(cs.InputError, match="here: T5EncoderModel does not give the same states"):
        Stepper(model, "here").probe(inputs)
