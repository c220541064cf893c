"""Supervised fine-tuning of one model on the rows of one or several tasks: experts, and the reference for merges.

Names are imported on use, so ``import consilience.training`` needs neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from consilience.training.fine_tuning import fine_tune
    from consilience.training.record import CurvePoint, TaskShare, TrainingRecord, read_record
    from consilience.training.settings import Settings

_HOME = {
    "CurvePoint": "record",
    "Settings": "settings",
    "TaskShare": "record",
    "TrainingRecord": "record",
    "fine_tune": "fine_tuning",
    "read_record": "record",
}

__all__ = ["CurvePoint", "Settings", "TaskShare", "TrainingRecord", "fine_tune", "read_record"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
