"""Tiny random models of twelve architectures: merged files equal a plain torch merge, and transformers runs them."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import consilience as cs
from consilience.engine.summary import Summary

hf: Any = importlib.import_module("transformers")
State = dict[str, torch.Tensor]

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ENCODER = {k: v for k, v in TEXT.items() if k not in ("num_key_value_heads", "bos_token_id", "eos_token_id")}
VISION = {k: v for k, v in ENCODER.items() if k not in ("vocab_size", "max_position_embeddings", "pad_token_id")}
IMAGE = 60  # the image token of the multimodal models


def token_inputs() -> dict[str, Any]:
    return {"input_ids": torch.arange(3, 11).reshape(1, 8)}


def image_tokens(count: int, before: int = 1) -> torch.Tensor:
    return torch.tensor([[before] + [IMAGE] * count + [2]])


def llama() -> tuple[Any, dict[str, Any]]:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)), token_inputs()


def mistral() -> tuple[Any, dict[str, Any]]:
    return hf.MistralForCausalLM(hf.MistralConfig(**TEXT, sliding_window=4)), token_inputs()


def qwen2() -> tuple[Any, dict[str, Any]]:
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**TEXT, tie_word_embeddings=True)), token_inputs()


def gemma3() -> tuple[Any, dict[str, Any]]:
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**TEXT, head_dim=8)), token_inputs()


def t5() -> tuple[Any, dict[str, Any]]:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = hf.T5Config(vocab_size=64, decoder_start_token_id=0, **sizes)
    return hf.T5ForConditionalGeneration(config), token_inputs() | {"labels": torch.arange(4).reshape(1, 4)}


def bert() -> tuple[Any, dict[str, Any]]:
    return hf.BertForSequenceClassification(hf.BertConfig(**ENCODER)), token_inputs()


def vit() -> tuple[Any, dict[str, Any]]:
    config = hf.ViTConfig(**VISION, image_size=16, patch_size=8)
    return hf.ViTForImageClassification(config), {"pixel_values": torch.linspace(0, 1, 768).reshape(1, 3, 16, 16)}


def resnet() -> tuple[Any, dict[str, Any]]:
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=3)
    return hf.ResNetForImageClassification(config), {"pixel_values": torch.linspace(0, 1, 3072).reshape(1, 3, 32, 32)}


def mixtral() -> tuple[Any, dict[str, Any]]:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**TEXT, num_local_experts=3, num_experts_per_tok=2)), token_inputs()


def mamba() -> tuple[Any, dict[str, Any]]:
    config = hf.MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2)
    return hf.MambaForCausalLM(config), token_inputs()


def qwen2_vl() -> tuple[Any, dict[str, Any]]:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    tokens = {"video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    config = hf.Qwen2VLConfig(
        text_config=TEXT | {"rope_parameters": rope}, vision_config=vision, image_token_id=IMAGE, **tokens
    )
    ids = image_tokens(2, before=62)
    inputs = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == IMAGE).long(),
        "pixel_values": torch.linspace(0, 1, 8 * 96).reshape(8, 96),
        "image_grid_thw": torch.tensor([[1, 4, 2]]),
    }
    return hf.Qwen2VLForConditionalGeneration(config), inputs


def internvl() -> tuple[Any, dict[str, Any]]:
    vision = VISION | {"image_size": [16, 16], "patch_size": [4, 4]}
    text = hf.Qwen2Config(**TEXT).to_dict()
    config = hf.InternVLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, downsample_ratio=0.5)
    inputs = {"input_ids": image_tokens(4), "pixel_values": torch.linspace(0, 1, 768).reshape(1, 3, 16, 16)}
    return hf.InternVLForConditionalGeneration(config), inputs


MODELS: list[Callable[[], tuple[Any, dict[str, Any]]]] = [
    llama, mistral, qwen2, gemma3, t5, bert, vit, resnet, mixtral, mamba, qwen2_vl, internvl,
]  # fmt: skip
#: Models kept in 16 bits; the others stay float32.
HALF = {"llama": torch.bfloat16, "qwen2": torch.bfloat16, "t5": torch.float16, "qwen2_vl": torch.bfloat16}
WEIGHTS = {"first": 0.7, "second": -0.4}


@dataclass
class Family:
    """A base and two experts on disk, what to feed them, and the files' tensors."""

    folder: Path
    kind: Any
    inputs: dict[str, Any]
    states: dict[str, State]

    def path(self, name: str) -> str:
        return str(self.folder / name)

    @property
    def experts(self) -> dict[str, str]:
        return {name: self.path(name) for name in WEIGHTS}


def perturb(model: Any, generator: torch.Generator) -> None:
    """Change every parameter and buffer, as fine-tuning would."""
    done: set[int] = set()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.data_ptr() in done:  # tied: one change
                continue
            done.add(value.data_ptr())
            if not value.is_floating_point():
                value += 3
                continue
            value += (torch.randn(value.shape, generator=generator) * 0.05).to(value.dtype)
            if name.endswith("running_var"):
                value.abs_().add_(0.5)


QUICK = {llama, t5, resnet}


@pytest.fixture(
    scope="module",
    params=[pytest.param(make, marks=() if make in QUICK else pytest.mark.slow) for make in MODELS],
    ids=lambda make: make.__name__,
)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    hf.utils.logging.disable_progress_bar()
    hf.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param.__name__)
    model, inputs = request.param()
    model = model.to(HALF.get(request.param.__name__, torch.float32)).eval()
    perturb(model, torch.Generator().manual_seed(1))  # or all biases, norms and buffers would be zeros and ones
    model.save_pretrained(folder / "base")
    for seed, name in enumerate(WEIGHTS):
        expert = type(model).from_pretrained(folder / "base")
        perturb(expert, torch.Generator().manual_seed(2 + seed))
        expert.save_pretrained(folder / name)
    states = {name: load_file(folder / name / "model.safetensors") for name in ("base", *WEIGHTS)}
    inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    return Family(folder, type(model), inputs, states)


def trimmed(tau: torch.Tensor, density: float) -> torch.Tensor:
    flat = tau.reshape(-1)
    keep = max(int(density * flat.numel()), 1)
    order = flat.abs().float().sort(descending=True, stable=True).indices[:keep]
    return torch.zeros_like(flat).index_copy_(0, order, flat[order]).reshape(tau.shape)


def torch_merge(states: dict[str, State], name: str, method: str) -> torch.Tensor:
    """The merge of one tensor of the files, in float64."""
    base, *experts = (states[model][name] for model in ("base", *WEIGHTS))
    if not base.is_floating_point():
        return base
    weights = torch.tensor([1.0, 1.0] if method == "ties" else list(WEIGHTS.values()), dtype=torch.float64)
    thetas = torch.stack([e.double() for e in experts])
    column = weights.reshape(-1, *[1] * base.ndim)
    if name.endswith(("running_mean", "running_var")):  # averaged over the experts, whatever the method
        return (column.abs() * thetas).sum(0) / weights.abs().sum()
    if method == "linear":
        return (column * thetas).sum(0) / weights.sum()
    taus = thetas - base.double()
    if method == "task_arithmetic":
        return base.double() + 0.8 * (column * taus).sum(0)
    taus = torch.stack([trimmed(t, 0.4) for t in taus])
    agree = torch.where(taus.sum(0) >= 0, taus > 0, taus < 0)
    return base.double() + (taus * agree).sum(0) / agree.sum(0).clamp(min=1)


METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weight": WEIGHTS},
    "task_arithmetic": {"weight": WEIGHTS, "lambda": 0.8},
    "ties": {"density": 0.4},
}


def run_model(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits.double()


@pytest.mark.parametrize("method", METHODS)
def test_merged_model_loads_runs_and_equals_a_torch_merge(family: Family, method: str, tmp_path: Path) -> None:
    summary = cs.merge(family.path("base"), family.experts, tmp_path / "out", method=method, **METHODS[method])
    assert isinstance(summary, Summary)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == family.states["base"].keys()
    for name, tensor in merged.items():
        base = family.states["base"][name]
        assert (tensor.dtype, tensor.shape) == (base.dtype, base.shape)
        expected = torch_merge(family.states, name, method).to(tensor.dtype)
        if tensor.is_floating_point():
            torch.testing.assert_close(
                tensor, expected, rtol=torch.finfo(tensor.dtype).eps, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}"
            )
        else:
            assert torch.equal(tensor, expected), name
    model, info = family.kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == next(t.dtype for t in merged.values() if t.is_floating_point())
    logits = run_model(model, family.inputs)
    assert logits.isfinite().all()
    assert not torch.equal(logits, run_model(family.kind.from_pretrained(family.path("base")), family.inputs))
    buffers = [name for name in merged if name.endswith(("running_mean", "running_var"))]
    assert any("BatchNorm" in note for note in summary.notes) == bool(buffers)


def test_merging_files_is_merging_models(family: Family, tmp_path: Path) -> None:
    """Names in files and in modules differ (fused experts, prefixes); task arithmetic must not see the difference."""
    cs.merge(family.path("base"), family.experts, tmp_path / "out", weight=WEIGHTS, out_dtype="float32")
    base, *experts = (family.kind.from_pretrained(family.path(n)).float() for n in ("base", *WEIGHTS))
    others = [expert.state_dict() for expert in experts]
    done: set[int] = set()
    with torch.no_grad():
        for name, value in base.state_dict().items():
            if value.data_ptr() in done:  # tied: changed once
                continue
            done.add(value.data_ptr())
            if name.endswith(("running_mean", "running_var")):
                shares = [abs(w) / sum(map(abs, WEIGHTS.values())) for w in WEIGHTS.values()]
                value.copy_(sum(s * other[name] for s, other in zip(shares, others, strict=True)))
            elif value.is_floating_point():
                start = value.double()
                change = sum(w * (o[name].double() - start) for w, o in zip(WEIGHTS.values(), others, strict=True))
                value.copy_(start + change)
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in family.inputs.items()}
    merged = family.kind.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(run_model(merged, inputs), run_model(base, inputs), rtol=1e-4, atol=1e-4)


def test_batch_norm_buffers_are_averaged_and_counts_copied(tmp_path: Path) -> None:
    """By hand, on a flat state dict: weights 3 and -1 average as 3/4 and 1/4, and nothing is extrapolated."""

    def state(mean: float, count: int) -> State:
        return {
            "bn.weight": torch.tensor([mean]),
            "bn.running_mean": torch.tensor([mean]),
            "bn.running_var": torch.tensor([mean + 1]),
            "bn.num_batches_tracked": torch.tensor(count),
        }

    for name, values in {"base": (0.0, 5), "a": (4.0, 6), "b": (8.0, 7)}.items():
        save_file(state(*values), tmp_path / f"{name}.safetensors")
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("a", "b")}
    for method, weight in (("task_arithmetic", 4.0), ("ties", 4.0), ("linear", 2.0)):
        out = tmp_path / f"{method}.safetensors"
        cs.merge(tmp_path / "base.safetensors", paths, out, method=method, weight={"a": 3.0, "b": -1.0})
        merged = load_file(out)
        assert merged["bn.running_mean"].item() == 5.0
        assert merged["bn.running_var"].item() == 6.0
        assert merged["bn.num_batches_tracked"].item() == 5
        assert merged["bn.weight"].item() == weight


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "task_arithmetic"])
def test_tied_embeddings_stored_twice_stay_equal(method: str, tmp_path: Path) -> None:
    """Random methods and random rounding must treat both copies alike, or loading would pick one of two models."""
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, tie_word_embeddings=True)).to(torch.bfloat16)
    for name in ("base", "first", "second"):
        model.save_pretrained(tmp_path / name)
        state = load_file(tmp_path / name / "model.safetensors")
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        save_file(state, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        perturb(model, torch.Generator().manual_seed(len(name)))
    density: dict[str, Any] = {} if method == "task_arithmetic" else {"density": 0.5}
    paths = [tmp_path / "first", tmp_path / "second"]
    cs.merge(tmp_path / "base", paths, tmp_path / "out", method=method, stochastic_rounding=True, **density)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert not torch.equal(merged["lm_head.weight"], base["lm_head.weight"])
