"""What a run says while it works."""

import contextlib
import math
from collections.abc import Callable, Generator

#: Called after every step with (steps done, steps in all, loss of the step in nats per response token).
Listener = Callable[[int, int, float], None]


@contextlib.contextmanager
def listening(progress: bool | Listener) -> Generator[Listener]:
    """Give the function to call after every step: the caller's own, a bar on standard error, or nothing."""
    if not isinstance(progress, bool):
        yield progress
        return
    if not progress:
        yield lambda _done, _total, _loss: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        row = bar.add_task("training", total=None, loss=math.nan)
        yield lambda done, total, loss: bar.update(row, completed=done, total=total, loss=loss)
