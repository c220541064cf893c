"""What must hold of Expert Merging whatever the code looks like: identities, gradients, optima, reruns."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_experts import (
    MODULES,
    WORDS,
    State,
    read_state,
    recipe_of,
    sentences,
    write_adapter,
    write_base,
    write_expert,
    write_recipe,
    write_rows,
    write_state,
)

import consilience as cs
from consilience.api import learn
from consilience.coefficients import Coefficients, constant, load_coefficients, make_groups, save_coefficients
from consilience.coefficients.coefficients import Alpha
from consilience.engine.merge import run_merge
from consilience.engine.plan import make_plan
from consilience.learned.expert_merging import PRESETS, ExpertMerging, expert_merging
from consilience.learned.loop import schedule
from consilience.learned.run import Machine, Run, Workshop, groups_of, open_workshop
from consilience.methods.signature import settings_of
from consilience.objectives.alignment import Hidden, Logits, logit_divergence, soft_cross_entropy
from consilience.objectives.objective import Objective
from consilience.recipe.schema import parse_recipe
from consilience.student.bank import mergeable
from consilience.student.student import load_any

Chunks = Callable[[str], int] | None
#: Everything off that is not under test.
PLAIN: dict[str, Any] = {"hidden_weight": 0.0, "precision": "float32", "gamma": 0.0, "schedule": "constant"}


def written(folder: Path) -> dict[str, bytes]:
    """A folder's weight files, byte for byte."""
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def equal_states(ours: State, theirs: State) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[n].dtype == theirs[n].dtype and torch.equal(ours[n], theirs[n]) for n in ours
    )


def constant_file(
    path: Path, base: Path, experts: Mapping[str, Path], value: float, chunks: Chunks = None
) -> Coefficients:
    """Save coefficients that are ``value`` for every expert and tensor."""
    models = [{"model": str(folder), "name": name} for name, folder in experts.items()]
    recipe = parse_recipe({"method": "task_arithmetic", "base_model": str(base), "models": models}, "test")
    plan = make_plan(recipe)
    groups = make_groups(mergeable(plan, lambda name: False), "tensor", chunks)
    plan.close()
    made = constant(list(experts), groups, [value] * len(experts))
    save_coefficients(path, made)
    return made


# ----------------------------------------------------------------------------------------------------------------------
# B1, B8: constant coefficients, through the streaming engine.

FORMS = ["full float32", "full bfloat16", "adapters float32", "adapters bfloat16", "shards bfloat16", "mixed float16"]


@pytest.fixture(scope="session")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Path]]]:
    """A base and two experts in every form they come in."""
    made: dict[str, tuple[Path, dict[str, Path]]] = {}
    for form in FORMS:
        place = tmp_path_factory.mktemp(form.replace(" ", "-"))
        kind, _, name = form.partition(" ")
        dtype: torch.dtype = getattr(torch, name)
        shards = 3 if kind == "shards" else 1
        base = write_base(place / "base", dtype=dtype, shards=shards)
        if kind == "adapters":
            experts = [write_adapter(place / "one", base, 1), write_adapter(place / "two", base, 2, use_rslora=True)]
        else:
            experts = [write_expert(place / "one", base, 1, shards=shards), place / "two"]
            if kind == "mixed":
                write_adapter(place / "two", base, 2)
            else:
                write_expert(place / "two", base, 2, shards=2 if shards > 1 else 1)
        made[form] = base, {"one": experts[0], "two": experts[1]}
    return made


@pytest.mark.parametrize("form", FORMS)
def test_all_zero_coefficients_give_the_bases_bytes(
    forms: dict[str, tuple[Path, dict[str, Path]]], form: str, tmp_path: Path
) -> None:
    base, experts = forms[form]
    constant_file(tmp_path / "coefficients", base, experts, 0.0)
    cs.merge(base, experts, tmp_path / "out", method="coefficients", coefficients=tmp_path / "coefficients")
    assert equal_states(read_state(tmp_path / "out"), read_state(base))


@pytest.mark.parametrize("form", FORMS)
def test_one_expert_with_coefficient_one_gives_the_experts_bytes(
    forms: dict[str, tuple[Path, dict[str, Path]]], form: str, tmp_path: Path
) -> None:
    base, experts = forms[form]
    one = {"one": experts["one"]}
    constant_file(tmp_path / "coefficients", base, one, 1.0)
    cs.merge(base, one, tmp_path / "out", method="coefficients", coefficients=tmp_path / "coefficients")
    if form.startswith("adapters"):  # an adapter has no bytes of its own; the base with it folded in has
        cs.merge(base, one, tmp_path / "folded")
        assert equal_states(read_state(tmp_path / "out"), read_state(tmp_path / "folded"))
    else:
        assert equal_states(read_state(tmp_path / "out"), read_state(experts["one"]))


@pytest.mark.parametrize("chunks", [None, lambda name: 3], ids=["whole", "chunks"])
@pytest.mark.parametrize("form", FORMS)
def test_equal_coefficients_give_the_bytes_of_task_arithmetic(
    forms: dict[str, tuple[Path, dict[str, Path]]], form: str, chunks: Chunks, tmp_path: Path
) -> None:
    base, experts = forms[form]
    constant_file(tmp_path / "coefficients", base, experts, 0.3, chunks)
    cs.merge(base, experts, tmp_path / "ours", method="coefficients", coefficients=tmp_path / "coefficients")
    cs.merge(base, experts, tmp_path / "theirs", weight=0.3)
    assert written(tmp_path / "ours") == written(tmp_path / "theirs")


def test_a_learned_method_that_takes_no_step_is_task_arithmetic(zoo: Path, tmp_path: Path) -> None:
    experts = {name: zoo / name for name in ("a", "lora")}
    recipe = parse_recipe(recipe_of(zoo, experts, parameters={"steps": 0, "alphabar": 0.3}), "test")
    cs.merge_recipe(recipe, tmp_path / "ours")
    cs.merge(zoo / "base", experts, tmp_path / "theirs", weight=0.3)
    assert written(tmp_path / "ours") == written(tmp_path / "theirs")


def test_a_recipe_applies_the_coefficients_that_another_run_found(zoo: Path, tmp_path: Path) -> None:
    experts = {name: zoo / name for name in ("a", "b")}
    settings = {"steps": 2, "learning_rate": 0.1}
    cs.merge_recipe(parse_recipe(recipe_of(zoo, experts, parameters=settings), "test"), tmp_path / "learned")
    found = tmp_path / "learned" / "consilience"
    again = recipe_of(zoo, {"b": experts["b"], "a": experts["a"]}, merge_method="coefficients", coefficients=str(found))
    cs.merge_recipe(parse_recipe(again, "test"), tmp_path / "applied")
    assert written(tmp_path / "applied") == written(tmp_path / "learned")
    assert np.ptp(load_coefficients(found).alpha) > 0.05


# ----------------------------------------------------------------------------------------------------------------------
# B3 to B6: the losses on logits.


def logits(seed: int, count: int = 5, vocabulary: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, vocabulary, dtype=torch.float64, generator=generator) * 3


def slope(function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> torch.Tensor:
    leaf = at.clone().requires_grad_(True)
    return torch.autograd.grad(function(leaf).sum(), leaf)[0]


def test_divergence_is_zero_for_equal_distributions_and_else_positive() -> None:
    z = logits(0)
    for temperature in (0.5, 1.0, 3.0):
        assert logit_divergence(z + 2.0, z, temperature).abs().max() < 1e-14
        assert slope(lambda x: logit_divergence(x, z, 1.0), z).abs().max() < 1e-15
        assert (logit_divergence(logits(1), z, temperature) > 1e-3).all()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_cross_entropy_is_the_divergence_plus_the_experts_entropy(temperature: float) -> None:
    ours, expert = logits(0), logits(1)
    p = torch.softmax(expert / temperature, -1)
    entropy = -(p * p.log()).sum(-1) * temperature**2
    difference = soft_cross_entropy(ours, expert, temperature) - logit_divergence(ours, expert, temperature)
    torch.testing.assert_close(difference, entropy, rtol=1e-12, atol=1e-12)
    slopes = [slope(lambda x, f=f: f(x, expert, temperature), ours) for f in (logit_divergence, soft_cross_entropy)]
    torch.testing.assert_close(*slopes, rtol=1e-6, atol=1e-12)


def test_at_high_temperature_the_divergence_is_the_centred_squared_difference() -> None:
    ours, expert = logits(0) / 3, logits(1) / 3
    difference = ours - expert
    centred = difference - difference.mean(-1, keepdim=True)
    limit = centred.square().sum(-1) / (2 * ours.shape[-1])
    torch.testing.assert_close(logit_divergence(ours, expert, 100.0), limit, rtol=0.01, atol=0)
    at = [slope(lambda x, t=t: logit_divergence(x, expert, t), ours) for t in (1000.0, 3000.0)]
    torch.testing.assert_close(*at, rtol=0.01, atol=1e-4)


def test_losses_ignore_a_constant_added_to_all_logits() -> None:
    ours, expert = logits(0), logits(1)
    for loss in (logit_divergence, soft_cross_entropy):
        torch.testing.assert_close(loss(ours + 7.0, expert - 3.0, 2.0), loss(ours, expert, 2.0), rtol=1e-12, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# B3, B7, B11, B12: the objective as a function of the coefficients, against an explicit merge in float64.


def exact_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Llama's norm without its detour through float32."""
    return module.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)


@contextlib.contextmanager
def opened(
    zoo: Path,
    names: Sequence[str],
    *,
    grouping: str = "tensor",
    chunks: Chunks = None,
    exclude: Sequence[str] = (),
    layers: Sequence[int] | str = (),
    tokens: int = 4096,
    precision: Any = "float64",
    threads: int = 1,
) -> Generator[tuple[Workshop, Coefficients]]:
    """A student of some experts, and coefficients of 0.3 for it."""
    recipe = parse_recipe(recipe_of(zoo, {name: zoo / name for name in names}), "test")
    plan = make_plan(recipe)
    run = Run(plan, machine=Machine(threads=threads))
    start = groups_of(run, grouping, exclude, [0.3] * len(names))
    if chunks is not None:
        tensors = [tensor for group in start.groups for tensor in group.tensors]
        start = constant(names, make_groups(tensors, grouping, chunks), [0.3] * len(names))
    shop = open_workshop(run, start, replace(paper_settings().rows, tokens=tokens), layers=layers, precision=precision)
    try:
        yield shop, start
    finally:
        shop.close()
        plan.close()


def paper_settings() -> ExpertMerging:
    """The settings of a recipe that names the paper's preset."""
    values = {name: parameter.default for name, parameter in expert_merging.parameters.items()}
    return settings_of(ExpertMerging, values | PRESETS["paper"])


def deltas(place: Path, name: str) -> State:
    """An expert's task vectors in float64, from its files."""
    base = read_state(place / "base")
    if not (place / name / "adapter_config.json").is_file():
        own = read_state(place / name)
        return {n: own[n].double() - base[n].double() for n in base}
    config = json.loads((place / name / "adapter_config.json").read_text())
    factors = read_state(place / name)
    scale = config["lora_alpha"] / (config["r"] ** (0.5 if config.get("use_rslora") else 1))
    return {
        f"{module}.weight": scale
        * factors[f"base_model.model.{module}.lora_B.weight"].double()
        @ factors[f"base_model.model.{module}.lora_A.weight"].double()
        for module in MODULES
    }


class Reference:
    """Expert Merging written down plainly: an explicit merge, ``functional_call``, autograd."""

    def __init__(self, zoo: Path, names: Sequence[str], start: Coefficients) -> None:
        self.model: Any = load_any(zoo / "base").double().requires_grad_(False)
        self.base = {n: v.double() for n, v in read_state(zoo / "base").items()}
        self.taus = [deltas(zoo, name) for name in names]
        self.start = start

    def merged(self, alpha: torch.Tensor) -> State:
        weights = dict(self.base)
        for name, pieces in self.start.pieces.items():
            parts: list[torch.Tensor] = []
            for piece in pieces:
                part = self.base[name].flatten()[piece.start : piece.stop]
                for k, tau in enumerate(self.taus):
                    if name in tau:
                        part = part + alpha[k, piece.index] * tau[name].flatten()[piece.start : piece.stop]
                parts.append(part)
            weights[name] = torch.cat(parts).view(self.base[name].shape)
        return weights

    def expert(self, k: int) -> State:
        return {n: v + self.taus[k][n] if n in self.taus[k] else v for n, v in self.base.items()}

    def run(self, weights: State, ids: Sequence[int]) -> tuple[torch.Tensor, Any]:
        found = torch.func.functional_call(
            self.model, weights, (torch.tensor([list(ids)]),), {"output_hidden_states": True, "use_cache": False}
        )
        return found.logits[0], [h[0] for h in found.hidden_states]

    def loss(
        self,
        alpha: torch.Tensor,
        samples: Sequence[Any],
        *,
        logit: float = 1.0,
        hidden: float = 0.0,
        layer: int = 1,
        beta: Sequence[float] = (),
        every: Sequence[Any] = (),
    ) -> torch.Tensor:
        """Sum over experts of the mean over their tokens; ``every``: the rows that variances are taken over."""
        weights, total = self.merged(alpha), alpha.new_zeros(())
        for k in sorted({sample.expert for sample in samples}):
            own = [sample for sample in samples if sample.expert == k]
            count = sum(len(sample.encoded.inputs) for sample in own)
            theirs = self.expert(k)
            states = [self.run(theirs, s.encoded.inputs)[1][layer] for s in every if s.expert == k]
            spread = torch.cat(states).var(0, unbiased=False) if states else None
            for sample in own:
                z, h = self.run(weights, sample.encoded.inputs)
                zk, hk = self.run(theirs, sample.encoded.inputs)
                p = torch.softmax(zk, -1)
                loss = logit * (p * (p.log() - torch.log_softmax(z, -1))).sum()
                if spread is not None:
                    loss = (
                        loss + hidden * ((h[layer] - hk[layer]) ** 2 / (spread + 1e-6 * spread.mean())).mean(-1).sum()
                    )
                total = total + (beta[k] if beta else 1.0) * loss / count
        return total

    def slope(self, alpha: Alpha, samples: Sequence[Any], **more: Any) -> tuple[float, Alpha]:
        leaf = torch.tensor(alpha, requires_grad=True)
        value = self.loss(leaf, samples, **more)
        return float(value.detach()), torch.autograd.grad(value, leaf)[0].numpy()


def random_alpha(start: Coefficients, seed: int = 0) -> Alpha:
    return np.random.default_rng(seed).uniform(-0.2, 1.2, start.alpha.shape)


GROUPINGS: list[tuple[str, Chunks]] = [
    ("tensor", None),
    ("module", None),
    ("block", None),
    ("global", None),
    (r"re:\.(q_proj|k_proj|v_proj|o_proj|mlp)\b", None),
    ("tensor", lambda name: 5),
    ("block", lambda name: 3),
    ("global", lambda name: 7),
]


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("names", [["a", "lora"], ["lora"]], ids=["full and adapter", "adapter"])
@pytest.mark.parametrize(("grouping", "chunks"), GROUPINGS, ids=lambda value: value if isinstance(value, str) else "")
def test_the_gradient_is_that_of_autograd_through_an_explicit_merge(
    zoo: Path, names: list[str], grouping: str, chunks: Chunks
) -> None:
    with opened(zoo, names, grouping=grouping, chunks=chunks, layers=(1,)) as (shop, start):
        alpha = random_alpha(start)
        problem = shop.problem(Objective(terms=(Logits(0.7), Hidden(0.4))))
        chosen = [i for i in range(len(shop.samples)) if i % 3 < 2]
        terms, gradient = problem.evaluate(alpha, chosen, gradient=True)
        samples = [shop.samples[i] for i in chosen]
        reference = Reference(zoo, names, start)
        value, expected = reference.slope(alpha, samples, logit=0.7, hidden=0.4, every=shop.samples)
    assert gradient is not None
    assert sum(terms.values()) == pytest.approx(value, rel=1e-9)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(gradient, expected, rtol=1e-8, atol=1e-8 * np.abs(expected).max())


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("threads", [1, 2])
def test_reducing_beside_the_backward_pass_equals_accumulating_first(zoo: Path, threads: int) -> None:
    found: list[Alpha] = []
    for tokens in (4096, 6):  # one batch, or one per row
        with opened(zoo, ["a", "lora"], chunks=lambda name: 3, tokens=tokens, threads=threads) as (shop, start):
            chosen = [i for i, sample in enumerate(shop.samples) if sample.expert == 0]
            _, gradient = shop.problem(Objective()).evaluate(random_alpha(start), chosen, gradient=True)
            assert gradient is not None
            found.append(gradient)
    np.testing.assert_allclose(*found, rtol=1e-9, atol=1e-12)
    assert np.abs(found[0]).max() > 1e-3


@pytest.mark.usefixtures("exact")
def test_a_lone_expert_at_coefficient_one_has_no_loss_and_no_gradient(zoo: Path) -> None:
    for name in ("a", "lora"):
        with opened(zoo, [name], layers="middle") as (shop, start):
            problem = shop.problem(Objective(terms=(Logits(), Hidden(1.0))))
            chosen = range(len(shop.samples))
            terms, gradient = problem.evaluate(np.ones_like(start.alpha), chosen, gradient=True)
            assert gradient is not None
            assert all(0 <= value < 1e-12 for value in terms.values())
            assert np.abs(gradient).max() < 1e-10
            assert sum(problem.evaluate(start.alpha, chosen, gradient=False)[0].values()) > 0.01


@pytest.mark.usefixtures("exact")
def test_an_expert_of_weight_zero_leaves_the_loss_but_not_the_merge(zoo: Path) -> None:
    with opened(zoo, ["a", "b"]) as (shop, start):
        alpha, every = random_alpha(start), range(len(shop.samples))
        first = [i for i in every if shop.samples[i].expert == 0]
        terms, gradient = shop.problem(Objective(beta=(1.5, 0.0))).evaluate(alpha, every, gradient=True)
        reference = Reference(zoo, ["a", "b"], start)
        alone, expected = reference.slope(alpha, [shop.samples[i] for i in first], beta=(1.5, 9.0))
        nothing, flat = shop.problem(Objective(beta=(0.0, 0.0))).evaluate(alpha, every, gradient=True)
    assert gradient is not None
    assert flat is not None
    assert sum(terms.values()) == pytest.approx(alone, rel=1e-9)
    np.testing.assert_allclose(gradient, expected, rtol=1e-8, atol=1e-10)
    assert np.abs(gradient[1]).max() > 1e-4  # b's coefficients still move, through a's loss
    assert sum(nothing.values()) == 0
    assert np.abs(flat).max() == 0


def test_without_any_experts_weight_learning_stays_at_the_anchor(zoo: Path) -> None:
    found = learned(zoo, ["a", "b"], beta=0.0, steps=3, learning_rate=0.5, gamma=0.0)
    assert (found.alpha == 0.3).all()


def learned(
    zoo: Path,
    names: Sequence[str],
    seed: int = 0,
    *,
    method: str = "expert_merging",
    threads: int = 1,
    **parameters: Any,
) -> Coefficients:
    experts = {name: zoo / name for name in names}
    value = recipe_of(zoo, experts, parameters=PLAIN | parameters, seed=seed, merge_method=method)
    return learn(parse_recipe(value, "test"), threads=threads)


EXCLUDE = ("*norm*", "*embed*", "lm_head*", "*.0.mlp.*")


def test_only_tensors_with_coefficients_are_trained_and_nothing_else_changes(zoo: Path) -> None:
    with opened(zoo, ["a", "lora"], exclude=EXCLUDE, layers="middle", precision="float32") as (shop, start):
        problem = shop.problem(Objective(terms=(Logits(), Hidden(1.0))))
        chosen = range(len(shop.samples))
        for seed in range(2):
            problem.evaluate(random_alpha(start, seed), chosen, gradient=True)
        after = dict(shop.student.model.named_parameters())
    merged = {name for group in start.groups for name, _ in group.tensors}
    assert {n for n, p in after.items() if p.requires_grad} == merged
    assert all(p.grad is None for p in after.values())
    base = read_state(zoo / "base")
    for name, value in after.items():
        assert torch.equal(value, base[name]) == (name not in merged), name


def test_excluded_tensors_have_the_bases_bytes(zoo: Path, tmp_path: Path) -> None:
    parameters = {"steps": 2, "learning_rate": 0.2, "exclude": list(EXCLUDE)}
    value = recipe_of(zoo, {name: zoo / name for name in ("a", "b")}, parameters=parameters)
    cs.merge_recipe(parse_recipe(value, "test"), tmp_path / "out")
    found = load_coefficients(tmp_path / "out")
    base, out = read_state(zoo / "base"), read_state(tmp_path / "out")
    for name, tensor in base.items():
        assert torch.equal(out[name], tensor) == (name not in found.pieces), name
    excluded = sorted(set(base) - set(found.pieces))
    assert found.facts["excluded"] == excluded
    assert "model.layers.0.mlp.up_proj.weight" in excluded
    assert "model.layers.1.mlp.up_proj.weight" not in excluded


# ----------------------------------------------------------------------------------------------------------------------
# B8, B9: chunks through the real engine.


def test_one_chunk_each_is_the_method_without_chunks(zoo: Path) -> None:
    recipe = parse_recipe(recipe_of(zoo, {"a": zoo / "a", "lora": zoo / "lora"}), "test")
    plan = make_plan(recipe)
    tensors = mergeable(plan, lambda name: False)
    plan.close()
    assert make_groups(tensors, "tensor", lambda name: 1) == make_groups(tensors, "tensor")


def test_the_chunked_method_with_one_chunk_each_is_the_plain_one(zoo: Path) -> None:
    """Its first stage, and its second from the anchor again."""
    plain = learned(zoo, ["a", "b"], steps=3, learning_rate=0.1)
    more: dict[str, Any] = {"budget": 1.0, "kappa": 0.0, "stage_2": "anchor", "steps": 3, "learning_rate": 0.1}
    chunked = learned(zoo, ["a", "b"], method="expert_merging_pp", **more)
    assert set(chunked.facts["chunks"].values()) == {1}
    assert chunked.groups == plain.groups
    assert chunked.alpha.tobytes() == plain.alpha.tobytes()


@pytest.mark.parametrize(("grouping", "chunks"), [("tensor", 7), ("tensor", 10_000), ("block", 3), ("global", 11)])
@pytest.mark.parametrize("form", ["full float32", "adapters bfloat16", "shards bfloat16"])
def test_chunked_coefficients_multiply_their_elements_and_no_others(
    forms: dict[str, tuple[Path, dict[str, Path]]],
    form: str,
    grouping: str,
    chunks: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("consilience.engine.plan.SEGMENT", 1 << 8)
    base, experts = forms[form]
    flat = constant_file(tmp_path / "flat", base, experts, 0.0)
    groups = make_groups([t for g in flat.groups for t in g.tensors], grouping, lambda name: chunks)
    alpha = np.random.default_rng(0).uniform(-1, 1, (2, sum(g.chunks for g in groups)))
    made = Coefficients(tuple(experts), groups, alpha)
    save_coefficients(tmp_path / "coefficients", made)
    cs.merge(base, experts, tmp_path / "out", method="coefficients", coefficients=tmp_path / "coefficients")
    # Every task vector on its own, as the engine reads it.
    folded: list[State] = []
    for name, folder in experts.items():
        cs.merge(base, {name: folder}, tmp_path / name, out_dtype="float64")
        folded.append(read_state(tmp_path / name))
    out = read_state(tmp_path / "out")
    for name, value in read_state(base).items():
        start = value.double().flatten().numpy()
        expected = start.copy()
        seen = 0
        for group in groups:
            edges = [i * group.numel // group.chunks for i in range(group.chunks + 1)]
            begin = 0
            for member, numel in group.tensors:
                if member == name:
                    at = np.searchsorted(edges, begin + np.arange(numel), side="right") - 1
                    seen += numel
                    for k in range(2):
                        tau = folded[k][name].flatten().numpy() - start
                        expected += alpha[k, group.first + at] * tau
                begin += numel
        assert seen in (0, value.numel())
        tolerance = torch.finfo(value.dtype).eps
        np.testing.assert_allclose(out[name].double().flatten(), expected, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("chunks", [6, 10_000])
def test_no_coefficient_is_dead(zoo: Path, chunks: int) -> None:
    """The released code's pieces of ceil(numel / m) leave the last coefficients of some tensors without elements."""
    with opened(zoo, ["a"], chunks=lambda name: chunks, exclude=("*embed*", "lm_head*")) as (shop, start):
        covered = np.zeros(start.count, int)
        for name, numel in [tensor for group in start.groups for tensor in group.tensors]:
            pieces = start.pieces[name]
            assert [p.start for p in pieces] == [0, *(p.stop for p in pieces[:-1])]
            assert pieces[-1].stop == numel
            for piece in pieces:
                covered[piece.index] += piece.stop - piece.start
        _, gradient = shop.problem(Objective()).evaluate(start.alpha, range(len(shop.samples)), gradient=True)
    assert (covered > 0).all()
    assert gradient is not None
    assert (gradient != 0).all()


# ----------------------------------------------------------------------------------------------------------------------
# B13, B14, B15: where learning goes.


def test_a_strong_anchor_holds_the_coefficients(zoo: Path) -> None:
    for kind in ("real", "sigmoid"):
        found = learned(zoo, ["a", "b"], gamma=1e4, steps=5, coefficients=kind, learning_rate=0.02)
        assert np.abs(found.alpha - 0.3).max() < (1e-3 if kind == "real" else 0.02), kind


@pytest.mark.parametrize(
    ("grouping", "steps", "rate"), [("global", 40, 0.1), pytest.param("tensor", 150, 0.03, marks=pytest.mark.slow)]
)
def test_a_lone_expert_is_found_without_an_anchor(zoo: Path, grouping: str, steps: int, rate: float) -> None:
    found = learned(zoo, ["a"], grouping=grouping, steps=steps, learning_rate=rate, schedule="cosine", exclude="none")
    assert found.alpha.min() > 0.9
    assert found.facts["history"][-1]["logit"] < 0.01 * found.facts["history"][0]["logit"]


def test_experts_on_disjoint_inputs_are_both_found(tmp_path: Path) -> None:
    """Each expert moves the embeddings of its own words only, and its rows are made of those words alone."""
    base = write_base(tmp_path / "base")
    words = {"low": WORDS[:46], "high": WORDS[46:]}
    for seed, (name, own) in enumerate(words.items()):
        folder = write_expert(tmp_path / name, base, seed, only=lambda n: "embed_tokens" in n)
        state = read_state(folder)
        changed, plain = state["model.embed_tokens.weight"], read_state(base)["model.embed_tokens.weight"]
        ids = [3 + WORDS.index(word) for word in own]
        plain[ids] += 4 * (changed - plain)[ids]
        write_state(folder, state | {"model.embed_tokens.weight": plain})
        write_rows(tmp_path / "rows" / f"{name}.jsonl", sentences(seed, 4, words=own))
    found = learned(tmp_path, ["low", "high"], steps=80, learning_rate=0.05, schedule="cosine", exclude="none")
    np.testing.assert_allclose(found.of("model.embed_tokens.weight"), 1.0, atol=0.03)
    assert found.facts["history"][-1]["logit"] < 1e-3 * found.facts["history"][0]["logit"]


def test_sigmoid_coefficients_start_at_the_anchor_and_stay_inside(zoo: Path) -> None:
    still = learned(zoo, ["a", "b"], coefficients="sigmoid", steps=0, alphabar=0.1)
    np.testing.assert_allclose(still.alpha, 0.1, rtol=1e-12)
    moved = learned(zoo, ["a", "b"], coefficients="sigmoid", steps=20, learning_rate=2.0, alphabar=0.1)
    assert moved.alpha.min() > 0
    assert moved.alpha.max() < 1
    assert moved.alpha.max() > 0.5


@pytest.mark.parametrize("coefficients", ["real", "sigmoid", "softplus", "affine", "box"])
def test_the_anchor_costs_nothing_at_the_start(zoo: Path, coefficients: str) -> None:
    alphabar = 0.5 if coefficients == "affine" else 0.1
    found = learned(zoo, ["a", "b"], coefficients=coefficients, steps=1, gamma=5.0, alphabar=alphabar)
    assert found.facts["history"][0]["anchor"] == 0


# ----------------------------------------------------------------------------------------------------------------------
# The released code's settings, from its formulas.


@pytest.mark.usefixtures("exact")
def test_the_official_code_preset_takes_the_official_steps(zoo: Path) -> None:
    names, steps, seed = ["a", "b"], 3, 5
    settings = {"preset": "official-code", "steps": steps, "precision": "float64"}
    value = recipe_of(zoo, {name: zoo / name for name in names}, parameters=settings, seed=seed)
    found = learn(parse_recipe(value, "test"), threads=1)
    expected = official_steps(zoo, names, found, steps, seed)
    assert np.abs(found.alpha - 0.1).min() > 0.01
    np.testing.assert_allclose(found.alpha, expected, rtol=0, atol=1e-5)
    frozen = [n for n in read_state(zoo / "base") if any(w in n for w in ("lm_head", "norm", "embed_tokens"))]
    assert sorted(found.facts["excluded"]) == sorted(frozen)


def official_steps(zoo: Path, names: Sequence[str], like: Coefficients, steps: int, seed: int) -> Alpha:
    """alpha = sigmoid(w); soft-target cross-entropy per micro-batch; gamma sum|alpha - alphabar| / (count / K)."""
    reference = Reference(zoo, names, like)
    with opened(zoo, names) as (shop, _):
        samples = shop.samples
    alphabar = 0.1
    w = torch.full(like.alpha.shape, alphabar, dtype=torch.float64).logit().requires_grad_(True)
    anchor = torch.sigmoid(w.detach())
    optimizer = torch.optim.AdamW([w], lr=0.5, betas=(0.9, 0.999), weight_decay=1e-5)
    rates = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=50, T_mult=2, eta_min=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        chosen = schedule([sample.expert for sample in samples], 8, seed, step)
        for i in chosen:
            alpha = torch.sigmoid(w)
            z, _ = reference.run(reference.merged(alpha), samples[i].encoded.inputs)
            teacher, _ = reference.run(reference.expert(samples[i].expert), samples[i].encoded.inputs)
            loss = -(torch.softmax(teacher, -1) * torch.log_softmax(z, -1)).sum(-1).mean()
            loss = loss + 5.0 * (alpha - anchor).abs().sum() / (w.numel() / len(names))
            torch.autograd.backward(loss / len(chosen))
        torch.nn.utils.clip_grad_norm_([w], 1.0)
        optimizer.step()
        rates.step()
    return torch.sigmoid(w.detach()).numpy()


# ----------------------------------------------------------------------------------------------------------------------
# B16: the same again.

BUSY: dict[str, Any] = {"steps": 12, "learning_rate": 0.05, "batch": 4, "holdout": 0.2, "optimizer": "adam"}


def test_the_same_seed_gives_the_same_coefficients_and_another_does_not(zoo: Path) -> None:
    short: Any = BUSY | {"steps": 4}
    runs = [learned(zoo, ["a", "b"], s, threads=t, **short) for s, t in ((7, 1), (7, 1), (7, 2), (8, 1))]
    assert runs[0].alpha.tobytes() == runs[1].alpha.tobytes()
    assert runs[0].alpha.tobytes() == runs[2].alpha.tobytes()  # nor do the bank's threads change it
    assert runs[0].alpha.tobytes() != runs[3].alpha.tobytes()


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
import consilience.learned.loop as loop
from consilience.api import merge_recipe
from consilience.progress import NullProgress
loop.SAVE_EVERY = -1.0

class Killer(NullProgress):
    phase_name = ""
    def phase(self, title, total=None, unit="steps"):
        self.phase_name, self.left = title, 5
    def advance(self, count=1, text="", /, **figures):
        if self.phase_name == "learning" and count:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

merge_recipe(sys.argv[1], sys.argv[2], threads=1, progress=Killer())
"""


class Counter:
    """Counts the steps of every phase; ``stop`` raises KeyboardInterrupt after so many of learning's."""

    def __init__(self, stop: int = -1) -> None:
        self.stop, self.now = stop, ""
        self.seen: dict[str, list[int]] = {}

    def phase(self, title: str, total: int | None = None, unit: str = "steps") -> None:
        self.now = title
        self.seen[title] = []

    def advance(self, count: int = 1, text: str = "", /, **figures: float) -> None:
        self.seen[self.now] += [count] if count else []
        if self.now == "learning" and len(self.seen[self.now]) == self.stop:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_killed_run_continues_and_ends_with_the_same_bytes(zoo: Path, tmp_path: Path) -> None:
    experts = {name: zoo / name for name in ("a", "b")}
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_of(zoo, experts, parameters=PLAIN | BUSY, seed=3))
    out = tmp_path / "out"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(recipe), str(out)], env=environment, capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not out.exists()
    counter = Counter()
    cs.merge_recipe(recipe, out, threads=1, progress=counter)
    assert counter.seen["learning"] == [4] + [1] * 8  # the fifth step was done but not yet written
    assert sum(counter.seen["answers of the experts"]) == 0  # kept from the killed run
    same_as_undisturbed(recipe, tmp_path)


def same_as_undisturbed(recipe: Path, place: Path) -> None:
    cs.merge_recipe(recipe, place / "undisturbed", threads=1)
    ours, theirs = place / "out", place / "undisturbed"
    assert written(ours) == written(theirs)
    assert written(ours / "consilience") == written(theirs / "consilience")
    assert load_coefficients(ours).facts["history"] == load_coefficients(theirs).facts["history"]
    assert not (place / "out.partial").exists()
    assert not (ours / "consilience" / "learning").exists()


def test_an_interrupted_run_resumes_its_early_stopping(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consilience.learned.loop.SAVE_EVERY", -1.0)
    # Held-out rows that the steps make worse: a large rate, and patience for one bad check.
    settings = PLAIN | BUSY | {"learning_rate": 2.0, "steps": 40, "patience": 2, "optimizer": "sgd"}
    experts = {name: zoo / name for name in ("a", "b")}
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_of(zoo, experts, parameters=settings))
    for stop in (7, 4):
        with pytest.raises(KeyboardInterrupt):
            cs.merge_recipe(recipe, tmp_path / "out", threads=1, progress=Counter(stop))
        assert not (tmp_path / "out").exists()
    cs.merge_recipe(recipe, tmp_path / "out", threads=1)
    same_as_undisturbed(recipe, tmp_path)
    assert load_coefficients(tmp_path / "out").facts["steps"] < 40


def test_a_second_stage_resumes(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("consilience.learned.loop.SAVE_EVERY", -1.0)
    settings = PLAIN | {"steps": 4, "learning_rate": 0.05, "budget": 1.5}
    experts = {name: zoo / name for name in ("a", "b")}
    value = recipe_of(zoo, experts, parameters=settings, merge_method="expert_merging_pp")
    recipe = write_recipe(tmp_path / "recipe.yaml", value)
    for stop in (2, 3, 2):
        with pytest.raises(KeyboardInterrupt):
            cs.merge_recipe(recipe, tmp_path / "out", threads=1, progress=Counter(stop))
    cs.merge_recipe(recipe, tmp_path / "out", threads=1)
    same_as_undisturbed(recipe, tmp_path)


def test_a_run_of_other_settings_does_not_continue(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("consilience.learned.loop.SAVE_EVERY", -1.0)
    experts = {name: zoo / name for name in ("a", "b")}
    first = recipe_of(zoo, experts, parameters=PLAIN | BUSY)
    second = recipe_of(zoo, experts, parameters=PLAIN | BUSY | {"temperature": 2.0})
    with pytest.raises(KeyboardInterrupt):
        cs.merge_recipe(parse_recipe(first, "test"), tmp_path / "out", threads=1, progress=Counter(4))
    counter = Counter()
    recipe = write_recipe(tmp_path / "recipe.yaml", second)
    cs.merge_recipe(recipe, tmp_path / "out", threads=1, progress=counter)
    assert counter.seen["learning"] == [1] * 12
    same_as_undisturbed(recipe, tmp_path)


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-9], lambda data: b"\xff" * len(data)])
def test_a_damaged_state_is_learned_again(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes]
) -> None:
    monkeypatch.setattr("consilience.learned.loop.SAVE_EVERY", -1.0)
    experts = {name: zoo / name for name in ("a", "b")}
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_of(zoo, experts, parameters=PLAIN | BUSY | {"steps": 4}))
    with pytest.raises(KeyboardInterrupt):
        cs.merge_recipe(recipe, tmp_path / "out", threads=1, progress=Counter(2))
    kept = list((tmp_path / "out.partial" / "learning").rglob("*.safetensors"))
    assert len(kept) == 3  # the state, and two experts' answers
    for file in kept:
        file.write_bytes(damage(file.read_bytes()))
    cs.merge_recipe(recipe, tmp_path / "out", threads=1)
    same_as_undisturbed(recipe, tmp_path)


def test_a_plan_that_has_learned_nothing_is_not_merged(zoo: Path, tmp_path: Path) -> None:
    """It stands at the anchor; merging it would pass for a result."""
    plan = make_plan(parse_recipe(recipe_of(zoo, {"a": zoo / "a"}), "test"))
    with pytest.raises(cs.InputError, match="not learned"):
        run_merge(plan, tmp_path / "out")
    plan.close()
    assert not list(tmp_path.iterdir())
