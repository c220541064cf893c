"""GLUE on transformers: convex weights from a labelled target, by forward passes alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from consilience.api import build_recipe, learn, merge_recipe, plan_recipe
from consilience.coefficients import load_coefficients
from consilience.errors import InputError
from consilience.mixing.target import as_rows
from consilience.optimizers.spaces import Space
from consilience.recipe.schema import parse_recipe
from tests.learned.tiny_experts import read_state, sentences, write_base, write_expert, write_rows

NAMES = ("a", "b", "c")


def labelled(seed: int, count: int) -> list[dict[str, str]]:
    return [{"prompt": text, "response": f" {text.split()[0]} w{7 + seed}"} for text in sentences(seed, count)]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("glue")
    base = write_base(place / "base")
    for seed, name in enumerate(NAMES):
        write_expert(place / name, base, seed, scale=0.3)
    write_rows(place / "train.jsonl", labelled(20, 8))
    write_rows(place / "validation.jsonl", labelled(21, 6))
    return place


def recipe(zoo: Path, names: Sequence[str] = NAMES, target: Any = None, **parameters: Any) -> Any:
    files = {"train": str(zoo / "train.jsonl"), "validation": str(zoo / "validation.jsonl")}
    values = {"steps": 12, "batch": 0, "learning_rate": 0.3} | parameters
    experts = {name: str(zoo / name) for name in names}
    return build_recipe("glue", str(zoo / "base"), experts, values, target=files if target is None else target)


def loss_of(zoo: Path, weights: torch.Tensor, rows: str = "train.jsonl") -> torch.Tensor:
    """Mean loss per response token of an explicit convex blend, with a graph to the weights."""
    from torch.func import functional_call

    from consilience.student.student import load_any
    from consilience.tasks.encoding import encode
    from consilience.tasks.load import load_tokenizer
    from consilience.tasks.rows import Task, read_rows

    states = [read_state(zoo / name) for name in NAMES]
    blend = {
        name: sum((w * state[name].double() for w, state in zip(weights, states, strict=True)), torch.zeros(()))
        for name in states[0]
    }
    model = load_any(zoo / "base").double()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for one in encode(Task("t", read_rows(zoo / rows)), load_tokenizer(zoo / "base")):
        logits = functional_call(model, blend, (), {"input_ids": torch.tensor([one.inputs])}).logits[0]
        picked = torch.log_softmax(logits[list(one.positions)], -1)
        total = total - picked[torch.arange(len(one.targets)), torch.tensor(one.targets)].sum()
        count += len(one.targets)
    return total / count


def test_the_mixture_is_convex_written_whole_and_better_on_the_target(zoo: Path, tmp_path: Path) -> None:
    merge_recipe(recipe(zoo, steps=40, precision="float64"), tmp_path / "out")
    found = load_coefficients(tmp_path / "out")
    weights = found.alpha[:, 0]
    assert found.alpha.shape == (3, 1)
    assert (weights >= 0).all()
    assert weights.sum() == pytest.approx(1.0, abs=1e-6)
    states = [read_state(zoo / name) for name in NAMES]
    for name, value in read_state(tmp_path / "out").items():
        blend = sum(w * state[name].double().numpy() for w, state in zip(weights, states, strict=True))
        np.testing.assert_allclose(value.double().numpy(), blend, rtol=1e-5, atol=1e-6, err_msg=name)
    before = loss_of(zoo, torch.full((3,), 1 / 3, dtype=torch.float64), "validation.jsonl")
    after = loss_of(zoo, torch.tensor(weights), "validation.jsonl")
    assert float(after) < float(before)
    held = [line["held_out"] for line in found.facts["history"] if "held_out" in line]
    assert min(held) == pytest.approx(float(after), rel=1e-5)
    assert found.facts["diagnosis"]["advice"]


def test_no_step_runs_backwards(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a backward pass")

    monkeypatch.setattr(torch.autograd, "backward", refuse)
    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    assert learn(recipe(zoo, steps=3)).alpha.sum() == pytest.approx(1.0)


def test_the_full_gradient_is_autograds_through_the_blend(zoo: Path) -> None:
    """One step of plain descent from uniform weights: beta - rate * dL/dbeta."""
    found = learn(recipe(zoo, optimizer="sgd", steps=1, learning_rate=0.5, precision="float64", target=None))
    beta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    loss_of(zoo, torch.softmax(beta, 0)).backward()
    assert beta.grad is not None
    expected = torch.softmax(-0.5 * beta.grad, 0)
    first = next(line for line in found.facts["history"] if line["step"] == 0)
    assert first["target"] == pytest.approx(float(loss_of(zoo, torch.full((3,), 1 / 3).double())), rel=1e-6)
    uniform = np.full(3, 1 / 3)
    moved = found.alpha[:, 0]
    if not np.allclose(moved, uniform):  # the step may be worse on the validation rows, and the start is kept then
        np.testing.assert_allclose(moved, expected.numpy(), rtol=1e-6)
    alone = learn(
        recipe(zoo, optimizer="sgd", steps=1, learning_rate=0.5, precision="float64",
               target={"train": str(zoo / "train.jsonl")})
    )  # fmt: skip
    np.testing.assert_allclose(alone.alpha[:, 0], expected.numpy(), rtol=1e-6)


def test_one_expert_is_that_expert(zoo: Path, tmp_path: Path) -> None:
    merge_recipe(recipe(zoo, ("b",), steps=4), tmp_path / "out")
    assert load_coefficients(tmp_path / "out").alpha.tolist() == [[1.0]]
    own = read_state(zoo / "b")
    for name, value in read_state(tmp_path / "out").items():
        torch.testing.assert_close(value, own[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("space", "granularity"), [("affine", "block"), ("task_vector", "tensor"), ("simplex", "tensor")]
)
def test_other_spaces_and_granularities(zoo: Path, space: str, granularity: str) -> None:
    found = learn(recipe(zoo, space=space, granularity=granularity, steps=5))
    assert found.alpha.shape[1] > 1
    if space != "task_vector":
        np.testing.assert_allclose(found.alpha.sum(0), 1.0, atol=1e-6)


SPACES: dict[str, dict[str, Any]] = {
    "simplex": {},
    "affine": {"perturb": "weights"},
    "low_rank": {"parts": 2},
    "hierarchical": {"parts": 2, "alphabar": {"a": 0.5, "b": 0.25, "c": 0.25}},
    "a ball": {"radius": 0.4},
}


@pytest.mark.parametrize("name", SPACES)
def test_experts_on_disk_and_in_memory_are_mixed_alike(zoo: Path, name: str) -> None:
    from consilience.mixing import LossOf, Target, mix
    from consilience.student.student import load_any
    from consilience.tasks.encoding import encode
    from consilience.tasks.load import load_tokenizer
    from consilience.tasks.rows import Task, read_rows

    own: dict[str, Any] = {"space": name if name in get_args(Space) else "simplex", "steps": 4, "learning_rate": 0.3}
    own |= SPACES[name]
    start: dict[str, float] = own.pop("alphabar", dict.fromkeys(NAMES, 1 / 3))
    target = {"train": str(zoo / "train.jsonl")}
    experts = {k: {"model": str(zoo / k), "parameters": {"alphabar": start[k]}} for k in NAMES}
    stored = learn(
        build_recipe("glue", str(zoo / "base"), {k: str(zoo / k) for k in NAMES}, own | {"batch": 0}, target=target)
        if name != "hierarchical"
        else parse_recipe(
            {"merge_method": "glue", "base_model": str(zoo / "base"), "models": [*experts.values()],
             "parameters": own | {"batch": 0}, "target": target},
            "test",
        )
    )  # fmt: skip

    rows = encode(Task("t", read_rows(zoo / "train.jsonl")), load_tokenizer(zoo / "base"))
    width = max(len(one.inputs) for one in rows)
    inputs, labels = (torch.full((len(rows), width), fill) for fill in (0, -100))
    for i, one in enumerate(rows):
        inputs[i, : len(one.inputs)] = torch.tensor(one.inputs)
        for at, label in zip(one.positions, one.targets, strict=True):
            labels[i, at] = label

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2).double(), labels)

    perturb = {"weights": "alpha"}.get(own.pop("perturb", "logits"), "w")
    held = mix(
        load_any(zoo / "base"), {k: load_any(zoo / k).state_dict() for k in NAMES},
        Target(as_rows((inputs, labels)), None, LossOf(loss), 0), bn="blend", start=[start[k] for k in NAMES],
        normalise=True, perturb=perturb, **own,
    )  # fmt: skip
    np.testing.assert_allclose(stored.alpha, held.alpha, atol=2e-4)
    assert np.abs(stored.alpha - np.array([[start[k]] for k in NAMES])).max() > 0.01
    for key in ("entropy", "distance", "sigma_max", "sigma_max_centred"):
        assert stored.facts.get(key, np.nan) == pytest.approx(getattr(held, key), rel=1e-3, nan_ok=True), key
    assert stored.facts["left_hull"] == held.left_hull


def test_what_is_wrong_is_said_in_one_line(zoo: Path, tmp_path: Path) -> None:
    same = {"train": str(zoo / "train.jsonl"), "validation": str(zoo / "train.jsonl")}
    unlabelled = {"train": str(write_rows(tmp_path / "bare.jsonl", sentences(1, 4)))}
    cases: list[tuple[Any, str]] = [
        (recipe(zoo, target={}), "needs labelled rows of the target"),
        (recipe(zoo, target={"train": str(tmp_path / "none.jsonl")}), "none.jsonl"),
        (recipe(zoo, target=same), "are also in"),
        (recipe(zoo, target=unlabelled), "target: no row has a response"),
        (recipe(zoo, alphabar=0.0), "alphabar: start weights must be above 0"),
    ]
    for value, words in cases:
        with pytest.raises(InputError, match=words) as caught:
            merge_recipe(value, tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob("out*"))


def test_a_plan_says_how_many_rows_it_learns_from(zoo: Path) -> None:
    from consilience.cli.learning import learning_lines

    plan = plan_recipe(recipe(zoo))
    assert "  rows: target 8, target validation 6" in learning_lines(plan)
    plan.close()


@pytest.mark.parametrize("space", ["simplex", "task_vector", "low_rank", "a ball"])
def test_what_is_kept_is_mixed_as_if_there_were_no_others(zoo: Path, tmp_path: Path, space: str) -> None:
    own: dict[str, Any] = {"space": space, "steps": 4} if space != "a ball" else {"radius": 0.4, "steps": 4}
    own |= {"target": {"train": str(zoo / "train.jsonl")}}
    losses = [float(loss_of(zoo, torch.eye(3, dtype=torch.float64)[k], "train.jsonl")) for k in range(3)]
    best = [NAMES[k] for k in sorted(np.argsort(losses)[:2])]
    found = learn(recipe(zoo, keep=2, **own))
    alone = learn(recipe(zoo, best, **own))
    assert found.facts["kept"] == best
    chosen = [NAMES.index(name) for name in best]
    np.testing.assert_allclose(found.alpha[chosen], alone.alpha, rtol=1e-5, atol=1e-6)
    assert not np.delete(found.alpha, chosen, 0).any()
    assert np.abs(alone.alpha - 0.5).max() > 0.003
    merge_recipe(recipe(zoo, keep=2, **own), tmp_path / "out")
    assert load_coefficients(tmp_path / "out").alpha.tolist() == found.alpha.tolist()


def test_experts_that_are_kept_start_though_the_others_had_all_the_weight(zoo: Path) -> None:
    best = learn(recipe(zoo, keep=2, steps=0)).facts["kept"]
    (other,) = set(NAMES) - set(best)
    value = {
        "merge_method": "glue", "base_model": str(zoo / "base"),
        "models": [{"model": str(zoo / k), "parameters": {"alphabar": float(k == other)}} for k in NAMES],
        "parameters": {"keep": 2, "steps": 0, "space": "task_vector"}, "target": recipe(zoo).target.model_dump(),
    }  # fmt: skip
    found = learn(parse_recipe(value, "test"))
    assert found.facts["kept"] == best
    assert found.alpha[:, 0].tolist() == [0.0 if k == other else 0.5 for k in NAMES]


def test_no_more_experts_are_kept_than_there_are(zoo: Path) -> None:
    with pytest.raises(InputError, match="keep: 4 of 3 experts"):
        learn(recipe(zoo, keep=4))
