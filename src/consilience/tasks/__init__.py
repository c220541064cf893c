"""Measure language models on held-out rows: loss per token, rank classification, divergence between two models.

Names are imported on use, so ``import consilience.tasks`` needs neither torch nor transformers and takes milliseconds.
(No module here has the name of a function in it: importing the module would shadow the function.)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from consilience.tasks.cache import cache_folder
    from consilience.tasks.encoding import Encoded, encode
    from consilience.tasks.evaluation import evaluate
    from consilience.tasks.generate import sample
    from consilience.tasks.intervals import bootstrap
    from consilience.tasks.load import load_model
    from consilience.tasks.metrics import divergence, loss_per_token, measure, rank_accuracy
    from consilience.tasks.results import (
        Accuracy,
        Divergence,
        Evaluation,
        Interval,
        Loss,
        Settings,
        TaskResult,
        render,
    )
    from consilience.tasks.rows import Message, Overlap, Row, Task, load_task, overlap, read_rows

_HOMES = {
    "cache": ("cache_folder",),
    "encoding": ("Encoded", "encode"),
    "evaluation": ("evaluate",),
    "generate": ("sample",),
    "intervals": ("bootstrap",),
    "load": ("load_model",),
    "metrics": ("divergence", "loss_per_token", "measure", "rank_accuracy"),
    "results": ("Accuracy", "Divergence", "Evaluation", "Interval", "Loss", "Settings", "TaskResult", "render"),
    "rows": ("Message", "Overlap", "Row", "Task", "load_task", "overlap", "read_rows"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Accuracy",
    "Divergence",
    "Encoded",
    "Evaluation",
    "Interval",
    "Loss",
    "Message",
    "Overlap",
    "Row",
    "Settings",
    "Task",
    "TaskResult",
    "bootstrap",
    "cache_folder",
    "divergence",
    "encode",
    "evaluate",
    "load_model",
    "load_task",
    "loss_per_token",
    "measure",
    "overlap",
    "rank_accuracy",
    "read_rows",
    "render",
    "sample",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value
