"""GLUE and LoraHub on the accuracy of rank classification, against log-probabilities of explicit blends."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from consilience.api import build_recipe, learn, merge_recipe, plan_recipe
from consilience.coefficients import load_coefficients
from consilience.errors import InputError
from consilience.learned.compare import STRENGTHS
from consilience.learned.learn import learn_state
from consilience.learned.ranking import Ranking
from tests.learned.tiny_experts import WORDS, read_state, sentences, write_base, write_expert, write_rows

NAMES = ("a", "b", "c")
UNIFORM = np.full(3, 1 / 3)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three full experts, and rows whose right choice is the one that expert ``a`` ranks first."""
    place = tmp_path_factory.mktemp("ranking")
    base = write_base(place / "base")
    for seed, name in enumerate(NAMES):
        write_expert(place / name, base, seed, scale=0.5)
    for seed, name in ((30, "train"), (31, "validation")):
        write_rows(place / f"{name}.jsonl", [row | {"label": 0} for row in unlabelled(seed, 12)])
        right = choices_of(place, np.array([1.0, 0.0, 0.0]), place / f"{name}.jsonl")
        write_rows(place / f"{name}.jsonl", labelled(seed, right))
    return place


def unlabelled(seed: int, count: int) -> list[dict[str, Any]]:
    """Rows of two to four choices, some of several words."""
    generator, rows = np.random.default_rng(seed), list[dict[str, Any]]()
    for k, text in enumerate(sentences(seed, count)):
        words = generator.choice(WORDS, (2 + k % 3, 1 + k % 2), replace=False).tolist()
        rows.append({"prompt": text, "choices": ["".join(f" {word}" for word in choice) for choice in words]})
    return rows


def labelled(seed: int, right: Sequence[int]) -> list[dict[str, Any]]:
    return [row | {"label": label} for row, label in zip(unlabelled(seed, len(right)), right, strict=True)]


def choices_of(zoo: Path, weights: Any, rows: Path) -> list[int]:
    """The choices that an explicit blend of the experts finds likeliest, one sequence after the other."""
    from consilience.student.student import load_any

    states, model = [read_state(zoo / name) for name in NAMES], load_any(zoo / "base")
    model.load_state_dict(
        {name: sum(float(w) * s[name] for w, s in zip(weights, states, strict=True)) for name in states[0]}
    )
    ids, found = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}, list[int]()
    for line in rows.read_text().splitlines():
        row, values = json.loads(line), list[float]()
        for choice in row["choices"]:
            start, tokens = len(row["prompt"].split()), [ids[w] for w in (row["prompt"] + choice).split()]
            with torch.no_grad():
                logs = torch.log_softmax(model(torch.tensor([tokens])).logits[0].double(), -1)
            values.append(sum(float(logs[i - 1, tokens[i]]) for i in range(start, len(tokens))))
        found.append(int(np.argmax(values)))
    return found


def error_of(zoo: Path, weights: Any, rows: Path) -> float:
    labels = [json.loads(line)["label"] for line in rows.read_text().splitlines()]
    return float(np.mean(np.array(choices_of(zoo, weights, rows)) != np.array(labels)))


def recipe(zoo: Path, method: str = "glue", target: Any = None, **parameters: Any) -> Any:
    files = {"train": str(zoo / "train.jsonl"), "validation": str(zoo / "validation.jsonl")}
    values: dict[str, Any] = {"score": "accuracy", "steps": 4} | parameters
    values |= {"batch": 0} if method == "glue" else {}
    experts = {name: str(zoo / name) for name in NAMES}
    return build_recipe(method, str(zoo / "base"), experts, values, target=files if target is None else target)


@pytest.mark.slow
def test_the_error_is_that_of_the_merged_weights_and_falls(zoo: Path, tmp_path: Path) -> None:
    chosen = recipe(zoo, optimizer="cma", sigma=2.0, population=8, steps=5)
    merge_recipe(chosen, tmp_path / "out")
    found = load_coefficients(tmp_path / "out")
    weights, history = found.alpha[:, 0], found.facts["history"]
    train, validation = zoo / "train.jsonl", zoo / "validation.jsonl"
    assert history[0]["error"] == pytest.approx(error_of(zoo, UNIFORM, train), abs=1e-12)
    held = error_of(zoo, weights, validation)
    assert history[found.facts["step"] - 1]["held_out"] == pytest.approx(held, abs=1e-12)
    assert held < error_of(zoo, UNIFORM, validation)
    assert weights.sum() == pytest.approx(1.0)
    merged = read_state(tmp_path / "out")
    states = [read_state(zoo / name) for name in NAMES]
    for name, value in merged.items():
        blend = sum(w * state[name].double().numpy() for w, state in zip(weights, states, strict=True))
        np.testing.assert_allclose(value.double().numpy(), blend, rtol=1e-5, atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(learn(chosen).alpha, found.alpha)


def test_a_step_is_two_evaluations_of_all_rows_and_no_backward_pass(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a backward pass")

    monkeypatch.setattr(torch.autograd, "backward", refuse)
    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    one = recipe(zoo, mu=1.0, granularity="block", target={"train": str(zoo / "train.jsonl")})
    first, second = learn(one), learn(one)
    np.testing.assert_array_equal(first.alpha, second.alpha)
    assert not np.allclose(first.alpha, 1 / 3)
    for line in first.facts["history"]:  # the mean of two evaluations of all rows
        assert line["error"] * 24 == pytest.approx(round(line["error"] * 24), abs=1e-9)


def test_lorahub_searches_by_the_same_score(zoo: Path) -> None:
    values: dict[str, Any] = {"optimizer": "cma", "sigma": 0.7, "population": 8, "steps": 8, "penalty": 0.0}
    # Where the coefficients sum to 1, task vectors blend the experts themselves.
    found = learn(
        recipe(zoo, "lorahub", {"train": str(zoo / "train.jsonl")}, precision="float32", alphabar=1 / 3, **values)
    )
    errors = [line["error"] for line in found.facts["history"]]
    assert errors[0] == pytest.approx(error_of(zoo, UNIFORM, zoo / "train.jsonl"), abs=1e-12)
    assert min(errors) < errors[0]


def test_a_run_goes_on_unless_the_labels_have_changed(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, evaluate = 0, Ranking.evaluate

    def counted(self: Ranking, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return evaluate(self, *arguments, **options)

    monkeypatch.setattr(Ranking, "evaluate", counted)
    rows = [json.loads(line) for line in (zoo / "train.jsonl").read_text().splitlines()]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    one = recipe(zoo, target={"train": str(path)}, optimizer="cma", population=2, steps=1)
    beside = len(STRENGTHS) + 2  # every run compares itself anew
    for runs, evaluations in enumerate((3, 3, 6), 1):
        if evaluations == 6:
            write_rows(path, [row | {"label": (row["label"] + 1) % len(row["choices"])} for row in rows])
        plan = plan_recipe(one)
        found = learn_state(plan, tmp_path / "state")
        plan.close()
        assert calls == evaluations + runs * beside
        assert found.facts["history"][0]["error"] == pytest.approx(error_of(zoo, UNIFORM, path), abs=1e-12)


def test_what_is_wrong_is_said_in_one_line(zoo: Path, tmp_path: Path) -> None:
    plain = write_rows(
        tmp_path / "plain.jsonl", [unlabelled(1, 1)[0] | {"label": 0}, {"prompt": "w1", "response": "w2"}]
    )
    long = write_rows(tmp_path / "long.jsonl", [{"prompt": "w1", "choices": [" w2", " w3" * 80], "label": 0}])
    cases: list[tuple[Any, str]] = [
        (recipe(zoo, optimizer="adam"), "optimizer: adam follows a gradient and an accuracy has none"),
        (recipe(zoo, tune_mu=True), "tune_mu: an accuracy has no noise"),
        (recipe(zoo, target={"train": str(plain)}), r"plain.jsonl:2: score=accuracy ranks choices and this row has"),
        (recipe(zoo, "lorahub", {"train": str(plain)}), r"plain.jsonl:2: score=accuracy"),
        (recipe(zoo, target={"train": str(long)}), r"long.jsonl:1: choice 1 exceeds"),
    ]
    for value, words in cases:
        with pytest.raises(InputError, match=words) as caught:
            merge_recipe(value, tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.glob("out*"))
