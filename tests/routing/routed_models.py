"""Tiny models with random experts, and their adapters on disk."""

import json
from pathlib import Path
from typing import Any

import torch
from tiny_models import make_llama, make_t5, make_tokenizer
from torch import Tensor, nn

from consilience.routing.expert import Expert
from consilience.routing.layer import Factors
from consilience.routing.local.arrow import directions
from consilience.routing.model import Routing
from consilience.routing.router import Similarity
from consilience.routing.settings import Settings

LLAMA = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
T5 = ("q", "v", "o", "wi", "wo")
PROMPTS = {
    "e0": ["the cat sat", "the cat sat on the mat", "a cat and a mat"],
    "e1": ["is it positive", "is the sentiment negative?", "positive or negative?"],
    "e2": ["def f(x): return the cat", "return x + 1", "def g(y): return y or negative"],
}
TFIDF: dict[str, Any] = {"describer": "none", "embedder": "tfidf", "held_in": 0}


def linears(model: nn.Module, targets: tuple[str, ...]) -> dict[str, nn.Linear]:
    """Linear layers by name, of those whose last part is a target."""
    modules = model.named_modules()
    return {name: m for name, m in modules if isinstance(m, nn.Linear) and name.split(".")[-1] in targets}


def make_expert(model: nn.Module, name: str, seed: int, rank: int = 3, targets: tuple[str, ...] = LLAMA) -> Expert:
    """Random factors and gates on every target."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    factors, gates, means = dict[str, Factors](), dict[str, Tensor](), dict[str, Tensor]()
    for module, layer in linears(model, targets).items():
        factors[module] = Factors(0.4 * normal(rank, layer.in_features), 0.4 * normal(layer.out_features, rank))
        gates[module], means[module] = normal(layer.in_features), normal(layer.in_features)
    return Expert(name, factors, {"phatgoose": gates, "arrow": directions(factors), "average": means})


def make_experts(model: nn.Module, count: int = 3, targets: tuple[str, ...] = LLAMA) -> list[Expert]:
    """Experts of different ranks; the second leaves a part of the layers alone."""
    ranks = [2 + k for k in range(count)]
    return [make_expert(model, f"e{k}", 10 + k, ranks[k], targets[:-1] if k == 1 else targets) for k in range(count)]


class ByLetter:
    """A global router: the similarity to expert k is the share of its letter in the query."""

    def __init__(self, count: int) -> None:
        self.count, self.asked = count, list[str]()

    def __call__(self, queries: Any, settings: Settings) -> Similarity:
        self.asked += queries
        shares = [[text.count(chr(97 + k)) / max(1, len(text)) for k in range(self.count)] for text in queries]
        scale = settings.most_scale if settings.scale == "adaptive" else float(settings.scale)
        return Similarity(torch.tensor(shares), torch.full((len(shares),), scale))


def routed_llama(settings: Settings, count: int = 3, **changes: Any) -> Any:
    """A tiny Llama that routes among random experts."""
    model = make_llama(**changes).requires_grad_(False)
    Routing(model, make_experts(model, count), settings, make_tokenizer(), ByLetter(count))
    return model


def routed_t5(settings: Settings, count: int = 3) -> Any:
    """A tiny T5 that routes among random experts."""
    model = make_t5().requires_grad_(False)
    Routing(model, make_experts(model, count, T5), settings, make_tokenizer(), ByLetter(count))
    return model


def merge_into(model: nn.Module, experts: list[Expert], weights: list[float]) -> None:
    """Add fixed weights of experts to a plain model's own weights."""
    modules = dict(model.named_modules())
    with torch.no_grad():
        for expert, weight in zip(experts, weights, strict=True):
            for name, one in expert.factors.items():
                layer: Any = modules[name]
                layer.weight += weight * one.b @ one.a


def write_adapter(expert: Expert, place: Path) -> Path:
    """Save an expert as PEFT would, with alpha / r = 1."""
    from safetensors.torch import save_file

    place.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    for module, one in expert.factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = one.a.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = one.b.contiguous()
    save_file(tensors, place / "adapter_model.safetensors")
    rank = next(iter(expert.factors.values())).rank
    targets = sorted({module.split(".")[-1] for module in expert.factors})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets, "bias": "none"}
    (place / "adapter_config.json").write_text(json.dumps(config))
    return place


def write_zoo(place: Path) -> Path:
    """Write a base, three adapters and their rows."""
    model = make_llama()
    model.save_pretrained(place / "base")
    make_tokenizer().save_pretrained(place / "base")
    for expert in make_experts(model):
        write_adapter(expert, place / "adapters" / expert.name)
        rows = [{"prompt": prompt, "response": f"{expert.name} {n}"} for n, prompt in enumerate(PROMPTS[expert.name])]
        (place / f"{expert.name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def recipe_of(zoo: Path, names: tuple[str, ...] = ("e0", "e1", "e2"), **changes: Any) -> dict[str, Any]:
    """A recipe for experts of such a folder."""
    models = [
        {"model": str(zoo / "adapters" / name), "name": name, "data": {"train": str(zoo / f"{name}.jsonl")}}
        for name in names
    ]
    plain: dict[str, Any] = {"base_model": str(zoo / "base"), "models": models, "routing": {"local": "arrow"}}
    return plain | changes
