"""What `benchmarks.routed_forward` measures: bases, experts, the sides, the loop they are compared with, the passes.

python -m benchmarks.routed_sides SPEC.json FOUND.json      # one process of a run
"""

import copy
import importlib
import inspect
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.adapters import MODULES, write_adapter
from benchmarks.measure import anonymous_bytes
from benchmarks.worker import work_on
from consilience.routing.expert import Expert, read_factors
from consilience.routing.folder import store
from consilience.routing.local.arrow import directions
from consilience.routing.model import Routing
from consilience.routing.router import Similarity
from consilience.routing.settings import Local, Settings

Side = Literal["base", "ours", "ours, arrow", "peft arrow", "one adapter"]
SIDES: tuple[Side, ...] = get_args(Side)
TOP_K, SCALE = 2, 3.0
"""Experts a token, and the weight of instructions: GLIDER's for tasks that no expert was trained on."""
#: Experts' updates have this standard deviation, as a share of the weights' own, 0.02.
SHARE = 0.05
DECODED = 8
"""Steps of one token that are timed together."""


@dataclass(frozen=True)
class Load:
    """One forward pass: ``tokens`` of each of ``batch`` sequences, ``cached`` tokens of which came before."""

    batch: int
    tokens: int
    cached: int = 0

    @property
    def title(self) -> str:
        """What tables call it."""
        return f"decode {self.batch} after {self.cached}" if self.cached else f"prefill {self.batch} x {self.tokens}"


@dataclass(frozen=True)
class Net:
    """A base: a Llama's ``config`` with random weights, or with none the language suite's; its experts' rank."""

    config: dict[str, int]
    rank: int
    loads: tuple[Load, ...]


_LOADS = (Load(1, 512), Load(8, 128), Load(1, 1, 128), Load(16, 1, 128))
NETS = {
    "llama-2048": Net(
        {
            "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 2, "num_attention_heads": 16,
            "num_key_value_heads": 4, "vocab_size": 1024,
        }, 16, _LOADS,
    ),
    "smollm2-135m": Net({}, 8, _LOADS),
    "tiny": Net(
        {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 64,
        }, 4, (Load(2, 6), Load(3, 1, 5)),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """What a process is to do: ``sides`` in turn, ``repeat`` times after one that is not counted."""

    net: str
    dtype: str
    threads: int
    device: str
    repeat: int
    adapters: tuple[Path, ...]
    sides: tuple[Side, ...]


@dataclass(frozen=True)
class Agreement:
    """Largest difference from the loop, as a share of the largest value: of logits, and of any module's outputs.

    A module is given the very activations that the loop's has seen; logits have the differences of all layers in them.
    """

    logits: float
    module: float


@dataclass(frozen=True)
class Found:
    """What a process found.

    Args:
        imports_mb: anonymous memory before there was any weight, in MB of 10^6 bytes.
        experts_mb: what adapters and gates take in the model's dtype.
        device_mb: peak of a GPU's memory.
        seconds: by pass and side, of every round.
        agreement: of each side of ours with the loop.
    """

    imports_mb: float = 0.0
    experts_mb: float = 0.0
    device_mb: float = 0.0
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict[str, dict[str, list[float]]])
    agreement: dict[str, Agreement] = field(default_factory=dict[str, Agreement])


def base_folder() -> Path:
    """Return where the language suite's base is, if it has been fetched."""
    from suites.language.base import DEFAULT_OUT

    return DEFAULT_OUT


def make_net(name: str, dtype: str) -> Any:
    """Return a base in one of the dtypes, with random weights or the language suite's."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    net, kind = NETS[name], getattr(torch, dtype)
    torch.manual_seed(0)
    if net.config:
        made: Any = AutoModelForCausalLM.from_config(LlamaConfig(**cast(dict[str, Any], net.config)), dtype=kind)
    else:
        made = AutoModelForCausalLM.from_pretrained(base_folder(), dtype=kind)
    return made.eval().requires_grad_(False)


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linear layers that experts adapt, by name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in MODULES:
            yield name, module


def make_adapters(net: str, count: int, folder: Path) -> tuple[Path, ...]:
    """Write experts as PEFT adapters in float32, with random gates and their Arrow directions; return their folders."""
    rank, found = NETS[net].rank, [*layers(make_net(net, "float32"))]
    places: list[Path] = []
    for k in range(count):
        generator = torch.Generator().manual_seed(1 + k)
        factors, gates = dict[str, tuple[Tensor, Tensor]](), dict[str, Tensor]()
        for name, layer in found:
            width = layer.in_features
            size = SHARE * 0.02 * math.sqrt(width / rank)
            a = torch.randn(rank, width, generator=generator) / math.sqrt(width)
            factors[name] = torch.randn(layer.out_features, rank, generator=generator) * size, a
            gates[name] = torch.randn(width, generator=generator)
        places.append(folder / f"{net}-{k}")
        places[-1].mkdir(parents=True)
        write_adapter(places[-1], factors, rank, rank)
        arrows = directions(read_factors(places[-1]))
        store.write_vectors(places[-1], {"phatgoose": gates, "arrow": arrows})
    return tuple(places)


class Silent:
    """A tokenizer's face for a model whose queries are not read: every text is empty."""

    chat_template = None

    def decode(self, ids: Sequence[int], **_options: Any) -> str:
        """Return no text."""
        return ""


class Case:
    """What all sides share: the base's weights, the adapters' folders, tokens, and the sequences' similarities."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.net = spec, NETS[spec.net]
        self.base = make_net(spec.net, spec.dtype).to(spec.device)
        generator = torch.Generator().manual_seed(9)
        most, longest = max(load.batch for load in self.net.loads), max(_length(load) for load in self.net.loads)
        vocabulary = int(self.base.config.vocab_size)
        self.ids = torch.randint(3, vocabulary, (most, longest), generator=generator).to(spec.device)
        self.cosines = 0.5 + 0.4 * torch.rand(most, len(spec.adapters), generator=generator)

    def copy(self) -> Any:
        """Return a model of its own modules, whose weights are the base's."""
        shared: dict[int, Any] = {id(value): value for value in self.base.parameters()}
        return copy.deepcopy(self.base, shared)

    def experts(self) -> list[Expert]:
        """Read the experts."""
        places = self.spec.adapters
        return [Expert(place.name, read_factors(place), store.read_vectors(place)) for place in places]

    def similarity(self, queries: Sequence[str], settings: Settings) -> Similarity:
        """Return every sequence's fixed similarities: what a global router would find, at no cost."""
        return Similarity(self.cosines[: len(queries)], torch.full((len(queries),), float(settings.scale)))


def _length(load: Load) -> int:
    return load.cached + DECODED if load.cached else load.tokens


def _ours(case: Case, settings: Settings) -> Any:
    model = case.copy()
    Routing(model, case.experts(), settings, Silent(), case.similarity)
    return model


def _peft_arrow(case: Case) -> Any:
    from peft import ArrowConfig
    from peft.tuners.lora.arrow import create_arrow_model

    model, places = case.copy(), [str(place) for place in case.spec.adapters]
    create_arrow_model(model, places, ArrowConfig(top_k=TOP_K, rng_seed=0), autocast_adapter_dtype=False)
    return model.eval()


def _one_adapter(case: Case) -> Any:
    from peft import PeftModel

    model = case.copy()
    PeftModel.from_pretrained(model, str(case.spec.adapters[0]), autocast_adapter_dtype=False)
    return model.eval()


INSTRUCTED = Settings("phatgoose", SCALE, top_k=TOP_K)
ARROW = Settings("arrow", top_k=TOP_K)
MAKERS: dict[Side, Callable[[Case], Any]] = {
    "base": Case.copy,
    "ours": lambda case: _ours(case, INSTRUCTED),
    "ours, arrow": lambda case: _ours(case, ARROW),
    "peft arrow": _peft_arrow,
    "one adapter": _one_adapter,
}


class PerToken(nn.Module):
    """A linear layer with experts as one would write it: token by token, expert by expert."""

    def __init__(self, name: str, linear: nn.Linear, experts: Sequence[Expert], local: Local, bias: Tensor) -> None:
        super().__init__()
        self.name, self.linear, self.local, self.bias = name, linear, local, bias
        kind = linear.weight
        factors = [expert.factors[name] for expert in experts]
        self.pairs = [(one.a.to(kind).float(), one.b.to(kind).float()) for one in factors]
        self.vectors = [expert.vectors[local][name].to(kind.device).float() for expert in experts]

    def forward(self, u: Tensor) -> Tensor:
        """Map [B, T, in] to [B, T, out]."""
        y = self.linear(u).float()
        for row in range(u.shape[0]):
            for token in range(u.shape[1]):
                y[row, token] += self._update(u[row, token].float(), self.bias[row].tolist())
        return y.to(u.dtype)

    def _update(self, u: Tensor, bias: Sequence[float]) -> Tensor:
        logits = [self._logit(u, v) + more for v, more in zip(self.vectors, bias, strict=True)]
        exponentials = [math.exp(logit - max(logits)) for logit in logits]
        shares = [value / sum(exponentials) for value in exponentials]
        best = sorted(range(len(shares)), key=lambda k: -shares[k])[:TOP_K]
        total = sum(shares[k] for k in best) + 1e-6
        parts = [shares[k] / total * (self.pairs[k][1] @ (self.pairs[k][0] @ u)) for k in best]
        return torch.stack(parts).sum(0)

    def _logit(self, u: Tensor, v: Tensor) -> float:
        if self.local == "arrow":
            return abs(float(u @ v))
        return float(F.layer_norm(u, u.shape) @ F.layer_norm(v, v.shape)) / math.sqrt(len(u))


def loop(case: Case, settings: Settings) -> Any:
    """Return the routed model as a loop over tokens."""
    model, experts = case.copy(), case.experts()
    bias = case.cosines * float(settings.scale)
    for name, layer in [*layers(model)]:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, PerToken(name, layer, experts, settings.local, bias))
    return model


def compare(case: Case, model: Any, settings: Settings) -> Agreement:
    """Return how far a routed model is from the loop on two sequences.

    The loop reads them at once, the model all but the last token and then that one.
    """
    ids, exact = case.ids[:2, : min(6, case.ids.shape[1])], loop(case, settings)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(module: PerToken, args: tuple[Tensor], output: Tensor) -> None:
        seen[module.name] = (args[0].clone(), output.clone())

    for module in exact.modules():
        if isinstance(module, PerToken):
            module.register_forward_hook(keep)
    with torch.no_grad():
        logits = exact(input_ids=ids).logits
        first = model(input_ids=ids[:, :-1], use_cache=True)
        name = cache_name(model)
        last = model(input_ids=ids[:, -1:], use_cache=True, **{name: first[name]})
        with model.routing.queries([""] * len(ids)):
            modules = [_off(model.get_submodule(name)(u), y) for name, (u, y) in seen.items()]
    return Agreement(_off(torch.cat([first.logits, last.logits], 1), logits), max(modules))


def cache_name(model: Any) -> str:
    """Return what a model calls its cache, as an argument and in its answer: transformers renamed it in 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _off(found: Tensor, exact: Tensor) -> float:
    """Return the largest difference, as a share of the largest value."""
    return float((found.float() - exact.float()).abs().max() / exact.float().abs().max())


class Pass:
    """A side's forward pass, ready to be timed again and again."""

    def __init__(self, model: Any, load: Load, case: Case) -> None:
        self.model, self.load, self.device = model, load, case.spec.device
        self.ids = case.ids[: load.batch, : _length(load)]
        self.cache: Any = None
        self.cache_name = cache_name(model)
        if load.cached:
            with torch.no_grad():
                self.cache = model(input_ids=self.ids[:, : load.cached], use_cache=True)[self.cache_name]

    def __call__(self) -> float:
        """Return the seconds of a pass."""
        with torch.no_grad():
            begun = self._now()
            if self.cache is None:
                self.model(input_ids=self.ids, use_cache=True, logits_to_keep=1)
                return self._now() - begun
            for token in self.ids[:, self.load.cached :].split(1, 1):
                self.model(input_ids=token, use_cache=True, logits_to_keep=1, **{self.cache_name: self.cache})
            seconds = (self._now() - begun) / DECODED
            self.cache.crop(-DECODED)
        return seconds

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def work(spec: Spec) -> Found:
    """Run the sides of a process in turn."""
    torch.set_num_threads(spec.threads)
    imports = _imported()
    case = Case(spec)
    models = {side: MAKERS[side](case) for side in spec.sides}
    agreement: dict[str, Agreement] = {}
    if len(spec.sides) > 1:
        ours: dict[Side, Settings] = {"ours": INSTRUCTED, "ours, arrow": ARROW}
        agreement = {side: compare(case, models[side], chosen) for side, chosen in ours.items() if side in models}
    seconds: dict[str, dict[str, list[float]]] = {}
    for load in case.net.loads:
        passes = {side: Pass(model, load, case) for side, model in models.items()}
        rounds = [{side: one() for side, one in passes.items()} for _ in range(spec.repeat + 1)][1:]
        seconds[load.title] = {side: [each[side] for each in rounds] for side in spec.sides}
    peak = torch.cuda.max_memory_allocated() / 1e6 if spec.device == "cuda" else 0.0
    return Found(imports, _experts_mb(case), peak, seconds, agreement)


def _experts_mb(case: Case) -> float:
    """Return what all adapters and one gate of each take in the model's dtype."""
    rank = case.net.rank
    each = sum(rank * (layer.in_features + layer.out_features) + layer.in_features for _, layer in layers(case.base))
    return each * len(case.spec.adapters) * getattr(torch, case.spec.dtype).itemsize / 1e6


def _imported() -> float:
    """Import what any side needs and return the anonymous memory in MB."""
    for name in (
        "peft.tuners.lora.arrow", "transformers.models.llama.modeling_llama", "safetensors.torch",
        "consilience.kernels.routed",
    ):  # fmt: skip
        importlib.import_module(name)
    return anonymous_bytes(os.getpid()) / 1e6


def main(arguments: Sequence[str]) -> None:
    """Do what a file says, and write what was found to another."""
    work_on(arguments, Spec, work)


if __name__ == "__main__":
    main(sys.argv[1:])
