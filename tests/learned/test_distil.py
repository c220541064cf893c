"""Merge, then distil: the correction's directions, its gradient, what is written, and a run that was interrupted."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_experts import read_state, recipe_of, write_adapter, write_base, write_expert, write_rows
from torch.func import functional_call

import consilience as cs
from consilience.api import learn, plan_recipe
from consilience.errors import InputError
from consilience.learned.correction import Correction
from consilience.learned.expert_merging import ExpertMerging
from consilience.learned.learning import start_of
from consilience.learned.run import Run, Workshop, open_workshop
from consilience.learned.settings import Start
from consilience.methods.signature import settings_of
from consilience.progress import NullProgress
from consilience.recipe.schema import parse_recipe
from consilience.student.student import load_any

QUICK: dict[str, Any] = {
    "preset": "default", "precision": "float32", "steps": 6, "learning_rate": 0.1, "response_tokens": 5,
    "correction_rank": 3, "correction_rate": 0.01, "written_prompts": 0,
}  # fmt: skip
WIDE = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a full expert, an adapter of rank 2 and one of rank 5 (above the correction's)."""
    folder = tmp_path_factory.mktemp("distil")
    base = write_base(folder / "base")
    write_expert(folder / "full", base, 1)
    write_adapter(folder / "small", base, 2, rank=2)
    write_adapter(folder / "large", base, 3, rank=5)
    for name in ("full", "small", "large"):
        write_rows(folder / "rows" / f"{name}.jsonl", WIDE)
    return folder


def recipe(place: Path, *names: str, **parameters: Any) -> Any:
    experts = {name: place / name for name in names}
    value = recipe_of(place, experts, merge_method="expert_merging_distil", parameters=QUICK | parameters)
    return parse_recipe(value, "test")


def workshop(place: Path, *names: str) -> Workshop:
    plan = plan_recipe(recipe(place, *names, precision="float64"))
    run = Run(plan)
    rows = settings_of(ExpertMerging, plan.learning).rows
    return open_workshop(run, start_of(run, settings_of(Start, plan.learning)), rows, precision="float64")


def task_vectors(place: Path, name: str) -> dict[str, torch.Tensor]:
    """An expert's task vectors in float64, from its files."""
    base = {k: v.double() for k, v in read_state(place / "base").items()}
    if not (place / name / "adapter_config.json").is_file():
        return {k: v.double() - base[k] for k, v in read_state(place / name).items()}
    return {k: v for k, v in products(place / name).items()}


def products(folder: Path) -> dict[str, torch.Tensor]:
    """An adapter's updates by tensor, in float64."""
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    state = {k: v.double() for k, v in read_state(folder).items()}
    found: dict[str, torch.Tensor] = {}
    for key in [k for k in state if k.endswith(".lora_A.weight")]:
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        rank = state[key].shape[0]
        pattern: Mapping[str, int] = config.get("alpha_pattern") or {}
        scale = float(pattern[module] if module in pattern else config["lora_alpha"]) / rank
        found[f"{module}.weight"] = scale * state[key.replace("lora_A", "lora_B")] @ state[key]
    return found


def best(tau: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(tau, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def test_directions_are_those_of_the_best_approximation_of_each_task_vector(place: Path):
    shop = workshop(place, "full", "small", "large")
    try:
        correction = Correction(shop.student, 3, seed=0)
    finally:
        shop.close()
    taus = [task_vectors(place, name) for name in ("full", "small", "large")]
    seen: set[int] = set()
    for name, (left, right) in correction.fixed.items():
        held = [tau[name] for tau in taus if name in tau]
        at = 0
        for tau in held:
            wanted = best(tau, 3)
            rank = int(torch.linalg.matrix_rank(wanted))
            made = left[:, at : at + rank] @ right[at : at + rank]
            # A flat spectrum leaves a randomised SVD a choice of directions that are nearly as good.
            error, least = float((tau - made).norm()), float((tau - wanted).norm())
            assert error <= 1.01 * least + 1e-6 * float(tau.norm()), name
            seen.add(rank)
            at += rank
        assert at == left.shape[1]
    assert seen == {2, 3}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose adapters work on activations."""
    folder = tmp_path_factory.mktemp("adapters")
    base = write_base(folder / "base", hidden_size=48, intermediate_size=96)
    for rank, name in ((1, "small"), (2, "large")):
        write_adapter(folder / name, base, rank, rank=rank)
        write_rows(folder / "rows" / f"{name}.jsonl", WIDE)
    return folder


@pytest.mark.parametrize("kind", ["weights", "activations"])
def test_gradients_are_those_of_an_explicit_merge(place: Path, adapters: Path, kind: str):
    names = ("full", "small") if kind == "weights" else ("small", "large")
    place = place if kind == "weights" else adapters
    shop = workshop(place, *names)
    try:
        assert any(one.takes_correction for one in shop.student.factored.values()) == (kind == "activations")
        alpha = np.random.default_rng(1).random((2, shop.bank.count))
        correction = Correction(shop.student, 3, seed=0)
        generator = torch.Generator().manual_seed(4)
        for value in correction.parameters.values():
            value.data.copy_(0.05 * torch.randn(value.shape, generator=generator, dtype=torch.float64))
        problem = shop.problem(settings_of(ExpertMerging, shop.run.plan.learning).objective)
        terms, slopes = problem.evaluate(alpha, shop.learn, gradient=True)
        start = start_of(shop.run, settings_of(Start, shop.run.plan.learning))
        weights = explicit(place, names, start, alpha, correction)
        loss = divergence(place, names, shop, weights)
        loss.backward()
    finally:
        shop.close()
    assert sum(terms.values()) == pytest.approx(float(loss.detach()), rel=1e-9)
    assert slopes is not None
    wanted = np.zeros_like(slopes)
    for k, expert in enumerate(names):
        for name, tau in task_vectors(place, expert).items():
            gradient = weights[name].grad
            assert gradient is not None
            wanted[k, start.pieces[name][0].index] += float((gradient * tau).sum())
    assert np.allclose(slopes, wanted, rtol=1e-5, atol=1e-8)
    for name, (left, right) in correction.fixed.items():
        gradient = weights[name].grad
        assert gradient is not None
        for side, value in (("left", gradient @ right.T), ("right", left.T @ gradient)):
            own = correction.parameters[f"{name}.{side}"].grad
            # Norms are taken in float32 whatever the model's precision, and packed rows in another order.
            assert float((own - value).norm()) <= 1e-6 * float(value.norm()), (name, side)


@pytest.mark.parametrize("kind", ["weights", "activations"])
def test_an_expert_is_played_without_the_correction(place: Path, adapters: Path, kind: str):
    names = ("full", "small") if kind == "weights" else ("small", "large")
    shop = workshop(place if kind == "weights" else adapters, *names)
    ids = torch.tensor([[5, 9, 40, 3]])
    try:
        shop.student.become(1)
        with torch.no_grad():
            before = shop.student.model(input_ids=ids).logits
            correction = Correction(shop.student, 3, seed=0)
            for value in correction.parameters.values():
                value.data.fill_(0.1)
            assert torch.equal(shop.student.model(input_ids=ids).logits, before)
            shop.student.set(np.full((2, shop.bank.count), 0.3))
            corrected = shop.student.model(input_ids=ids).logits
            correction.turn(False)
            plain = shop.student.model(input_ids=ids).logits
            correction.turn(True)
            assert torch.equal(shop.student.model(input_ids=ids).logits, corrected)
        assert not torch.allclose(plain, corrected)
    finally:
        shop.close()


def explicit(place: Path, names: Any, start: Any, alpha: Any, correction: Any) -> dict[str, torch.Tensor]:
    """theta of the merge with its correction, as leaves."""
    weights = {k: v.double() for k, v in read_state(place / "base").items()}
    for k, name in enumerate(names):
        for tensor, tau in task_vectors(place, name).items():
            weights[tensor] = weights[tensor] + float(alpha[k, start.pieces[tensor][0].index]) * tau
    for tensor in correction.fixed:
        b, a = correction.factors(tensor)
        weights[tensor] = weights[tensor] + (b @ a).detach()
    return {k: v.detach().requires_grad_(True) for k, v in weights.items()}


def divergence(place: Path, names: Any, shop: Workshop, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """sum_k mean over expert k's tokens of KL(expert || merge)."""
    model: Any = load_any(place / "base").double()
    total = torch.zeros((), dtype=torch.float64)
    for k, name in enumerate(names):
        theirs = {n: v.double() for n, v in read_state(place / "base").items()}
        theirs |= {n: theirs[n] + tau for n, tau in task_vectors(place, name).items()}
        values: list[torch.Tensor] = []
        for i in shop.learn:
            one = shop.samples[i]
            if one.expert == k:
                ids, at = torch.tensor([one.encoded.inputs]), list(one.encoded.positions)
                q, p = (functional_call(model, w, (ids,)).logits[0, at].log_softmax(-1) for w in (weights, theirs))
                values.append((p.detach().exp() * (p.detach() - q)).sum(-1))
        total = total + torch.cat(values).mean()
    return total


def test_the_output_is_the_base_the_experts_and_the_correction(place: Path, tmp_path: Path):
    cs.merge_recipe(recipe(place, "full", "small"), tmp_path / "out")
    found = cs.load_coefficients(tmp_path / "out")
    assert found.experts == ("full", "small", "correction")
    assert (found.alpha[2] == 1).all()
    taus = [
        task_vectors(place, "full"),
        task_vectors(place, "small"),
        products(tmp_path / "out/consilience/correction"),
    ]
    assert max(float(tau.abs().max()) for tau in taus[2].values()) > 1e-3
    merged, base = read_state(tmp_path / "out"), read_state(place / "base")
    for name, value in merged.items():
        wanted = base[name].double()
        for alpha, tau in zip(found.alpha, taus, strict=True):
            wanted = wanted + (alpha[found.pieces[name][0].index] * tau[name] if name in tau else 0)
        assert torch.allclose(value.double(), wanted, atol=1e-6), name
    assert found.facts["compared"]["learned"] < found.facts["compared"]["base"]
    assert [line["step"] for line in found.facts["history"]] == list(range(6))


def test_the_coefficients_and_the_correction_can_be_applied_again(place: Path, tmp_path: Path):
    cs.merge_recipe(recipe(place, "full", "small"), tmp_path / "out")
    kept = tmp_path / "out" / "consilience"
    experts = {"full": place / "full", "small": place / "small", "correction": kept / "correction"}
    cs.merge(place / "base", experts, tmp_path / "again", method="coefficients", coefficients=kept)
    first, second = read_state(tmp_path / "out"), read_state(tmp_path / "again")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_adapters_and_their_correction_make_one_adapter(place: Path, tmp_path: Path):
    cs.merge_recipe(recipe(place, "small", "large"), tmp_path / "out")
    cs.merge_recipe(recipe(place, "small", "large"), tmp_path / "adapter", as_adapter="cat")
    merged, base, made = read_state(tmp_path / "out"), read_state(place / "base"), products(tmp_path / "adapter")
    for name, tau in made.items():
        assert torch.allclose(merged[name].double(), base[name].double() + tau, atol=1e-5), name


class Stop(NullProgress):
    """Progress that interrupts at a step of the learning."""

    def __init__(self, at: int) -> None:
        self.at, self.on = at, False

    def phase(self, title: str, total: int | None = None, unit: str = "steps") -> None:
        self.on = title == "learning"

    def advance(self, count: int = 1, text: str = "", /, **figures: float) -> None:
        if self.on:
            self.at -= count
            if self.at < 0:
                raise KeyboardInterrupt


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(place: Path, tmp_path: Path):
    cs.merge_recipe(recipe(place, "full", "small"), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        cs.merge_recipe(recipe(place, "full", "small"), tmp_path / "out", progress=Stop(3))
    assert not (tmp_path / "out").exists()
    cs.merge_recipe(recipe(place, "full", "small"), tmp_path / "out")
    whole, again = read_state(tmp_path / "whole"), read_state(tmp_path / "out")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_early_stopping_comes_back_to_the_best_correction(place: Path, tmp_path: Path):
    """At a step size that ruins the merge the best is the start: coefficients at the anchor and no correction."""
    ruined = recipe(place, "full", "small", holdout=0.34, correction_rate=30.0, correction_ridge=0, steps=12)
    cs.merge_recipe(ruined, tmp_path / "out")
    found = cs.load_coefficients(tmp_path / "out")
    assert found.facts["step"] == 0
    assert (found.alpha[:2] == 0.4).all()
    assert all(float(tau.abs().max()) == 0 for tau in products(tmp_path / "out/consilience/correction").values())


def test_what_cannot_be_distilled_is_said(place: Path, tmp_path: Path):
    with pytest.raises(InputError, match="name the output"):
        learn(recipe(place, "full"))
    value = recipe_of(place, {"correction": place / "full"}, merge_method="expert_merging_distil", parameters=QUICK)
    write_rows(place / "rows" / "correction.jsonl", WIDE)
    with pytest.raises(InputError, match="rename it"):
        cs.merge_recipe(parse_recipe(value, "test"), tmp_path / "out")
    with pytest.raises(InputError, match="use adam"):
        cs.merge_recipe(recipe(place, "full", optimizer="spsa"), tmp_path / "out")
    assert not list(tmp_path.iterdir())
