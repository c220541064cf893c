"""Progress: one contract that every long job keeps, and the ways to show it.

A job is a sequence of phases. It tells a ``Progress`` when a phase begins and how much of it is done; ``open_progress``
turns what a public function was given (True, a function, a ``Progress``) into one. What is wrong with the input is
found before the first phase where that is possible: an error is then the only thing on standard error.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TextIO, runtime_checkable

#: Seconds of a phase before its first line: short jobs print none.
SILENCE = 2.0
#: Seconds between two lines of a phase, and before the first one while nothing is done: what is wrong with the input is
#: mostly found before anything is done.
INTERVAL = 10.0


@runtime_checkable
class Progress(Protocol):
    """Is told how far a job is, possibly from several threads at once."""

    def phase(self, title: str, total: int | None = None, unit: str = "steps") -> None:
        """A part of the work begins: ``total`` units ("bytes", "rows", ...), or nobody knows how many (None)."""
        ...

    def advance(self, count: int = 1, text: str = "", /, **figures: float) -> None:
        """``count`` more units of the phase are done; ``text`` and ``figures`` (such as losses) say how it goes."""
        ...


#: What public functions take: True for a bar on standard error (lines if it is not a terminal), a function called with
#: (done, in all) of each phase, or a ``Progress``.
ProgressOption = bool | Callable[[int, int], None] | Progress
#: The same for training, whose function is called with (steps done, steps in all, loss of the step).
LossProgressOption = bool | Callable[[int, int, float], None] | Progress


class NullProgress:
    """Shows nothing."""

    def phase(self, title: str, total: int | None = None, unit: str = "steps") -> None:
        """Ignore."""

    def advance(self, count: int = 1, text: str = "", /, **figures: float) -> None:
        """Ignore."""


class CallbackProgress:
    """Calls a function with (done, in all, *figures) whenever something is done in a phase whose total is known.

    Args:
        function: what is called, by one thread at a time; what it raises stops the job.
        figures: names of the figures that it takes; without all of them it is not called.
    """

    def __init__(self, function: Callable[..., None], figures: Sequence[str] = ()) -> None:
        self._function, self._figures = function, tuple(figures)
        self._done, self._total = 0, None
        self._lock = threading.RLock()

    def phase(self, title: str, total: int | None = None, unit: str = "steps") -> None:
        """Count from 0."""
        with self._lock:
            self._done, self._total = 0, total

    def advance(self, count: int = 1, text: str = "", /, **figures: float) -> None:
        """Count, and call."""
        with self._lock:
            self._done += count
            if count and self._total is not None and all(name in figures for name in self._figures):
                self._function(self._done, self._total, *(figures[name] for name in self._figures))


@dataclass
class _Phase:
    """The phase that is under way. ``first``: when something was first done, and how much was done then."""

    title: str
    total: int | None
    unit: str
    started: float
    done: int = 0
    text: str = ""
    first: tuple[float, int] | None = None
    printed: float | None = None

    def advance(self, count: int, text: str, figures: dict[str, float], now: float) -> None:
        self.done += count
        if count and self.first is None:
            self.first = (now, self.done)
        shown = [f"{name.replace('_', ' ')} {value:.4f}" for name, value in figures.items()]
        self.text = ", ".join([text, *shown] if text else shown)

    def state(self, now: float) -> str:
        """Return how far the phase is, how fast it goes and how long it will take; "" where nothing is known."""
        amount = _amount(self.done, self.total, self.unit)
        parts = [amount] if amount else []
        if self.total:
            parts.append(f"{min(1.0, self.done / self.total):.0%}")
        # What an interrupted run had done comes at once with the first unit: the rate is of what was done since.
        rate = (self.done - self.first[1]) / (now - self.first[0]) if self.first and now > self.first[0] else 0.0
        if rate > 0:
            parts.append(f"{rate / 1e6:.0f} MB/s" if self.unit == "bytes" else f"{rate:.3g} {self.unit}/s")
            if self.total and self.total > self.done:
                parts.append(f"{_duration((self.total - self.done) / rate)} left")
        return ", ".join([*parts, self.text] if self.text else parts)

    def outcome(self, now: float) -> str:
        """Return what was done, and in how long."""
        amount = _amount(self.done, self.total, self.unit) or "done"
        parts = [f"{amount} in {_duration(now - self.started)}"]
        return ", ".join([*parts, self.text] if self.text else parts)


def _amount(done: int, total: int | None, unit: str) -> str:
    if total is None and not done:
        return ""
    if unit == "bytes":
        largest = max(done, total or 0)
        scale, unit = (1e9, "GB") if largest >= 1e9 else (1e6, "MB")
        return f"{done / scale:.1f} {unit}" if total is None else f"{done / scale:.1f} of {total / scale:.1f} {unit}"
    return f"{done} {unit}" if total is None else f"{done} of {total} {unit}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


@dataclass
class LineProgress:
    """Prints plain lines, for logs: nothing of a short phase, else a line now and then, and one at its end.

    A phase has its first line after ``SILENCE`` seconds (``INTERVAL`` while nothing is done), then one every
    ``INTERVAL`` seconds, whenever ``advance`` or ``tick`` is called.
    """

    stream: TextIO
    clock: Callable[[], float] = time.monotonic
    _phase: _Phase | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def phase(self, title: str, total: int | None = None, unit: str = "steps") -> None:
        """End the phase before, and begin one."""
        with self._lock:
            self._end()
            self._phase = _Phase(title, total, unit, self.clock())

    def advance(self, count: int = 1, text: str = "", /, **figures: float) -> None:
        """Count, and print a line if one is due."""
        with self._lock:
            if self._phase is not None:
                self._phase.advance(count, text, figures, self.clock())
            self._print_if_due()

    def tick(self) -> None:
        """Print a line if one is due."""
        with self._lock:
            self._print_if_due()

    def close(self) -> None:
        """End the last phase."""
        with self._lock:
            self._end()

    def _print_if_due(self) -> None:
        phase, now = self._phase, self.clock()
        if phase is None:
            return
        since = phase.started if phase.printed is None else phase.printed
        if now - since >= (SILENCE if phase.printed is None and phase.done else INTERVAL):
            phase.printed = now
            self._print(phase.title, phase.state(now) or f"{_duration(now - phase.started)} so far")

    def _end(self) -> None:
        if self._phase is not None and self._phase.printed is not None:
            self._print(self._phase.title, self._phase.outcome(self.clock()))
        self._phase = None

    def _print(self, title: str, text: str) -> None:
        line = f"{title}: {text}"
        plain = "".join(c if c.isprintable() else " " for c in line).encode("ascii", "backslashreplace").decode()
        with contextlib.suppress(OSError):  # nobody reads any more: no reason to stop working
            self.stream.write(plain + "\n")
            self.stream.flush()


class BarProgress:
    """Shows a bar on a terminal for the phase that is under way; it goes when the work ends."""

    def __init__(self, console: Any = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.table import Column

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(20),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),  # where room is scarce the bar gives way
            TextColumn("{task.fields[state]}", markup=False),
        )
        self._bars = Progress(*columns, console=console or Console(stderr=True), transient=True)
        self._phase: tuple[Any, _Phase] | None = None
        self._lock = threading.RLock()

    def phase(self, title: str, total: int | None = None, unit: str = "steps") -> None:
        """Begin a bar in place of the one before."""
        with self._lock:
            if self._phase is not None:
                self._bars.remove_task(self._phase[0])
            phase = _Phase(title, total, unit, time.monotonic())
            self._phase = self._bars.add_task(title, total=total, state=""), phase
            self._bars.start()

    def advance(self, count: int = 1, text: str = "", /, **figures: float) -> None:
        """Move the bar, and say how it goes."""
        with self._lock:
            if self._phase is not None:
                task, phase = self._phase
                now = time.monotonic()
                phase.advance(count, text, figures, now)
                self._bars.update(task, completed=phase.done, state=phase.state(now))

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self._phase is not None:
            self._bars.stop()


@contextlib.contextmanager
def open_progress(progress: bool | Callable[..., None] | Progress, figures: Sequence[str] = ()) -> Generator[Progress]:
    """Give the ``Progress`` that an option asks for, and take it off the terminal at the end.

    Args:
        progress: True for a bar on standard error, or for lines where that is not a terminal; False for nothing; a
            function to call with (done, in all, *figures); or a ``Progress``, which is its owner's to end.
        figures: names of the figures that a function takes.
    """
    if isinstance(progress, Progress):
        yield progress
    elif callable(progress):
        yield CallbackProgress(progress, figures)
    elif not progress or sys.stderr is None:  # None: the process was started without one
        yield NullProgress()
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        bar = BarProgress()
        try:
            yield bar
        finally:
            bar.close()
    else:
        lines = LineProgress(sys.stderr)
        with _ticking(lines.tick):
            yield lines
        lines.close()  # not after an error, which is to be the last line


@contextlib.contextmanager
def _ticking(tick: Callable[[], None]) -> Generator[None]:
    """Call ``tick`` once a second from a thread of its own: a phase that is stuck says so, too."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(1.0):
            tick()

    thread = threading.Thread(target=run, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
