"""AdaMerging's laws, and AdaMerging++'s task vectors: the learner's against the merge's against numpy."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_experts import (
    MODULES,
    read_state,
    recipe_of,
    sentences,
    write_adapter,
    write_base,
    write_expert,
    write_rows,
)

from consilience.api import learn, merge, merge_recipe, plan_recipe
from consilience.coefficients import Coefficients, constant, make_groups
from consilience.coefficients.coefficients import Trimmed
from consilience.errors import InputError
from consilience.recipe.schema import parse_recipe
from consilience.student.bank import Bank


def recipe(experts: Mapping[str, Path], method: str = "adamerging", base: Path | None = None, **parameters: Any) -> Any:
    place = next(iter(experts.values())).parent
    plain = {"precision": "float32", "steps": 6, "batch": 0}
    value = recipe_of(place, experts, base, merge_method=method, parameters=plain | parameters)
    return parse_recipe(value, "recipe")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adamerging")
    base = write_base(folder / "base")
    for k, name in enumerate(["math", "code"]):
        write_expert(folder / name, base, k)
        write_adapter(folder / f"{name}-lora", base, k)
        write_rows(folder / "rows" / f"{name}.jsonl", sentences(k, 3))
    return folder


@pytest.fixture(scope="module")
def full(place: Path) -> dict[str, Path]:
    return {"math": place / "math", "code": place / "code"}


@pytest.fixture(scope="module")
def adapters(place: Path) -> dict[str, Path]:
    return {"math": place / "math-lora", "code": place / "code-lora"}


def losses(found: Coefficients) -> list[float]:
    return [line["loss"] for line in found.facts["history"]]


def entropy(folder: Path, rows: Mapping[str, list[str]]) -> float:
    """Sum over experts of the mean entropy of every next-token prediction, by the definition."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    total = 0.0
    for texts in rows.values():
        each: list[torch.Tensor] = []
        for text in texts:
            with torch.no_grad():
                p = torch.softmax(model(tokenizer(text, return_tensors="pt").input_ids).logits[0].double(), -1)
            each.append(-(p * p.log()).sum(-1))
        total += float(torch.cat(each).mean())
    return total


@pytest.mark.parametrize("kind", ["full", "adapters"])
def test_plain_descent_never_raises_the_entropy_and_merges(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    experts: dict[str, Path] = request.getfixturevalue(kind)
    made = recipe(experts, optimizer="sgd", learning_rate=0.02)
    found = learn(made)
    history = losses(found)
    assert len(history) == 6
    assert all(later <= earlier for earlier, later in pairwise(history))
    assert history[-1] < history[0] - 1e-3
    merge_recipe(made, tmp_path / "out")
    rows = {name: sentences(k, 3) for k, name in enumerate(experts)}
    assert entropy(tmp_path / "out", rows) < history[-1]
    merge_recipe(made, tmp_path / "start", coefficients=found.with_alpha(np.full_like(found.alpha, 0.3)))
    assert entropy(tmp_path / "start", rows) == pytest.approx(history[0], rel=1e-4)


@pytest.mark.parametrize("kind", ["full", "adapters"])
def test_a_rate_of_zero_is_task_arithmetic_to_the_byte(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    experts: dict[str, Path] = request.getfixturevalue(kind)
    base = experts["math"].parent / "base"
    merge_recipe(recipe(experts, learning_rate=0, steps=2), tmp_path / "ada")
    merge(base, experts, tmp_path / "ta", weight=0.3)
    ada, ta = tmp_path / "ada" / "model.safetensors", tmp_path / "ta" / "model.safetensors"
    assert ada.read_bytes() == ta.read_bytes()


def test_granularity_decides_what_shares_a_coefficient(full: dict[str, Path]) -> None:
    task = learn(recipe(full, granularity="task", steps=2))
    layer = learn(recipe(full, granularity="layer", steps=2, exclude=["*norm*"]))
    assert task.alpha.shape == (2, 1)
    assert len(task.groups[0].tensors) == len(read_state(full["math"]))
    assert [group.name for group in layer.groups] == [g[0] for g in task.groups[0].tensors if "norm" not in g[0]]
    assert task.facts["parameters"]["granularity"] == "task"
    assert "logit_weight" not in task.facts["parameters"]


def test_clamped_coefficients_stay_in_the_unit_interval(full: dict[str, Path]) -> None:
    wild = learn(recipe(full, learning_rate=0.5, clamp=False))
    tame = learn(recipe(full, learning_rate=0.5, clamp=True))
    assert wild.alpha.min() < 0 or wild.alpha.max() > 1
    assert tame.alpha.min() >= 0
    assert tame.alpha.max() <= 1
    assert {0.0, 1.0} & set(tame.alpha.ravel())
    with pytest.raises(InputError, match="clamp=false"):
        learn(recipe(full, alphabar=1.5))
    assert learn(recipe(full, alphabar=1.5, clamp=False, steps=0)).alpha == pytest.approx(1.5)


def test_a_batch_counts_rows_of_each_expert(full: dict[str, Path]) -> None:
    whole, again = learn(recipe(full, steps=3)), learn(recipe(full, steps=3, batch=3))
    part = learn(recipe(full, steps=3, batch=1))
    assert (whole.alpha == again.alpha).all()
    assert losses(part) != losses(whole)


def test_an_expert_of_weight_zero_asks_for_nothing(full: dict[str, Path]) -> None:
    none = learn(recipe(full, beta=0.0, steps=2))
    assert (none.alpha == 0.3).all()


# --- AdaMerging++ ---------------------------------------------------------------------------------------------------


def trimmed(taus: Mapping[str, np.ndarray[Any, Any]], density: float, elect: bool) -> dict[str, Any]:
    """The largest entries over all tensors in order of name, first come first kept; then the election."""
    names = sorted(taus)
    flat = np.concatenate([taus[name].reshape(len(taus[name]), -1) for name in names], 1)
    keep = max(1, int(density * flat.shape[1]))
    for row in flat:
        row[np.argsort(-np.abs(row).astype(np.float32), kind="stable")[keep:]] = 0
    if elect:
        positive = flat.sum(0) >= 0
        flat[~np.where(positive, flat > 0, flat < 0)] = 0
    out: dict[str, Any] = {}
    at = 0
    for name in names:
        count = taus[name][0].size
        out[name] = flat[:, at : at + count]
        at += count
    return out


@pytest.fixture(scope="module")
def ties(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task vectors of few distinct magnitudes, so that the threshold cuts through entries of equal size.

    The base stores its tied embeddings twice.
    """
    folder = tmp_path_factory.mktemp("trimmed")
    base = write_base(folder / "base", dtype=torch.bfloat16, tie_word_embeddings=True)
    state = read_state(base)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, base / "model.safetensors", {"format": "pt"})
    for k, name in enumerate(["math", "code", "chat"]):
        write_adapter(folder / f"{name}-lora", base, k, modules=MODULES)
        generator = torch.Generator().manual_seed(k)
        (folder / name).mkdir()
        own = {n: v + torch.randint(-3, 4, v.shape, generator=generator).to(v) for n, v in state.items()}
        own["lm_head.weight"] = own["model.embed_tokens.weight"].clone()
        save_file(own, folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text((base / "config.json").read_text())
        write_rows(folder / "rows" / f"{name}.jsonl", sentences(k, 2))
    return folder


def blended(plan: Any, found: Coefficients) -> dict[str, torch.Tensor]:
    """What the learner's student holds."""
    bank = Bank(plan, found.groups, trimmed=found.trimmed)
    try:
        weights = {name: torch.empty(t.numel) for name, t in bank.tensors.items()}
        bank.blend(found.alpha, weights)
    finally:
        bank.close()
    return weights


@pytest.mark.parametrize("elect", [True, False])
@pytest.mark.parametrize("experts", [("math", "code", "chat"), ("math-lora", "code-lora"), ("math", "code-lora")])
def test_the_student_holds_what_the_merge_writes(
    ties: Path, tmp_path: Path, experts: tuple[str, ...], elect: bool
) -> None:
    paths = {name.removesuffix("-lora"): ties / name for name in experts}
    made = recipe(paths, "adamerging_pp", ties / "base")
    plan = plan_recipe(made)
    generator = np.random.default_rng(0)
    tensors = [(t.name, t.numel) for t in plan.tensors if t.program is not None and t.name == t.stream]
    groups = make_groups(tensors, "tensor")
    found = constant(tuple(paths), groups, [0.0] * len(paths))
    found = found.with_alpha(generator.normal(size=found.alpha.shape))
    found = Coefficients(found.experts, found.groups, found.alpha, Trimmed(0.2, elect))
    weights = blended(plan, found)
    plan.close()
    merge_recipe(made, tmp_path / "out", coefficients=found)
    merged = read_state(tmp_path / "out")
    for name, values in weights.items():
        assert torch.equal(values.to(torch.bfloat16).view_as(merged[name]), merged[name]), name
    if "lm_head.weight" in merged:
        assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])


@pytest.mark.parametrize("elect", [True, False])
def test_trimming_is_the_formula(place: Path, full: dict[str, Path], elect: bool) -> None:
    base = {name: value.double().numpy() for name, value in read_state(place / "base").items()}
    taus = {name: np.stack([read_state(path)[name].double().numpy() for path in full.values()]) for name in base}
    taus = {name: value - base[name] for name, value in taus.items()}
    expected = trimmed(taus, 0.3, elect)
    found = learn(recipe(full, "adamerging_pp", density=0.3, elect=elect, learning_rate=0, steps=1))
    assert found.trimmed == Trimmed(0.3, elect)
    assert (found.facts["parameters"]["density"], found.facts["parameters"]["elect"]) == (0.3, elect)
    plan = plan_recipe(recipe(full, "adamerging_pp"))
    weights = blended(plan, found)
    plan.close()
    kept = 0
    for name, values in weights.items():
        update = 0.3 * expected[name].sum(0)
        kept += int(np.count_nonzero(update))
        assert values.numpy() == pytest.approx(base[name].ravel() + update, abs=1e-6), name
    assert kept


def test_a_rate_of_zero_is_the_disjoint_sum_of_ties(full: dict[str, Path], place: Path, tmp_path: Path) -> None:
    merge_recipe(recipe(full, "adamerging_pp", learning_rate=0, steps=1), tmp_path / "ada")
    merge(place / "base", full, tmp_path / "ties", method="ties", trim="model", normalize=False, lambda_=0.3)
    ada, ties = read_state(tmp_path / "ada"), read_state(tmp_path / "ties")
    for name, value in ties.items():
        assert torch.allclose(ada[name], value, rtol=0, atol=1e-6), name


def test_all_of_a_task_vector_without_election_is_adamerging(full: dict[str, Path]) -> None:
    plain = learn(recipe(full, optimizer="sgd", learning_rate=0.02))
    same = learn(recipe(full, "adamerging_pp", optimizer="sgd", learning_rate=0.02, density=1, elect=False))
    assert same.alpha == pytest.approx(plain.alpha, abs=1e-9)
    assert losses(same) == pytest.approx(losses(plain))


@pytest.mark.parametrize("kind", ["full", "adapters"])
def test_trimmed_descent_never_raises_the_entropy_and_merges(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    experts: dict[str, Path] = request.getfixturevalue(kind)
    made = recipe(experts, "adamerging_pp", optimizer="sgd", learning_rate=0.02, density=0.5)
    found = learn(made)
    history = losses(found)
    assert all(later <= earlier for earlier, later in pairwise(history))
    assert history[-1] < history[0]
    merge_recipe(made, tmp_path / "out", coefficients=found)
    rows = {name: sentences(k, 3) for k, name in enumerate(experts)}
    assert entropy(tmp_path / "out", rows) == pytest.approx(history[-1], rel=0.05)
