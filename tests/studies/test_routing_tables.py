"""The page of the routing study, built from cells whose right answers are known."""

import re
from typing import Any

import pytest

from studies import routing
from studies.cells import Cell, check_study
from studies.routing_tables import OURS, page

TASKS = ("code", "spam")


def _cell(identity: str, setting: dict[str, Any], losses: dict[str, float], experts: list[str]) -> Cell:
    tasks: dict[str, Any] = {}
    for name, loss in losses.items():
        tasks[name] = {"nats": [2 * loss, loss], "tokens": [2, 1], "loss": loss, "shares": [[1.0] * len(experts)] * 2}
    tasks["spam"]["correct"] = [1, 0]
    facts: dict[str, Any] = {"threshold": 0.3, "width": 0.1, "wrong_inside": 0.0, "wrong_outside": 0.5}
    result = {"experts": experts, "tasks": tasks, "adaptive": facts, "seconds_a_query": 0.02, "queries": 4}
    return Cell(identity, setting | {"examples": 2, "tokens": 3}, result, 1.0, {})


def _single(name: str, code: float, spam: float) -> Cell:
    return _cell(f"single-{name}", {"kind": "single", "expert": name}, {"code": code, "spam": spam}, list(TASKS))


def _routed(label: str, code: float, spam: float) -> Cell:
    setting = {"kind": "routed", "label": label, "held_out": ["spam"]}
    return _cell(f"0-{label}", setting, {"code": code, "spam": spam}, ["code"])


CELLS = [_single("base", 4.0, 6.0), _single("code", 2.0, 5.0), _single("spam", 3.0, 1.0),
         _routed(OURS, 2.5, 3.5), _routed("Arrow", 3.0, 6.0)]  # fmt: skip


def _row(text: str, title: str, label: str) -> list[str]:
    section = text.split(f"## {title}", 1)[1].split("\n## ", 1)[0]
    row = next(line for line in section.splitlines() if line.startswith(f"| {label} |"))
    return [part.strip() for part in row.strip("|").split("|")][1:]


def test_gain_kept_is_a_share_of_the_own_expert_s_gain() -> None:
    text = page(CELLS).markdown
    # code: (4 - 2.5) / (4 - 2); spam: (6 - 3.5) / (6 - 1)
    assert _row(text, "All methods", OURS)[0::2] == ["75.0", "50.0"]
    assert _row(text, "All methods", "Arrow")[0::2] == ["50.0", "0.0"]
    assert _row(text, "All methods", r"*base*")[0::2] == ["0.0", "0.0"]
    assert _row(text, "All methods", r"*own expert*")[0::2] == ["100.0", "100.0"]


def test_intervals_hold_the_mean_and_are_points_where_rows_do_not_differ() -> None:
    mean, low, high = map(float, re.findall(r"-?\d+\.\d+", _row(page(CELLS).markdown, "All methods", OURS)[1]))
    assert mean == low == high == pytest.approx(2.5)


def test_differences_are_paired() -> None:
    row = _row(page(CELLS).markdown, f"{OURS}, less another", "Arrow")
    assert row == ["-0.500 [-0.500, -0.500]", "1 of 1", "-2.500 [-2.500, -2.500]", "1 of 1"]


def test_a_held_out_task_s_accuracy_stands_under_held_out() -> None:
    assert _row(page(CELLS).markdown, "Accuracy", OURS) == ["", "50"]


@pytest.mark.slow
def test_a_page_can_be_made_of_any_of_the_cells() -> None:
    for some in (CELLS[:1], CELLS[3:4], CELLS[4:], CELLS[:4], []):
        assert page(some).markdown.startswith("# Routing eight language experts")


def test_pictures_are_png() -> None:
    pictures = page(CELLS).pictures
    assert set(pictures) == {"shares.png", "depth.png"}
    assert all(data.startswith(b"\x89PNG") for data in pictures.values())


def test_the_study_is_sound_and_every_domain_is_left_out_once() -> None:
    check_study(routing.STUDY)
    assert sorted(name for fold in routing.FOLDS for name in fold) == sorted(routing.TASKS)


def test_the_page_speaks_of_labels_that_there_are() -> None:
    from studies.routing_tables import CHOICES, PICTURED, SWEEP

    known = {*routing.METHODS, *routing.MORE}
    assert known >= {*PICTURED, *SWEEP.values(), *(label for labels in CHOICES.values() for label in labels)}
