"""Whether a merged model is about to be measured on rows that its coefficients were learned on.

A learned merge keeps hashes of its calibration rows in OUT/consilience/coefficients.json; ``overlap`` says by the same
hashes what counts as the same row.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from consilience.checkpoints.json_files import read_object
from consilience.errors import InputError
from consilience.tasks.rows import Task, row_hashes


def _calibration(folder: Path) -> dict[str, set[str]]:
    """Return the hashes of every expert's calibration rows; nothing for models that were not learned."""
    path = folder / "consilience" / "coefficients.json"
    if not path.is_file():
        return {}
    try:
        facts = cast(dict[str, Any], read_object(path).get("facts", {}))
        experts = cast(dict[str, dict[str, Any]], facts.get("calibration", {}))
        return {name: set(map(str, entry.get("hashes", []))) for name, entry in experts.items()}
    except (InputError, AttributeError, TypeError):
        return {}  # a damaged report is no reason not to measure


def learned_on(folder: Path, tasks: Sequence[Task]) -> tuple[str, ...]:
    """Return one line for every task that shares rows with a merged model's calibration data."""
    notes: list[str] = []
    for expert, hashes in _calibration(folder).items():
        for task in tasks:
            shared = sum(not hashes.isdisjoint(row_hashes(row)) for row in task.rows)
            if shared:
                notes.append(
                    f"{task.name}: {shared} of {len(task.rows)} rows were calibration rows of {expert}: this model was "
                    "learned on them, so the figure is no held-out measurement"
                )
    return tuple(notes)
