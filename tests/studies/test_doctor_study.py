"""The doctor's study: its page from cells whose right answers are known, its experts, and who sees which rows."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from studies import doctor, doctor_experts
from studies.cells import Cell, check_study
from studies.doctor_experts import Rows, Suite, Tuning, World, expert, gather, train, world
from studies.doctor_tables import (
    AIMS,
    FIGURES,
    SMOOTHNESS,
    agreement,
    bound_of,
    curve_of,
    extrapolated,
    gains,
    merges_of,
    page,
)
from suites.vision.images import DataSet, Images

TINY = Suite(("dots",), size=8, net="vit1", width=8, patch=4, validation=8, train=16, base=16, test=8,
             steps=20, batch=4, learning_rate=0.01)  # fmt: skip
STEP = Tuning("sgd", 0.05, 4, 4, 16)


# The page.


def _expert(task: int, single: float, tuning: Tuning = STEP) -> dict[str, Any]:
    sgd = tuning.optimizer == "sgd"
    squares, length = (tuning.learning_rate * tuning.length, tuning.length) if sgd else (None, None)
    logs = {"final_loss": 1.0, "final_gradient": 0.0, "stability": 0.0, "squares": squares, "length": length}
    score = {"loss": single, "accuracy": 0.9}
    return {
        "task": task,
        "tuning": tuning.name,
        "norm": 1.0,
        "logs": logs,
        "base": score,
        "train": score,
        "test": score,
    }


def _average(members: Sequence[int], loss: float, v: float, length: float | None) -> dict[str, Any]:
    count = len(members)
    checkpoints = {"norms": v, "displacement": v, "moves": [v] * count, "cosine": 0.0, "sigma_max": v,
                   "sigma_max_centred": v, "common": 0.0}  # fmt: skip
    risk = {"optimisation": None, "gradient": 1.0, "displacement": v, "stability": 1.0}
    probes = {"quadratic": loss, "measured": loss, "causes": {}, "risk": risk}
    said = {"checkpoints": checkpoints, "logs": {"length": length, "unequal": v, "noise": v}, "probes": probes}
    return {"members": list(members), "said": said, "losses": [loss] * count, "accuracies": [1 - loss / 10] * count,
            "others": None}  # fmt: skip


def _equal(rate: float, steps: int, losses: Mapping[tuple[int, ...], tuple[float, float]], single: float = 0.5,
           seed: int = 0, **changes: Any) -> Cell:  # fmt: skip
    """A cell of two experts, by members its loss and V."""
    tuning = asdict(Tuning("sgd", rate, steps, 32, 400)) | changes
    one = {"experts": [_expert(task, single, Tuning(**tuning)) for task in (0, 1)],
           "merges": [_average(members, loss, v, rate * steps) for members, (loss, v) in losses.items()]}  # fmt: skip
    setting = {"kind": "equal", "tuning": tuning, "suite": asdict(TINY), "seed": seed}
    name = "-".join(str(value) for value in (*tuning.values(), seed))
    return Cell(name, setting, {"tasks": ["dots/0", "dots/1"], "sets": [one]}, 1.0, {})


def _unequal(loss: float, length: float) -> Cell:
    one = {"experts": [_expert(0, 0.5), _expert(1, 0.5)], "merges": [_average((0, 1), loss, 3.0, length)],
           "mean_length": length}  # fmt: skip
    setting = {"kind": "unequal", "suite": asdict(TINY), "seed": 0}
    return Cell("unequal-0", setting, {"tasks": ["dots/0", "dots/1"], "sets": [one] * 4}, 1.0, {})


def _advice() -> Cell:
    def way(loss: float, predicted: float) -> dict[str, Any]:
        return {"weights": [0.5, 0.5], "losses": [loss, loss], "predicted": predicted}

    ways = {"average": way(1.0, 1.0), "best weights": way(0.8, 0.5), "equal lengths": way(1.1, 0.1)}
    one = {"members": [0, 1], "tunings": ["a", "b"], "lengths": [1.0, 2.0], "followed": "average", "ways": ways}
    setting = {"kind": "advice", "suite": asdict(TINY), "seed": 0}
    return Cell("advice-0", setting, {"tasks": ["a", "b"], "advice": [one, one | {"followed": "best weights"}]}, 1, {})


def _saturation() -> Cell:
    """Measured losses of 1 + 1/k, predicted ones of 1 + 2/k."""
    sizes = range(1, 9)
    measured = [{"members": list(range(k)), "losses": [1 + 1 / k] * 8, "validation": 1 + 1 / k} for k in sizes]
    predicted = {name: [1 + 2 / k for k in sizes] for name in ("all", "members")}
    setting = {"kind": "saturation", "tuning": asdict(STEP), "suite": asdict(TINY), "seed": 0}
    return Cell("saturation-0", setting, {"tasks": ["a"], "predicted": predicted, "measured": measured}, 1.0, {})


#: Merged loss by learning rate is least at 0.02, single experts' at 0.04; V rises with the rate.
SWEEP = [
    _equal(rate, 100, {(0, 1): (loss, 100 * rate)}, single)
    for rate, loss, single in ((0.01, 0.8, 0.7), (0.02, 0.6, 0.5), (0.04, 0.9, 0.4), (0.08, 1.5, 0.6))
]
CELLS = [*SWEEP, _unequal(0.75, 2.0), _advice(), _saturation()]


def _line(text: str, start: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [part.strip() for part in line.strip("|").split("|")]


def test_within_strata_what_tasks_share_does_not_count() -> None:
    # Within each pair of tasks loss rises with V; between them it falls.
    cells = [
        _equal(0.01 * k, 100, {(0,): (1.0 + 0.01 * k, 1.0 + 0.1 * k), (1,): (0.1 + 0.01 * k, 9.0 + 0.1 * k)})
        for k in range(1, 6)
    ]
    found = agreement([merge for cell in cells for merge in merges_of(cell)], "V", lambda merge: merge.loss)
    assert found.within.value == found.within.low == found.within.high == pytest.approx(1)
    assert found.tau_within == pytest.approx(1)
    assert found.strata == 2
    assert found.pooled.value < 0
    assert found.tau < 0


def test_correlations_need_four_points_that_differ() -> None:
    merges = [merge for cell in SWEEP for merge in merges_of(cell)]
    assert agreement(merges, "V", lambda merge: merge.loss).within.value == pytest.approx(0.8)
    assert np.isnan(agreement(merges[:3], "V", lambda merge: merge.loss).pooled.value)
    assert np.isnan(agreement(merges, "K", lambda merge: merge.loss).pooled.value)


@pytest.mark.slow
def test_seeds_are_told_apart() -> None:
    # In seed 0 loss rises with the rate, in seed 1 it falls.
    cells = [
        _equal(0.01 * k, 100, {(0, 1): (1.0 + sign * 0.01 * k, 1.0)}, seed=seed)
        for k in range(1, 6)
        for seed, sign in ((0, 1), (1, -1))
    ]
    found = _line(page(cells).markdown.partition("seed 0 | seed 1")[2], "learning rate / batch")
    assert [value.split()[0] for value in found[1:]] == ["+1.00", "-1.00"]


@pytest.mark.slow
def test_the_optimum_of_merges_is_found_and_compared_with_single_experts() -> None:
    text = page(SWEEP).markdown
    assert _line(text, "merged loss is a U in learning rate")[1:] == [
        "the optimum is inside the range in 1 of 1 sweeps", "", "holds"]  # fmt: skip
    assert _line(text, "its optimum is at a smaller learning rate")[1] == "smaller in 1, the same in 0, larger in 0"
    assert _line(text, "learning rate, at steps 100")[1:] == ["0.02", "0.04"]
    worse = [replace(cell, id=f"{cell.id}!", setting=cell.setting | {"seed": 1}) for cell in reversed(SWEEP)]
    assert "in 2 of 2 sweeps" in page([*SWEEP, *worse]).markdown


@pytest.mark.slow
def test_unequal_lengths_are_compared_with_equal_ones_of_the_same_mean() -> None:
    text = page(CELLS).markdown
    # Rate 0.02 of 100 steps is the mean length 2, and its loss 0.6.
    assert _line(text, "unequal H is worse")[1:] == ["loss +0.150 [+0.150, +0.150]", "4 pairs", "holds"]
    assert _line(text, "2 | 0.600")[1:4] == ["0.600 (1)", "0.750 (4)", "+0.150 [+0.150, +0.150]"]


@pytest.mark.slow
def test_signs_that_do_not_hold_are_said_to_fail() -> None:
    cells = [
        _equal(0.02, 100 * k, {(0, 1): (loss, 1.0), (0,): (0.5, 1.0)}, rows=rows)
        for k in range(1, 5)
        for rows, loss in ((50, 0.6), (400, 0.9))
    ]
    text = page(cells).markdown
    assert _line(text, "more rows help")[1:] == ["loss +0.300 [+0.300, +0.300]", "4 pairs", "fails"]
    assert _line(text, "accuracy falls with the number")[3] == "holds"
    batches = [_equal(0.02, 100 * k, {(0, 1): (0.6, 1.0)}, batch=b) for k in range(1, 5) for b in (8, 32)]
    assert _line(page(batches).markdown, "a larger batch helps or is neutral")[3] == "holds"


def test_the_bound_of_experts_that_do_not_move_is_what_training_left() -> None:
    experts, merge = [_expert(0, 0.5), _expert(1, 0.5)], _average((0, 1), 1.0, 0.0, 1.0)
    assert bound_of(experts, merge, 5.0).total == pytest.approx(1.0)
    moved = _average((0, 1), 1.0, 0.2, 1.0)
    assert bound_of(experts, moved, 5.0).total == pytest.approx(1.0 + 5.0 * 0.2)
    unknown = [one | {"logs": one["logs"] | {"stability": None}} for one in experts]
    assert bound_of(unknown, moved, 5.0).total is None


@pytest.mark.slow
def test_advice_is_compared_with_the_average_of_the_same_set() -> None:
    advised = _advice().result["advice"]
    assert gains(advised, "followed") == pytest.approx([0.0, -0.2])
    assert gains(advised, "best candidate") == pytest.approx([-0.2, -0.2])
    assert gains(advised, "equal lengths") == pytest.approx([0.1, 0.1])
    assert gains(advised, "one scale") == []
    assert _line(page(CELLS).markdown, "best candidate")[1:] == [
        "-0.200 [-0.200, -0.200]", "-0.500", "2 of 2", "-0.200"]  # fmt: skip


def test_the_number_of_experts_is_foretold_from_half_of_them() -> None:
    curve = curve_of(_saturation())
    assert curve.sizes == tuple(range(1, 9))
    assert curve.measured["all"][3] == curve.measured["members"][3] == pytest.approx(1.25)
    assert curve.predicted["all"][3] == pytest.approx(1.5)
    assert extrapolated(curve) == (8, pytest.approx(1.125, abs=1e-3), pytest.approx(1.125))


@pytest.mark.slow
def test_a_page_can_be_made_of_any_of_the_cells() -> None:
    for some in ([], *([cell] for cell in CELLS), SWEEP[:2], CELLS[4:]):
        assert page(some).markdown.startswith("# Does what the doctor says")


@pytest.mark.slow
def test_pictures_are_png() -> None:
    pictures = page(CELLS).pictures
    names = {"ranks", "lengths", "unequal", "effects", "saturation", "advice"}
    assert set(pictures) == {f"{name}.png" for name in names}
    assert all(data.startswith(b"\x89PNG") for data in pictures.values())


# The study.


def test_the_study_is_sound() -> None:
    check_study(doctor.STUDY)
    assert len({tuning.name for tuning in (*doctor.CORE, *doctor.MORE, *doctor.ADAM)}) > 24
    assert {name for names in FIGURES.values() for name in names} >= set(AIMS)
    largest = max(tuning.learning_rate for tuning in (*doctor.CORE, *doctor.MORE))
    assert pytest.approx(1 / largest) == SMOOTHNESS


@pytest.mark.parametrize("count", [4, 8, 20])
def test_merges_of_a_size_hold_every_task_as_often(count: int) -> None:
    found = doctor.subsets(count)
    assert len(found) == len(set(found))
    for size in {len(members) for members in found}:
        counts = np.bincount([k for members in found if len(members) == size for k in members], minlength=count)
        assert len(set(counts.tolist())) == 1


def test_unequal_lengths_have_the_mean_and_are_there() -> None:
    lengths = [tuning.length for tuning in doctor.CORE]
    for pattern in doctor.UNEQUAL:
        assert np.mean(pattern) == pytest.approx(1)
        for mean in doctor.MEANS:
            assert all(np.isclose(lengths, mean * share).any() for share in pattern)


# The experts.


def _dots(_name: str = "dots") -> DataSet:
    """Four classes by the place of a bright bar; every image has a number of its own in its first pixel."""

    def part(count: int, first: int) -> Images:
        labels = torch.arange(count) % 4
        images = 200 * (torch.arange(8) // 2 == labels[:, None])[:, None, None, :].repeat(1, 1, 8, 1)
        images[:, 0, 0, 0] = first + torch.arange(count)
        return Images(images.to(torch.uint8), labels)

    return DataSet("dots", ("a", "b", "c", "d"), part(120, 0), part(40, 200))


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(doctor_experts, "CACHE", tmp_path)
    return world(TINY, 0, load=_dots)


def test_no_two_purposes_share_a_row() -> None:
    images = gather(TINY, 0, _dots)
    numbers = {name: set(one.images[:, 0, 0, 0].tolist()) for name, one in images.items()}
    own = [numbers[f"dots/0/{purpose}"] for purpose in doctor_experts.PURPOSES]
    assert [len(one) for one in own] == [8, 16, 16, 8]
    assert len(set().union(*own)) == 48
    assert min(numbers["dots/0/test"]) >= 200 > max(numbers["dots/0/validation"] | numbers["dots/0/train"])
    assert set(images["dots/1/train"].labels.tolist()) == {0, 1}
    assert images["dots/1/train"].images.shape == (16, 3, 8, 8)


def test_coloured_images_are_what_stands_out_from_their_ground() -> None:
    pixels = torch.full((1, 3, 3, 3), 7, dtype=torch.uint8)
    pixels[0, :, 0, 0] = torch.tensor([10, 11, 12], dtype=torch.uint8)
    shown = doctor_experts.resized(Images(pixels, torch.zeros(1, dtype=torch.int64)), 3).images
    assert shown.shape == (1, 3, 3, 3)
    assert shown[0, 0].tolist() == [[255, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_an_expert_learns_its_task_and_is_kept(made: World) -> None:
    tuning = replace(STEP, steps=30)
    one = expert(made, 1, tuning, 0)
    rows = made.tasks[1].train
    assert made.score(made.theta + one.tau, 1, rows).loss < made.score(made.theta, 1, rows).loss
    assert one.training.length is not None
    assert one.training.length.value == pytest.approx(tuning.length)
    assert (one.training.rows, one.training.batch_size, one.training.family) == (16, 4, "sgd")
    assert one.training.noise_scale is not None
    assert torch.equal(expert(made, 1, tuning, 0).tau, one.tau)
    assert torch.equal(train(made, 1, tuning, 0)[0], one.tau)
    assert torch.equal(world(TINY, 0, load=_dots).theta, made.theta)


def test_what_the_doctor_says_hangs_on_no_test_row(made: World) -> None:
    experts = [expert(made, task, STEP, 0) for task in (0, 1)]
    said = doctor.Asked(made, experts).says()
    advice, saturates = doctor.Asked(made, experts).advice(), doctor.Asked(made, experts).saturates()
    unknown = Rows(torch.full((8, 3, 8, 8), float("nan")), torch.zeros(8, dtype=torch.int64))
    blind = World(TINY, [replace(task, test=unknown) for task in made.tasks], made.net)
    blind.theta, blind.heads = made.theta, made.heads
    assert np.isnan(doctor.losses_of(blind, experts, [0.5, 0.5], "test")).all()
    again = doctor.Asked(blind, experts)
    assert (again.says(), again.advice(), again.saturates()) == (said, advice, saturates)
    assert np.isfinite(said["probes"]["quadratic"])


def test_probes_are_of_the_average(made: World) -> None:
    experts = [expert(made, task, STEP, 0) for task in (0, 1)]
    asked = doctor.Asked(made, experts)
    probed = doctor.losses_of(made, experts, [0.5, 0.5], "validation")
    assert asked.says()["probes"]["measured"] == pytest.approx(np.mean(probed), abs=1e-4)
    assert asked.predicts([0, 1]).mean() == pytest.approx(asked.says()["probes"]["quadratic"])


def test_every_kind_of_cell_runs_and_is_on_the_page(made: World, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {share * 0.2 for pattern in doctor.UNEQUAL for share in pattern}
    monkeypatch.setattr(doctor, "CORE", tuple(replace(STEP, learning_rate=rate / STEP.steps) for rate in rates))
    monkeypatch.setattr(doctor, "MORE", ())
    monkeypatch.setattr(doctor, "MEANS", (0.2,))
    tuning = asdict(doctor.CORE[0])
    cells: list[Cell] = []
    for kind, run in doctor.RUNS.items():
        setting = {"kind": kind, "tuning": tuning, "suite": asdict(TINY), "seed": 0, "sets": 2, "subsets": 2}
        if kind in ("unequal", "advice"):
            del setting["tuning"]
        result = {"tasks": list(TINY.tasks)} | run(made, setting)
        cells.append(Cell(kind, setting, json.loads(json.dumps(result, allow_nan=False)), 1.0, {}))
    text = page(cells).markdown
    assert all(
        part in text for part in ("## Equal and unequal", "## More experts", "## The advice", "## Every setting")
    )


@pytest.mark.parametrize("tuning", [STEP, Tuning("adam", 3e-4, 400, 32, 400), Tuning("sgd", 1e-5, 1, 8, 50)])
def test_a_setting_is_told_from_its_name(tuning: Tuning) -> None:
    assert Tuning.of(tuning.name) == tuning
