"""The step benchmark: its sides compute the same two losses, and its page says what was found."""

import math
from pathlib import Path

import pytest

from benchmarks import glue_step, records
from benchmarks.glue_sides import SIDES, Found, Spec, work
from benchmarks.glue_step import Row
from benchmarks.records import Results


def test_the_sides_agree() -> None:
    found = work(Spec("vit8", 2, 1, 1, SIDES, True))
    assert set(found.seconds) == set(found.losses) == set(SIDES)
    for losses in found.losses.values():
        assert losses == pytest.approx(found.losses["straightforward"], rel=1e-5)
    assert {"forward", "backward", "blend", "slopes", "predicted", "measured"} <= set(found.costs)


def results() -> Results[Row]:
    seconds = {"floor": [0.10, 0.12], "spsa": [0.11, 0.12], "gradient": [0.22, 0.12], "straightforward": [0.2, 0.2]}
    losses = {side: [1.0, 2.0] for side in SIDES} | {"spsa": [1.0, 2.000002]}
    costs = {"forward": 0.05, "backward": 0.1, "blend": 0.001, "slopes": 0.002, "predicted": 1.5, "measured": 1.4}
    found = Found(1000, 100.0, seconds, losses, costs)
    rows = (
        Row("vit8", 10, 1, found, {"floor": 50.0, "spsa": 60.0, "gradient": 150.0, "straightforward": 55.0}),
        Row("resnet20", 10, 1, failure="time limit"),
    )
    return Results("2026-01-02T03:04:05+00:00", {"cores": "2"}, {"python": "3.11"}, {"experts": "10"}, rows)


def test_a_page_says_what_was_found(tmp_path: Path) -> None:
    path = glue_step.save(results(), tmp_path)
    assert records.load(Results[Row], path) == results()
    text = path.with_suffix(".md").read_text()
    assert "| vit8 | time, spsa / floor | 1.05 | <= 1.1 | met |" in text
    assert "| vit8 | memory, gradient / spsa | 2.50 | >= 2.0 | met |" in text
    assert "| vit8 | 50.0 | 100.0 | 1.0 | 2.0 | 2.00 | 1.50 | 1.40 | 1.0e-06 |" in text
    assert "Failed: resnet20 (time limit)." in text
    path.with_suffix(".md").unlink()
    assert glue_step.main(["--page", str(path)]) == 0
    assert path.with_suffix(".md").read_text() == text


def test_losses_of_one_side_alone_are_no_agreement() -> None:
    assert math.isnan(Row("vit8", 2, 1).error)


@pytest.mark.parametrize("arguments", [["--net", "vgg"], ["--k", "0"], ["--repeat", "x"]])
def test_what_cannot_be_run_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        glue_step.main(arguments)
