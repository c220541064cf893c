"""What learned merges say of themselves: where they stand, and whether their weights have settled."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from consilience.coefficients import load_coefficients
from consilience.mixing import LossOf, Target, mix
from consilience.mixing.target import Tensors
from tests.learned.tiny_experts import sentences, write_adapter, write_base, write_rows
from tests.mixing.tiny_nets import Point, State, squared
from tests.real_files.support import Outcome, cli, logits, real_file


def experts(tmp_path: Path, count: int, **more: Any) -> list[str]:
    """Write a base and ``count`` adapters; return the options that name them and their rows."""
    base = write_base(tmp_path / "base")
    words: list[str] = []
    for k in range(count):
        path = write_adapter(tmp_path / f"x{k}", base, k, **more)
        rows = write_rows(tmp_path / f"x{k}.jsonl", sentences(k, 3))
        words += ["-e", f"x{k}={path}", "--calibration", f"x{k}={rows}"]
    return words


def learned(tmp_path: Path, words: list[str], method: str, *settings: str) -> Outcome:
    more = [word for setting in settings for word in ("--set", setting)]
    return cli("merge", tmp_path / "base", tmp_path / "out", *words, "--method", method, "--dtype", "float32", *more)


def kl(teacher: Path, model: Path, rows: Path) -> float:
    """Mean KL(teacher || model) over the tokens of a file's prompts, with transformers alone."""
    from transformers import AutoTokenizer

    from consilience.tasks.rows import read_rows

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    values: list[torch.Tensor] = []
    for row in read_rows(rows):
        ids = torch.tensor([tokenizer(row.prompt).input_ids])
        p, q = (logits(one, ids)[0].double().log_softmax(-1) for one in (teacher, model))
        values.append((p.exp() * (p - q)).sum(-1))
    return float(torch.cat(values).mean())


@pytest.mark.parametrize("method", ["adamerging", "adamerging_pp", "least_squares", "expert_merging"])
@real_file(12, family="Llama, LoRA of unequal sizes", option="learned merges that end below the base, no row held out",
           expected="KL by transformers", before="silent loss")  # fmt: skip
def test_an_end_below_the_base_is_said(tmp_path: Path, method: str) -> None:
    words = experts(tmp_path, 2)
    settings = {
        "least_squares": ["ridge=1000", "alphabar=8"],
        "expert_merging": ["learning_rate=0", "steps=1", "alphabar=8", "responses=given"],
    }.get(method, ["learning_rate=0", "steps=1", "alphabar=8", "clamp=false"])
    if method == "adamerging_pp":
        settings.append("density=1.0")
    outcome = learned(tmp_path, words, method, *settings, "precision=float32")
    assert outcome.code == 0, outcome.said
    figures = re.search(r"KL to the experts on 6 .*: base ([\d.]+), .* learned ([\d.]+)", outcome.said)
    assert figures is not None, outcome.said
    assert "no better than the base" in outcome.said
    played = [tmp_path / f"full{k}" for k in range(2)]
    for k, path in enumerate(played):  # an expert alone, as a folder
        assert cli("merge", tmp_path / "base", path, "-e", f"x={tmp_path / f'x{k}'}", "--method", "task_arithmetic",
                   "--set", "weight=1.0", "--dtype", "float32").code == 0  # fmt: skip
    for at, model in ((1, tmp_path / "base"), (2, tmp_path / "out")):
        each = [kl(played[k], model, tmp_path / f"x{k}.jsonl") for k in range(2)]
        assert float(figures[at]) == pytest.approx(sum(each) / 2, rel=2e-3)


@pytest.mark.parametrize("count", [20, 30, 100])
@real_file(12, family="PyTorch module", option="GLUE on 20, 30 and 100 experts, small steps", expected="a formula",
           before="wrong numbers")  # fmt: skip
def test_weights_that_hardly_moved_have_not_converged(count: int) -> None:
    draw = torch.Generator().manual_seed(count)
    places = torch.randn(count, 50, generator=draw, dtype=torch.float64)
    states: dict[str, State] = {f"x{k}": {"theta": place} for k, place in enumerate(places)}
    goal = places[:3].mean(0)
    noisy = goal + 3 * torch.randn(200, 50, generator=draw, dtype=torch.float64)
    rows = Tensors(torch.zeros(200, 1), noisy)
    target = Target(rows, rows, LossOf(squared), batch_size=4)
    found = mix(Point(50), states, target, steps=60, learning_rate=0.01)
    weights = torch.tensor(found.alpha[:, 0])
    left = float((weights @ places - goal).norm() / (places.mean(0) - goal).norm())
    assert left > 0.5, "most of the way is left"
    assert found.diagnosis is not None
    assert found.diagnosis.verdict == "unsettled"


@real_file(12, family="Llama, 20 LoRA adapters", option="GLUE whose steps are tiny", expected="the weights in OUT",
           before="wrong numbers")  # fmt: skip
def test_a_run_of_glue_does_not_call_twenty_still_weights_converged(tmp_path: Path) -> None:
    words = [word for word in experts(tmp_path, 20) if not word.startswith("--cal") and not word.endswith(".jsonl")]
    rows = [{"prompt": text, "response": f" w{k}"} for k, text in enumerate(sentences(1, 12))]
    target = ["--target", f"train={write_rows(tmp_path / 'target.jsonl', rows)}"]
    outcome = learned(tmp_path, [*words, *target], "glue", "steps=24", "learning_rate=0.003", "batch=4")
    assert outcome.code == 0, outcome.said
    weights = load_coefficients(tmp_path / "out").alpha[:, 0]
    assert abs(weights - 1 / 20).max() < 0.01
    assert "converged" not in outcome.said
    assert "loss on 12 rows that were learned from" in outcome.said
