"""A bar that counts what is done."""

import contextlib
from collections.abc import Callable, Generator

#: Called with (things done, things in all).
Listener = Callable[[int, int], None]


@contextlib.contextmanager
def listening(title: str, progress: bool | Listener) -> Generator[Listener]:
    """Give the function to call after every step: the caller's own, a bar on standard error, or nothing."""
    if not isinstance(progress, bool):
        yield progress
        return
    if not progress:
        yield lambda _done, _total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        row = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(row, completed=done, total=total)
