"""The experts' answers: what a model with the expert's weights says, computed once and kept."""

import contextlib
import json
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from consilience.engine.plan import make_plan
from consilience.learned.run import Data, Machine, Run, Workshop, groups_of, open_workshop
from consilience.objectives.alignment import Hidden, Logits
from consilience.objectives.objective import Objective
from consilience.recipe.schema import parse_recipe
from consilience.student.calibration import batches
from consilience.student.outputs import Reader
from consilience.student.student import load_any
from consilience.student.teachers import Teachers
from tests.learned.tiny_experts import (
    State,
    read_state,
    recipe_of,
    sentences,
    write_adapter,
    write_base,
    write_expert,
    write_rows,
)

ADAPTER = "adapter_model.safetensors"
NAMES = ("a", "lora", "quiet")


def write_zoo(place: Path, **changes: Any) -> Path:
    base = write_base(place / "base", **changes)
    write_expert(place / "a", base, 1)
    write_adapter(place / "lora", base, 2)
    write_expert(place / "quiet", base, 3, only=lambda name: "mlp" in name)
    for seed, name in enumerate(NAMES):
        write_rows(place / "rows" / f"{name}.jsonl", sentences(seed, 3))
    return place


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    return write_zoo(tmp_path / "zoo")


@contextlib.contextmanager
def opened(
    zoo: Path,
    names: Sequence[str] = NAMES,
    *,
    exclude: Sequence[str] = (),
    folder: Path | None = None,
    layers: Sequence[int] = (1, 2),
    tokens: int = 4096,
    precision: Any = "float32",
) -> Generator[Workshop]:
    plan = make_plan(parse_recipe(recipe_of(zoo, {name: zoo / name for name in names}), "test"))
    run = Run(plan, folder=folder, machine=Machine(threads=1))
    start = groups_of(run, "tensor", exclude, [0.3] * len(names))
    shop = open_workshop(run, start, Data(tokens=tokens), layers=layers, precision=precision)
    try:
        yield shop
    finally:
        shop.close()
        plan.close()


def weights_of(zoo: Path, name: str) -> State:
    base = read_state(zoo / "base")
    if name != "lora":
        return read_state(zoo / name)
    factors = read_state(zoo / name)
    config = json.loads((zoo / name / "adapter_config.json").read_text())
    for key in factors:
        if key.endswith("lora_A.weight"):
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = factors[key.replace("lora_A", "lora_B")]
            base[f"{module}.weight"] = base[f"{module}.weight"] + config["lora_alpha"] / config["r"] * b @ factors[key]
    return base


def answers(zoo: Path, name: str, ids: Sequence[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits and all blocks' outputs of a model with the expert's own weights."""
    model = load_any(zoo / "base")
    model.load_state_dict(weights_of(zoo, name), strict=False)
    seen: list[torch.Tensor] = []
    for block in model.model.layers:
        block.register_forward_hook(lambda m, a, out: seen.append((out[0] if isinstance(out, tuple) else out)[0]))
    with torch.no_grad():
        logits = model(torch.tensor([list(ids)]), use_cache=False).logits[0]
    return logits, seen


def check(zoo: Path, shop: Workshop, names: Sequence[str] = NAMES) -> None:
    """Every cached answer is the expert's, whatever the student holds in the meantime."""
    assert shop.teachers is not None
    shop.student.set(np.random.default_rng(0).normal(size=(len(names), shop.bank.count)))
    for batch in batches(shop.samples, range(len(shop.samples)), shop.tokens):
        found = shop.teachers.outputs(batch)
        assert found.head.weight is None or not found.head.weight.requires_grad
        logits, at = found.head(found.states), 0
        for sample in batch.samples:
            expected, blocks = answers(zoo, names[batch.expert], sample.encoded.inputs)
            rows = slice(at, at := at + len(sample.encoded.inputs))
            torch.testing.assert_close(logits[rows], expected, rtol=1e-4, atol=1e-4)
            for layer, values in found.blocks.items():
                torch.testing.assert_close(values[rows], blocks[layer - 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("exclude", [(), ("lm_head*",), ("*norm*", "*embed*", "lm_head*", "*self_attn*")])
def test_answers_are_those_of_the_experts_own_weights(zoo: Path, exclude: tuple[str, ...]) -> None:
    """Also where learning leaves a tensor alone: an expert's head, norms and embeddings are its own."""
    with opened(zoo, exclude=exclude) as shop:
        check(zoo, shop)


def test_tied_heads(tmp_path: Path) -> None:
    zoo = write_zoo(tmp_path / "tied", tie_word_embeddings=True)
    for exclude in ((), ("*embed*",)):
        with opened(zoo, exclude=exclude) as shop:
            check(zoo, shop)


def test_batches_make_no_difference(zoo: Path) -> None:
    with opened(zoo, tokens=7) as shop:
        check(zoo, shop)


def test_the_variance_is_over_an_experts_own_tokens(zoo: Path) -> None:
    with opened(zoo) as shop:
        assert shop.teachers is not None
        for expert, name in enumerate(NAMES):
            every = [s.encoded.inputs for s in shop.samples if s.expert == expert]
            for layer in (1, 2):
                states = torch.cat([answers(zoo, name, ids)[1][layer - 1] for ids in every])
                expected = states.double().var(0, unbiased=False).float()
                torch.testing.assert_close(shop.teachers.variances[expert][layer], expected, rtol=1e-3, atol=1e-5)


def test_a_single_position_has_a_finite_distance(zoo: Path) -> None:
    for name in NAMES:
        write_rows(zoo / "rows" / f"{name}.jsonl", ["w5"])
    with opened(zoo, layers=(1,)) as shop:
        problem = shop.problem(Objective(terms=(Logits(), Hidden(1.0))))
        terms, gradient = problem.evaluate(np.full((3, shop.bank.count), 0.3), [0, 1, 2], gradient=True)
        assert gradient is not None
        assert 0 < terms["hidden"] < 10


def test_after_the_experts_the_student_is_the_bases_again(zoo: Path) -> None:
    with opened(zoo, exclude=("*mlp*", "lm_head*")) as shop:
        base = read_state(zoo / "base")
        shop.student.set(np.zeros((3, shop.bank.count)))
        for name, value in shop.student.model.named_parameters():
            assert torch.equal(value, base[name]), name
        shop.student.become(0)
        shop.student.become(2)
        own = read_state(zoo / "quiet")
        for name, value in shop.student.model.named_parameters():
            torch.testing.assert_close(value.detach(), own[name], rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["float64", "bfloat16", "mixed"])
def test_every_precision_keeps_what_it_computes(zoo: Path, precision: str) -> None:
    with opened(zoo, precision=precision) as shop:
        assert shop.teachers is not None
        kind = torch.float64 if precision == "float64" else torch.float32
        (batch, *_) = batches(shop.samples, range(len(shop.samples)), shop.tokens)
        found = shop.teachers.outputs(batch)
        assert {found.states.dtype, *(v.dtype for v in found.blocks.values())} == {kind}
        expected, _ = answers(zoo, "a", batch.samples[0].encoded.inputs)
        logits = found.head(found.states)[: len(expected)].float()
        assert (logits - expected).norm() < (1e-5 if precision == "float64" else 0.05) * expected.norm()


# ----------------------------------------------------------------------------------------------------------------------
# Kept answers.


class Runs:
    """Counts the forward passes of every reader."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        real = Reader.run

        def run(reader: Reader, batch: Any) -> Any:
            self.count += 1
            return real(reader, batch)

        monkeypatch.setattr(Reader, "run", run)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(monkeypatch)


def kept(teachers: Teachers | None) -> list[torch.Tensor]:
    assert teachers is not None
    held = [teachers.outputs(b) for b in batches(teachers.samples, range(len(teachers.samples)), 4096)]
    return [value for one in held for value in (one.states, *one.blocks.values())]


def test_kept_answers_are_not_computed_again(zoo: Path, tmp_path: Path, runs: Runs) -> None:
    with opened(zoo, folder=tmp_path / "state") as shop:
        first = kept(shop.teachers)
    done = runs.count
    assert done == 3
    with opened(zoo, folder=tmp_path / "state") as shop:
        again = kept(shop.teachers)
        check(zoo, shop)
    assert runs.count == done
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_another_experts_new_row_leaves_the_others_answers_right(zoo: Path, tmp_path: Path, runs: Runs) -> None:
    with opened(zoo, folder=tmp_path / "state"):
        pass
    write_rows(zoo / "rows" / "a.jsonl", sentences(0, 5))
    with opened(zoo, folder=tmp_path / "state") as shop:
        assert len(shop.samples) == 11
        check(zoo, shop)
    assert runs.count == 3 + 1


@pytest.mark.parametrize("damage", ["cut", "empty", "other tensors"])
def test_damaged_answers_are_computed_again(zoo: Path, tmp_path: Path, runs: Runs, damage: str) -> None:
    with opened(zoo, folder=tmp_path / "state"):
        pass
    files = sorted((tmp_path / "state").rglob("*.safetensors"))
    if damage == "other tensors":
        files[0].write_bytes((zoo / "base" / "model.safetensors").read_bytes())
    else:
        files[0].write_bytes(files[0].read_bytes()[: 40 if damage == "cut" else 0])
    with opened(zoo, folder=tmp_path / "state") as shop:
        check(zoo, shop)
    assert runs.count == 3 + 1


def test_answers_of_other_weights_are_not_taken(zoo: Path, tmp_path: Path, runs: Runs) -> None:
    """The scale of an adapter is in its config, and its base is a file of its own."""
    with opened(zoo, ("lora",), folder=tmp_path / "state"):
        pass
    path = zoo / "lora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 1}))
    with opened(zoo, ("lora",), folder=tmp_path / "state") as shop:
        check(zoo, shop, ("lora",))
    assert runs.count == 2
    (zoo / "base" / "model.safetensors").unlink()
    write_base(tmp_path / "other", seed=9)
    (tmp_path / "other" / "model.safetensors").rename(zoo / "base" / "model.safetensors")
    with opened(zoo, ("lora",), folder=tmp_path / "state") as shop:
        check(zoo, shop, ("lora",))
    assert runs.count == 3


def test_a_base_that_has_an_adapter_of_its_own(zoo: Path) -> None:
    """The base's adapter counts in every tensor, also in those that no expert changes."""
    whole = [f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn.q_proj", "mlp.gate_proj")]
    write_adapter(zoo / "own", zoo / "base", 7, modules=[*whole, "lm_head"])
    norm = "model.layers.0.input_layernorm.weight"
    save_file(read_state(zoo / "own") | {f"base_model.model.{norm}": torch.full((16,), 3.0)}, zoo / "own" / ADAPTER)
    value = recipe_of(zoo, {"lora": zoo / "lora"}) | {"base_model": f"{zoo / 'base'}+{zoo / 'own'}"}
    plan = make_plan(parse_recipe(value, "test"))
    run = Run(plan, machine=Machine(threads=1))
    shop = open_workshop(run, groups_of(run, "tensor", (), [0.3]), Data(), precision="float32")
    base = read_state(zoo / "base")
    factors = read_state(zoo / "own")
    for module in [*whole, "lm_head"]:
        stem = f"base_model.model.{module}"
        base[f"{module}.weight"] += 2 * factors[f"{stem}.lora_B.weight"] @ factors[f"{stem}.lora_A.weight"]
    base[norm] = torch.full((16,), 3.0)
    shop.student.set(np.zeros_like(shop.student.bank.products({})))
    for name, parameter in shop.student.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), base[name], msg=lambda text, name=name: f"{name}: {text}")
    shop.close()
    plan.close()
