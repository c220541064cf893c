"""Statistics: against activations and slopes taken apart, joined parts, and the merges that read them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tiny_experts import sentences, write_rows, write_tokenizer
from typer.testing import CliRunner

import consilience as cs
from consilience.cli.app import app
from consilience.errors import InputError
from consilience.experts.model import open_model
from consilience.experts.statistics import Facts, Writer, join, mark_of, open_statistics
from consilience.learned.statistics import Collecting, collect_statistics

Q, K, DOWN = (f"model.layers.1.{part}.weight" for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"))


@pytest.fixture(scope="module")
def place(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The zoo with a tokenizer in each expert's folder, labelled rows, and rows with choices."""
    out = tmp_path_factory.mktemp("statistics") / "zoo"
    shutil.copytree(zoo, out)
    for name in ("a", "b"):
        write_tokenizer(out / name)
    texts = sentences(7, 4)
    rows = [{"prompt": text + " ", "response": other} for text, other in zip(texts, sentences(8, 4), strict=True)]
    (out / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"prompt": text + " ", "choices": ["w1", "w2 w3"], "label": 0} for text in texts]
    (out / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def ids(folder: Path, rows: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(json.loads(line)["prompt"]).input_ids for line in rows.read_text().splitlines()]


def inputs_of(folder: Path, rows: Path, names: list[str]) -> dict[str, np.ndarray]:
    """What layers are given, row by row, in float64."""
    model, seen = loaded(folder), dict[str, list[Any]]()
    for name in names:
        layer = model.get_submodule(name.removesuffix(".weight"))
        layer.register_forward_pre_hook(lambda _m, args, n=name: seen.setdefault(n, []).append(args[0][0].double()))
    with torch.no_grad():
        for row in ids(folder, rows):
            model(torch.tensor([row]))
    return {name: torch.cat(parts).numpy() for name, parts in seen.items()}


def test_gram_matrices_and_means_are_of_what_layers_are_given(place: Path, tmp_path: Path) -> None:
    rows = place / "rows" / "a.jsonl"
    facts = collect_statistics(
        place / "a", rows, tmp_path / "s", settings=Collecting(("gram", "mean"), batch_size=3), progress=False
    )
    found, seen = open_statistics(tmp_path / "s"), inputs_of(place / "a", rows, [Q, K, DOWN])
    assert facts.rows == 5
    assert len({file.stat().st_mode for file in (tmp_path / "s").iterdir() if file.is_file()}) == 1
    assert facts.tokens == len(seen[Q])
    for name, x in seen.items():
        np.testing.assert_allclose(found.read("gram", name), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.read("mean", name), x.mean(0), rtol=1e-4, atol=1e-5)
    held = [key for file in found.files for key in file.tensors]
    assert f"gram/{Q}" in held
    assert f"gram/{K}" not in held  # it is given what Q is given
    assert K in found.names("gram")
    assert "model.embed_tokens.weight" not in found.names("gram")


def test_gram_matrices_do_not_depend_on_how_many_are_made_at_a_time(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = place / "rows" / "a.jsonl"
    collect_statistics(place / "a", rows, tmp_path / "whole", progress=False)
    monkeypatch.setattr("consilience.learned.statistics.BYTES", 1)
    collect_statistics(place / "a", rows, tmp_path / "parts", settings=Collecting(batch_size=1), progress=False)
    whole, parts = (open_statistics(tmp_path / name) for name in ("whole", "parts"))
    assert len(parts.files) > 1
    for name in whole.names("gram"):
        np.testing.assert_allclose(whole.read("gram", name), parts.read("gram", name), rtol=1e-5, atol=1e-6)


def squared_slopes(model: Any, log: Any) -> dict[str, np.ndarray]:
    slopes = torch.autograd.grad(log, list(model.parameters()), retain_graph=True, allow_unused=True)
    named = zip(dict(model.named_parameters()), slopes, strict=True)
    return {n: s.double().square().numpy() for n, s in named}


def test_empirical_fisher_information_is_of_the_given_responses(place: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    rows = place / "labelled.jsonl"
    collect_statistics(place / "a", rows, tmp_path / "s", settings=Collecting(("fisher",), "empirical"), progress=False)
    model, tokenizer = loaded(place / "a"), AutoTokenizer.from_pretrained(place / "a")
    total: dict[str, Any] = {}
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        prompt, whole = (tokenizer(text).input_ids for text in (row["prompt"], row["prompt"] + row["response"]))
        logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        log = sum(logs[i - 1, whole[i]] for i in range(len(prompt), len(whole)))
        for name, value in squared_slopes(model, log).items():
            total[name] = total.get(name, 0) + value / 4
    found = open_statistics(tmp_path / "s")
    for name in (Q, DOWN, "model.norm.weight", "lm_head.weight"):
        np.testing.assert_allclose(found.read("fisher", name), total[name], rtol=1e-3, atol=1e-7)
    norm = np.sqrt(sum(float(np.square(value).sum()) for value in total.values()))
    assert found.facts.norm == pytest.approx(norm, rel=1e-3)


def test_exact_fisher_information_is_over_a_rows_choices(place: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    rows = place / "choices.jsonl"
    collect_statistics(place / "a", rows, tmp_path / "s", settings=Collecting(("fisher",), "exact"), progress=False)
    model, tokenizer = loaded(place / "a"), AutoTokenizer.from_pretrained(place / "a")
    total: dict[str, Any] = {}
    for line in rows.read_text().splitlines():
        row, scores = json.loads(line), list[Any]()
        prompt = tokenizer(row["prompt"]).input_ids
        for choice in row["choices"]:
            whole = tokenizer(row["prompt"] + choice).input_ids
            logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(logs[i - 1, whole[i]] for i in range(len(prompt), len(whole))))
        for log in torch.stack(scores).log_softmax(0):
            for name, value in squared_slopes(model, log).items():
                total[name] = total.get(name, 0) + float(log.detach().exp()) * value / 4
    found = open_statistics(tmp_path / "s")
    for name in (Q, DOWN, "lm_head.weight"):
        np.testing.assert_allclose(found.read("fisher", name), total[name], rtol=2e-3, atol=1e-7)


def test_sampled_labels_are_the_models_own(place: Path, tmp_path: Path) -> None:
    """Over many rows the slope of the head goes by the model's own distribution; another seed draws others."""
    (tmp_path / "alike.jsonl").write_text(400 * (json.dumps({"text": "w1 w2"}) + "\n"))
    found: list[Any] = []
    for seed in range(2):
        settings = Collecting(("fisher",), "sampled", seed=seed)
        collect_statistics(
            place / "a", tmp_path / "alike.jsonl", tmp_path / f"s{seed}", settings=settings, progress=False
        )
        found.append(open_statistics(tmp_path / f"s{seed}").read("fisher", "lm_head.weight"))
    assert not np.array_equal(*found)
    model = loaded(place / "a")
    row = torch.tensor([[4, 5]])  # w1 w2
    hidden = model.model(row).last_hidden_state[0, 0].detach()
    p = model(row).logits[0, 0].softmax(-1).detach()
    expected = torch.outer(p * (1 - p), hidden.square()).numpy()  # E (1[y = v] - p_v)^2 h^2
    likely = np.argsort(-p.numpy())[:4]
    for one in found:
        assert one.sum() == pytest.approx(expected.sum(), rel=0.05)
        np.testing.assert_allclose(one[likely], expected[likely], rtol=0.4)


def test_parts_join_to_the_whole(place: Path, tmp_path: Path) -> None:
    lines = (place / "labelled.jsonl").read_text().splitlines(keepends=True)
    settings = Collecting(("gram", "mean", "fisher"), "empirical")
    for name, chosen in (("whole", lines), ("one", lines[:1]), ("rest", lines[1:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(chosen))
        collect_statistics(place / "a", tmp_path / f"{name}.jsonl", tmp_path / name, settings=settings, progress=False)
    join([tmp_path / "one", tmp_path / "rest"], tmp_path / "joined")
    whole, joined = (open_statistics(tmp_path / name) for name in ("whole", "joined"))
    assert (joined.facts.rows, joined.facts.tokens) == (whole.facts.rows, whole.facts.tokens)
    assert joined.facts.norm == pytest.approx(whole.facts.norm, rel=1e-4)
    for kind in ("gram", "mean", "fisher"):
        assert joined.names(kind) == whole.names(kind)
        for name in whole.names(kind):
            np.testing.assert_allclose(joined.read(kind, name), whole.read(kind, name), rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError, match="count twice"):
        join([tmp_path / "one", tmp_path / "joined"], tmp_path / "again")
    collect_statistics(place / "b", tmp_path / "one.jsonl", tmp_path / "other", settings=settings, progress=False)
    with pytest.raises(InputError, match="another model"):
        join([tmp_path / "one", tmp_path / "other"], tmp_path / "again")
    assert not list(tmp_path.glob("*again*"))


def test_regmean_is_the_least_squares_of_the_experts_outputs(place: Path, tmp_path: Path) -> None:
    names, statistics, stacked, wanted = [Q, K, DOWN], dict[str, str](), dict[str, Any](), dict[str, Any]()
    for expert in ("a", "b"):
        rows = place / f"many-{expert}.jsonl"
        write_rows(rows, sentences(ord(expert), 30))
        collect_statistics(place / expert, rows, tmp_path / expert, progress=False)
        statistics[expert] = str(tmp_path / expert)
        weights = load_file(place / expert / "model.safetensors")
        for name, x in inputs_of(place / expert, rows, names).items():
            x = x / len(x) ** 0.5
            stacked.setdefault(name, []).append(x)
            wanted.setdefault(name, []).append(x @ weights[name].astype(np.float64).T)
    experts = {expert: str(place / expert) for expert in statistics}
    plain: dict[str, Any] = {"off_diagonal": 1.0, "ridge": 0.0}
    summary: Any = cs.merge(place / "base", experts, tmp_path / "out", method="regmean", statistics=statistics, **plain)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name in names:
        best = np.linalg.lstsq(np.concatenate(stacked[name]), np.concatenate(wanted[name]), rcond=None)[0].T
        np.testing.assert_allclose(found[name], best, atol=2e-3)
    lineage = json.loads((tmp_path / "out" / "consilience" / "lineage.json").read_text())
    assert [one["rows"] for one in lineage["statistics"]] == [30, 30]
    norm = [load_file(place / e / "model.safetensors")["model.norm.weight"] for e in ("a", "b")]
    np.testing.assert_allclose(found["model.norm.weight"], np.mean(norm, 0), atol=1e-6)
    assert any("2 of 16 matrices have no statistics" in note for note in summary.notes), summary.notes


def made(folder: Path, model: Path, tensors: dict[str, Any], kind: str) -> str:
    """Statistics with given values, of a model."""
    opened = open_model("m", str(model))
    folder.mkdir()
    writer = Writer(folder)
    writer.add({f"{kind}/{name}": np.asarray(value, np.float32) for name, value in tensors.items()})
    writer.finish(Facts(str(model), mark_of(opened), (kind,), 1, 1, (folder.name,), "empirical"))
    opened.close()
    return str(folder)


def test_lot_is_least_squares_of_least_norm_on_few_rows(place: Path, tmp_path: Path) -> None:
    """Two rows of each expert: fewer tokens than the last layer's 24 inputs, so that many matrices are as near."""
    base = load_file(place / "base" / "model.safetensors")
    names, norm = [Q, DOWN], "model.layers.1.post_attention_layernorm.weight"
    experts, statistics = {e: str(place / e) for e in ("a", "b")}, dict[str, str]()
    inputs: dict[str, list[Any]] = {name: [] for name in names}
    outputs: dict[str, list[Any]] = {name: [] for name in names}
    squares, changes = list[Any](), list[Any]()
    for expert in experts:
        lines = (place / "rows" / f"{expert}.jsonl").read_text().splitlines()[:2]
        rows = write_rows(tmp_path / f"{expert}.jsonl", [json.loads(line) for line in lines])
        statistics[expert] = str(tmp_path / expert)
        collect_statistics(experts[expert], rows, tmp_path / expert, progress=False)
        weights = load_file(place / expert / "model.safetensors")
        for name, x in inputs_of(place / expert, rows, names).items():
            share = x / len(x) ** 0.5
            inputs[name].append(share)
            outputs[name].append(share @ (weights[name] - base[name]).astype(np.float64).T)
        x = inputs_of(place / expert, rows, [norm])[norm]
        normal = x / np.sqrt(np.square(x).mean(1, keepdims=True) + loaded(place / expert).config.rms_norm_eps)
        squares.append(np.square(normal).mean(0))
        changes.append((weights[norm] - base[norm]).astype(np.float64))
    assert sum(map(len, inputs[DOWN])) < 24
    cs.merge(place / "base", experts, tmp_path / "out", method="lot", statistics=statistics)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name in names:
        best = np.linalg.lstsq(np.concatenate(inputs[name]), np.concatenate(outputs[name]), rcond=1e-4)[0].T
        np.testing.assert_allclose(found[name] - base[name], best, atol=2e-3)
    weighed = (squares[0] * changes[0] + squares[1] * changes[1]) / (squares[0] + squares[1])
    np.testing.assert_allclose(found[norm] - base[norm], weighed, atol=1e-5)
    assert np.abs(weighed - np.mean(changes, 0)).max() > 1e-4
    # regmean, as published, averages norms
    cs.merge(place / "base", experts, tmp_path / "plain", method="regmean", statistics=statistics)
    plain = load_file(tmp_path / "plain" / "model.safetensors")[norm]
    np.testing.assert_allclose(plain - base[norm], np.mean(changes, 0), atol=1e-6)


def test_lot_reduces_to_known_cases(place: Path, tmp_path: Path) -> None:
    """One expert is itself on what its rows reach and the base elsewhere; adapters are their products."""
    from tiny_experts import write_adapter

    base, weights = (load_file(place / e / "model.safetensors")[DOWN].astype(np.float64) for e in ("base", "a"))
    reach = np.linalg.qr(np.random.default_rng(0).standard_normal((24, 7)))[0]
    held = made(tmp_path / "low", place / "a", {DOWN: reach @ np.diag(np.arange(1.0, 8)) @ reach.T}, "gram")
    cs.merge(place / "base", {"a": str(place / "a")}, tmp_path / "one", method="lot", statistics={"a": held})
    found = load_file(tmp_path / "one" / "model.safetensors")[DOWN]
    np.testing.assert_allclose(found, base + (weights - base) @ reach @ reach.T, atol=1e-4)
    results: list[Any] = []
    adapters, tuned = dict[str, str](), dict[str, str]()
    for seed, name in enumerate(("x", "y"), 5):
        adapters[name] = str(write_adapter(tmp_path / name, place / "base", seed))
        tuned[name] = str(tmp_path / f"{name}-whole")
        cs.merge(place / "base", {name: adapters[name]}, tuned[name], weight=1.0)
    for kind, models in (("low-rank", adapters), ("full", tuned)):
        grams = {
            n: made(tmp_path / f"{kind}-{n}", Path(p), {DOWN: spread(24, ord(n))}, "gram") for n, p in models.items()
        }
        cs.merge(place / "base", models, tmp_path / kind, method="lot", statistics=grams, others="base")
        results.append(load_file(tmp_path / kind / "model.safetensors")[DOWN])
    assert np.abs(results[0] - base).max() > 1e-3
    np.testing.assert_allclose(results[0], results[1], atol=1e-4)


@pytest.mark.parametrize("kind", ["layer", "rms", "offset"])
def test_mean_squares_of_norms_are_of_what_their_scales_multiply(kind: str) -> None:
    """Of a bias and of scales counted from 1 (Gemma's) nothing is in them; padding and heads are told apart."""
    from consilience.learned.inputs import InputSums

    class Offset(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.rand(6))

        def forward(self, x: Any) -> Any:
            return x / x.square().mean(-1, keepdim=True).sqrt() * (1 + self.weight)

    torch.manual_seed(0)
    norm: Any = {"layer": torch.nn.LayerNorm(6), "rms": torch.nn.RMSNorm(6, eps=0), "offset": Offset()}[kind]
    for value in norm.parameters():
        value.data.uniform_(0.5, 2)
    before = norm.weight.detach().clone()
    x, mask = torch.randn(2, 5, 3, 6), torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    sums = InputSums(["gram"])
    sums.mask = mask
    with torch.no_grad():
        sums.take_scaled({"n": norm})("n", x)
    assert torch.equal(norm.weight, before)
    y = x[mask].reshape(-1, 6)
    if kind == "layer":
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, unbiased=False) + norm.eps).sqrt()
    else:
        y = y / y.square().mean(-1, keepdim=True).sqrt()
    assert sums.counts["n"] == 24
    np.testing.assert_allclose(sums.sums["gram/n"], y.square().sum(0), rtol=1e-4)
    sums = InputSums(["gram"])
    sums.mask = mask
    with torch.no_grad():
        sums.take_scaled({"n": norm})("n", x.transpose(1, 2))
    assert not sums.sums


def spread(size: int, seed: int) -> np.ndarray:
    half = np.random.default_rng(seed).standard_normal((size, 3 * size))
    return half @ half.T / size


def test_regmean_reduces_to_known_cases(place: Path, tmp_path: Path) -> None:
    experts = {name: str(place / name) for name in ("a", "b")}
    alike = {name: made(tmp_path / f"alike-{name}", place / name, {DOWN: spread(24, 1)}, "gram") for name in experts}
    cs.merge(place / "base", experts, tmp_path / "mean", method="regmean", statistics=alike)
    cs.merge(place / "base", {"a": experts["a"]}, tmp_path / "one", method="regmean", statistics={"a": alike["a"]})
    weights = {n: load_file(Path(p) / "model.safetensors")[DOWN] for n, p in experts.items()}
    found = {n: load_file(tmp_path / n / "model.safetensors")[DOWN] for n in ("mean", "one")}
    np.testing.assert_allclose(found["mean"], (weights["a"] + weights["b"]) / 2, atol=1e-5)
    np.testing.assert_allclose(found["one"], weights["a"], atol=1e-5)


def test_regmean_of_adapters_is_that_of_their_products(place: Path, tmp_path: Path) -> None:
    from tiny_experts import write_adapter

    base = load_file(place / "base" / "model.safetensors")
    adapters, tuned, low, full = dict[str, str](), dict[str, str](), dict[str, str](), dict[str, str]()
    for seed, name in enumerate(("x", "y"), 5):
        adapters[name] = str(write_adapter(tmp_path / name, place / "base", seed))
        tuned[name] = str(tmp_path / f"{name}-whole")
        cs.merge(place / "base", {name: adapters[name]}, tuned[name], weight=1.0)
        low[name] = made(tmp_path / f"{name}-low", Path(adapters[name]), {DOWN: spread(24, seed)}, "gram")
        full[name] = made(tmp_path / f"{name}-full", Path(tuned[name]), {DOWN: spread(24, seed)}, "gram")
    cs.merge(place / "base", adapters, tmp_path / "low", method="regmean", statistics=low, others="base")
    cs.merge(place / "base", tuned, tmp_path / "full", method="regmean", statistics=full, others="base")
    found = [load_file(tmp_path / kind / "model.safetensors")[DOWN] for kind in ("low", "full")]
    assert np.abs(found[0] - base[DOWN]).max() > 1e-3
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)


def test_fisher_weighs_elements(place: Path, tmp_path: Path) -> None:
    experts = {name: str(place / name) for name in ("a", "b")}
    weights = {name: load_file(Path(path) / "model.safetensors") for name, path in experts.items()}
    norm = "model.norm.weight"
    rng = np.random.default_rng(0)
    values = {n: {DOWN: rng.random(weights["a"][DOWN].shape), norm: rng.random(16)} for n in experts}
    statistics = {n: made(tmp_path / f"s-{n}", place / n, values[n], "fisher") for n in experts}
    weight = {"a": 1.0, "b": 3.0}
    cs.merge(
        place / "base", experts, tmp_path / "out", method="fisher", statistics=statistics, weight=weight, floor=0.0
    )
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name in (DOWN, norm):
        up = sum(weight[n] * values[n][name] * weights[n][name] for n in experts)
        np.testing.assert_allclose(found[name], up / sum(weight[n] * values[n][name] for n in experts), atol=1e-5)


def test_what_is_wrong_is_named_and_nothing_is_left(place: Path, tmp_path: Path) -> None:
    experts = {name: str(place / name) for name in ("a", "b")}
    own = {name: made(tmp_path / name, place / name, {DOWN: spread(24, 1)}, "gram") for name in experts}
    before = sorted(tmp_path.rglob("*"))

    def refused(match: str, **changed: Any) -> None:
        arguments: dict[str, Any] = {"method": "regmean"} | changed
        with pytest.raises(InputError, match=match):
            cs.merge(place / "base", experts, tmp_path / "out", **arguments)

    refused("b: method 'regmean' reads statistics", statistics={"a": own["a"]})
    refused("which is not b", statistics={"a": own["a"], "b": own["a"]})
    refused("no fisher", method="fisher", statistics=own)
    refused("no folder of statistics", statistics=own | {"b": str(place)})
    refused("reads no statistics", method="ties", statistics=own)
    refused("there is no expert 'c'", statistics=own | {"c": own["a"]})
    rows = place / "rows" / "a.jsonl"
    with pytest.raises(InputError, match="needs a response"):
        collect_statistics(
            place / "a", rows, tmp_path / "s", settings=Collecting(("fisher",), "empirical"), progress=False
        )
    wrong: list[tuple[str, Any]] = [
        ("dtype: 'fp16'", {"dtype": "fp16"}),
        ("kind: 'grams'", {"kinds": ("grams",)}),
        ("fisher: 'all'", {"fisher": "all"}),
        ("rows: 0", {"rows": 0}),
    ]
    for match, odd in wrong:
        settings = Collecting(**odd)
        with pytest.raises(InputError, match=match):
            collect_statistics(place / "a", rows, tmp_path / "s", settings=settings, progress=False)
    with pytest.raises(InputError, match="not empty"):
        collect_statistics(place / "a", place / "labelled.jsonl", tmp_path / "a", progress=False)
    assert sorted(tmp_path.rglob("*")) == before
    held = {"w": np.ones((2, 2))}
    with pytest.raises(InputError, match="of models in files"):
        cs.merge(held, {"a": held}, method="regmean")
    with pytest.raises(InputError, match="reads no statistics"):
        cs.merge(held, {"a": held}, method="ties", statistics={"a": own["a"]})
    (tmp_path / "a" / "statistics.json").write_text('{"version": 1, "model": "a"}')
    refused("is damaged", statistics=own)
    empty = {
        name: made(tmp_path / f"empty-{name}", place / name, {"x.weight": spread(4, 1)}, "gram") for name in experts
    }
    refused("hold none of the matrices", statistics=empty)
    odd = {name: made(tmp_path / f"odd-{name}", place / name, {DOWN: spread(5, 1)}, "gram") for name in experts}
    refused(r"has shape \[5, 5\]", statistics=odd)


def test_the_command_line(place: Path, tmp_path: Path) -> None:
    run = CliRunner()
    options: list[str] = []
    for name in ("a", "b"):
        rows = str(place / "rows" / f"{name}.jsonl")
        done = run.invoke(
            app, ["stats", str(place / name), rows, str(tmp_path / name), "--kind", "gram", "--json", "-q"]
        )
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["rows"] == 5
        options += ["-e", f"{name}={place / name}", "--statistics", f"{name}={tmp_path / name}"]
    merge = ["merge", str(place / "base"), str(tmp_path / "out"), "--method", "regmean", *options]
    done = run.invoke(app, merge)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "model.safetensors").is_file()
    recipe = (tmp_path / "out" / "consilience" / "recipe.yaml").read_text()
    assert "statistics:" in recipe
