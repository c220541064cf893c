"""Every learned method stands beside the base and Task Arithmetic, by the measure that fits its rows."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from consilience.api import build_recipe, learn
from consilience.cli.learning import summary
from consilience.learned.compare import ROWS, STRENGTHS, TARGET_ROWS
from consilience.student.student import load_any
from consilience.tasks.encoding import encode
from consilience.tasks.load import load_tokenizer
from consilience.tasks.rows import Task, read_rows
from tests.learned.tiny_experts import read_state, sentences, write_adapter, write_base, write_expert, write_rows

NAMES = ("a", "b")
Measured = Callable[[Any, Any], torch.Tensor]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("compare")
    base = write_base(place / "base")
    for seed, name in enumerate(NAMES):
        write_expert(place / name, base, seed, scale=0.2)
        write_rows(place / f"{name}.jsonl", sentences(seed, 7))
        write_rows(place / f"{name}-held.jsonl", sentences(seed + 10, 3))
        write_rows(place / f"{name}-answered.jsonl", answered(seed, 6))
    write_adapter(place / "lora", base, 3, rank=2)
    write_adapter(place / "wide", base, 4, rank=5, modules=["model.layers.1.mlp.down_proj"])
    write_rows(place / "target.jsonl", answered(20, 8))
    write_rows(place / "target-held.jsonl", answered(21, TARGET_ROWS + 4))
    return place


def answered(seed: int, count: int) -> list[dict[str, str]]:
    return [{"prompt": text, "response": f" {text.split()[0]} w{7 + seed}"} for text in sentences(seed, count)]


def recipe(zoo: Path, method: str, names: Sequence[str] = NAMES, rows: str = "{}.jsonl", **more: Any) -> Any:
    held = more.pop("held", None)
    data: dict[str, dict[str, str]] = {}
    if "target" not in more:
        key = "probe" if method == "stability_weights" else "calibration"
        data = {name: {key: str(zoo / rows.format(own))} for name, own in zip(names, NAMES, strict=True)}
        for name, files in data.items():
            files |= {"validation": str(zoo / held.format(name))} if held else {}
    parameters = {"precision": "float32", **more.pop("parameters", {})}
    return build_recipe(method, str(zoo / "base"), {n: str(zoo / n) for n in names}, parameters, data=data, **more)


def mean_over_experts(zoo: Path, files: Sequence[str], count: int, strength: float, labelled: bool) -> float:
    """The measure of Task Arithmetic, one row at a time on whole models."""
    base = read_state(zoo / "base")
    blend = {k: v + strength * sum((read_state(zoo / n)[k] - v for n in NAMES), 0 * v) for k, v in base.items()}
    each: list[float] = []
    for expert, file in enumerate(files):
        student, teacher = load_any(zoo / "base"), load_any(zoo / NAMES[expert])
        student.load_state_dict(blend, strict=False)
        values: list[float] = []
        for one in encode(Task("t", read_rows(zoo / file)[:count]), load_tokenizer(zoo / "base")):
            ids = torch.tensor([one.inputs])
            with torch.no_grad():
                q, p = (m(input_ids=ids).logits[0].double().log_softmax(-1) for m in (student, teacher))
            if labelled:
                values += [-float(q[at, to]) for at, to in zip(one.positions, one.targets, strict=True)]
            else:
                values += (p.exp() * (p - q)).sum(-1).tolist()
        each.append(float(np.mean(values)))
    return float(np.mean(each))


CASES: dict[str, tuple[str, dict[str, Any], str, str, int]] = {
    "adamerging": ("adamerging", {"parameters": {"steps": 2}}, "kl", "rows that were learned from", 2 * ROWS),
    "adamerging_pp": ("adamerging_pp", {"parameters": {"steps": 2}}, "kl", "rows that were learned from", 2 * ROWS),
    "least squares": ("least_squares", {"parameters": {}}, "kl", "rows that were learned from", 2 * ROWS),
    "labelled": (
        "adamerging", {"rows": "{}-answered.jsonl", "parameters": {"steps": 2, "positions": "all"}}, "loss",
        "rows that were learned from", 2 * ROWS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_figures_are_those_of_whole_models(zoo: Path, case: str) -> None:
    method, more, measure, on, count = CASES[case]
    facts = learn(recipe(zoo, method, **more)).facts["compared"]
    files = [more.get("rows", "{}.jsonl").format(name) for name in NAMES]
    by_strength = {s: mean_over_experts(zoo, files, ROWS, s, measure == "loss") for s in (0.0, *STRENGTHS)}
    assert (facts["measure"], facts["on"], facts["rows"]) == (measure, on, count)
    assert facts["base"] == pytest.approx(by_strength.pop(0.0), rel=1e-3)
    assert facts["task_arithmetic"] == pytest.approx(min(by_strength.values()), rel=1e-3)
    assert by_strength[facts["strength"]] == pytest.approx(facts["task_arithmetic"], rel=1e-3)


def test_validation_rows_judge_where_none_is_held_out(zoo: Path) -> None:
    facts = learn(recipe(zoo, "adamerging", held="{}-held.jsonl", parameters={"steps": 1})).facts["compared"]
    assert (facts["on"], facts["rows"]) == ("validation rows", 6)
    held = [f"{name}-held.jsonl" for name in NAMES]
    assert facts["base"] == pytest.approx(mean_over_experts(zoo, held, ROWS, 0.0, labelled=False), rel=1e-3)


@pytest.mark.parametrize(
    ("method", "parameters"), [("glue", {"steps": 2}), ("lorahub", {"steps": 2, "optimizer": "cma"})]
)
@pytest.mark.parametrize("held", [False, True])
def test_a_target_is_judged_by_its_loss(zoo: Path, method: str, parameters: dict[str, Any], held: bool) -> None:
    target = {"train": str(zoo / "target.jsonl")} | ({"validation": str(zoo / "target-held.jsonl")} if held else {})
    facts = learn(recipe(zoo, method, target=target, parameters=parameters)).facts["compared"]
    file, rows = ("target-held.jsonl", TARGET_ROWS) if held else ("target.jsonl", 8)
    assert (facts["measure"], facts["rows"]) == ("loss", rows)
    assert facts["on"] == ("rows held out" if held else "rows that were learned from")
    assert facts["base"] == pytest.approx(mean_over_experts(zoo, [file], rows, 0.0, labelled=True), rel=1e-3)


@pytest.mark.parametrize("method", ["expert_merging", "adamerging", "expert_merging_pp"])
def test_an_end_below_the_base_is_told(zoo: Path, method: str) -> None:
    """Adapters of unequal ranks, pushed far beyond what they were trained for."""
    given = {} if method == "adamerging" else {"preset": "paper", "responses": "given"}
    parameters = {"steps": 1, "learning_rate": 0.0, "alphabar": 6.0, **given}
    parameters |= {"clamp": False} if method == "adamerging" else {}
    found = learn(recipe(zoo, method, ("lora", "wide"), parameters=parameters))
    facts = found.facts["compared"]
    assert facts["learned"] > facts["base"]
    assert any("no better than the base" in line for line in summary(found))


def test_what_cannot_be_compared_is_told_and_the_merge_stands(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from consilience.errors import InputError
    from consilience.student.student import Student

    def unheld(*_: Any) -> None:
        raise InputError("the expert cannot be run in its place")

    monkeypatch.setattr(Student, "become", unheld)
    found = learn(recipe(zoo, "adamerging", parameters={"steps": 1}))
    assert found.facts["compared"] == {"impossible": "the expert cannot be run in its place"}
    assert any("not compared with the base and Task Arithmetic: the expert" in line for line in summary(found))
