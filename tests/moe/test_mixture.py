"""A mixture computes what its parts say, in transformers' own implementation of its architecture."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import consilience as cs
from consilience.checkpoints.open import open_checkpoint
from consilience.engine.lineage import checkpoint_fingerprints, model_fingerprint
from consilience.moe.architecture import DEFAULTS
from tests.moe.dense import KINDS, NAMES, SIZES, hf, ids, load, logits, save_dense, shared, write_recipe

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]
CLASSES = {"llama": "Mixtral", "mistral": "Mixtral", "qwen2": "Qwen2Moe", "qwen3": "Qwen3Moe"}


def more_of(kind: str, folder: Path, **settings: Any) -> dict[str, Any]:
    return shared(folder, **settings) if kind == "qwen2" else {}


@pytest.mark.parametrize("kind", KINDS)
def test_identical_experts_are_the_dense_model_whatever_the_routers(kind: str, tmp_path: Path) -> None:
    base = save_dense(kind, tmp_path / "base", 1)
    # Qwen2-MoE always has a shared expert: one whose output is scaled to nothing.
    more = more_of(kind, base, residual_scale=0)
    for mode in ("mlp_input", "random"):
        experts = {name: base for name in ("math", "code", "mood")}
        recipe = write_recipe(tmp_path / "r.yaml", base, experts, gate_mode=mode, **more)
        summary = cs.merge_recipe(recipe, tmp_path / "out", force=True)
        assert "opened by transformers" in summary.loader  # pyright: ignore
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["architectures"] == [f"{CLASSES[kind]}ForCausalLM"]
        dense = logits(base)
        assert (logits(tmp_path / "out") - dense).abs().max() < 1e-6 * dense.abs().max()  # routers are in float32


def test_a_shared_expert_adds_its_output_times_the_sigmoid_of_its_gate(tmp_path: Path) -> None:
    base = save_dense("qwen2", tmp_path / "base", 1)
    experts = {name: base for name in ("math", "code")}
    cs.merge_recipe(write_recipe(tmp_path / "r.yaml", base, experts, **shared(base)), tmp_path / "out")
    model = load(tmp_path / "out")
    dense = load(base)
    seen: list[tuple[Any, Any]] = []
    for block in model.model.layers:
        block.mlp.register_forward_hook(lambda _m, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        model(ids())
        for layer, (x, output) in enumerate(seen):
            gate = model.model.layers[layer].mlp.shared_expert_gate.weight[0]
            assert abs(float(gate.norm()) - 1) < 1e-6
            expected = dense.model.layers[layer].mlp(x) * (1 + torch.sigmoid(x @ gate))[..., None]
            assert (output - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_is_the_weighted_sum_of_its_experts_own_mlps(kind: str, tmp_path: Path) -> None:
    folders = {
        name: save_dense(kind, tmp_path / name, seed) for seed, name in enumerate(("base", "math", "code", "mood"))
    }
    base = folders.pop("base")
    more = more_of(kind, base, residual_scale=0)
    cs.merge_recipe(write_recipe(tmp_path / "r.yaml", base, folders, **more), tmp_path / "out")
    model = load(tmp_path / "out")
    weights = {name: load_file(folder / "model.safetensors") for name, folder in folders.items()}
    stored = load_file(tmp_path / "out" / "model.safetensors")
    seen: list[tuple[Any, Any]] = []
    for block in model.model.layers:
        block.mlp.register_forward_hook(lambda _m, args, output: seen.append((args[0].numpy(), output.numpy())))
    with torch.no_grad():
        model(ids())
    router = "block_sparse_moe.gate.weight" if CLASSES[kind] == "Mixtral" else "mlp.gate.weight"
    for layer, (x, output) in enumerate(seen):
        scores = x @ stored[f"model.layers.{layer}.{router}"].double().numpy().T
        odds = np.exp(scores - scores.max(-1, keepdims=True))
        best = np.argsort(-odds, axis=-1)[..., :2]
        odds = np.where((np.arange(3) == best[..., :1]) | (np.arange(3) == best[..., 1:]), odds, 0.0)
        odds /= odds.sum(-1, keepdims=True)
        assert len(np.unique(best[..., 0])) > 1  # tokens do not all go one way
        expected = np.zeros_like(x)
        for number, name in enumerate(folders):
            gate, up, down = (
                weights[name][f"model.layers.{layer}.mlp.{part}_proj.weight"].double().numpy()
                for part in ("gate", "up", "down")
            )
            inner = x @ gate.T
            expected += odds[..., number : number + 1] * ((inner / (1 + np.exp(-inner)) * (x @ up.T)) @ down.T)
        assert np.abs(output - expected).max() < 1e-6 * np.abs(expected).max()


def test_one_expert_is_the_base_with_that_expert_s_mlps(tmp_path: Path) -> None:
    base, math = (save_dense("llama", tmp_path / name, seed) for seed, name in enumerate(("base", "math")))
    recipe = write_recipe(tmp_path / "r.yaml", base, {"math": math}, experts_per_token=1)
    cs.merge_recipe(recipe, tmp_path / "out")
    own = load_file(math / "model.safetensors")
    state = {n: own[n] if ".mlp." in n else t for n, t in load_file(base / "model.safetensors").items()}
    save_file(state, base / "model.safetensors", {"format": "pt"})
    dense = logits(base)
    assert (logits(tmp_path / "out") - dense).abs().max() < 1e-12 * dense.abs().max()


def test_an_adapter_s_mlps_are_the_base_s_plus_its_update_and_what_else_it_adapts_is_said(tmp_path: Path) -> None:
    import peft

    base = save_dense("llama", tmp_path / "base", 0)
    for seed, name in enumerate(("math", "code")):
        torch.manual_seed(seed)
        targets = ["up_proj", "down_proj", "q_proj"]
        model = peft.get_peft_model(
            hf.AutoModelForCausalLM.from_pretrained(base),
            peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets, init_lora_weights=False),
        )
        model.save_pretrained(str(tmp_path / name))
    more = {"experts_per_token": 1, "dtype": "float64"}
    recipe = write_recipe(tmp_path / "r.yaml", base, {n: tmp_path / n for n in ("math", "code")}, **more)
    summary = cs.merge_recipe(recipe, tmp_path / "out")
    assert any("math: its updates of 3 of 9 tensors are left behind" in note for note in summary.notes)
    out, dense = load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors")
    for number, name in enumerate(("math", "code")):
        factors = load_file(tmp_path / name / "adapter_model.safetensors")
        for layer in range(3):
            for part, w in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
                key = f"model.layers.{layer}.mlp.{part}_proj"
                expected = dense[f"{key}.weight"].double()
                if part != "gate":
                    a, b = (factors[f"base_model.model.{key}.lora_{side}.weight"].double() for side in "AB")
                    expected = expected + 3.0 * b @ a
                written = out[f"model.layers.{layer}.block_sparse_moe.experts.{number}.{w}.weight"]
                torch.testing.assert_close(written, expected, rtol=1e-12, atol=1e-12)
    # Both adapters stand on the same tensors of the base, which are one input each.
    lineage = json.loads((tmp_path / "out" / "consilience" / "lineage.json").read_text())
    entry = next(model for model in lineage["models"] if model["name"] == "base")
    checkpoint = open_checkpoint(base)
    assert entry["fingerprint"] == model_fingerprint(checkpoint_fingerprints(checkpoint))


def test_all_but_mlps_is_the_base_s_byte_for_byte_and_types_and_scales_are_as_asked(tmp_path: Path) -> None:
    base, math, code = (
        save_dense("qwen3", tmp_path / name, seed) for seed, name in enumerate(("base", "math", "code"))
    )
    recipe = write_recipe(tmp_path / "r.yaml", base, {"math": math, "code": code})
    value = recipe.read_text().replace("name: math", "name: math\n  residual_scale: 0.5")
    recipe.write_text(value)
    plain: Any = cs.merge_recipe(recipe, tmp_path / "out", threads=1)
    again: Any = cs.merge_recipe(recipe, tmp_path / "again", threads=3, shard_size=60_000)
    assert plain.fingerprint == again.fingerprint
    out, dense, own = (load_file(f / "model.safetensors") for f in (tmp_path / "out", base, math))
    for name, tensor in dense.items():
        if ".mlp." not in name:
            assert torch.equal(out[name], tensor)
    down = "model.layers.1.mlp.{}down_proj.weight"
    assert torch.equal(out[down.format("experts.0.")], 0.5 * own[down.format("")])
    assert torch.equal(out["model.layers.1.mlp.experts.0.up_proj.weight"], own["model.layers.1.mlp.up_proj.weight"])
    recipe.write_text(value + "dtype: bfloat16\n")
    cs.merge_recipe(recipe, tmp_path / "narrow")
    narrow = load_file(tmp_path / "narrow" / "model.safetensors")
    assert narrow.keys() == out.keys()
    assert all(torch.equal(narrow[name], tensor.bfloat16()) for name, tensor in out.items())
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_are_those_of_the_dense_model_s_own_class(kind: str) -> None:
    plain = getattr(hf, f"{NAMES[kind]}Config")()
    written = plain.to_dict()
    for key, value in DEFAULTS[kind].items():
        derived = {"num_key_value_heads": plain.num_attention_heads, "head_dim": 128}
        assert written[key] == (derived.get(key) if value is None and key in derived else value), key
    assert written["rope_parameters"]["rope_theta"] == 10000.0
    assert SIZES["hidden_size"] != DEFAULTS[kind]["hidden_size"]
