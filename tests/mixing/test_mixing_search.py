from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_nets import Point, fingerprint, labelled, net, points, scattered, towards
from torch import Tensor

from consilience.coefficients.spectrum import entropy
from consilience.errors import InputError
from consilience.learned import loop
from consilience.mixing import (
    ExpertBank,
    Mixture,
    RemoteScore,
    Search,
    Target,
    TargetLoss,
    identity,
    mix,
    mix_bank,
)
from consilience.mixing.target import Tensors, as_rows
from consilience.optimizers.parameterisation import parameterise
from consilience.optimizers.spaces import hierarchical, low_rank, make_space

CORNERS = points([2.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 2.0, 0])


def goal(*weights: float) -> Tensor:
    """Return that mixture of the corners."""
    return sum((w * state["theta"] for w, state in zip(weights, CORNERS.values(), strict=True)), torch.zeros(4))


def search(target: Target, **settings: Any) -> Mixture:
    return mix(Point(), CORNERS, target, every=20, patience=99, **settings)


@pytest.mark.parametrize(("optimizer", "steps"), [("sgd", 150), ("spsa", 450)])
def test_a_target_at_an_expert_is_found(optimizer: str, steps: int) -> None:
    found = search(towards(goal(0, 1, 0)), optimizer=optimizer, steps=steps, learning_rate=0.3)
    assert found.alpha[1, 0] > 0.95
    assert found.alpha[:, 0].sum() == pytest.approx(1, abs=1e-6)
    assert found.entropy < 0.3
    assert not found.left_hull


@pytest.mark.parametrize(("optimizer", "steps"), [("sgd", 150), ("spsa", 450)])
def test_a_target_inside_the_hull_is_found(optimizer: str, steps: int) -> None:
    truth = (0.2, 0.3, 0.5)
    found = search(towards(goal(*truth)), optimizer=optimizer, steps=steps, learning_rate=0.3)
    assert np.allclose(found.alpha[:, 0], truth, atol=0.03)
    assert torch.allclose(found.state["theta"], goal(*truth), atol=0.1)


def test_a_target_outside_the_hull_needs_the_affine_space() -> None:
    target = towards(goal(1.0, 0.6, -0.6))
    inside = search(target, optimizer="sgd", steps=100, learning_rate=0.1)
    outside = search(target, optimizer="sgd", steps=100, learning_rate=0.1, space="affine")
    assert outside.validation[-1][1] < 0.1 * inside.validation[-1][1]
    assert outside.left_hull
    assert np.isnan(outside.entropy)
    assert outside.alpha.sum() == pytest.approx(1)
    held = search(target, optimizer="sgd", steps=100, learning_rate=0.1, space="affine", radius=0.5)
    assert held.distance == pytest.approx(0.5)
    assert outside.distance > 0.6


def test_task_vectors_need_not_sum_to_one() -> None:
    base = {"theta": torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)}
    target = towards(torch.tensor([2.0, 2.0, 0.0, -1.0], dtype=torch.float64))
    found = search(target, optimizer="sgd", steps=200, learning_rate=0.1, space="task_vector", base=base)
    assert np.allclose(found.alpha[:, 0], [1, 1, 0], atol=1e-3)
    assert found.left_hull


def test_one_expert_is_the_mixture_and_nothing_moves() -> None:
    module = net()
    expert = scattered(module, 1)
    for granularity in ("global", "tensor"):
        found = mix(module, expert, labelled(), steps=3, granularity=granularity, bn="blend")
        for name, value in expert["expert0"].items():
            assert torch.equal(found.state[name], value)
        assert found.movement == [0.0, 0.0, 0.0]


def test_equal_experts_leave_the_logits_where_they_are() -> None:
    one = CORNERS["expert0"]
    found = mix(Point(), {"a": one, "b": one, "c": one}, towards(goal(0, 1, 0)), steps=10)
    assert np.allclose(found.alpha, 1 / 3, atol=1e-12)
    assert found.distance == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("optimizer", ["spsa", "sgd", "adam", "cma"])
def test_coefficients_stay_on_the_simplex(optimizer: str) -> None:
    module = net()
    found = mix(
        module, scattered(module, 4), labelled(), optimizer=optimizer, steps=6, learning_rate=3.0, granularity="block"
    )
    assert (found.trajectory >= 0).all()
    assert np.allclose(found.trajectory.sum(1), 1, atol=1e-6)
    assert found.trajectory.shape == (7, 4, 3)
    assert [group.name for group in found.groups] == ["embed", "blocks.0", "blocks.1"]


def test_a_shift_of_the_logits_is_the_same_model() -> None:
    module = net()
    bank = ExpertBank.of(scattered(module, 3), module)
    mapped = parameterise("softmax", bank.table([1 / 3] * 3), np.ones(1, bool))
    logits = torch.tensor([[0.3], [-1.0], [0.4]], dtype=torch.float64)
    one, other = (bank.state(mapped.coefficients(logits + shift)) for shift in (0.0, 5.0))
    for name in one:
        assert torch.allclose(one[name].float(), other[name].float(), rtol=1e-6, atol=1e-6)


def test_permuted_experts_have_permuted_coefficients() -> None:
    module = net(torch.float64)
    states, data = scattered(module, 3), labelled(dtype=torch.float64)
    order = ["expert2", "expert0", "expert1"]
    settings: dict[str, Any] = {"optimizer": "sgd", "steps": 10, "learning_rate": 1.0, "holdout": 0.0}
    one = mix(module, states, data, **settings)
    other = mix(module, {name: states[name] for name in order}, data, **settings)
    assert other.names == tuple(order)
    assert np.allclose(other.alpha, one.alpha[[2, 0, 1]], rtol=1e-9)
    assert not np.allclose(one.alpha, 1 / 3, atol=1e-3)


@pytest.mark.parametrize("directions", [1, 3])
def test_a_step_is_two_forward_passes_a_direction_and_no_backward_pass(directions: int) -> None:
    module = net()
    states = scattered(module, 3)
    before = fingerprint(states)
    target = Target(as_rows(labelled()), None, batch_size=8)
    found = mix(module, states, target, steps=5, directions=directions)
    assert (found.counts.forwards, found.counts.backwards) == (2 * directions * 5, 0)
    full = mix(module, states, target, steps=5, optimizer="sgd")
    assert (full.counts.forwards, full.counts.backwards) == (5, 5)
    assert fingerprint(states) == before


def test_the_error_of_a_unit_direction_is_within_the_proposition() -> None:
    """E||d u - g||^2 <= (K-1)/K sigma_max^2 ||dL/dtheta||^2 with unit directions, over all +-1 patterns."""
    module = net(torch.float64, dropout=0.0)
    experts, mu = 5, 1e-4
    bank = ExpertBank.of(scattered(module, experts), module)
    # The batch's own statistics: blended ones would make the loss depend on alpha beside theta.
    loss = TargetLoss(bank, module, Target(as_rows(labelled(dtype=torch.float64)), None, batch_size=0), bn="batch")
    alpha = bank.table([1 / experts] * experts)
    _, slope = loss(alpha, 0, gradient=True)
    assert slope is not None
    patterns = 1 - 2 * ((np.arange(2**experts)[:, None] >> np.arange(experts)) & 1)
    errors: list[float] = []
    for pattern in patterns:
        unit = pattern[:, None] / np.sqrt(experts)
        high, low = (terms["target"] for terms in loss.at([alpha + mu * unit, alpha - mu * unit], 0))
        errors.append(float(np.square((high - low) / (2 * mu) * unit - slope).sum()))
    # What the proposition bounds: of g itself the share is exact, and ||g|| <= sigma_max ||dL/dtheta||.
    share = (experts - 1) / experts
    assert np.mean(errors) == pytest.approx(share * float(np.square(slope).sum()), rel=1e-5)
    module.load_state_dict(bank.state(alpha))
    inputs, labels = loss.target.batch(0, 0)
    torch.autograd.backward(torch.nn.functional.cross_entropy(module.train()(inputs), labels))
    norm = sum(float(value.grad.square().sum()) for value in module.parameters() if value.grad is not None)
    assert np.mean(errors) <= share * bank.spectrum().sigma_max ** 2 * norm


def test_a_search_ends_where_validation_no_longer_improves() -> None:
    rows = Tensors(torch.zeros(4, 1), goal(0, 1, 0).expand(4, -1))
    held = Tensors(torch.zeros(4, 1), goal(0.25, 0.5, 0.25).expand(4, -1))
    target = Target(rows, held, towards(goal(0, 1, 0)).measure, 0)
    found = mix(Point(), CORNERS, target, optimizer="sgd", steps=500, learning_rate=0.05, every=1, patience=3)
    losses = [value for _, value in found.validation]
    best = int(np.argmin(losses))
    assert found.step == best
    assert len(losses) == best + 4
    assert np.array_equal(found.alpha, found.trajectory[best])
    assert found.alpha[1, 0] == pytest.approx(0.5, abs=0.05)


def test_a_search_may_move_in_any_map() -> None:
    bank = ExpertBank.of(CORNERS, Point())
    spectrum = bank.spectrum()
    goals = towards(goal(0.2, 0.3, 0.5))
    mapped = low_rank(spectrum.metric[0], 2, bank.table([1 / 3] * 3), [True])
    found = mix_bank(
        bank,
        TargetLoss(bank, Point(), goals),
        Search(steps=100, optimizer="sgd", every=20, patience=99),
        parameterisation=mapped,
    )
    assert found.validation[-1][1] < 0.1 * found.validation[0][1]
    assert found.alpha.shape == (3, 1)


def many() -> tuple[dict[str, Any], Target]:
    """Twelve points near two corners of a plane, two of them near the goal."""
    generator = torch.Generator().manual_seed(4)
    centres = [torch.tensor([4.0, 0.0, 0.0]), torch.tensor([0.0, 4.0, 0.0])]
    experts = {f"e{k}": {"theta": centres[k % 2] + 0.3 * torch.randn(3, generator=generator)} for k in range(10)}
    goals = torch.tensor([1.0, 3.0, 0.0])
    experts |= {f"near{k}": {"theta": goals + 0.1 * torch.randn(3, generator=generator)} for k in range(2)}
    return experts, towards(goals)


@pytest.mark.parametrize("space", ["low_rank", "hierarchical"])
@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("spsa", marks=pytest.mark.slow)])
def test_spaces_for_many_experts_find_a_goal_in_the_hull(space: Any, optimizer: str) -> None:
    experts, goals = many()
    settings: dict[str, Any] = {"normalise": True} if optimizer == "spsa" else {}
    # Along a direction in which experts lie far apart a coordinate moves the model far.
    rate = 0.1 if space == "hierarchical" else {"sgd": 0.004, "spsa": 0.02}[optimizer]
    found = mix(Point(3), experts, goals, space=space, optimizer=optimizer, parts=2, steps=400, learning_rate=rate,
                schedule="cosine", every=50, patience=99, **settings)  # fmt: skip
    assert found.alpha.sum() == pytest.approx(1.0)
    losses = [value for _, value in found.validation]
    assert min(losses) < 0.1 * losses[0]


def test_the_worst_experts_are_dropped_first() -> None:
    experts, goals = many()
    found = mix(Point(3), experts, goals, keep=3, steps=5)
    assert {"near0", "near1"} < set(found.names)
    assert found.alpha.shape == (3, 1)
    with pytest.raises(InputError, match="keep: 13 experts of 12"):
        mix(Point(3), experts, goals, keep=13, steps=5)


def test_a_remote_score_is_maximised() -> None:
    wanted = goal(0.1, 0.8, 0.1)

    def score(state: dict[str, Tensor]) -> float:
        return -float((state["theta"] - wanted).square().sum())

    found = mix(Point(), CORNERS, None, measure=RemoteScore(score), steps=300, learning_rate=0.3, every=50)
    assert np.allclose(found.alpha[:, 0], [0.1, 0.8, 0.1], atol=0.03)


class Interrupter:
    """Is told of steps and ends the run after some."""

    def __init__(self, after: int) -> None:
        self.after = after

    def phase(self, title: str, total: int | None = None, unit: str = "steps") -> None:
        pass

    def advance(self, count: int = 1, text: str = "", /, **figures: float) -> None:
        if count:
            self.after -= 1
        if not self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("optimizer", ["spsa", "sgd", "adam"])
def test_a_resumed_search_is_the_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY", -1.0)
    module = net()
    states = scattered(module, 3)
    settings: dict[str, Any] = {
        "optimizer": optimizer, "steps": 8, "learning_rate": 0.5, "every": 2, "batch_size": 8, "granularity": "block",
    }  # fmt: skip
    whole = mix(module, states, labelled(), **settings)
    with pytest.raises(KeyboardInterrupt):
        mix(module, states, labelled(), folder=tmp_path, progress=Interrupter(5), **settings)
    found = mix(module, states, labelled(), folder=tmp_path, **settings)
    assert np.array_equal(found.alpha, whole.alpha)
    assert np.array_equal(found.trajectory, whole.trajectory)
    assert found.record == whole.record
    assert (found.record is None) == (optimizer != "spsa")
    assert found.history == whole.history
    assert found.counts == whole.counts
    assert all(torch.equal(found.state[name], whole.state[name]) for name in whole.state)
    other = mix(module, scattered(module, 3, 0.2), labelled(), folder=tmp_path, **settings)
    assert not np.array_equal(other.trajectory, whole.trajectory)


def test_a_state_belongs_to_one_map() -> None:
    """Radii, bases and clusters are told apart, and one map is itself."""
    start, learned = np.full((4, 1), 0.25), [True]
    matrix = torch.randn(4, 30, generator=torch.Generator().manual_seed(3), dtype=torch.float64).numpy()
    gram = matrix @ matrix.T
    maps = {
        "wide": lambda: make_space("simplex", start, learned, gram=gram, radius=2.0),
        "narrow": lambda: make_space("simplex", start, learned, gram=gram, radius=0.5),
        "free": lambda: make_space("simplex", start, learned),
        "two coordinates": lambda: low_rank(gram, 2, start, learned),
        "another basis": lambda: low_rank(gram + np.diag([9.0, 0, 0, 0]), 2, start, learned),
        "pairs": lambda: hierarchical(np.array([0, 0, 1, 1]), start, learned),
        "other pairs": lambda: hierarchical(np.array([0, 1, 0, 1]), start, learned),
    }
    found = {name: identity.image_of(make()) for name, make in maps.items()}
    assert len(set(found.values())) == len(maps)
    assert found == {name: identity.image_of(make()) for name, make in maps.items()}


def test_entropy_is_that_of_the_weights() -> None:
    assert entropy(np.full((4, 3), 0.25)) == pytest.approx(np.log(4))
    assert entropy(np.array([[1.0, 0.5], [0.0, 0.5]])) == pytest.approx(np.log(2) / 2)
    assert np.isnan(entropy(np.array([[1.2], [-0.2]])))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"space": "ball"}, "space 'ball' is unknown"),
        ({"space": "task_vector"}, "needs base"),
        ({"base": {}}, "takes no base"),
        ({"optimizer": "sdg"}, "optimizer 'sdg' is unknown"),
        ({"directoins": 2}, "did you mean 'directions'"),
        ({"mu": -1.0}, "mu"),
        ({"schedule": "steep"}, "setting 'schedule': 'steep' will not do"),
        ({"measure": "acuracy"}, "did you mean 'accuracy'"),
        ({"start": [0.5, 0.5]}, "2 coefficients for 3 experts"),
        ({"holdout": 1.5}, "holdout"),
        ({"optimizer": "sgd", "measure": "accuracy"}, "a score has no gradient"),
        ({"granularity": "globle"}, "did you mean 'global'"),
    ],
)
def test_settings_that_will_not_do_are_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    module = net()
    with pytest.raises(InputError, match=message) as found:
        mix(module, scattered(module, 3), labelled(), steps=2, **settings)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("data", [(torch.zeros(3, 5), torch.zeros(2)), (torch.zeros(0, 5), torch.zeros(0)), "rows"])
def test_targets_that_are_no_rows_are_refused(data: Any) -> None:
    module = net()
    with pytest.raises(InputError, match="target: "):
        mix(module, scattered(module, 2), data if data != "rows" else 3, steps=2)


@pytest.mark.parametrize("space", ["simplex", "affine", "task_vector", "low_rank", "hierarchical"])
@pytest.mark.parametrize("granularity", ["global", "tensor"])
def test_what_is_excluded_is_mixed_as_if_experts_did_not_differ_there(space: Any, granularity: str) -> None:
    module = net()
    experts, base = scattered(module, 4), module.state_dict() if space == "task_vector" else None
    names = [name for name, _ in module.named_parameters() if name.endswith("bias")]
    fixed = {n: base[n] if base else torch.stack([s[n] for s in experts.values()]).mean(0) for n in names}
    settings: dict[str, Any] = {
        "space": space,
        "optimizer": "sgd",
        "steps": 6,
        "learning_rate": 0.5,
        "granularity": granularity,
    }
    settings |= {"base": base, "bn": "blend", "holdout": 0.0, "parts": 2 if space == "hierarchical" else 0}
    found = mix(module, experts, labelled(48), exclude=["re:bias$"], **settings)
    same = mix(module, {k: {**state, **fixed} for k, state in experts.items()}, labelled(48), **settings)
    assert found.groups[-1].name == "excluded"
    assert {name for name, _ in found.groups[-1].tensors} == set(names)
    assert np.all(found.alpha[:, -1] == (0.0 if base else 0.25))
    for name in names:
        torch.testing.assert_close(found.state[name], fixed[name], rtol=1e-5, atol=1e-6)
    moved = [i for i, g in enumerate(same.groups) if granularity == "global" or g.name not in names]
    np.testing.assert_allclose(found.alpha[:, :-1], same.alpha[:, moved], rtol=1e-3, atol=1e-5)
    assert np.ptp(found.alpha[:, 0]) > 1e-3


def test_an_exclusion_has_to_mean_something() -> None:
    with pytest.raises(InputError, match="exclude: 'nothing' matches no parameter"):
        mix(Point(), CORNERS, towards(goal(0, 1, 0)), exclude=["nothing"])
    with pytest.raises(InputError, match="nothing is left to learn"):
        mix(Point(), CORNERS, towards(goal(0, 1, 0)), exclude=["*"])
