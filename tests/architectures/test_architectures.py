"""Tiny random models of forty architectures: merged files equal a plain torch merge, and transformers runs them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, GENERATING, TEXT, hf
from safetensors.torch import load_file, save_file

import consilience as cs
from consilience.engine.summary import Summary

State = dict[str, torch.Tensor]
#: Models kept in 16 bits; the others stay float32.
HALF = {
    **dict.fromkeys(("llama", "qwen2", "qwen2_vl", "gemma2", "deepseek_v3", "gpt_oss", "mamba2"), torch.bfloat16),
    **dict.fromkeys(("t5", "gpt_neox", "llava", "modernbert"), torch.float16),
}
WEIGHTS = {"first": 0.7, "second": -0.4}


@dataclass
class Family:
    """A base and two experts on disk, what to feed them, and the files' tensors."""

    folder: Path
    kind: Any
    inputs: dict[str, Any]
    generates: bool
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


#: One of each kind; the others repeat it.
QUICK = ("llama", "gemma3", "t5", "qwen3_moe", "mamba2", "bert", "resnet", "qwen2_vl", "wav2vec2")


@pytest.fixture(
    scope="module",
    params=[pytest.param(make, marks=() if make.__name__ in QUICK else pytest.mark.slow) for make in FAMILIES],
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
    return Family(folder, type(model), inputs, request.param in GENERATING, states)


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
        answer = model.eval()(**inputs)
    value = next(answer[key] for key in ("logits", "logits_per_image", "last_hidden_state") if key in answer)
    return value.double()


def generate(model: Any, inputs: dict[str, Any]) -> list[int]:
    """Return the tokens that follow the prompt, chosen greedily."""
    prompt = {key: value for key, value in inputs.items() if key != "labels"}
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    return model.eval().generate(**prompt, **settings)[0, -5:].tolist()


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
    if family.generates:
        assert len(generate(model, family.inputs)) == 5
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
    if family.generates:
        assert generate(merged, inputs) == generate(base, inputs)


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
