"""Routers are what their definition says, one prompt at a time and without padding; so is what is said of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file

import consilience as cs
from consilience.moe import build, states
from consilience.moe.gates import Gates, Routed, random_gates
from tests.moe.dense import PROMPTS, hf, save_dense, write_recipe

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("dense")
    return {name: save_dense("llama", root / name, seed) for seed, name in enumerate(("base", "math", "code", "mood"))}


def mixture(dense: dict[str, Path], out: Path, **more: Any) -> tuple[Any, dict[str, Any]]:
    """Build a mixture of all; return the summary and the output's tensors."""
    experts = {name: folder for name, folder in dense.items() if name != "base"}
    summary = cs.merge_recipe(write_recipe(out.with_suffix(".yaml"), dense["base"], experts, **more), out, force=True)
    return summary, load_file(out / "model.safetensors")


def seen(base: Path, prompt: str, *, mlp: bool) -> tuple[list[int], list[Any]]:
    """Return a prompt's tokens and what comes into every layer (or its MLP), [T, H], by hooks of our own."""
    tokenizer = hf.AutoTokenizer.from_pretrained(base)
    ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False).input_ids]
    model, found = hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).eval(), list[Any]()
    for block in model.model.layers:
        module = block.post_attention_layernorm if mlp else block.input_layernorm
        module.register_forward_hook(lambda _m, args, output: found.append((output if mlp else args[0])[0].numpy()))
    with torch.no_grad():
        model(torch.tensor([ids]))
    return ids, found


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg", "hidden_last", "mlp_input", "mlp_input_last"])
def test_routers_are_normalised_differences_of_mean_states(
    mode: str, dense: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "BATCH_TOKENS", 40)  # several batches, of padded prompts
    _, tensors = mixture(dense, tmp_path / "out", gate_mode=mode)
    mlp = mode.startswith("mlp")

    def mean(prompts: list[str]) -> Any:
        pooled: list[Any] = []
        for prompt in prompts:
            layers = [x[1:] if mlp else x for x in seen(dense["base"], prompt, mlp=mlp)[1]]
            pooled.append([x[-1] if mode in ("hidden", "hidden_last", "mlp_input_last") else x.mean(0) for x in layers])
        return np.mean(pooled, axis=0)

    for number, (positive, negative) in enumerate(PROMPTS.values()):
        state = mean(positive) - (mean(negative) if negative else 0)
        for layer, expected in enumerate(state / np.linalg.norm(state, axis=-1, keepdims=True)):
            found = tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"][number]
            assert np.abs(found - expected).max() < 1e-5, (number, layer)


def test_cheap_embeddings_are_sums_of_rows_without_a_forward_pass(dense: dict[str, Path], tmp_path: Path) -> None:
    _, tensors = mixture(dense, tmp_path / "out", gate_mode="cheap_embed")
    tokenizer = hf.AutoTokenizer.from_pretrained(dense["base"])
    rows = load_file(dense["base"] / "model.safetensors")["model.embed_tokens.weight"].astype(np.float64)

    def unit(prompts: list[str]) -> Any:
        ids = [i for p in prompts for i in (3, *tokenizer(p, add_special_tokens=False).input_ids)]
        return rows[ids].sum(0) / np.linalg.norm(rows[ids].sum(0))

    for number, (positive, negative) in enumerate(PROMPTS.values()):
        state = unit(positive) - (unit(negative) if negative else 0)
        for layer in range(3):
            found = tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"][number]
            assert np.abs(found - state / np.linalg.norm(state)).max() < 1e-6


def test_random_routers_are_functions_of_the_seed_and_of_their_place(dense: dict[str, Path], tmp_path: Path) -> None:
    _, first = mixture(dense, tmp_path / "out", gate_mode="random")
    _, second = mixture(dense, tmp_path / "out", gate_mode="random", seed=1)
    name = "model.layers.{}.block_sparse_moe.gate.weight"
    assert not np.array_equal(first[name.format(0)], second[name.format(0)])
    assert not np.array_equal(first[name.format(0)], first[name.format(1)])
    normal = random_gates("random", 4, 8, 512, 7)
    assert np.array_equal(normal[:, :3], random_gates("random", 4, 3, 512, 7))
    assert abs(normal.mean()) < 0.05
    assert abs(normal.std() - 1) < 0.03
    assert np.isfinite(normal).all()
    assert 0.6 < (np.abs(normal) < 1).mean() < 0.76  # 0.683
    uniform = random_gates("uniform_random", 4, 8, 512, 7)
    assert abs(uniform.std() * 512**0.5 - 3**-0.5) < 0.02
    assert np.abs(uniform).max() <= 512**-0.5


def test_what_is_said_of_routers_is_counted_token_by_token(dense: dict[str, Path], tmp_path: Path) -> None:
    summary, tensors = mixture(dense, tmp_path / "out", gate_mode="hidden")
    lineage = json.loads((tmp_path / "out" / "consilience" / "lineage.json").read_text())["mixture"]
    assert lineage["experts"] == ["math", "code", "mood"]
    assert lineage["chance"] == 2 / 3
    for number, told in enumerate(lineage["routing"]):
        chosen, first, tokens, votes = np.zeros(3), np.zeros(3), 0, 0
        for prompt in PROMPTS[told["name"]][0]:
            ids, layers = seen(dense["base"], prompt, mlp=True)
            tokens += len(ids) - 1
            counts = np.zeros(3)
            for layer, x in enumerate(layers):
                scores = x[1:] @ tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"].T
                order = np.argsort(-scores, axis=1)
                chosen[layer] += (order[:, :2] == number).any(1).sum()
                first[layer] += (order[:, 0] == number).sum()
                counts += np.bincount(order[:, 0], minlength=3)
            votes += counts.argmax() == number
        assert told["tokens"] == tokens
        assert np.allclose(told["share"], chosen / tokens, atol=1e-12)
        assert np.allclose(told["first"], first / tokens, atol=1e-12)
        assert told["prompts_first"] == votes / told["prompts"]
        line = (
            f"of the {tokens} tokens of {told['name']}'s own prompts {np.mean(told['share']):.0%} go to it (chance 67%)"
        )
        assert any(line in note for note in summary.notes)
        lost = np.mean(told["share"]) <= 2 / 3
        assert lost == any(f"{told['name']}: " in text and "by chance" in text for text in summary.warnings)


def test_routers_no_better_than_chance_are_warned_of() -> None:
    def gates(share: float, first: float, per_token: int) -> Gates:
        routed = np.zeros((2, 4, 8), np.float32)
        return Gates("hidden", per_token, routed, routed[:, :0], (Routed("a", 1, 9, (share,) * 2, (first,) * 2, 0.0),))

    assert gates(0.51, 0.0, 2).warnings() == []
    assert "by chance (50%)" in gates(0.5, 0.9, 2).warnings()[0][1]
    assert gates(1.0, 0.26, 4).warnings() == []  # all go to all: then first choices count
    assert "by chance (25%)" in gates(1.0, 0.25, 4).warnings()[0][1]
    assert (
        "no prompts" in Gates("random", 1, np.zeros((1, 2, 4), np.float32), np.zeros((1, 0, 4), np.float32)).lines()[0]
    )


def test_an_interrupted_run_goes_on_with_the_routers_it_had_made(
    dense: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from consilience.engine import merge

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(merge, "stream_in", stop)
        with pytest.raises(KeyboardInterrupt):
            mixture(dense, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial" / "learning" / "gates.json").exists()
    with monkeypatch.context() as patched:
        patched.setattr(build, "_made", stop)
        summary, tensors = mixture(dense, tmp_path / "out")
        recipe = yaml.safe_load((tmp_path / "out.yaml").read_text())
        recipe["experts"][0]["positive_prompts"] = ["another one"]
        with pytest.raises(KeyboardInterrupt):  # other prompts are other routers
            cs.merge_recipe(recipe, tmp_path / "other")
    assert not list(tmp_path.glob("out.*partial"))
    again, _ = mixture(dense, tmp_path / "again")
    assert again.fingerprint == summary.fingerprint
    assert any("router: of the" in note for note in summary.notes)
    assert len(tensors) > 0
