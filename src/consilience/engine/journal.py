"""What survives a kill: which segments of OUT.partial are on disk, with their fingerprints.

A line is written only after the bytes it speaks of have been flushed, so a rerun trusts every whole line. The same
background thread that keeps the journal thereby starts writing data out while the merge still computes.
"""

import json
import os
import threading
from collections.abc import Callable
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from consilience.engine.plan import Plan
from consilience.engine.worker import Record


class Journal:
    """Appends finished segments to a file, flushing the data first, every ``period`` seconds."""

    def __init__(self, path: Path, flush_data: Callable[[], None], period: float = 1.0) -> None:
        self.path, self.flush_data, self.period = path, flush_data, period
        self.failure: OSError | None = None
        self._pending: list[Record] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="journal", daemon=True)

    def __enter__(self) -> "Journal":
        self._file = open(self.path, "a", encoding="utf-8")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()
        self._flush()
        self._file.close()

    def add(self, record: Record) -> None:
        """Remember a finished segment."""
        with self._lock:
            self._pending.append(record)

    def _loop(self) -> None:
        while not self._closing.wait(self.period):
            self._flush()

    def _flush(self) -> None:
        with self._lock:
            batch, self._pending = self._pending, []
        if not batch or self.failure is not None:
            return
        try:
            self.flush_data()
            self._file.write("".join(json.dumps(asdict(record), separators=(",", ":")) + "\n" for record in batch))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:  # the merge itself meets the same disk and reports it
            self.failure = error


def _valid(value: Any, plan: Plan) -> Record:
    """Return the record a line holds; raise ValueError or TypeError for anything this plan could not have written."""
    record = Record(**value)
    tensor = plan.tensors[record.tensor] if 0 <= record.tensor < len(plan.tensors) else None
    numbers: list[Any] = [
        *chain(*record.inputs), *record.output, *chain(*record.below), *record.rounding, *chain(*record.measured)
    ]  # fmt: skip
    shapes = {len(record.output), len(record.rounding), *map(len, record.inputs)} == {2}
    if (
        tensor is None
        or not 0 <= record.segment < tensor.segments
        or not shapes
        or len(record.inputs) != len(tensor.rows) + 1
        or len(record.below) not in (0, len(tensor.rows))
        or any(len(counts) != 4 for counts in record.below)
        or len(record.measured) not in (0, len(tensor.rows))
        or not all(isinstance(number, int | float) for number in numbers)
    ):
        raise ValueError("not a record of this plan")
    return record


def read_journal(path: Path, plan: Plan) -> list[Record]:
    """Return the records of every whole, sensible line, and cut the file after the last of them.

    A line cut short by a crash must go: what is appended after it would be lost to the next reading.
    """
    records: list[Record] = []
    good = 0
    try:
        data = path.read_bytes()
    except OSError:
        return records
    for line in data.splitlines(keepends=True):
        try:
            if not line.endswith(b"\n"):
                break
            records.append(_valid(json.loads(line), plan))
        except (ValueError, TypeError, RecursionError):
            break
        good += len(line)
    os.truncate(path, good)
    return records
