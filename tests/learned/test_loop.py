import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from consilience.coefficients.coefficients import Alpha
from consilience.learned import loop
from consilience.learned.loop import Learned, Stopping, descend, schedule
from consilience.optimizers.anchor import Anchor
from consilience.optimizers.gradient import Optimizer, Terms
from consilience.optimizers.make import make_optimizer
from consilience.optimizers.parameterisation import parameterise
from consilience.optimizers.settings import Descent

START = np.array([[0.3, 0.3], [0.2, 0.2]])
STEPS = 9


class Walk:
    """An optimizer that adds 1 to every coefficient in each step."""

    def __init__(self) -> None:
        self.value = 0.0
        self.restored = 0

    def step(self, loss: Any, number: int) -> Terms:
        terms, _ = loss(self.alpha, number, gradient=False)
        self.value += 1.0
        return terms

    @property
    def alpha(self) -> Alpha:
        return np.full((1, 1), self.value)

    def state(self) -> dict[str, Any]:
        return {"value": np.array(self.value)}

    def restore(self, state: dict[str, Any]) -> None:
        self.value = float(state["value"])
        self.restored += 1


def make(name: str) -> Optimizer:
    mapped = parameterise("real", START, np.ones(2, bool))
    anchor = Anchor(mapped.start, mapped.learned, 0.01)
    return make_optimizer(name, Descent(learning_rate=0.05, steps=STEPS), mapped, anchor, 3)


def square(alpha: Alpha, step: int, *, gradient: bool) -> tuple[Terms, Alpha | None]:
    off = alpha - 0.8 - 0.1 * np.random.default_rng(step).standard_normal(alpha.shape)
    return {"loss": float((off**2).sum())}, 2 * off if gradient else None


def held_out(alpha: Alpha) -> float:
    return float(((alpha - 0.5) ** 2).sum())


def walk(held: list[float], *, every: int = 1, patience: int = 99, steps: int = 6) -> tuple[Learned, Walk]:
    """Learn by walking from 0 up, with a held-out loss of ``held[i]`` at i."""
    optimizer = Walk()
    stopping = Stopping(lambda alpha: held[int(alpha[0, 0])], every, patience)
    return descend(optimizer, square, steps, stopping=stopping), optimizer


def test_without_held_out_rows_the_last_coefficients_are_returned() -> None:
    learned = descend(Walk(), square, 4)
    assert learned.alpha.item() == 4.0
    assert learned.step == 4
    assert learned.history.held_out == []
    expected = [square(np.full((1, 1), i), i, gradient=False)[0] for i in range(4)]
    assert learned.history.terms == expected


def test_early_stopping_returns_the_best() -> None:
    learned, _ = walk([5, 4, 1, 3, 2, 6, 7])
    assert learned.alpha.item() == 2.0
    assert learned.step == 2
    assert learned.history.held_out == list(enumerate([5, 4, 1, 3, 2, 6, 7]))


def test_the_start_is_the_best_if_nothing_beats_it() -> None:
    learned, optimizer = walk([1, 1, 2, 2, 2, 2, 2], patience=3)
    assert learned.alpha.item() == 0.0
    assert learned.step == 0
    assert optimizer.value == 3.0


def test_patience_counts_takes_since_the_best() -> None:
    learned, optimizer = walk([9, 8, 8.5, 7, 8, 8, 0], patience=2)
    assert learned.alpha.item() == 3.0
    assert optimizer.value == 5.0
    assert len(learned.history.terms) == 5


def test_the_held_out_loss_is_taken_every_so_often_and_last() -> None:
    learned, _ = walk([6, 5, 4, 3, 2, 1, 0, -1], every=3, steps=7)
    assert learned.history.held_out == [(0, 6), (3, 3), (6, 0), (7, -1)]
    assert learned.alpha.item() == 7.0


def test_lines_hold_the_loss_before_a_step_and_the_held_out_loss_after_it() -> None:
    learned, _ = walk([6, 5, 4, 3], every=2, steps=3)
    lines = learned.history.lines()
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert [line.get("held_out") for line in lines] == [None, 4, 3]
    assert lines[1]["loss"] == square(np.ones((1, 1)), 1, gradient=False)[0]["loss"]
    json.dumps(lines, allow_nan=False)


def test_no_steps_return_the_start() -> None:
    learned, _ = walk([1], steps=0)
    assert learned.alpha.item() == 0.0
    assert learned.history.lines() == []


class Log:
    """A progress and a TensorBoard writer in one."""

    def __init__(self) -> None:
        self.done = 0
        self.figures: list[dict[str, float]] = []
        self.scalars: list[tuple[str, int]] = []

    def phase(self, title: str, total: int | None = None, unit: str = "steps") -> None:
        raise AssertionError("the phase is the caller's to begin")

    def advance(self, count: int = 1, text: str = "", /, **figures: float) -> None:
        self.done += count
        self.figures.append(figures)

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.scalars.append((tag, global_step))


def test_progress_is_told_of_every_step() -> None:
    log = Log()
    descend(Walk(), square, 2, stopping=Stopping(held_out, every=2), progress=log, scalars=log)
    assert log.done == 2
    assert [list(figures) for figures in log.figures] == [[], ["loss"], ["loss", "held_out"]]
    assert log.scalars == [
        ("loss/total", 0), ("loss/loss", 0), ("loss/total", 1), ("loss/loss", 1), ("loss/held_out", 1),
    ]  # fmt: skip


def learn(name: str, folder: Path | None, loss: Any = square, *, identity: Any = "this run") -> Learned:
    stopping = Stopping(held_out, every=2, patience=2)
    return descend(make(name), loss, STEPS, stopping=stopping, folder=folder, identity=identity)


def interrupted_at(step: int) -> Any:
    def loss(alpha: Alpha, number: int, *, gradient: bool) -> tuple[Terms, Alpha | None]:
        if number == step:
            raise KeyboardInterrupt
        return square(alpha, number, gradient=gradient)

    return loss


def assert_same(one: Learned, two: Learned) -> None:
    assert np.array_equal(one.alpha, two.alpha)
    assert one.history == two.history
    assert one.step == two.step


@pytest.mark.parametrize("every", [-1.0, 1e9], ids=["saved each step", "never saved"])
@pytest.mark.parametrize("name", ["adam", "sgd", "spsa", "cma"])
def test_an_interrupted_run_ends_like_the_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, every: float
) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY", every)
    whole = learn(name, None)
    for step in range(len(whole.history.terms)):
        folder = tmp_path / str(step)
        with pytest.raises(KeyboardInterrupt):
            learn(name, folder, interrupted_at(step))
        assert (folder / "state.safetensors").exists()
        assert_same(learn(name, folder), whole)


@pytest.mark.parametrize("every", [-1.0, 1e9], ids=["saved each step", "never saved"])
def test_a_large_state_goes_on_from_what_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: float
) -> None:
    """No copy of it is made for every step."""
    monkeypatch.setattr(loop, "SAVE_EVERY", every)
    monkeypatch.setattr(loop, "SMALL", 0)
    copies: list[int] = []
    optimizer = make("adam")
    state = optimizer.state
    monkeypatch.setattr(type(optimizer), "state", lambda self: copies.append(0) or state.__func__(self))
    whole = learn("adam", None)
    for step in range(len(whole.history.terms)):
        copies.clear()
        with pytest.raises(KeyboardInterrupt):
            learn("adam", tmp_path / str(step), interrupted_at(step))
        assert len(copies) == 1 + (step if every < 0 else 0)
        assert_same(learn("adam", tmp_path / str(step)), whole)


def test_a_run_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY", -1.0)
    with pytest.raises(KeyboardInterrupt):
        learn("adam", tmp_path, interrupted_at(5))
    asked: list[int] = []
    log = Log()

    def recording(alpha: Alpha, step: int, *, gradient: bool) -> tuple[Terms, Alpha | None]:
        asked.append(step)
        return square(alpha, step, gradient=gradient)

    stopping = Stopping(held_out, every=2, patience=99)
    descend(make("adam"), recording, STEPS, stopping=stopping, folder=tmp_path, identity="this run", progress=log)
    assert asked == [5, 6, 7, 8]
    assert log.done == STEPS


@pytest.mark.parametrize("stops_early", [False, True])
def test_a_finished_run_is_not_done_again(tmp_path: Path, stops_early: bool) -> None:
    held: Any = (lambda alpha: float(alpha[0, 0])) if stops_early else held_out
    stopping = Stopping(held, every=1, patience=2 if stops_early else 99)
    first = descend(make("adam"), square, STEPS, stopping=stopping, folder=tmp_path)
    assert (len(first.history.terms) < STEPS) == stops_early
    assert_same(descend(make("adam"), refuse, STEPS, stopping=stopping, folder=tmp_path), first)


def refuse(alpha: Alpha, step: int, *, gradient: bool) -> tuple[Terms, Alpha | None]:
    raise AssertionError("nothing is left to do")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(b"\xff" * 200)


def without_facts(path: Path) -> None:
    save_file(load_file(path), path)


def facts_cut(path: Path) -> None:
    save_file(load_file(path), path, {"facts": '{"key": "'})


def facts_no_object(path: Path) -> None:
    save_file(load_file(path), path, {"facts": "[1, 2]"})


@pytest.mark.parametrize("damage", [truncate, empty, garbage, without_facts, facts_cut, facts_no_object])
def test_a_damaged_state_is_ignored_and_rewritten(tmp_path: Path, damage: Any) -> None:
    whole = learn("adam", tmp_path)
    path = tmp_path / "state.safetensors"
    good = path.read_bytes()
    damage(path)
    assert_same(learn("adam", tmp_path), whole)
    assert path.read_bytes() == good


def test_the_state_of_another_run_is_ignored(tmp_path: Path) -> None:
    learn("spsa", tmp_path, identity={"seed": 1})
    assert_same(learn("adam", tmp_path, identity={"seed": 2}), learn("adam", None))


def test_identity_does_not_depend_on_the_order_of_keys(tmp_path: Path) -> None:
    first = learn("adam", tmp_path, identity={"a": 1, "b": [2.5, None]})
    assert_same(learn("adam", tmp_path, refuse, identity={"b": [2.5, None], "a": 1}), first)


def test_scalars_of_a_state_come_back_as_scalars(tmp_path: Path) -> None:
    descend(Walk(), square, 3, folder=tmp_path)
    again = Walk()
    assert descend(again, refuse, 3, folder=tmp_path).alpha.item() == 3.0
    assert again.restored == 1


EXPERTS = st.lists(st.integers(0, 3), min_size=1, max_size=14)


@given(EXPERTS, st.integers(0, 20), st.integers(0, 9), st.integers(0, 40))
def test_a_step_holds_as_many_distinct_samples_as_asked_for(
    experts: list[int], size: int, seed: int, step: int
) -> None:
    chosen = schedule(experts, size, seed, step)
    assert chosen == schedule(experts, size, seed, step)
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) <= set(range(len(experts)))
    if size == 0 or size >= len(experts):
        assert chosen == list(range(len(experts)))
    else:
        assert 1 <= len(chosen) <= size


@given(EXPERTS, st.integers(0, 9), st.integers(1, 30))
def test_single_draws_take_experts_in_turn_and_every_sample_once_a_round(
    experts: list[int], seed: int, rounds: int
) -> None:
    if len(experts) == 1:
        return
    names = sorted(set(experts))
    drawn = [schedule(experts, 1, seed, step)[0] for step in range(rounds * len(names))]
    assert [experts[i] for i in drawn] == names * rounds
    for name in names:
        own = [i for i, e in enumerate(experts) if e == name]
        mine = [i for i in drawn if experts[i] == name]
        for first in range(0, len(mine), len(own)):
            turn = mine[first : first + len(own)]
            assert set(Counter(turn).values()) <= {1}
            assert len(turn) < len(own) or sorted(turn) == own


@given(EXPERTS, st.integers(1, 13), st.integers(0, 9), st.integers(0, 20))
def test_a_larger_step_is_a_run_of_single_draws(experts: list[int], size: int, seed: int, step: int) -> None:
    if size >= len(experts):
        return
    singles = [schedule(experts, 1, seed, at)[0] for at in range(step * size, (step + 1) * size)]
    assert schedule(experts, size, seed, step) == list(dict.fromkeys(singles))


def test_rounds_and_seeds_have_orders_of_their_own() -> None:
    def order(turn: int, seed: int) -> tuple[int, ...]:
        return tuple(schedule([0] * 12, 1, seed, 12 * turn + place)[0] for place in range(12))

    assert len({order(turn, seed) for turn in (0, 1) for seed in (0, 1)}) == 4
