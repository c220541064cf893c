"""A bar on standard error that counts what is done."""

import contextlib
import math
from collections.abc import Callable, Generator

#: Called with (things done, things in all).
Listener = Callable[[int, int], None]
#: Called after every step with (steps done, steps in all, loss of the step).
LossListener = Callable[[int, int, float], None]


@contextlib.contextmanager
def listening(title: str, progress: bool | Listener) -> Generator[Listener]:
    """Give the function to call after every thing done: the caller's own, a bar that goes at the end, or nothing."""
    if not isinstance(progress, bool):
        yield progress
    elif not progress:
        yield lambda _done, _total: None
    else:
        with _bar(title, (), transient=True) as update:
            yield lambda done, total: update(completed=done, total=total)


@contextlib.contextmanager
def listening_to_loss(title: str, progress: bool | LossListener) -> Generator[LossListener]:
    """Give the function to call after every step: the caller's own, a bar that shows the loss and stays, or nothing."""
    if not isinstance(progress, bool):
        yield progress
    elif not progress:
        yield lambda _done, _total, _loss: None
    else:
        with _bar(title, ("loss {task.fields[loss]:.3f}",), transient=False) as update:
            yield lambda done, total, loss: update(completed=done, total=total, loss=loss)


@contextlib.contextmanager
def _bar(title: str, fields: tuple[str, ...], *, transient: bool) -> Generator[Callable[..., None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    shown = (TextColumn(field) for field in fields)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *shown, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=transient) as bars:
        row = bars.add_task(title, total=None, loss=math.nan)
        yield lambda **found: bars.update(row, **found)
