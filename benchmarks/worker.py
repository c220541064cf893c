"""Work in a process of its own, so that its memory is its own: ``python -m MODULE SPEC.json FOUND.json``.

The process reads what it is to do from the first file and writes what it found to the second.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import TypeAdapter

from benchmarks.measure import Measurement, measure
from benchmarks.synthetic import ROOT

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

S = TypeVar("S")
F = TypeVar("F")


def work_on(arguments: Sequence[str], kind: type[S], work: "Callable[[S], DataclassInstance]") -> None:
    """Be the process: do the work that one file says and write what was found to the other."""
    given, out = map(Path, arguments)
    found = work(TypeAdapter(kind).validate_json(given.read_bytes()))
    out.write_text(json.dumps(asdict(found)), encoding="utf-8")


def run_worker(
    module: str,
    spec: "DataclassInstance",
    kind: type[F],
    folder: Path,
    *,
    threads: int,
    limit_s: float,
    environment: Mapping[str, str] | None = None,
) -> tuple[F | None, Measurement]:
    """Run the process and return what it found, None if it failed, and what it cost.

    Arguments:
        module: calls `work_on`.
        spec: what it is to do.
        kind: of what it finds.
        folder: for the two files.
        threads: of the libraries that it uses.
        limit_s: after so many seconds it is killed.
        environment: further variables.
    """
    given, out = folder / "spec.json", folder / "found.json"
    out.unlink(missing_ok=True)
    given.write_bytes(TypeAdapter(type(spec)).dump_json(spec))
    count = str(threads)
    usual = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "HF_HUB_OFFLINE": "1"}
    command = (Path(sys.executable), "-m", module, given, out)
    done = measure(command, environment={**usual, **(environment or {})}, folder=ROOT, limit_s=limit_s)
    if done.timed_out or done.exit_status or not out.exists():
        return None, done
    return TypeAdapter(kind).validate_json(out.read_bytes()), done


def failure_of(done: Measurement) -> str:
    """Say why a process has no result, without this machine's paths."""
    if done.timed_out:
        return "time limit"
    lines = [line.strip() for line in done.output.splitlines() if line.strip()] or ["no output"]
    return f"exit status {done.exit_status}: {lines[-1]}".replace(f"{ROOT}/", "")
