from typing import Any, get_args

import numpy as np
import pytest
from toy_losses import Quadratic, pieces

from consilience.errors import InputError
from consilience.optimizers.gradient import Gradient, Optimizer
from consilience.optimizers.make import make_optimizer
from consilience.optimizers.parameterisation import Kind
from consilience.optimizers.settings import Descent, SpsaSettings

NAMES = ["adam", "adamw", "sgd", "spsa", "cma"]
#: With the one whose first candidate may be its start.
ALL = [*NAMES, "ngopt"]
KINDS = get_args(Kind)
START = np.array([[0.3, -1.5, 0.2], [0.3, 2.0, 0.6]])
GOAL = np.array([[0.5, 0.0, 0.6], [0.4, 0.0, 0.1]])
LEARNED = [True, False, True]


def make(name: str, kind: Kind = "real", seed: int = 0) -> Optimizer:
    settings = Descent(learning_rate=0.05, steps=8, clip=1.0, weight_decay=1e-3, spsa=SpsaSettings(directions=2))
    return make_optimizer(name, settings, *pieces(kind, START, LEARNED, 0.05), seed)


def follow(optimizer: Optimizer, steps: range) -> list[Any]:
    loss = Quadratic(GOAL, noise=0.1)
    return [(optimizer.step(loss, number), optimizer.alpha) for number in steps]


def same(one: list[Any], two: list[Any]) -> bool:
    return all(a == b and np.array_equal(x, y) for (a, x), (b, y) in zip(one, two, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_any_optimizer_moves_any_coefficients(name: str, kind: Kind) -> None:
    optimizer = make(name, kind)
    start = optimizer.alpha
    ((terms, alpha),) = follow(optimizer, range(1))
    assert set(terms) == {"near", "far", "anchor"}
    assert terms["anchor"] == 0.0
    assert alpha.shape == START.shape
    assert alpha.dtype == np.float64
    assert np.isfinite(alpha).all()
    assert np.array_equal(alpha[:, 1], START[:, 1])
    assert not np.array_equal(alpha[:, [0, 2]], start[:, [0, 2]])
    if kind in ("softmax", "affine"):
        np.testing.assert_allclose(alpha[:, [0, 2]].sum(0), 1.0)


@pytest.mark.parametrize("name", ALL)
def test_one_seed_is_one_run(name: str) -> None:
    assert same(follow(make(name), range(6)), follow(make(name), range(6)))


@pytest.mark.parametrize("kind", ["box", "sigmoid"])
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("done", [0, 1, 5])
def test_a_resumed_run_is_the_uninterrupted_one(name: str, kind: Kind, done: int) -> None:
    whole = follow(make(name, kind), range(8))
    first, second = make(name, kind), make(name, kind)
    follow(first, range(done))
    state = first.state()
    assert all(isinstance(value, np.ndarray) and value.dtype != object for value in state.values())
    follow(second, range(3))  # what an optimizer did before it is restored leaves no trace
    second.restore(state)
    assert np.array_equal(second.alpha, first.alpha)
    assert same(follow(second, range(done, 8)), whole[done:])


@pytest.mark.parametrize("name", ALL)
def test_a_state_is_a_copy(name: str) -> None:
    optimizer = make(name)
    follow(optimizer, range(2))
    state = optimizer.state()
    copies = {key: value.copy() for key, value in state.items()}
    alpha = optimizer.alpha
    kept = alpha.copy()
    follow(optimizer, range(2, 4))
    assert all(np.array_equal(state[key], copies[key]) for key in copies)
    assert np.array_equal(alpha, kept)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_the_name_chooses_the_rule(name: str) -> None:
    optimizer = make_optimizer(name, Descent("adam"), *pieces("real", START), 0)
    assert isinstance(optimizer, Gradient)
    assert type(optimizer.rule).__name__.lower() == name


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(InputError, match=r"optimizer 'lion' is unknown \(known: adam, adamw, sgd, spsa, cma, ngopt\)"):
        make("lion")
