import io
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file

import consilience as cs
from consilience import progress as module
from consilience.engine.summary import Summary
from consilience.progress import (
    BarProgress,
    CallbackProgress,
    LineProgress,
    NullProgress,
    Progress,
    open_progress,
)


@pytest.fixture(autouse=True)
def _thresholds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENCE", 2.0)
    monkeypatch.setattr(module, "INTERVAL", 10.0)


class Log:
    """Lines with a clock that is set by hand."""

    def __init__(self) -> None:
        self.now, self.stream = 0.0, io.StringIO()
        self.progress = LineProgress(self.stream, lambda: self.now)

    def lines(self) -> list[str]:
        """Return what was printed since the last time."""
        text = self.stream.getvalue()
        self.stream.seek(0)
        self.stream.truncate()
        assert text == "" or text.endswith("\n")
        return text.splitlines()


# ----------------------------------------------------------------------------------------------------------------------
# Lines.


def test_a_short_job_prints_nothing() -> None:
    log = Log()
    for title in ("one", "two", "three"):
        log.progress.phase(title, 10)
        for _ in range(10):
            log.now += 0.19
            log.progress.advance()
            log.progress.tick()
    log.progress.close()
    assert log.lines() == []


def test_a_long_phase_prints_a_line_now_and_then_and_one_at_its_end() -> None:
    log = Log()
    log.progress.phase("learning", 100)
    for step in range(1, 101):
        log.now += 0.5
        log.progress.advance(1, loss=1 / step, held_out=0.5)
    assert log.lines() == [
        "learning: 4 of 100 steps, 4%, 2 steps/s, 48 s left, loss 0.2500, held out 0.5000",
        "learning: 24 of 100 steps, 24%, 2 steps/s, 38 s left, loss 0.0417, held out 0.5000",
        "learning: 44 of 100 steps, 44%, 2 steps/s, 28 s left, loss 0.0227, held out 0.5000",
        "learning: 64 of 100 steps, 64%, 2 steps/s, 18 s left, loss 0.0156, held out 0.5000",
        "learning: 84 of 100 steps, 84%, 2 steps/s, 8 s left, loss 0.0119, held out 0.5000",
    ]
    log.progress.phase("merging", 10)
    assert log.lines() == ["learning: 100 of 100 steps in 50 s, loss 0.0100, held out 0.5000"]
    log.progress.close()
    assert log.lines() == []


def test_a_phase_that_is_stuck_says_so_later_and_without_a_rate() -> None:
    log = Log()
    log.progress.phase("loading model")
    log.now = 9.9
    log.progress.tick()
    assert log.lines() == []
    log.now = 10.0
    log.progress.tick()
    assert log.lines() == ["loading model: 10 s so far"]
    log.now = 70.0
    log.progress.advance(0, "compiling kernels")
    assert log.lines() == ["loading model: compiling kernels"]
    log.now = 7320.0
    log.progress.close()
    assert log.lines() == ["loading model: done in 2 h 2 min, compiling kernels"]


def test_bytes_are_in_units_that_people_read() -> None:
    log = Log()
    log.progress.phase("merging (ties)", 3_400_000_000, "bytes")
    log.now = 1.0
    log.progress.advance(200_000_000)
    log.now = 3.0
    log.progress.advance(200_000_000)
    assert log.lines() == ["merging (ties): 0.4 of 3.4 GB, 12%, 100 MB/s, 30 s left"]
    log.progress.phase("verifying", 5_000_000, "bytes")
    log.now = 103.0
    log.progress.advance(5_000_000)
    log.progress.close()
    assert log.lines() == [
        "merging (ties): 0.4 of 3.4 GB in 3 s",
        "verifying: 5.0 of 5.0 MB, 100%",
        "verifying: 5.0 of 5.0 MB in 1 min 40 s",
    ]


def test_steps_of_an_earlier_run_do_not_count_as_speed() -> None:
    log = Log()
    log.progress.phase("learning", 100)
    log.progress.advance(90)
    for _ in range(4):
        log.now += 1.0
        log.progress.advance()
    assert log.lines() == ["learning: 92 of 100 steps, 92%, 1 steps/s, 8 s left"]


def test_lines_are_plain_ascii() -> None:
    log = Log()
    log.progress.phase("evaluating é\r\x1b[1m\n", 4)
    log.now = 3.0
    log.progress.advance(1, "naïve")
    assert log.lines() == [r"evaluating \xe9  [1m : 1 of 4 steps, 25%, na\xefve"]


def test_advancing_before_any_phase_is_nothing() -> None:
    log = Log()
    log.now = 99.0
    log.progress.advance()
    log.progress.close()
    assert log.lines() == []


def test_a_reader_that_has_gone_does_not_stop_the_work() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        lines = LineProgress(stream, iter([0.0, 20.0, 40.0, 60.0]).__next__)
        lines.phase("merging")
        lines.tick()
        with pytest.raises(BrokenPipeError):
            stream.flush()  # what could not be written waits in the buffer
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# ----------------------------------------------------------------------------------------------------------------------
# Functions.


def test_a_function_is_called_with_what_is_done_of_each_phase() -> None:
    told: list[tuple[int, int]] = []
    with open_progress(lambda done, total: told.append((done, total))) as progress:
        progress.phase("one", 3)
        progress.advance(2)
        progress.advance(0, "nothing new")
        progress.advance()
        progress.phase("nobody knows how much")
        progress.advance()
        progress.phase("two", 1)
        progress.advance(1, loss=2.0)
    assert told == [(2, 3), (3, 3), (1, 1)]


def test_a_function_of_losses_is_called_where_there_are_some() -> None:
    told: list[tuple[int, int, float]] = []
    with open_progress(lambda *facts: told.append(facts), ("loss",)) as progress:
        progress.phase("training", 5)
        progress.advance(3)  # of an earlier run
        progress.advance(1, loss=2.0)
        progress.advance(1, held_out=4.0, loss=3.0)
    assert told == [(4, 5, 2.0), (5, 5, 3.0)]


def test_a_function_is_called_by_one_thread_at_a_time() -> None:
    told: list[int] = []
    callback = CallbackProgress(lambda done, _total: told.append(done))
    callback.phase("merging", 4000)
    threads = [threading.Thread(target=lambda: [callback.advance() for _ in range(1000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == list(range(1, 4001))


# ----------------------------------------------------------------------------------------------------------------------
# Bars, and which of them all it is.


def test_a_bar_shows_title_amount_and_figures() -> None:
    stream = io.StringIO()
    bar = BarProgress(Console(file=stream, force_terminal=True, width=140))
    bar.phase("loading [model]")
    bar.phase("learning", 8)
    bar.advance(2, loss=0.25)
    bar.close()
    text = stream.getvalue()
    assert "loading [model]" in text
    assert "learning" in text
    assert "2 of 8 steps, 25%" in text
    assert "loss 0.2500" in text
    assert text.endswith("\x1b[2K")  # the line is wiped at the end


def test_a_bar_of_no_phase_writes_nothing() -> None:
    stream = io.StringIO()
    bar = BarProgress(Console(file=stream, force_terminal=True))
    bar.advance()
    bar.close()
    assert stream.getvalue() == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "term", "kind"),
    [
        (Terminal(), "xterm", BarProgress),
        (Terminal(), "dumb", LineProgress),
        (io.StringIO(), "xterm", LineProgress),
        (None, "xterm", NullProgress),
    ],
)
def test_bars_are_for_terminals(monkeypatch: pytest.MonkeyPatch, stream: Any, term: str, kind: type) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", term)
    with open_progress(True) as progress:
        assert isinstance(progress, kind)
    with open_progress(False) as progress:
        assert isinstance(progress, NullProgress)


def test_a_progress_stays_its_owners(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log()
    with open_progress(log.progress) as progress:
        assert progress is log.progress
        progress.phase("merging", 2)
        log.now = 5.0
        progress.advance()
    assert len(log.lines()) == 1  # not ended
    assert isinstance(log.progress, Progress)


def test_a_stuck_phase_prints_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INTERVAL", 0.0)
    printed = threading.Event()

    class Stream(io.StringIO):
        def write(self, s: str, /) -> int:
            printed.set()
            return super().write(s)

    stream = Stream()
    monkeypatch.setattr(sys, "stderr", stream)
    with open_progress(True) as progress:
        progress.phase("loading model")
        assert printed.wait(60)
    assert re.match(r"loading model: \d+ s so far\n", stream.getvalue())
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_after_an_error_nothing_more_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(module, "SILENCE", 0.0)

    def fail() -> None:
        with open_progress(True) as progress:
            progress.phase("merging", 2)
            progress.advance()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert stream.getvalue() == "merging: 1 of 2 steps, 50%\n"


# ----------------------------------------------------------------------------------------------------------------------
# The command line.

#: Runs the command line with every line due at once.
DRIVER = "import consilience.progress as p; p.SILENCE = p.INTERVAL = 0.0; from consilience.__main__ import main; main()"


@pytest.fixture
def experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    base = draw.standard_normal((64, 64)).astype(np.float32)
    for name in ("base", "a", "b"):
        values = base + (name != "base") * draw.standard_normal(base.shape).astype(np.float32)
        save_file({"w": values, "v": values.T.astype(ml_dtypes.bfloat16)}, f"{name}.safetensors")
    return tmp_path


def arguments(*more: str) -> list[str]:
    pairs = ["-e", "a=a.safetensors", "-e", "b=b.safetensors"]
    return ["merge", "base.safetensors", "out.safetensors", *pairs, "--method", "ties", "--set", "density=0.5", *more]


def command(*more: str, driver: str = DRIVER) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", driver, *arguments(*more)], capture_output=True, text=True, check=False
    )


def test_a_merge_prints_lines_where_there_is_no_terminal(experts: Path) -> None:
    ended = command()
    assert ended.returncode == 0, ended.stderr
    lines = ended.stderr.splitlines()
    assert lines[0].startswith("merging (ties): ")
    assert [line.split(":")[0] for line in lines] == sorted([line.split(":")[0] for line in lines])
    merged = [line for line in lines if line.startswith("merging (ties): ")]
    assert merged[-1].startswith("merging (ties): 0.1 of 0.1 MB in ")  # all passes of all tensors were counted
    assert lines[-1].startswith("verifying: 0.0 of 0.0 MB in ")
    assert "\r" not in ended.stderr
    assert "\x1b" not in ended.stderr
    assert "verified" in ended.stdout


def test_a_short_merge_and_a_quiet_one_print_none(experts: Path) -> None:
    command()  # kernels are compiled
    assert command("--force", driver="from consilience.__main__ import main; main()").stderr == ""
    assert command("--force", "-q").stderr == ""


def test_bad_input_prints_its_error_alone(experts: Path) -> None:
    for more in (["--set", "density=7"], ["--method", "tie"], ["-e", "c=missing"]):
        ended = command(*more)
        assert ended.returncode == 2
        assert ended.stderr.startswith("consilience: ")
        assert ended.stderr.count("\n") == 1, ended.stderr


def test_a_merge_shows_a_bar_on_a_terminal(experts: Path) -> None:
    parent, child = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", "from consilience.__main__ import main; main()", *arguments()],
        env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=child,
    ) as process:  # fmt: skip
        os.close(child)
        text = read_all(parent)
    assert process.returncode == 0, text
    assert "merging (ties)" in text
    assert "verifying" in text
    assert "MB" in text


def read_all(descriptor: int) -> str:
    """Read a terminal until its last writer has gone, which is an error on Linux."""
    parts: list[bytes] = []
    try:
        while part := os.read(descriptor, 4096):
            parts.append(part)
    except OSError:
        pass
    finally:
        os.close(descriptor)
    return b"".join(parts).decode()


# ----------------------------------------------------------------------------------------------------------------------
# What a merge tells.


class Record(NullProgress):
    """Remembers phases as [title, total, unit, done] and all texts."""

    def __init__(self, stop: Callable[[int], bool] = lambda _: False) -> None:
        self.phases: list[list[Any]] = []
        self.texts: list[str] = []
        self.stop, self.lock = stop, threading.Lock()

    def phase(self, title: str, total: int | None = None, unit: str = "steps") -> None:
        self.phases.append([title, total, unit, 0])

    def advance(self, count: int = 1, text: str = "", /, **figures: float) -> None:
        with self.lock:
            self.phases[-1][3] += count
            self.texts.append(text)
            if self.stop(self.phases[-1][3]):
                raise KeyboardInterrupt


def merge(progress: Progress, **settings: Any) -> Summary:
    pair = {name: f"{name}.safetensors" for name in ("a", "b")}
    summary = cs.merge("base.safetensors", pair, "out.safetensors", force=True, progress=progress, **settings)
    assert isinstance(summary, Summary)
    return summary


def test_a_merge_and_its_verification_are_told_to_the_last_byte(experts: Path) -> None:
    record = Record()
    merge(record, method="ties", density=0.5)
    size = 64 * 64 * 6  # a float32 and a bfloat16 tensor
    assert record.phases == [
        ["merging (ties)", 2 * 3 * size, "bytes", 2 * 3 * size],  # three models, read twice
        ["verifying", size, "bytes", size],
    ]


@pytest.mark.parametrize("settings", [{"method": "ties", "density": 0.5}, {"method": "linear", "weight": 0.5}])
def test_a_resumed_merge_begins_where_the_other_stopped(
    experts: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    monkeypatch.setattr("consilience.engine.plan.SEGMENT", 1024)
    merge(first := Record(), **settings)
    total = first.phases[0][1]
    with pytest.raises(KeyboardInterrupt):
        merge(Record(lambda done: done > 0.9 * total), threads=1, **settings)
    record = Record()
    assert merge(record, **settings).resumed_segments > 0
    assert record.phases[0][3] == total


def test_compilation_is_told_while_it_lasts(experts: Path, tmp_path: Path) -> None:
    from consilience.jit import compilation_shown, kernel

    @kernel
    def inner(x: Any) -> Any:
        return x + 1

    @kernel
    def outer(x: Any) -> Any:
        return inner(x) * 2

    record = Record()
    record.phase("merging")
    with compilation_shown(record):
        assert outer(2) == 6
        assert outer(3) == 8  # compiled already
    assert record.texts == ["compiling kernels (once on this machine)", ""]
    assert outer(2.5) == 7.0  # nobody is told any more
    assert len(record.texts) == 2
