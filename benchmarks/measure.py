"""Run a command and measure its wall time, CPU time and peak anonymous memory, children included.

Peak memory is the sum of `RssAnon` and `RssShmem` over the process tree, read from /proc every 20 ms. `ru_maxrss`
would be wrong here: it counts the pages of mapped input files, which belong to the page cache and are free to go.
"""

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE_SECONDS = 0.02
NOISE = 0.25
"""Cores busy with other work above which a time counts as measured on a loaded machine."""
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Measurement:
    """What one run of a command cost.

    Arguments:
        wall_s: seconds from fork to exit.
        cpu_s: user + system seconds of the command and its descendants.
        anon_mb: peak anonymous memory of the whole process tree, in units of 10^6 bytes.
        other_cores: cores that were busy with anything else meanwhile (writeback included); above `NOISE` wall_s is an
            upper bound.
        exit_status: as a shell would see it, negative for a signal.
        timed_out: whether it was killed at the time limit.
        output: the last 4,000 characters of its standard output and error.
    """

    wall_s: float
    cpu_s: float
    anon_mb: float
    other_cores: float
    exit_status: int
    timed_out: bool
    output: str


def _tree(pid: int) -> list[int]:
    """Return ``pid`` and its living descendants."""
    found, queue = [pid], [pid]
    while queue:
        parent = queue.pop()
        # A process may end between any two reads.
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{parent}/task"):
                children = Path(f"/proc/{parent}/task/{task}/children").read_text().split()
                queue += map(int, children)
                found += map(int, children)
    return found


def anonymous_bytes(pid: int) -> int:
    """Return a process's resident anonymous and shared memory; nought once it is gone."""
    total = 0
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(("RssAnon:", "RssShmem:")):
                total += 1024 * int(line.split()[1])
    return total


def _busy_seconds() -> float:
    """Return the seconds that all cores together have been busy since boot."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / _CLOCK_TICKS


class _Sampler(threading.Thread):
    """Keeps the peak of a process tree's anonymous memory."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._pid = pid
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, sum(map(anonymous_bytes, _tree(self._pid))))

    def stop(self) -> int:
        """Stop sampling and return the peak in bytes."""
        self._stopped.set()
        self.join()
        return self.peak


def measure(
    command: Sequence[str | Path],
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    limit_s: float = 3600.0,
) -> Measurement:
    """Run ``command`` to its end and return what it cost.

    Arguments:
        command: program and arguments.
        environment: variables added to this process's own.
        folder: where it runs.
        limit_s: after so many seconds its process group is killed.
    """
    with tempfile.TemporaryFile() as log:
        busy, start = _busy_seconds(), time.perf_counter()
        # Its own session, so that a time limit or an interrupt ends its children too.
        process = subprocess.Popen(
            [os.fspath(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            cwd=folder,
            start_new_session=True,
        )
        sampler = _Sampler(process.pid)
        sampler.start()
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit_s, expire)
        timer.daemon = True
        timer.start()
        try:
            # wait4 gives this child's own usage; it also reaps it, so Popen is told the status by hand.
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        finally:
            timer.cancel()
            peak = sampler.stop()
        wall = time.perf_counter() - start
        busy = _busy_seconds() - busy
        process.returncode = os.waitstatus_to_exitcode(status)
        cpu = usage.ru_utime + usage.ru_stime
        log.seek(max(0, log.seek(0, os.SEEK_END) - 4000))
        output = log.read().decode(errors="replace")
    return Measurement(
        wall_s=wall,
        cpu_s=cpu,
        anon_mb=peak / 1e6,
        other_cores=max(0.0, (busy - cpu) / wall),
        exit_status=process.returncode,
        timed_out=expired.is_set(),
        output=output,
    )
