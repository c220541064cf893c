"""Adapters on activations: the outputs and gradients of explicitly merged weights, and the cases left to the bank."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call

from consilience.engine.plan import make_plan
from consilience.learned.run import Data, Machine, Run, Workshop, groups_of, open_workshop
from consilience.recipe.schema import parse_recipe
from consilience.student.extents import Extent
from consilience.student.factored import Factored, Leaf
from tests.learned.tiny_experts import (
    read_state,
    recipe_of,
    sentences,
    write_adapter,
    write_base,
    write_expert,
    write_rows,
)

PARTS = ("self_attn.q_proj", "mlp.down_proj")
MODULES = [f"model.layers.{i}.{part}" for i in range(2) for part in PARTS]


def write_zoo(place: Path, names: Sequence[str], **adapter: Any) -> Path:
    base = write_base(place / "base", hidden_size=48, intermediate_size=96)
    for seed, name in enumerate(names):
        write_adapter(place / name, base, seed, modules=MODULES, rank=1 + seed % 2, **adapter)
        write_rows(place / "rows" / f"{name}.jsonl", sentences(seed, 3))
    return place


def workshop(zoo: Path, names: Sequence[str], grouping: str = "tensor", precision: Any = "float64") -> Workshop:
    plan = make_plan(parse_recipe(recipe_of(zoo, {name: zoo / name for name in names}), "test"))
    run = Run(plan, machine=Machine(threads=1))
    return open_workshop(
        run, groups_of(run, grouping, (), [0.3] * len(names)), Data(), precision=precision, teachers=False
    )


def updates(zoo: Path, names: Sequence[str]) -> list[dict[str, torch.Tensor]]:
    """Every adapter's update of every layer, in float64; alpha is twice the rank."""
    found: list[dict[str, torch.Tensor]] = []
    for name in names:
        state = {key: value.double() for key, value in read_state(zoo / name).items()}
        stems = {module: f"base_model.model.{module}" for module in MODULES}
        found.append({
            f"{module}.weight": 2 * state[f"{stem}.lora_B.weight"] @ state[f"{stem}.lora_A.weight"]
            for module, stem in stems.items()
        })  # fmt: skip
    return found


def test_a_student_with_adapters_is_the_merged_model(tmp_path: Path) -> None:
    """Outputs and dL/dalpha against autograd through an explicit merge; weights are untouched, without gradients."""
    names = ("a", "b", "c")
    zoo = write_zoo(tmp_path, names)
    shop = workshop(zoo, names)
    student = shop.student
    assert sorted(student.factored) == sorted(f"{module}.weight" for module in MODULES)
    assert not student.merged
    values = np.random.default_rng(0).normal(size=(3, shop.bank.count))
    ids = torch.tensor([[5, 9, 40, 3, 77, 12]])
    student.set(values)
    student.model(input_ids=ids).logits.sin().sum().backward()
    assert not any(parameter.grad is not None for parameter in student.model.parameters())
    found = student.slopes()

    base = {name: value.double() for name, value in read_state(zoo / "base").items()}
    alpha = torch.tensor(values, requires_grad=True)
    merged = dict(base)
    for k, tau in enumerate(updates(zoo, names)):
        for name, value in tau.items():
            merged[name] = merged[name] + alpha[k, int(shop.bank.extents[name].indices[0])] * value
    student.leaf.alpha = None
    logits = functional_call(student.model, merged, (), {"input_ids": ids}).logits
    logits.sin().sum().backward()
    assert alpha.grad is not None
    np.testing.assert_allclose(found, alpha.grad.numpy(), rtol=1e-9, atol=1e-10)
    for name, value in base.items():
        assert torch.equal(student.model.get_parameter(name).detach(), value), name
    for k, name in enumerate(names):
        student.become(k)
        own = {n: base[n] + tau for n, tau in updates(zoo, [name])[0].items()}
        with torch.no_grad():
            logits = student.model(input_ids=ids).logits
            student.become_base()
            expected = functional_call(student.model, own, (), {"input_ids": ids}).logits
        torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    shop.close()
    shop.run.plan.close()


def test_what_is_left_to_the_bank(tmp_path: Path) -> None:
    """Layers that a full expert holds too, layers too small for the ranks, and half precision weights."""
    zoo = write_zoo(tmp_path, ("a", "b"))
    write_expert(zoo / "full", zoo / "base", 5)
    write_rows(zoo / "rows" / "full.jsonl", sentences(9, 3))
    write_adapter(zoo / "big", zoo / "base", 6, modules=MODULES, rank=40)
    write_rows(zoo / "rows" / "big.jsonl", sentences(8, 3))
    cases: list[tuple[tuple[str, ...], Any, set[str]]] = [
        (("a", "b"), "float32", {"0", "1"}),
        (("a", "b"), "mixed", {"0", "1"}),
        (("a", "full"), "float32", set()),
        (("a", "big"), "float32", set()),
        (("a", "b"), "bfloat16", set()),
    ]
    for names, precision, expected in cases:
        shop = workshop(zoo, names, precision=precision)
        found = {name.split(".")[2] for name in shop.student.factored}
        assert found == expected, (names, precision)
        assert set(shop.student.merged) == set(shop.bank.tensors) - set(shop.student.factored)
        shop.close()
        shop.run.plan.close()


def test_a_model_that_uses_a_weight_in_its_own_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that multiplies by a layer's weight without calling the layer, or that does both."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    zoo = write_zoo(tmp_path, ("a", "b"))
    plain = LlamaMLP.forward

    def around(mlp: Any, x: torch.Tensor) -> torch.Tensor:
        inner = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        return torch.nn.functional.linear(inner, mlp.down_proj.weight)

    def twice(mlp: Any, x: torch.Tensor) -> torch.Tensor:
        return plain(mlp, x) + 0.5 * around(mlp, x)

    for forward in (around, twice):
        monkeypatch.setattr(LlamaMLP, "forward", forward)
        shop = workshop(zoo, ("a", "b"))
        assert not shop.student.factored
        assert not any(module._forward_hooks for module in shop.student.model.modules())
        shop.student.set(np.full((2, shop.bank.count), 0.7))
        base = {name: value.double() for name, value in read_state(zoo / "base").items()}
        for tau in updates(zoo, ("a", "b")):
            for name, value in tau.items():
                base[name] = base[name] + 0.7 * value
        ids = torch.tensor([[5, 9, 40]])
        with torch.no_grad():
            ours = shop.student.model(input_ids=ids).logits
            expected = functional_call(shop.student.model, base, (), {"input_ids": ids}).logits
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
        shop.close()
        shop.run.plan.close()


@pytest.fixture(scope="module")
def tensor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The plan of one layer [48, 96] with adapters of two ranks, and the two updates."""
    zoo = write_zoo(tmp_path_factory.mktemp("zoo"), ("a", "b"))
    plan = make_plan(parse_recipe(recipe_of(zoo, {name: zoo / name for name in ("a", "b")}), "test"))
    name = f"{MODULES[1]}.weight"
    yield next(t for t in plan.tensors if t.name == name), [tau[name] for tau in updates(zoo, ("a", "b"))]
    plan.close()


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 48 * 96), min_size=2, max_size=9, unique=True).map(sorted),
    seed=st.integers(0, 9),
    whole=st.booleans(),
)
def test_any_cut_of_a_layer(tensor: Any, cuts: list[int], seed: int, whole: bool) -> None:
    """Pieces that end inside rows, several to a row, and elements that belong to none: outputs and gradients."""
    plan, taus = tensor
    if whole:
        cuts = [0, *(cut for cut in cuts if 0 < cut < 48 * 96), 48 * 96]
    starts, stops = tuple(cuts[:-1]), tuple(cuts[1:])
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randperm(12, generator=generator)[: len(starts)]
    leaf = Leaf(torch.randn(2, 12, generator=generator, dtype=torch.float64, requires_grad=True))
    made = Factored(plan, Extent(starts, stops, indices.numpy()), leaf, "cpu")
    x = torch.randn(2, 3, 96, generator=generator, dtype=torch.float64, requires_grad=True)
    alpha = leaf.alpha.detach().clone().requires_grad_()
    weight = torch.zeros(48 * 96, dtype=torch.float64)
    for index, start, stop in zip(indices, starts, stops, strict=True):
        shown = torch.zeros(48 * 96, dtype=torch.float64)
        shown[start:stop] = 1
        for k, tau in enumerate(taus):
            weight = weight + alpha[k, int(index)] * shown * tau.flatten()
    expected = x.detach() @ weight.view(48, 96).T
    found = made.update(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    aim = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    (found * aim).sum().backward()
    (expected * aim).sum().backward()
    assert alpha.grad is not None
    torch.testing.assert_close(leaf.alpha.grad, alpha.grad, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(x.grad, aim @ weight.detach().view(48, 96), rtol=1e-9, atol=1e-10)


def test_a_played_expert_has_its_own_factors_alone(tmp_path: Path) -> None:
    """In turn, between blends, and a base that has none: logits are those of explicit merges."""
    names = ("a", "b", "c")
    zoo = write_zoo(tmp_path, names)
    shop = workshop(zoo, names)
    student = shop.student
    ids = torch.tensor([[5, 9, 40, 3, 77, 12]])
    base = {name: value.double() for name, value in read_state(zoo / "base").items()}

    def logits(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional_call(student.model, weights, (), {"input_ids": ids}).logits

    taus = updates(zoo, names)
    with torch.no_grad():
        student.become_base()
        plain = student.model(input_ids=ids).logits
        torch.testing.assert_close(plain, logits(base))
        for k in (1, 0, 2, 1):
            student.set(np.full((3, shop.bank.count), 0.7))
            student.become(k)
            played = student.model(input_ids=ids).logits
            student.become_base()
            expected = logits(base | {name: base[name] + tau for name, tau in taus[k].items()})
            torch.testing.assert_close(played, expected)
            assert not torch.allclose(played, plain)
    shop.close()


def test_factors_that_are_held_are_those_that_are_read(tensor: Any) -> None:
    """With room and without, before and after a correction moves: outputs and gradients, and what room is left."""
    plan, _ = tensor
    generator = torch.Generator().manual_seed(0)
    extent = Extent((0,), (48 * 96,), np.array([3]))
    given = torch.randn(5, 96, generator=generator, dtype=torch.float64)
    fixed: Any = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((48, 2), (2, 96))]
    found: list[list[torch.Tensor]] = []
    for room in (1e9, 0.0):
        leaf = Leaf(torch.full((2, 12), 0.7, dtype=torch.float64, requires_grad=True), room=room)
        made = Factored(plan, extent, leaf, "cpu")
        moved: Any = [torch.zeros_like(side).requires_grad_() for side in fixed]
        seen: list[torch.Tensor] = []
        for step in range(4):
            made.correction = (*fixed, *moved) if step else None
            x = given.clone().requires_grad_()
            made.update(x).sin().sum().backward()
            assert x.grad is not None
            seen += [x.grad, leaf.alpha.grad.clone()]
            for number, side in enumerate(moved):  # as ``data``, which no version counts
                side.data.add_(0.1 * (step + 1) + number)
                seen += [] if side.grad is None else [side.grad.clone()]
        found.append(seen)
        assert (leaf.room < room) == bool(room)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    leaf = Leaf(torch.full((2, 12), 0.7, dtype=torch.float64), room=8.0 * (48 + 96) * 3)
    made = Factored(plan, extent, leaf, "cpu")
    made.update(given)
    assert leaf.room == 0
    sides: Any = (*fixed, *(torch.zeros_like(side) for side in fixed))
    made.correction = sides  # larger than the room that comes free
    made.update(given)
    assert leaf.room == 8.0 * (48 + 96) * 3


def test_layers_of_one_input_get_it_converted_once(tmp_path: Path) -> None:
    """Under autocast: what each layer is given is one tensor, and the logits are those without it, bit for bit."""
    zoo = write_zoo(tmp_path, ("a", "b"))
    for name in ("a", "b"):
        write_adapter(
            zoo / f"{name}-wide", zoo / "base", 3, rank=1,
            modules=[f"model.layers.0.self_attn.{part}_proj" for part in "qkv"],
        )  # fmt: skip
        write_rows(zoo / "rows" / f"{name}-wide.jsonl", sentences(1, 3))
    shop = workshop(zoo, ("a-wide", "b-wide"), precision="mixed")
    student, given = shop.student, list[torch.Tensor]()
    assert len(student.factored) == 3
    layers = [student.model.model.layers[0].self_attn.get_submodule(f"{part}_proj") for part in "qkv"]
    for layer in layers:
        layer.register_forward_hook(lambda _m, args, _out: given.append(args[0]))
    ids = torch.tensor([[5, 9, 40]])
    with torch.no_grad(), student.compute():
        student.set(np.full((2, shop.bank.count), 0.7))
        once = student.model(input_ids=ids).logits
        assert given[0] is given[1] is given[2]
        assert given[0].dtype == torch.bfloat16
        for layer in layers:
            layer._forward_pre_hooks.clear()
        each = student.model(input_ids=ids).logits
    assert given[3] is given[4]
    assert given[3].dtype == torch.float32
    assert torch.equal(once, each)
    shop.close()
    shop.run.plan.close()


def test_a_head_that_nobody_changes_is_held_narrow(tmp_path: Path) -> None:
    """It gives what autocast gives of the wide one; a head that an expert changes stays as it is."""
    zoo = write_zoo(tmp_path, ("a", "b"))
    write_expert(zoo / "head", zoo / "base", 5, only=lambda name: name == "lm_head.weight")
    write_rows(zoo / "rows" / "head.jsonl", sentences(9, 3))
    for names, kind in ((("a", "b"), torch.bfloat16), (("a", "head"), torch.float32)):
        shop = workshop(zoo, names, precision="mixed")
        head = shop.student.model.lm_head
        assert head.weight.dtype == kind
        states = torch.randn(4, 48)
        wide = read_state(zoo / "base")["lm_head.weight"]
        with torch.no_grad(), shop.student.compute():
            shop.student.become_base()
            assert torch.equal(head(states), torch.nn.functional.linear(states, wide))
        shop.close()
        shop.run.plan.close()
