"""A collapsed model against the routed one: equal where routing is constant, and its means counted token by token."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from routed_models import LLAMA, T5, ByLetter, make_experts, write_adapter
from torch import Tensor

from consilience.__main__ import run
from consilience.api import merge_recipe
from consilience.coefficients import load_coefficients
from consilience.errors import InputError
from consilience.routing import build_routed, load_routed
from consilience.routing.conversion.collapse import collapse
from consilience.routing.layer import RoutedLinear
from consilience.routing.model import Routing
from consilience.routing.settings import Settings
from consilience.tasks import evaluate, load_task
from consilience.tasks.load import load_model
from consilience.tasks.results import Evaluation, Metric
from tests.tasks.tiny_models import make_llama, make_t5, make_tokenizer

IDS = torch.tensor([[5, 9, 40, 77, 120, 33], [8, 8, 61, 200, 3, 17]])
WORDS = ("a", "bb", "ab cab", "the cat sat", "is good?", "cc aa bb")


def save_routed(place: Path, model: Any, targets: tuple[str, ...]) -> Path:
    """Write a base, three adapters and the routed model's folder."""
    model.save_pretrained(place / "base")
    make_tokenizer().save_pretrained(place / "base")
    experts = [write_adapter(expert, place / expert.name) for expert in make_experts(model, 3, targets)]
    recipe = {
        "base_model": str(place / "base"),
        "models": [{"model": str(path)} for path in experts],
        "routing": {"local": "arrow", "top_k": 2},
    }
    build_routed(recipe, place / "routed")
    return place / "routed"


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_routed(tmp_path_factory.mktemp("llama"), make_llama(), LLAMA)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of different lengths, with responses."""
    path = tmp_path_factory.mktemp("rows") / "words.jsonl"
    lines = [json.dumps({"prompt": word, "response": word[::-1]}) for word in WORDS]
    path.write_text("\n".join(lines) + "\n")
    return path


def logits(model: Any, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**(inputs or {"input_ids": IDS})).logits


def measured(evaluation: Evaluation, metric: Metric) -> float:
    found = evaluation.results[0].value(metric)
    assert found is not None
    return found[0]


def layers(model: Any) -> dict[str, Any]:
    return {name: one for name, one in model.named_modules() if isinstance(one, RoutedLinear)}


def test_fixed_weights_collapse_exactly(routed: Path, rows: Path, tmp_path: Path) -> None:
    model = load_routed(routed, dtype="float32")
    with model.routing.only([0.2, 0.5, 0.3]):
        found = collapse(routed, [rows], tmp_path / "out", model=model)
        expected = logits(model)
    assert np.allclose(found.coefficients.alpha, np.array([0.2, 0.5, 0.3])[:, None], atol=1e-7)
    merged = load_model(tmp_path / "out")
    assert type(merged.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert torch.allclose(logits(merged), expected, atol=1e-3, rtol=1e-4)
    losses = [measured(one, "loss") for one in found.evaluations]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert measured(found.evaluations[1], "kl") < 1e-6
    assert found.shares["words"] == pytest.approx({"e0": 0.2, "e1": 0.5, "e2": 0.3}, abs=1e-6)


def test_weights_that_differ_by_layer_collapse_exactly(routed: Path, rows: Path, tmp_path: Path) -> None:
    model = load_routed(routed, dtype="float32")
    generator = torch.Generator().manual_seed(1)
    chosen = {name: torch.rand(1, 3, generator=generator).softmax(-1) for name in layers(model)}
    for name, layer in layers(model).items():
        layer.experts.router = replace(model.routing.router, fixed=chosen[name])
    found = collapse(routed, [rows], tmp_path / "out", model=model)
    for name, weights in chosen.items():
        assert found.coefficients.of(f"{name}.weight")[:, 0] == pytest.approx(weights[0].tolist(), abs=1e-6)
    assert torch.allclose(logits(load_model(tmp_path / "out")), logits(model), atol=1e-3, rtol=1e-4)


def test_an_encoder_and_a_decoder_collapse_exactly(rows: Path, tmp_path: Path) -> None:
    folder = save_routed(tmp_path, make_t5(), T5)
    model = load_routed(folder, dtype="float32")
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]}
    with model.routing.only([0.6, 0.0, 0.4]):
        collapse(folder, [rows], tmp_path / "out", model=model)
        expected = logits(model, **inputs)
    assert torch.allclose(logits(load_model(tmp_path / "out"), **inputs), expected, atol=1e-3, rtol=1e-4)


def test_coefficients_are_means_over_tokens(routed: Path, rows: Path, tmp_path: Path) -> None:
    model, seen = load_routed(routed, dtype="float32"), dict[str, list[Tensor]]()
    tokenizer = model.tokenizer
    for word in WORDS:
        turns = [{"role": "user", "content": word}, {"role": "assistant", "content": word[::-1]}]
        text = tokenizer.apply_chat_template(turns, tokenize=False).removesuffix("<|im_end|>\n")
        ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
        with model.routing.watched(lambda name, weights: seen.setdefault(name, []).append(weights[0])):
            logits(model, input_ids=ids)
    found = collapse(routed, [rows], tmp_path / "out", batch_size=4)
    assert {name for group in found.coefficients.groups for name, _ in group.tensors} == {f"{n}.weight" for n in seen}
    means = {name: torch.cat(weights).double().mean(0) for name, weights in seen.items()}
    for name, mean in means.items():
        assert found.coefficients.of(f"{name}.weight")[:, 0] == pytest.approx(mean.tolist(), abs=1e-5)
    overall = torch.stack(list(means.values())).mean(0).tolist()
    assert list(found.shares["words"].values()) == pytest.approx(overall, abs=1e-5)
    assert found.coefficients.facts["tokens"] == sum(len(one) for one in seen[next(iter(seen))])


def test_answers_do_not_route_themselves(routed: Path, tmp_path: Path) -> None:
    model = make_llama().requires_grad_(False)
    semantics = ByLetter(3)
    Routing(model, make_experts(model), Settings("arrow", scale=20.0), make_tokenizer(), semantics)
    model.tokenizer = make_tokenizer()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "aab", "response": "cc"}\n{"prompt": "b", "response": "ccc"}\n')
    found = collapse(routed, [tmp_path / "rows.jsonl"], tmp_path / "out", model=model)
    # Measuring begins with a probe of eight tokens, whose query is no row's.
    assert {"aab", "b"} <= set(semantics.asked)
    assert all("c" not in text for text in semantics.asked)
    assert found.coefficients.facts["routing"]["scale"] == 20.0


def test_the_output_is_an_ordinary_merge(routed: Path, rows: Path, tmp_path: Path) -> None:
    found = collapse(routed, [f"held={rows}"], tmp_path / "out")
    ours = tmp_path / "out/consilience"
    assert np.array_equal(load_coefficients(ours).alpha, found.coefficients.alpha)
    assert json.loads((ours / "lineage.json").read_text())["method"] == "coefficients"
    record = json.loads((ours / "collapse.json").read_text())
    assert [one["model"] for one in record["evaluations"]] == ["routed", "collapsed"]
    assert record["routing"]["top_k"] == 2
    merge_recipe(ours / "recipe.yaml", tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
    again = evaluate(str(tmp_path / "out"), [load_task(f"held={rows}")], cache=False, progress=False)
    assert "6 of 6 rows were calibration rows" in again.notes[0]
    assert not (tmp_path / "out.partial").exists()


def test_rows_without_responses_are_compared_by_divergence(routed: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "aab"}\n{"prompt": "the cat sat"}\n')
    found = collapse(routed, [tmp_path / "prompts.jsonl"], tmp_path / "out")
    (single,) = found.evaluations
    assert single.results[0].loss is None
    assert measured(single, "kl") > 0
    both = collapse(routed, [tmp_path / "prompts.jsonl"], tmp_path / "both", held_out=[rows])
    assert np.array_equal(both.coefficients.alpha, found.coefficients.alpha)
    assert [one.results[0].task for one in both.evaluations] == ["words", "words"]


def stopping(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def test_an_interrupted_run_goes_on(routed: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr("consilience.routing.conversion.collapse.evaluate", stopping)
        with pytest.raises(KeyboardInterrupt):
            collapse(routed, [rows], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as broken:
        broken.setattr("consilience.engine.worker.Worker.merge", stopping)
        collapse(routed, [rows], tmp_path / "out")
    collapse(routed, [rows], tmp_path / "whole")
    for name in ("model.safetensors", "consilience/coefficients.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def other_experts(folder: Path) -> Any:
    model = load_routed(folder, dtype="float32")
    model.routing.replace(model.routing.experts[:2], None)
    return model


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (lambda folder: {"folder": folder / "nowhere"}, "holds no consilience"),
        (lambda folder: {"model": other_experts(folder)}, "its experts are not those"),
        (lambda folder: {"out": folder / "inside"}, "choose another OUT"),
        (lambda folder: {"tasks": ["lost.jsonl"]}, "no such file"),
    ],
)
def test_wrong_input_leaves_nothing(
    routed: Path, rows: Path, tmp_path: Path, settings: Callable[[Path], dict[str, Any]], said: str
) -> None:
    before = sorted(routed.rglob("*"))
    given: dict[str, Any] = {"folder": routed, "tasks": [rows], "out": tmp_path / "out"}
    with pytest.raises(InputError, match=said):
        collapse(**(given | settings(routed)))
    assert list(tmp_path.iterdir()) == []
    assert sorted(routed.rglob("*")) == before


def test_a_module_that_sees_nothing_is_named(
    routed: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_routed(routed, dtype="float32")
    lost = "model.layers.1.mlp.down_proj"
    layer = layers(model)[lost]
    monkeypatch.setattr(layer.experts, "add", lambda _u, y: y)
    with pytest.raises(InputError, match=lost):
        collapse(routed, [rows], tmp_path / "out", model=model)
    assert list(tmp_path.iterdir()) == []


def test_the_command_shows_both(routed: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(["route", "collapse", str(routed), str(out), f"held={rows}", "--set", "top_k=0"]) == 0
    shown = capsys.readouterr().out
    assert f"{out}: one model of 3 experts" in shown.replace("\n", "")
    lines = [line for line in shown.splitlines() if "routed" in line or "collapsed" in line]
    assert [line.split()[1] for line in lines[:2]] == ["routed", "collapsed"]
    assert json.loads((out / "consilience/collapse.json").read_text())["routing"]["top_k"] == 0
