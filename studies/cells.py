"""Run the cells of studies that are missing, and build their tables from the cells.

``python -m studies.cells [STUDY ...] [--list] [--tables] [--only PATTERN] [--limit-minutes M]``

A study is a ``Study`` value named in ``studies.STUDIES``: an ordered list of cells (an id and a JSON-able setting), a
function that runs one setting (at most 15 minutes on 2 cores) and one that turns finished cells into Markdown and
pictures. A finished cell is a file ``docs/results/cells/STUDY/ID.json``, written whole or not at all and meant to be
committed at once: a study survives any interruption and no cell is ever run twice. ``docs/results/STUDY.md`` is built
from those files alone.

Exit status: 0 done; 1 a cell failed (the others still ran) or the machine did; 2 a study or an option is wrong; 130
interrupted.
"""

import argparse
import gc
import importlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from consilience.errors import ConsilienceError, InputError, MachineError, nearest
from consilience.progress import open_progress
from consilience.workdir import write_file
from studies.json_rows import json_rows

ROOT = Path(__file__).resolve().parents[1]
_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,119}")
_PACKAGES = ("torch", "transformers", "peft", "numpy", "consilience")


@dataclass(frozen=True)
class Tables:
    """What ``docs/results/STUDY.md`` holds, and pictures by file name, written to ``docs/results/STUDY/``."""

    markdown: str
    pictures: Mapping[str, bytes] = field(default_factory=dict[str, bytes])


@dataclass(frozen=True)
class Cell:
    """A finished cell: what was asked, what came out, and where and when it ran."""

    id: str
    setting: dict[str, Any]
    result: dict[str, Any]
    seconds: float
    record: dict[str, Any]


@dataclass(frozen=True)
class Study:
    """A study: ``cells`` are (id, setting) pairs in the order in which they run and reach ``tables``.

    ``run(setting)`` returns a JSON-able result; ``tables(cells)`` gets the finished cells only, which may be some of
    them. A setting should name its ``seed``.
    """

    name: str
    cells: Sequence[tuple[str, Mapping[str, Any]]]
    run: Callable[[dict[str, Any]], Mapping[str, Any]]
    tables: Callable[[Sequence[Cell]], Tables | str]


def _canonical(value: Any, what: str) -> str:
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} is not JSON ({error}); use finite numbers, strings, lists and mappings") from None


def check_study(study: Study) -> None:
    """Check a study's name, ids and settings.

    Raises:
        InputError: an id is no safe file name or occurs twice (also up to case: some file systems fold it), or a
            setting is not JSON-able.
    """
    if not _SAFE.fullmatch(study.name):
        raise InputError(f"study {study.name!r}: its name must be letters, digits and . _ + = -, as a file name")
    seen: dict[str, str] = {}
    for identity, setting in study.cells:
        if not _SAFE.fullmatch(identity):
            raise InputError(f"study {study.name}: id {identity!r} must be letters, digits and . _ + = -, at most 120")
        if identity.lower() in seen:
            raise InputError(
                f"study {study.name}: ids {seen[identity.lower()]!r} and {identity!r} are one file; rename"
            )
        seen[identity.lower()] = identity
        _canonical(dict(setting), f"study {study.name}: the setting of {identity!r}")


def cell_path(results: Path, study: Study, identity: str) -> Path:
    """Where a cell's file is."""
    return results / "cells" / study.name / f"{identity}.json"


def read_cell(results: Path, study: Study, identity: str, setting: Mapping[str, Any]) -> Cell | None:
    """Read a finished cell, or None where there is none.

    Raises:
        InputError: the file is damaged, or its setting is not the study's setting for that id any more.
        MachineError: the file is there but cannot be read.
    """
    path = cell_path(results, study, identity)
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"))
        cell = Cell(identity, record["setting"], record["result"], float(record["seconds"]), record)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise MachineError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: damaged ({type(error).__name__}); restore it from git, or delete it to run it again"
        ) from None
    if _canonical(cell.setting, str(path)) != _canonical(dict(setting), identity):
        now = json.loads(_canonical(dict(setting), identity))
        keys = sorted({*cell.setting, *now})
        changed = [key for key in keys if key not in now or key not in cell.setting or cell.setting[key] != now[key]]
        raise InputError(
            f"{path}: was run with another setting ({', '.join(changed)} changed); give the cell a new id, or delete"
            " the file to run it again"
        )
    return cell


def finished(study: Study, results: Path) -> dict[str, Cell]:
    """Read every finished cell of a study, in the study's order.

    Raises:
        InputError: as ``read_cell``.
    """
    found = {identity: read_cell(results, study, identity, setting) for identity, setting in study.cells}
    return {identity: cell for identity, cell in found.items() if cell is not None}


def hardware() -> dict[str, Any]:
    """The machine, in a few words: processor, how many cores this process may use, memory."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass  # not Linux
    usable = getattr(os, "sched_getaffinity", None)
    cores = len(usable(0)) if usable else os.cpu_count()
    memory: float | None = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    return {
        "processor": model,
        "cores": cores,
        "memory_gib": memory,
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions(root: Path = ROOT) -> dict[str, str | None]:
    """Python's, the main packages' and the code's versions; the revision ends in ``+changes`` for uncommitted code."""
    out: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            out[package] = None
    return {**out, "revision": _revision(root)}


def _revision(root: Path) -> str | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()

    try:
        # Cells and tables are written while a study runs: they are not the code.
        changed = git("status", "--porcelain", "--", ".", ":(exclude)docs/results")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def run_cell(study: Study, identity: str, setting: Mapping[str, Any], results: Path) -> Cell:
    """Run one cell and write its file.

    Raises:
        MachineError: the file cannot be written.
        Exception: whatever the study's ``run`` raises, or TypeError for a result that is not JSON; no file is written.
    """
    plain = json.loads(_canonical(dict(setting), identity))
    began = datetime.now(UTC)
    code = versions()  # before the run: it is this code that runs
    started = time.perf_counter()
    result = study.run(json.loads(json.dumps(plain)))
    seconds = time.perf_counter() - started
    record: dict[str, Any] = {
        "study": study.name,
        "id": identity,
        "setting": plain,
        "result": dict(result),
        "seed": plain.get("seed"),
        "date": began.isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "hardware": hardware() | _torch_threads(),
        "versions": code,
    }
    try:
        text = json_rows(record)
    except (TypeError, ValueError) as error:
        raise TypeError(f"the result is not JSON ({error})") from None
    path = cell_path(results, study, identity)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, text.encode())
    except OSError as error:
        raise MachineError(f"{path}: cannot be written ({error.strerror})") from None
    return Cell(identity, plain, json.loads(text)["result"], seconds, json.loads(text))


def _torch_threads() -> dict[str, int]:
    torch = sys.modules.get("torch")
    return {} if torch is None else {"torch_threads": int(torch.get_num_threads())}


def build_tables(study: Study, results: Path) -> Path | None:
    """Build a study's page from its finished cells alone; None while there are none.

    Raises:
        InputError: a cell's file is wrong, or a picture's name is no safe file name.
        MachineError: the page cannot be written.
    """
    cells = finished(study, results)
    if not cells:
        return None
    tables = study.tables(list(cells.values()))
    tables = Tables(tables) if isinstance(tables, str) else tables
    footer = (
        f"*{len(cells)} of {len(study.cells)} cells, from"
        f" [cells/{study.name}](cells/{study.name}) by `python -m studies.cells {study.name} --tables`.*"
    )
    page = results / f"{study.name}.md"
    try:
        results.mkdir(parents=True, exist_ok=True)
        for name, data in tables.pictures.items():
            if not _SAFE.fullmatch(name):
                raise InputError(f"study {study.name}: picture {name!r} must be letters, digits and . _ + = -")
            (results / study.name).mkdir(exist_ok=True)
            write_file(results / study.name / name, data)
        write_file(page, f"{tables.markdown.rstrip()}\n\n{footer}\n".encode())
    except OSError as error:
        raise MachineError(f"{page}: cannot be written ({error.strerror})") from None
    return page


def load_studies(names: Sequence[str], registered: Sequence[str]) -> list[Study]:
    """Import registered studies, all of them or those named, and check them.

    Raises:
        InputError: a name is not registered or does not import, two studies share a name, or one is wrong.
    """
    studies: dict[str, Study] = {}
    for dotted in registered:
        module, _, attribute = dotted.rpartition(".")
        try:
            study: Any = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise InputError(f"study {dotted}: does not import ({error}); mend studies.STUDIES") from error
        if not isinstance(study, Study):
            raise InputError(f"study {dotted}: is a {type(study).__name__}, not a Study; mend studies.STUDIES")
        check_study(study)
        if study.name in studies:
            raise InputError(f"study {dotted}: another study is named {study.name!r}; rename one")
        studies[study.name] = study
    for name in names:
        if name not in studies:
            raise InputError(
                f"{name}: no such study{nearest(name, list(studies))}; there are: {', '.join(studies) or 'none'}"
            )
    return [studies[name] for name in dict.fromkeys(names)] if names else list(studies.values())


@dataclass(frozen=True)
class _Plan:
    study: Study
    done: dict[str, Cell]
    missing: list[tuple[str, Mapping[str, Any]]]


def _plan(studies: Sequence[Study], only: str | None, results: Path) -> list[_Plan]:
    plans: list[_Plan] = []
    for study in studies:
        done = finished(study, results)
        missing = [
            (identity, setting)
            for identity, setting in study.cells
            if identity not in done and (only is None or fnmatchcase(identity, only))
        ]
        plans.append(_Plan(study, done, missing))
    return plans


def _list(plans: Sequence[_Plan], only: str | None) -> None:
    for plan in plans:
        for identity, _ in plan.study.cells:
            if only is not None and not fnmatchcase(identity, only):
                continue
            cell = plan.done.get(identity)
            print(f"{plan.study.name}/{identity}  {f'{cell.seconds:.0f} s' if cell else 'missing'}")


def run_missing(
    plans: Sequence[_Plan], results: Path, limit_seconds: float | None, *, debug: bool = False
) -> list[str]:
    """Run the planned cells one after another and return one line per cell that failed.

    With a limit no cell begins that is expected to end past it, taking the median time of the study's finished cells.
    """
    failures: list[str] = []
    if not any(plan.missing for plan in plans):
        return failures
    started = time.perf_counter()
    with open_progress(True) as progress:
        progress.phase("cells", sum(len(plan.missing) for plan in plans), "cells")
        for plan in plans:
            times = [cell.seconds for cell in plan.done.values()]
            for identity, setting in plan.missing:
                name = f"{plan.study.name}/{identity}"
                expected = statistics.median(times) if times else 0.0
                elapsed = time.perf_counter() - started
                if limit_seconds is not None and elapsed + expected > limit_seconds:
                    print(f"{name}: not begun, the time limit is near", file=sys.stderr)
                    return failures
                progress.advance(0, name)
                try:
                    cell = run_cell(plan.study, identity, setting, results)
                except MachineError:
                    raise  # a full disk fails every cell that follows
                except Exception as error:
                    if debug:
                        traceback.print_exc()
                    said = str(error).strip().splitlines()[:1]
                    failures.append(f"{name}: {type(error).__name__}: {said[0] if said else 'no message'}")
                    print(f"failed {failures[-1]}", file=sys.stderr)
                else:
                    times.append(cell.seconds)
                    print(f"{name}: {cell.seconds:.0f} s", file=sys.stderr)
                progress.advance()
                gc.collect()  # models that a cell leaves in reference cycles would add up
    return failures


def main(arguments: Sequence[str] | None = None, *, registered: Sequence[str] | None = None) -> int:
    """Command line of ``python -m studies.cells``; returns the exit status."""
    import studies

    parser = argparse.ArgumentParser(prog="python -m studies.cells", description="Run the missing cells of studies.")
    parser.add_argument("study", nargs="*", help="studies to run (all by default)")
    parser.add_argument("--list", action="store_true", help="list cells and whether they are finished; run nothing")
    parser.add_argument("--tables", action="store_true", help="build the pages from finished cells; run nothing")
    parser.add_argument("--only", metavar="PATTERN", help="only cells whose id matches, with * and ? as in a shell")
    parser.add_argument("--limit-minutes", type=float, metavar="M", help="begin no cell that would end after M minutes")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results", help="where cells and pages are")
    parser.add_argument("--debug", action="store_true", help="print the traceback of a cell that fails")
    options = parser.parse_args(arguments)
    results = cast(Path, options.results)
    try:
        known = studies.STUDIES if registered is None else registered
        plans = _plan(load_studies(options.study, known), options.only, results)
        if options.list:
            _list(plans, options.only)
            return 0
        failures: list[str] = []
        try:
            if not options.tables:
                limit = None if options.limit_minutes is None else 60 * options.limit_minutes
                failures = run_missing(plans, results, limit, debug=options.debug)
        finally:
            for plan in plans:
                page = build_tables(plan.study, results)
                if page is not None:
                    print(f"{page}")
    except ConsilienceError as error:
        if options.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("interrupted; finished cells are kept and a rerun goes on from them", file=sys.stderr)
        return 130
    if failures:
        print(f"{len(failures)} of {sum(len(plan.missing) for plan in plans)} cells failed:", file=sys.stderr)
        for failure in failures:
            print(f"  {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    # The studies import this module by its name: run that one, so that there is one Study class, not two.
    from studies.cells import main as run

    raise SystemExit(run())
