"""``tensorboard=FOLDER`` logs every term of every step."""

from pathlib import Path
from typing import Any

import pytest
from tiny_experts import recipe_of

from consilience.api import learn
from consilience.recipe.schema import parse_recipe


def test_every_term_is_logged_at_every_step(zoo: Path, tmp_path: Path) -> None:
    accumulator: Any = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    experts = {name: zoo / name for name in ("a", "b")}
    value = recipe_of(zoo, experts, parameters={"steps": 3, "precision": "float32"})
    found = learn(parse_recipe(value, "test"), tensorboard=tmp_path / "runs")
    (folder,) = [path for path in (tmp_path / "runs").iterdir() if path.is_dir()]
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    history = found.facts["history"]
    assert {f"loss/{key}" for key in history[0] if key not in ("step", "loss")} | {"loss/total"} == set(
        events.Tags()["scalars"]
    )
    logged = [event.value for event in events.Scalars("loss/total")]
    assert logged == pytest.approx([one["loss"] for one in history], rel=1e-6)
