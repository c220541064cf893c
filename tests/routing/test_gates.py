"""Gates against the formula and autograd through hooks; what training leaves alone; interruptions."""

import hashlib
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from own_tasks import MAKE, TARGETS, nats, own_expert, own_tasks
from routed_models import make_experts, merge_into
from torch import Tensor, nn

from consilience.errors import InputError, MachineError
from consilience.routing.expert import Expert
from consilience.routing.install import install
from consilience.routing.layer import Factors, LowRank
from consilience.routing.local.answers import answer_losses
from consilience.routing.local.gate_settings import GateSettings
from consilience.routing.local.gate_training import GateRecord, train_gates
from consilience.routing.local.gates import GatedLinear, gated
from consilience.routing.settings import Settings
from consilience.training.data import Examples
from consilience.training.losses import batch_loss
from consilience.training.sampling import draw

QUICK = GateSettings(steps=6, batch_size=4, learning_rate=0.05, precision="float32")

kinds = pytest.mark.parametrize("kind", ["llama", "t5"])


def train(
    kind: str, model: Any = None, settings: GateSettings = QUICK, **more: Any
) -> tuple[dict[str, Tensor], GateRecord]:
    expert = own_expert(kind)
    return train_gates(model or MAKE[kind](), "own", expert.factors, own_tasks(kind), settings, **more)


@contextmanager
def opened(model: nn.Module, expert: Expert, gates: Mapping[str, Tensor]) -> Generator[None]:
    """Add sigmoid(v . u) B A u to the layers of a plain model, within, by hooks and explicit products."""

    def added(name: str, u: Tensor, y: Any) -> Tensor:
        product = (expert.factors[name].b @ expert.factors[name].a).to(u)
        return y + (u @ product.T) / (1 + torch.exp(-(u * gates[name].to(u)).sum(-1, keepdim=True)))

    modules = dict(model.named_modules())
    handles = [
        modules[name].register_forward_hook(lambda _, args, y, name=name: added(name, args[0], y)) for name in gates
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def by_hand(model: Any, expert: Expert, gates: Mapping[str, Tensor], rows: list[tuple[int, Any]]) -> Tensor:
    """The mean over tasks of the mean over tokens, row by row."""
    with opened(model, expert, gates):
        found = [(task, nats(model, one)) for task, one in rows]
    parts = [torch.cat([value for task, value in found if task == t]) for t in sorted({task for task, _ in found})]
    return torch.stack([part.mean() for part in parts]).mean()


def checksums(model: nn.Module) -> dict[str, str]:
    held = [*model.named_parameters(), *model.named_buffers()]
    return {name: hashlib.sha256(value.detach().numpy().tobytes()).hexdigest() for name, value in held}


def whole(model: nn.Module) -> tuple[Any, ...]:
    """All that training must leave alone: modules, their modes, parameters, flags, bytes, configuration."""
    modules = [(name, id(m), m.training) for name, m in model.named_modules()]
    flags = [(name, id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()]
    config: Any = model.config
    return modules, flags, checksums(model), config.to_dict(), config._attn_implementation


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(0, 2**31 - 1))
def test_a_gated_layer_is_the_formula_and_its_gradients(n: int, d: int, out: int, rank: int, seed: int) -> None:
    """y, dL/dv = sum_n g (1 - g) <dL/dy, B A u> u, and dL/du of a sum of cosines of y."""
    random = np.random.default_rng(seed)
    u, w, a, b, v, bias = (random.normal(size=shape) for shape in ((n, d), (out, d), (rank, d), (out, rank), d, out))
    linear = nn.Linear(d, out).double().requires_grad_(False)
    linear.weight.copy_(torch.from_numpy(w))
    linear.bias.copy_(torch.from_numpy(bias))
    layer = GatedLinear.around(linear, Factors(torch.from_numpy(a), torch.from_numpy(b)))
    assert not layer.gate.any()
    layer.gate.data = torch.from_numpy(v)
    leaf = torch.from_numpy(u).requires_grad_()
    y = layer(leaf)
    y.sin().sum().backward()

    g = 1 / (1 + np.exp(-u @ v))[:, None]
    expected = u @ w.T + bias + g * (u @ a.T @ b.T)
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-9, atol=1e-9)
    slope = np.cos(expected)
    of_gate = (slope * (u @ a.T @ b.T)).sum(1, keepdims=True) * g * (1 - g)
    assert layer.gate.grad is not None
    assert leaf.grad is not None
    np.testing.assert_allclose(layer.gate.grad.numpy(), (of_gate * u).sum(0), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(leaf.grad.numpy(), slope @ w + (g * (slope @ b)) @ a + of_gate * v, rtol=1e-8, atol=1e-8)
    assert linear.weight.grad is None


@kinds
def test_gates_at_zero_give_half_of_the_expert(kind: str) -> None:
    model, merged, expert = MAKE[kind](), MAKE[kind](), own_expert(kind)
    merge_into(merged, [expert], [0.5])
    rows = [(k, one) for k, task in enumerate(own_tasks(kind)) for one in task.sequences]
    with torch.no_grad(), gated(model, expert) as layers:
        for layer in layers.values():
            assert (layer.opening(torch.randn(4, layer.in_features) * 1e4) == 0.5).all()
        found, _ = answer_losses(model, [one for _, one in rows], [k for k, _ in rows])
        expected = torch.cat([nats(merged, one) for _, one in rows])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@kinds
def test_the_gradient_of_a_batch_is_that_of_its_rows_alone(kind: str) -> None:
    """Padded rows of two tasks, against autograd through hooks on a plain model, at gates that are not 0."""
    model, other, expert = MAKE[kind]().double(), MAKE[kind]().double().requires_grad_(False), own_expert(kind)
    generator = torch.Generator().manual_seed(5)
    gates = {
        name: (torch.randn(one.a.shape[1], generator=generator).double() * 0.3).requires_grad_()
        for name, one in expert.factors.items()
    }
    rows = [(k, one) for k, task in enumerate(own_tasks(kind)) for one in task.sequences]
    with gated(model, expert) as layers:
        for name, layer in layers.items():
            layer.gate.data = gates[name].detach().clone()
        loss, _ = batch_loss(*answer_losses(model, [one for _, one in rows], [k for k, _ in rows]))
        torch.autograd.backward(loss)
        found = {name: layer.gate.grad for name, layer in layers.items()}
    expected = by_hand(other, expert, gates, rows)
    torch.autograd.backward(expected)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert set(found) == set(gates)
    for name, gate in gates.items():
        slope, own = gate.grad, found[name]
        assert slope is not None
        assert own is not None
        # The loss is taken in float32.
        torch.testing.assert_close(own, slope, rtol=1e-4, atol=1e-6 + 1e-5 * float(slope.abs().max()))
        assert own.any()
    assert all(parameter.grad is None for parameter in model.parameters())


@kinds
def test_training_changes_the_gates_and_nothing_else(kind: str) -> None:
    model = MAKE[kind]()
    model.train()
    model.get_input_embeddings().weight.requires_grad_(False)
    before = whole(model)
    gates, record = train(kind, model, replace(QUICK, steps=20))
    assert whole(model) == before
    assert {name: (gate.shape[0], gate.dtype) for name, gate in gates.items()} == {
        name: (one.a.shape[1], torch.float32) for name, one in own_expert(kind).factors.items()
    }
    assert all(gate.any() for gate in gates.values())
    assert not any(gate.requires_grad for gate in gates.values())
    assert record.loss_after < record.loss_before - 0.05


def test_a_model_is_given_back_when_training_is_stopped() -> None:
    model = MAKE["llama"]()
    before = whole(model)
    with pytest.raises(Stop):
        train("llama", model, progress=stopping_at(2))
    assert whole(model) == before


@kinds
def test_a_record_says_what_was_measured(kind: str) -> None:
    """Losses by hand at gates of 0 and at the trained ones; the mean of the gates over tokens, then modules."""
    gates, record = train(kind)
    model, expert = MAKE[kind]().requires_grad_(False), own_expert(kind)
    tasks = own_tasks(kind)
    rows = [(k, one) for k, task in enumerate(tasks) for one in task.sequences]
    zeros = {name: torch.zeros_like(gate) for name, gate in gates.items()}
    assert record.rows == len(rows)
    assert record.loss_before == pytest.approx(float(by_hand(model, expert, zeros, rows)), rel=1e-4)
    seen: dict[str, list[Tensor]] = {name: [] for name in gates}
    modules = dict(model.named_modules())
    for name in gates:
        modules[name].register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].flatten(0, 1)))
    assert record.loss_after == pytest.approx(float(by_hand(model, expert, gates, rows)), rel=1e-4)
    means = [torch.sigmoid(torch.cat(seen[name]) @ gate).mean() for name, gate in gates.items()]
    assert record.mean_gate == pytest.approx(float(torch.stack(means).mean()), rel=1e-4)
    assert record.parameters == sum(gate.numel() for gate in gates.values())
    assert record.tasks == {one.task.name: one.task.digest for one in tasks}
    assert [point.step for point in record.curve] == [QUICK.steps]
    told = record.to_dict()
    assert told["settings"] == asdict(QUICK)
    assert told["loss_after"] == record.loss_after


def test_the_first_step_is_adamws_on_the_clipped_gradient() -> None:
    """-eta g / (|g| + epsilon), with g of the rows that ``draw`` names, clipped over all gates together."""
    settings = GateSettings(steps=1, batch_size=3, learning_rate=0.01, clip=1e-7, precision="float32")
    found, _ = train("llama", None, settings)
    tasks, expert = own_tasks("llama"), own_expert("llama")
    gates = {name: torch.zeros(one.a.shape[1], requires_grad=True) for name, one in expert.factors.items()}
    rows = [(k, tasks[k].sequences[i]) for k, i in draw([4, 3], 3, 0, 0)]
    torch.autograd.backward(by_hand(MAKE["llama"]().requires_grad_(False), expert, gates, rows))
    slopes = {name: gate.grad for name, gate in gates.items() if gate.grad is not None}
    norm = torch.cat([slope for slope in slopes.values()]).norm()
    assert norm > 1e-7
    for name, slope in slopes.items():
        g = slope * (1e-7 / (norm + 1e-6))
        torch.testing.assert_close(found[name], -0.01 * g / (g.abs() + 1e-8), rtol=2e-2, atol=1e-5)


@given(st.integers(1, 60), st.floats(0, 1), st.floats(1e-6, 1))
def test_the_rate_rises_linearly_then_stays(steps: int, warmup: float, peak: float) -> None:
    settings = GateSettings(steps=steps, warmup=warmup, learning_rate=peak)
    rates = [settings.learning_rate_at(step) for step in range(steps)]
    rise = max(1, round(warmup * steps))
    assert rates[rise - 1 :] == [peak] * (steps - rise + 1)
    assert np.allclose(np.diff([0.0, *rates[:rise]]), peak / rise)


class Stop(Exception):
    """Stands for whatever ends a process between two steps."""


def stopping_at(step: int) -> Callable[[int, int, float], None]:
    def listen(done: int, _total: int, _loss: float) -> None:
        if done == step:
            raise Stop

    return listen


@pytest.mark.parametrize(
    ("kind", "precision"), [("llama", "mixed"), pytest.param("t5", "float32", marks=pytest.mark.slow)]
)
def test_a_training_that_was_stopped_ends_in_the_same_bytes(kind: str, precision: Any, tmp_path: Path) -> None:
    settings = replace(QUICK, precision=precision)
    gates, record = train(kind, settings=settings)
    more: dict[str, Any] = {"settings": settings, "state": tmp_path / "state"}
    for step in (3, 5):
        with pytest.raises(Stop):
            train(kind, checkpoint_seconds=0.0, progress=stopping_at(step), **more)
    seen: list[int] = []
    rest, again = train(kind, progress=lambda done, *_: seen.append(done), **more)
    assert seen == [5, 6]  # the step it was stopped in was not saved
    assert {name: gate.numpy().tobytes() for name, gate in rest.items()} == {
        name: gate.numpy().tobytes() for name, gate in gates.items()
    }
    assert replace(again, seconds=0.0) == replace(record, seconds=0.0)
    rest, _ = train(kind, progress=stopping_at(6), **more)  # nothing is left to do
    assert all(torch.equal(rest[name], gate) for name, gate in gates.items())


def test_the_state_of_another_training_is_left_alone(tmp_path: Path) -> None:
    train("llama", state=tmp_path)
    expert, tasks = own_expert("llama"), own_tasks("llama")
    other = own_expert("llama", 4)
    for name, factors, rows, settings in (
        ("other", expert.factors, tasks, QUICK),
        ("own", other.factors, tasks, QUICK),
        ("own", expert.factors, tasks[:1], QUICK),
        ("own", expert.factors, tasks, replace(QUICK, seed=1)),
    ):
        with pytest.raises(Stop):
            train_gates(MAKE["llama"](), name, factors, rows, settings, tmp_path, stopping_at(1))
        train_gates(MAKE["llama"](), name, factors, rows, settings, tmp_path)
    assert len(list(tmp_path.iterdir())) == 5


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    train("llama", state=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"not a state")
    with pytest.raises(MachineError, match=r"gates-.*cannot be read"):
        train("llama", state=tmp_path)


@kinds
def test_other_experts_of_a_routed_model_do_not_count(kind: str) -> None:
    model = MAKE[kind]()
    install(model, make_experts(model, 3, TARGETS[kind]), Settings("phatgoose"))
    before = whole(model)
    found, _ = train(kind, model)
    expected, _ = train(kind)
    assert all(torch.equal(found[name], gate) for name, gate in expected.items())
    assert whole(model) == before


@kinds
def test_half_precision_models_are_trained_under_autocast(kind: str) -> None:
    """Weights that bfloat16 holds exactly: a model in float32 and one in bfloat16 agree up to rounding."""
    rounded = MAKE[kind]().bfloat16()
    settings = replace(QUICK, steps=8, precision="mixed")
    half, of_half = train(kind, rounded, settings)
    _, of_full = train(kind, MAKE[kind]().bfloat16().float(), settings)
    assert all(gate.dtype == torch.float32 for gate in half.values())
    assert of_half.loss_before == pytest.approx(of_full.loss_before, rel=0.05)
    assert of_half.loss_after < of_half.loss_before
    with pytest.raises(InputError, match=r"precision: the base is loaded in bfloat16.*use mixed"):
        train(kind, rounded)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"steps": 0}, "steps = 0: give a whole number"),
        ({"learning_rate": -1.0}, "learning_rate = -1.0: give a number above 0"),
        ({"warmup": 2.0}, "warmup = 2.0"),
        ({"batch_size": True}, "batch_size = True"),
        ({"clip": float("nan")}, "clip = nan"),
        ({"precision": "half"}, "precision = 'half': give one of mixed, float32"),
    ],
)
def test_settings_out_of_range_are_named(change: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        GateSettings(**change)


def test_what_does_not_suit_is_one_line() -> None:
    tasks, expert, model = own_tasks("llama"), own_expert("llama"), MAKE["llama"]()
    first = tasks[0].sequences[0]
    mute = Examples(tasks[0].task, (first, replace(first, row=2, targets=())))
    misfit = {"model.layers.9.mlp.down_proj": next(iter(expert.factors.values()))}
    cases: list[tuple[str, Mapping[str, LowRank], list[Examples]]] = [
        ("expert 'own': has no rows of its own", expert.factors, []),
        ("expert 'own': task copy has no rows", expert.factors, [Examples(tasks[0].task, ())]),
        ("task copy, row 3: has no response to learn", expert.factors, [mute]),
        ("adapts 'model.layers.9.mlp.down_proj', which the base does not have", misfit, tasks),
        ("adapts nothing", {}, tasks),
    ]
    for why, factors, examples in cases:
        with pytest.raises(InputError, match=why):
            train_gates(model, "own", factors, examples, QUICK)
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(InputError, match=r"at step 1 of the gates the loss is nan .*lower it"):
        train_gates(model, "own", expert.factors, tasks, QUICK)
