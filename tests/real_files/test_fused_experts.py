"""LoRA on all experts of a mixture at once (PEFT's ``target_parameters``), on files that hold them in any form."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.real_files.support import (
    SIZES,
    State,
    adapter,
    cli,
    hf,
    logits,
    merged,
    peft,
    real_file,
    refused,
    state,
    tiny,
)

FUSED = ["gate_up_proj", "down_proj"]
MOE: dict[str, Any] = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}


def mixtral(**more: Any) -> Any:
    sizes: dict[str, Any] = {"num_local_experts": 3, "num_experts_per_tok": 2}
    return tiny("Mixtral", **sizes | more)


def qwen3(**more: Any) -> Any:
    return tiny("Qwen3Moe", **MOE | more)


def qwen2(**more: Any) -> Any:
    sizes: dict[str, Any] = MOE | {"shared_expert_intermediate_size": 24}
    return tiny("Qwen2Moe", **sizes | more)


def deepseek(**more: Any) -> Any:
    return tiny(
        "DeepseekV3", n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, n_group=1, topk_group=1,
        first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        **more,
    )  # fmt: skip


def gpt_oss(**more: Any) -> Any:
    sizes: dict[str, Any] = {
        "num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8, "intermediate_size": 24,
    }  # fmt: skip
    return tiny("GptOss", **sizes | more)


def granite(**more: Any) -> Any:
    return tiny("GraniteMoe", num_local_experts=3, num_experts_per_tok=2, **more)


def llama4(**more: Any) -> Any:
    config: Any = hf.Llama4TextConfig(
        **SIZES | {"intermediate_size_mlp": 48, "head_dim": 8, "num_local_experts": 3, "moe_layers": [0, 1]} | more
    )
    torch.manual_seed(0)
    model = hf.Llama4ForCausalLM(config).eval()
    with torch.no_grad():
        for value in model.parameters():  # torch.empty in this version's initialisation
            value.normal_(std=0.05, generator=torch.Generator().manual_seed(value.numel()))
    return model


def equal(found: State, wanted: State, atol: float = 2e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].float(), value.float(), atol=atol, rtol=1e-5, msg=name)


def is_right(tmp_path: Path, base: Any, original: bool = True, **config: Any) -> None:
    """Merge an adapter into a saved model and compare every tensor with what PEFT merges and transformers saves."""
    base.save_pretrained(tmp_path / "base", save_original_format=original)
    tuned = adapter(type(base).from_pretrained(tmp_path / "base", dtype=torch.float32), tmp_path / "a", **config)
    before = state(tmp_path / "base")
    tuned.merge_and_unload().save_pretrained(tmp_path / "want", save_original_format=original)
    outcome = merged(tmp_path / "base", tmp_path / "out", a=tmp_path / "a")
    assert outcome.code == 0, outcome.said
    want = state(tmp_path / "want")
    assert sum(not torch.equal(before[name], want[name]) for name in want if "expert" in name or "moe" in name) > 1
    equal(state(tmp_path / "out"), want)


def like_full_models(tmp_path: Path, base: Any, methods: tuple[str, ...], **config: Any) -> None:
    """Merge two adapters by each method, and what PEFT merges of them; the results are the same."""
    base.save_pretrained(tmp_path / "base")
    for seed, name in enumerate("ab"):
        model = type(base).from_pretrained(tmp_path / "base", dtype=torch.float32)
        tuned = adapter(model, tmp_path / name, seed=seed, **config)
        tuned.merge_and_unload().save_pretrained(tmp_path / f"{name}-full")
    before = state(tmp_path / "base")
    for method in methods:
        words = ["--method", method]
        one = merged(tmp_path / "base", tmp_path / f"{method}-1", *words, a=tmp_path / "a", b=tmp_path / "b")
        two = merged(tmp_path / "base", tmp_path / f"{method}-2", *words, a=tmp_path / "a-full", b=tmp_path / "b-full")
        assert (one.code, two.code) == (0, 0), one.said + two.said
        found = state(tmp_path / f"{method}-1")
        for name, value in state(tmp_path / f"{method}-2").items():
            # TIES keeps other entries where a trim falls between two that differ by a rounding
            assert (found[name] - value).norm() <= 0.02 * (value - before[name]).norm() + 1e-6, name


@pytest.mark.parametrize("original", [True, False], ids=["one-by-one", "fused"])
@pytest.mark.parametrize("make", [mixtral, qwen3, qwen2, deepseek])
@real_file(
    8, family="Mixtral, Qwen-MoE, DeepSeek V3", option="LoRA on all linear layers of a mixture",
    expected="PEFT's merge", before="wrongly refused",
)  # fmt: skip
def test_an_adapter_on_all_linear_layers(tmp_path: Path, make: Callable[..., Any], original: bool) -> None:
    is_right(tmp_path, make(), original, target_modules="all-linear")


@pytest.mark.parametrize("make", [gpt_oss, llama4, granite])
@pytest.mark.parametrize("square", [False, True])
@real_file(
    8, family="gpt-oss, Llama 4, Granite-MoE", option="experts fused in the file", expected="PEFT's merge",
    before="wrongly refused",
)  # fmt: skip
def test_experts_that_are_fused_in_the_file(tmp_path: Path, make: Callable[..., Any], square: bool) -> None:
    sizes = {"intermediate_size": 32, "hidden_size": 32} if square else {}
    is_right(tmp_path, make(**sizes), target_modules=["q_proj"], target_parameters=FUSED)


@pytest.mark.parametrize("chosen", [["down_proj"], ["mlp.experts.gate_up_proj"], ["mlp.gate.weight", "down_proj"]])
@pytest.mark.parametrize("original", [True, False])
@real_file(
    8, family="Qwen3-MoE", option="LoRA on one of the experts' two parameters", expected="PEFT's merge",
    before="wrongly refused",
)  # fmt: skip
def test_one_parameter_alone(tmp_path: Path, chosen: list[str], original: bool) -> None:
    is_right(tmp_path, qwen3(), original, target_modules=["v_proj"], target_parameters=chosen)


@real_file(
    8, family="Qwen3-MoE", option="square experts: both parameters fit either way", expected="PEFT's merge",
    before="wrongly refused",
)  # fmt: skip
def test_square_experts(tmp_path: Path) -> None:
    is_right(tmp_path, qwen3(moe_intermediate_size=32), False, target_modules=[], target_parameters=FUSED)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"gate_up_proj": 3}},
        {"r": 3, "lora_alpha": 5},
    ],
)
@real_file(
    3, family="Mixtral", option="ranks and alphas of their own for fused experts", expected="PEFT's merge",
    before="wrongly refused",
)  # fmt: skip
def test_scales_of_fused_experts(tmp_path: Path, options: dict[str, Any]) -> None:
    is_right(tmp_path, mixtral(), target_modules=["q_proj"], target_parameters=FUSED, **options)


@real_file(
    8, family="Mixtral", option="two adapters on fused experts, by TIES", expected="TIES of PEFT's merges",
    before="wrongly refused",
)  # fmt: skip
def test_any_method_takes_them(tmp_path: Path) -> None:
    like_full_models(tmp_path, mixtral(), ("ties", "breadcrumbs"), target_modules="all-linear")


@real_file(
    8, family="gpt-oss", option="two adapters on experts fused in the file, by TIES", expected="TIES of PEFT's merges",
    before="wrongly refused",
)  # fmt: skip
def test_any_method_takes_experts_fused_in_the_file(tmp_path: Path) -> None:
    methods = ("ties", "task_arithmetic")
    like_full_models(tmp_path, gpt_oss(), methods, target_modules=["q_proj"], target_parameters=FUSED)


@real_file(
    8, family="Mixtral", option="adapter on a base and an adapter", expected="PEFT's merge of both",
    before="wrongly refused",
)  # fmt: skip
def test_an_adapter_on_another_base(tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path / "base")
    model = hf.MixtralForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapter(model, tmp_path / "a", target_modules="all-linear").merge_and_unload().save_pretrained(tmp_path / "want")
    outcome = cli(
        "merge",
        tmp_path / "base",
        tmp_path / "out",
        "-e",
        f"x={tmp_path / 'base'}+{tmp_path / 'a'}",
        "--dtype",
        "float32",
    )
    assert outcome.code == 0, outcome.said
    equal(state(tmp_path / "out"), state(tmp_path / "want"))
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tmp_path / "want"), atol=1e-5, rtol=1e-5)


@real_file(
    8, family="Mixtral", option="factors that the config does not explain", expected="none",
    before="wrongly refused", now="refused, true cause",
)  # fmt: skip
def test_factors_that_fit_nothing(tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path / "base")
    model = hf.MixtralForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapter(model, tmp_path / "a", target_modules=["q_proj"], target_parameters=FUSED)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())

    def now(**changed: Any) -> Any:
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | changed))
        return merged(tmp_path / "base", tmp_path / "out", a=tmp_path / "a")

    refused(now(target_parameters=["down_proj"]), "experts", "has factors of 2 parameters (of 'down_proj')")
    refused(now(target_parameters="down_proj"), "target_parameters", "list")
    refused(now(target_parameters=["w_in", "w_out"]), "experts", "w_in")
    refused(now(r=5), "rank")
    assert not (tmp_path / "out").exists()
    mixtral(intermediate_size=40).save_pretrained(tmp_path / "other")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    refused(
        merged(tmp_path / "other", tmp_path / "out", a=tmp_path / "a"), "experts", "give the base it was trained on"
    )


@pytest.mark.filterwarnings("ignore")
def test_the_packing_against_a_loop(tmp_path: Path) -> None:
    """The formula, element by element, with factors that no two experts or ranks share."""
    experts, rank, out, into = 3, 2, 48, 32
    model = mixtral()
    model.save_pretrained(tmp_path / "base")
    a = torch.arange(experts * rank * into, dtype=torch.float32).reshape(experts * rank, into) / 100
    b = torch.arange(into * rank * experts, dtype=torch.float32).reshape(into, rank * experts) / 100
    del out
    folder = tmp_path / "a"
    adapter(model, folder, r=rank, lora_alpha=3, target_modules=[], target_parameters=["down_proj"])
    name = "base_model.model.model.layers.0.mlp.experts.lora_{}.weight"
    held = load_file(folder / "adapter_model.safetensors")
    wide = torch.arange(experts * rank * 48, dtype=torch.float32).reshape(experts * rank, 48) / 100
    assert held[name.format("A")].shape == wide.shape
    assert held[name.format("B")].shape == b.shape
    assert a.shape != wide.shape
    held |= {name.format("A"): wide, name.format("B"): b}
    save_file(held, folder / "adapter_model.safetensors", {"format": "pt"})
    outcome = merged(tmp_path / "base", tmp_path / "out", a=folder)
    assert outcome.code == 0, outcome.said
    base, found = state(tmp_path / "base"), state(tmp_path / "out")
    for e in range(experts):
        update = sum(1.5 * torch.outer(b[:, j * experts + e], wide[e * rank + j]) for j in range(rank))
        weight = f"model.layers.0.block_sparse_moe.experts.{e}.w2.weight"
        torch.testing.assert_close(found[weight], base[weight] + update, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_peft_is_as_it_was_measured() -> None:
    """Wrappers are nested in the order of declaration, whatever order the config has."""
    model = mixtral()
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[], target_parameters=FUSED[::-1]))
    shapes = {
        name: tuple(value.shape) for name, value in tuned.named_parameters() if "layers.0" in name and "lora_A" in name
    }
    inner, outer = sorted(shapes, key=len, reverse=True)
    assert "base_layer" in inner
    assert (shapes[inner], shapes[outer]) == ((6, 32), (6, 48))


@real_file(
    8, family="Mixtral", option="adapters on fused experts where they cannot stay adapters", expected="none",
    before="wrongly refused", now="refused, true cause",
)  # fmt: skip
def test_what_cannot_take_them_says_so(tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path / "base")
    model = hf.MixtralForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapter(model, tmp_path / "a", target_modules="all-linear")
    refused(merged(tmp_path / "base", tmp_path / "out", "--as-adapter", "cat", a=tmp_path / "a"), "target_parameters")
    words = ("--as-adapter", "svd", "--rank", "2")
    refused(merged(tmp_path / "base", tmp_path / "out", *words, a=tmp_path / "a"), "leave --as-adapter svd out")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"base_model: {tmp_path / 'base'}\nmodels:\n- {{name: a, model: {tmp_path / 'a'}}}\n")
    refused(cli("route", "build", recipe, tmp_path / "r"), "target_parameters")
    listed = cli("inspect", tmp_path / "a", "--json")
    assert "model.layers.0.mlp.experts.down_proj" in json.loads(listed.out)["adapter"]["parameters"]


@pytest.mark.parametrize("fused_base", [False, True])
@pytest.mark.parametrize("make", [mixtral, qwen3, deepseek])
@real_file(
    8, family="Mixtral, Qwen3-MoE, DeepSeek V3", option="full models, experts fused in one file and apart in another",
    expected="the expert's file", before="wrong cause named",
)  # fmt: skip
def test_full_models_in_two_forms(tmp_path: Path, make: Callable[..., Any], fused_base: bool) -> None:
    make().save_pretrained(tmp_path / "base", save_original_format=not fused_base)
    tuned = make()
    with torch.no_grad():
        for name, value in tuned.named_parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))))
    tuned.save_pretrained(tmp_path / "e", save_original_format=fused_base)
    tuned.save_pretrained(tmp_path / "want", save_original_format=not fused_base)
    assert state(tmp_path / "e").keys() != state(tmp_path / "base").keys()
    outcome = merged(tmp_path / "base", tmp_path / "out", x=tmp_path / "e")
    assert outcome.code == 0, outcome.said
    equal(state(tmp_path / "out"), state(tmp_path / "want"))
