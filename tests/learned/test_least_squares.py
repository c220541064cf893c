"""Closed-form coefficients against a dense solution in numpy, and the cases whose answer is known."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_experts import (
    MODULES,
    WORDS,
    read_state,
    recipe_of,
    sentences,
    write_adapter,
    write_base,
    write_expert,
    write_rows,
    write_state,
    write_tokenizer,
)

from consilience.api import learn, merge_recipe
from consilience.coefficients import Coefficients
from consilience.errors import InputError
from consilience.learned.quadratic import Quadratic
from consilience.recipe.schema import parse_recipe

#: Rows of unequal length, so that batches are padded.
ROWS = {name: [" ".join(s.split()[: 3 + i]) for i, s in enumerate(sentences(k, 3))] for k, name in enumerate("abc")}
EXACT = {"precision": "float64", "ridge": 0.0, "alphabar": 0.3}
Grams = dict[str, Any]


def recipe(place: Path, experts: Mapping[str, Path], base: Path | None = None, **parameters: Any) -> Any:
    for name in experts:
        if not (place / "rows" / f"{name}.jsonl").exists():
            write_rows(place / "rows" / f"{name}.jsonl", ROWS[name])
    value = recipe_of(place, experts, base, merge_method="least_squares", parameters=EXACT | parameters)
    return parse_recipe(value, "recipe")


def load(folder: Path) -> Any:
    """A model in float64; an adapter stands on the base beside it."""
    from transformers import AutoModelForCausalLM

    if not (folder / "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval().requires_grad_(False)
    model, factors = load(folder.parent / "base"), read_state(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    for name in [name for name in factors if "lora_A" in name]:
        update = factors[name.replace("lora_A", "lora_B")].double() @ factors[name].double()
        stem = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        model.get_submodule(stem).weight.data += config["lora_alpha"] / config["r"] * update
    return model


def _keep(inputs: list[Any], _module: Any, args: Any) -> None:
    inputs.append(args[0][0].clone())


def dense_grams(base: Path, experts: Mapping[str, Path]) -> Grams:
    """< X_k tau_i^T, X_k tau_j^T > / n_k [k, i, j] by every matrix's name: one row at a time, everything in memory."""
    from transformers import AutoTokenizer
    from transformers.pytorch_utils import Conv1D

    tokenizer = AutoTokenizer.from_pretrained(base)
    models = [load(path) for path in experts.values()]
    start = load(base).state_dict()
    weights = [model.state_dict() for model in models]
    out: Grams = {}
    for k, (name, model) in enumerate(zip(experts, models, strict=True)):
        seen: dict[str, list[Any]] = {}
        kinds = (torch.nn.Linear, Conv1D, torch.nn.Embedding)
        for stem, module in model.named_modules():
            if isinstance(module, kinds):
                seen[stem] = []
                module.register_forward_pre_hook(partial(_keep, seen[stem]))
        for row in ROWS[name]:
            model(tokenizer(row, return_tensors="pt").input_ids)
        for stem, inputs in seen.items():
            x, key = torch.cat(inputs), f"{stem}.weight"
            deltas = [w[key] - start[key] for w in weights]
            module = model.get_submodule(stem)
            if isinstance(module, torch.nn.Embedding):
                outputs = [d[x] for d in deltas]
            else:
                outputs = [x @ d if isinstance(module, Conv1D) else x @ d.T for d in deltas]
            flat = torch.stack(outputs).flatten(1)
            held = out.setdefault(key, np.zeros((len(models),) * 3))
            held[k] = (flat @ flat.T).numpy() / len(x)
    return out


def brute(grams: list[Any], beta: list[float], anchor: float = 0.3, ridge: float = 0.0) -> Any:
    """The solution for the experts that do something to these matrices; the others stay at the anchor."""
    total = np.sum(grams, 0)
    a = np.sum([w * total[k] for k, w in enumerate(beta)], 0)
    b = np.array([sum(w * total[k, i, k] for k, w in enumerate(beta)) for i in range(len(beta))])
    live = np.flatnonzero(np.diag(a))
    pull = ridge * np.diag(np.diag(a)[live])
    out = np.full(len(beta), anchor)
    out[live] = np.linalg.solve(a[np.ix_(live, live)] + pull, b[live] + anchor * pull.sum(1))
    return out


def check(found: Coefficients, grams: Grams, beta: list[float], ridge: float = 0.0) -> None:
    silent = found.facts["at_alphabar"]
    for group in found.groups:
        held = [grams[name] for name, _ in group.tensors if name in grams]
        assert (group.name in silent) == (not held)
        expected = brute(held, beta, ridge=ridge) if held else np.full(len(beta), 0.3)
        assert found.alpha[:, group.first] == pytest.approx(expected, rel=1e-5, abs=1e-6), group.name


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("least_squares")
    base = write_base(folder / "base")
    write_expert(folder / "full", base, 0)
    write_expert(folder / "other", base, 1, only=lambda name: "layers.0" in name or "lm_head" in name)
    write_adapter(folder / "lora", base, 2)
    write_adapter(folder / "lora-2", base, 3, modules=[*MODULES, "model.layers.0.self_attn.o_proj"], rank=3)
    for name, rows in ROWS.items():
        write_rows(folder / "rows" / f"{name}.jsonl", rows)
    return folder


def test_full_experts_and_adapters_agree_with_the_dense_solution(place: Path) -> None:
    experts = {"a": place / "full", "b": place / "lora", "c": place / "other"}
    found = learn(recipe(place, experts))
    check(found, dense_grams(place / "base", experts), [1.0] * 3)
    assert {"model.norm.weight", "model.layers.1.input_layernorm.weight"} <= set(found.facts["at_alphabar"])
    assert "model.embed_tokens.weight" not in found.facts["at_alphabar"]
    loss = found.facts["loss"]
    assert loss["solution"] < loss["alphabar"] < loss["base"]


def test_adapters_alone_never_meet_their_products_and_agree_with_the_dense_solution(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from consilience.student.bank import Bank

    def refuse(*_: Any) -> Any:
        raise AssertionError("a product was formed")

    monkeypatch.setattr(Bank, "rows", refuse)
    experts = {"a": place / "lora", "b": place / "lora-2"}
    found = learn(recipe(place, experts, beta=0.5, exclude=["*.o_proj.*"]))
    check(found, dense_grams(place / "base", experts), [0.5, 0.5])


def test_ridge_and_beta_are_those_of_the_formula(place: Path) -> None:
    experts = {"a": place / "lora", "b": place / "full"}
    made = recipe(place, experts, ridge=0.5)
    made.models[1].parameters["beta"] = 3.0
    found = learn(made)
    check(found, dense_grams(place / "base", experts), [1.0, 3.0], ridge=0.5)
    huge = learn(recipe(place, experts, ridge=1e12))
    assert huge.alpha == pytest.approx(np.full_like(huge.alpha, 0.3), abs=1e-6)


def test_groups_sum_their_normal_equations(place: Path) -> None:
    experts = {"a": place / "lora", "b": place / "full", "c": place / "other"}
    grams = dense_grams(place / "base", experts)
    for grouping in ("block", "global"):
        check(learn(recipe(place, experts, grouping=grouping)), grams, [1.0] * 3)


@pytest.mark.parametrize("expert", ["full", "lora"])
def test_one_expert_gets_one(place: Path, expert: str) -> None:
    found = learn(recipe(place, {"a": place / expert}))
    with_data = [g.first for g in found.groups if g.name not in found.facts["at_alphabar"]]
    assert with_data
    assert found.alpha[:, with_data] == pytest.approx(1.0, abs=1e-12)
    assert found.facts["loss"]["solution"] == pytest.approx(0, abs=1e-9 * found.facts["loss"]["base"])


def test_an_expert_named_twice_shares_its_task_vector(place: Path) -> None:
    found = learn(recipe(place, {"a": place / "lora", "b": place / "lora"}))
    # Only the sum is determined; the nearest to the anchor is taken.
    assert found.alpha == pytest.approx(0.5, abs=1e-6)


def test_the_order_of_experts_permutes_the_rows_and_batches_do_not_matter(place: Path) -> None:
    paths = {"a": place / "lora", "b": place / "full", "c": place / "lora-2"}
    one = learn(recipe(place, paths, ridge=0.1))
    two = learn(recipe(place, {name: paths[name] for name in "cab"}, ridge=0.1, batch_tokens=1))
    assert two.experts == ("c", "a", "b")
    assert two.alpha[[1, 2, 0]] == pytest.approx(one.alpha, rel=1e-9, abs=1e-12)


def test_rounding_modes_stay_near_the_exact_solution(place: Path) -> None:
    paths = {"a": place / "lora", "b": place / "lora-2"}
    exact = learn(recipe(place, paths, ridge=0.1))
    assert learn(recipe(place, paths, ridge=0.1, precision="float32")).alpha == pytest.approx(exact.alpha, abs=1e-4)
    assert learn(recipe(place, paths, ridge=0.1, precision="mixed")).alpha == pytest.approx(exact.alpha, abs=0.05)


def test_task_vectors_on_inputs_of_their_own_get_one_each(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    halves = {"a": WORDS[:40], "b": WORDS[40:]}
    for k, (name, words) in enumerate(halves.items()):
        state = read_state(base)
        ids = [3 + WORDS.index(word) for word in words]
        noise = torch.randn(len(ids), 16, generator=torch.Generator().manual_seed(k))
        state["model.embed_tokens.weight"][ids] += noise
        (tmp_path / name).mkdir()
        write_state(tmp_path / name, state)
        (tmp_path / name / "config.json").write_text((base / "config.json").read_text())
        write_rows(tmp_path / "rows" / f"{name}.jsonl", sentences(k, 3, words=words))
    found = learn(
        recipe(tmp_path, {name: tmp_path / name for name in halves}, exclude=["*layers*", "*norm*", "*head*"])
    )
    assert [g.name for g in found.groups] == ["model.embed_tokens.weight"]
    assert found.alpha == pytest.approx(1.0, abs=1e-9)


def write_gpt2(folder: Path, seed: int, near: Path | None = None) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=96, n_positions=32, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1)
    model: Any = GPT2LMHeadModel(config)
    start = None if near is None else load(near).state_dict()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.3 if start is None else start[name] + 0.1 * noise)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def test_conv1d_and_tied_embeddings(tmp_path: Path) -> None:
    base = write_gpt2(tmp_path / "base", 0)
    experts = {name: write_gpt2(tmp_path / name, k + 1, base) for k, name in enumerate("ab")}
    found = learn(recipe(tmp_path, experts))
    grams = dense_grams(base, experts)
    grams["transformer.wte.weight"] = grams["transformer.wte.weight"] + grams.pop("lm_head.weight")
    check(found, grams, [1.0, 1.0])
    assert "transformer.h.0.mlp.c_fc.weight" in grams


def write_t5(folder: Path, seed: int) -> Path:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=96, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, pad_token_id=0,
                      eos_token_id=1)  # fmt: skip
    config.decoder_start_token_id = 0
    model: Any = T5ForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def test_encoder_decoder_rows_of_any_lengths_count_no_padding(tmp_path: Path) -> None:
    base = write_t5(tmp_path / "base", 0)
    experts = {name: write_t5(tmp_path / name, k + 1) for k, name in enumerate("ab")}
    rows = [{"prompt": "w1 w2 w3", "response": "w4"}, {"prompt": "w5", "response": "w6 w7 w8"}]
    for name in experts:
        write_rows(tmp_path / "rows" / f"{name}.jsonl", rows)
    together = learn(recipe(tmp_path, experts, base))
    cross = "decoder.block.0.layer.1.EncDecAttention.k.weight"
    assert {cross, "shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"}.isdisjoint(
        together.facts["at_alphabar"]
    )
    # What the cross attention of an expert reads is its own encoder's output, padding left out.
    column = next(group.first for group in together.groups if group.name == cross)
    taus = [(read_state(path)[cross] - read_state(base)[cross]).double() for path in experts.values()]
    grams = np.zeros((2, 2, 2))
    for k, path in enumerate(experts.values()):
        from transformers import AutoTokenizer, T5ForConditionalGeneration

        model: Any = T5ForConditionalGeneration.from_pretrained(path, dtype=torch.float64)
        tokenizer = AutoTokenizer.from_pretrained(base)
        with torch.no_grad():
            ids = [tokenizer(row["prompt"], return_tensors="pt").input_ids for row in rows]
            x = torch.cat([model.encoder(one).last_hidden_state[0] for one in ids])
        y = torch.stack([x @ tau.T for tau in taus]).flatten(1)
        grams[k] = (y @ y.T).numpy() / len(x)
    assert together.alpha[:, column] == pytest.approx(brute([grams], [1.0, 1.0]), rel=1e-5)


def test_merging_end_to_end_reaches_a_lone_expert(place: Path, tmp_path: Path) -> None:
    merge_recipe(recipe(place, {"a": place / "lora"}, alphabar=0.0), tmp_path / "out")
    merged, expert = load(tmp_path / "out").state_dict(), load(place / "lora").state_dict()
    for name, value in merged.items():
        assert torch.allclose(value, expert[name], atol=1e-6), name
    assert (tmp_path / "out" / "consilience" / "coefficients.json").is_file()


def test_rows_that_are_missing_are_named(place: Path, tmp_path: Path) -> None:
    value = yaml.safe_load(
        yaml.safe_dump(recipe_of(tmp_path, {"a": place / "lora"}, place / "base", merge_method="least_squares"))
    )
    with pytest.raises(InputError, match=r"a\.jsonl"):
        learn(parse_recipe(value, "recipe"))


@st.composite
def stacks(draw: st.DrawFn) -> tuple[Any, list[float]]:
    count = draw(st.integers(1, 4))
    generator = np.random.default_rng(draw(st.integers(0, 10**6)))
    taus = generator.normal(size=(count, 5, 6)) * 10.0 ** draw(st.integers(-3, 3))
    grams = np.zeros((count,) * 3)
    for k in range(count):
        y = (generator.normal(size=(draw(st.integers(1, 9)), 6)) @ taus.transpose(0, 2, 1)).reshape(count, -1)
        grams[k] = y @ y.T
    beta = draw(st.lists(st.floats(0.1, 3), min_size=count, max_size=count))
    return grams, beta


@settings(max_examples=60, deadline=None)
@given(stacks(), st.sampled_from([0.0, 0.01, 1.0]))
def test_the_minimum_is_one(stack: tuple[Any, list[float]], ridge: float) -> None:
    grams, beta = stack
    problem = Quadratic.of([grams], beta)
    anchor = np.full(len(beta), 0.3)

    def penalised(alpha: Any) -> float:
        return problem.value(alpha) + ridge * float(np.diag(problem.a) @ (alpha - anchor) ** 2)

    found = problem.minimum(anchor, ridge)
    best = penalised(found)
    slack = 1e-9 * max(problem.c, 1e-300)
    assert best >= -slack
    for k in range(len(beta)):
        for step in (-0.1, 0.1):
            moved = found.copy()
            moved[k] += step
            assert penalised(moved) >= best - slack
    # Scaling a task vector as an unknown scales its coefficient and nothing else.
    scale = np.linspace(0.5, 2, len(beta))
    other = Quadratic(problem.a * np.outer(scale, scale), problem.b * scale, problem.c)
    assert other.minimum(anchor / scale, ridge) * scale == pytest.approx(found, rel=1e-6, abs=1e-9)
