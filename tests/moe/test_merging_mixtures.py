"""Mixtures are merged by any method; their routers are named, and ``private: [routers]`` keeps the base's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import consilience as cs
from consilience.checkpoints.checkpoint import TensorInfo
from consilience.checkpoints.dtypes import DTYPES
from consilience.checkpoints.open import open_checkpoint
from consilience.experts.expert_set import open_experts
from consilience.experts.routers import patterns, routers
from tests.moe.dense import SIZES, hf
from tests.tasks.tiny_models import shake

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

OF: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 3}, ["block_sparse_moe.gate.weight"]),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8}, ["mlp.gate.weight"]),
    "qwen2_moe": (
        "Qwen2Moe",
        {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 32},
        ["mlp.gate.weight", "mlp.shared_expert_gate.weight"],
    ),
}


def save_mixture(kind: str, folder: Path, seed: int) -> Path:
    name, more, _ = OF[kind]
    config = getattr(hf, f"{name}Config")(**SIZES | more | {"num_experts_per_tok": 2})
    shake(getattr(hf, f"{name}ForCausalLM")(config), seed).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", OF)
def test_routers_are_merged_as_any_tensor_and_said_or_stay_the_base_s(kind: str, tmp_path: Path) -> None:
    base, one, two = (save_mixture(kind, tmp_path / name, seed) for seed, name in enumerate(("base", "one", "two")))
    names = [f"model.layers.{layer}.{name}" for layer in range(3) for name in OF[kind][2]]
    dense, first, second = (load_file(folder / "model.safetensors") for folder in (base, one, two))
    assert set(names) <= dense.keys()
    for private in ((), ("routers",)):
        out = tmp_path / f"out{len(private)}"
        summary = cs.merge(base, {"one": one, "two": two}, out, weight=0.25, private=private)
        said = [note for note in summary.notes if "routers of a mixture" in note]  # pyright: ignore
        assert bool(said) == (not private)
        assert not said or said[0].startswith(
            f"{len(names)} routers of a mixture are merged as any tensor ('{names[0]}'"
        )
        merged = load_file(out / "model.safetensors")
        assert merged.keys() == dense.keys()
        for name, value in merged.items():
            expected = dense[name] + 0.25 * (first[name] - dense[name]) + 0.25 * (second[name] - dense[name])
            if private and name in names:
                assert torch.equal(value, dense[name])
            else:
                torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
        hf.AutoModelForCausalLM.from_pretrained(out)
    weight = [{"filter": r"re:gate\.weight$", "value": 0}, {"value": 0.25}]  # as docs/moe.md has it for adapters
    cs.merge(base, {"one": one, "two": two}, tmp_path / "weighed", weight=weight)
    weighed, kept = (load_file(tmp_path / name / "model.safetensors") for name in ("weighed", "out1"))
    assert all(torch.equal(value, kept[name]) for name, value in weighed.items())
    heads = load_file(tmp_path / "out1" / "consilience" / "heads" / "one.safetensors")
    assert set(heads) == set(names)
    opened = open_experts(str(base), {"one": str(one)}, ["routers"])
    assert opened.private == set(names)
    opened.close()


@pytest.mark.parametrize("kind", OF)
def test_routers_are_found_by_names_and_shapes(kind: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_mixture(kind, tmp_path / "base", 0))
    found = routers(checkpoint.tensors)
    assert sorted(found) == sorted(f"model.layers.{layer}.{name}" for layer in range(3) for name in OF[kind][2])
    assert len(patterns(found)) == len(OF[kind][2])


def test_routers_of_further_layouts() -> None:
    shapes: dict[str, tuple[int, ...]] = {
        # gpt-oss: all experts in one tensor
        "model.layers.0.mlp.router.weight": (32, 64), "model.layers.0.mlp.router.bias": (32,),
        "model.layers.0.mlp.experts.gate_up_proj": (32, 64, 96),
        "model.layers.0.mlp.experts.gate_up_proj_bias": (32, 96),
        # DeepSeek-V3: a bias beside the router, shared experts that are no routers
        "model.layers.1.mlp.gate.weight": (2, 64), "model.layers.1.mlp.gate.e_score_correction_bias": (2,),
        "model.layers.1.mlp.experts.0.gate_proj.weight": (16, 64),
        "model.layers.1.mlp.experts.1.gate_proj.weight": (16, 64),
        "model.layers.1.mlp.shared_experts.gate_proj.weight": (16, 64),
        # Switch Transformers
        "encoder.block.1.layer.1.mlp.router.classifier.weight": (8, 64),
        "encoder.block.1.layer.1.mlp.experts.expert_0.wi.weight": (96, 64),
        # no mixture
        "model.layers.2.mlp.gate_proj.weight": (2, 64), "model.layers.2.self_attn.gate.weight": (2, 64),
        "model.layers.1.post_attention_layernorm.weight": (64,), "score.weight": (1, 64),
    }  # fmt: skip
    tensors = {name: TensorInfo(name, DTYPES["F32"], shape) for name, shape in shapes.items()}
    assert routers(tensors) == [
        "model.layers.0.mlp.router.weight",
        "model.layers.0.mlp.router.bias",
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "encoder.block.1.layer.1.mlp.router.classifier.weight",
    ]


def test_routers_of_a_dense_model_are_a_filter_that_matches_nothing(tmp_path: Path) -> None:
    from tests.moe.dense import save_dense

    base, one = (save_dense("llama", tmp_path / name, seed) for seed, name in enumerate(("base", "one")))
    with pytest.raises(cs.InputError, match="private: 'routers' matches no tensor"):
        cs.merge(base, {"one": one}, tmp_path / "out", private="routers")
