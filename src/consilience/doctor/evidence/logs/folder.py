"""Finds what a training run left in a folder; names inside files are never followed, nor links out of the folder."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from consilience.checkpoints.json_files import read_object
from consilience.doctor.evidence.logs.configs import read_adapter_config, read_any_config, read_config, read_own_record
from consilience.doctor.evidence.logs.facts import read_facts
from consilience.doctor.evidence.logs.reading import LIMIT, Reading, read_bytes
from consilience.doctor.evidence.logs.tables import looks_like_log, read_csv, read_jsonl
from consilience.doctor.evidence.logs.tensorboard import read_events
from consilience.doctor.evidence.logs.trainer import OTHERWISE, read_arguments, read_pickled_arguments, read_state
from consilience.errors import InputError

Reader = Callable[[Path], Reading]

STATE = "trainer_state.json"
_ARGUMENTS = ("training_args.json", "args.json")
_RESULTS = ("train_results.json", "all_results.json")
_PICKLED = "training_args.bin"
_OWN = "training.json"
_ADAPTER = "adapter_config.json"
_EVENTS = "tfevents"
_TABLES = {".csv": read_csv, ".tsv": read_csv, ".jsonl": read_jsonl}
_YAML = (".yml", ".yaml")
#: Folders of logs inside a run's, and how deep they are searched.
_FOLDERS = frozenset(["logs", "log", "runs", "tensorboard", "tb", "lightning_logs", "csv_logs", "consilience"])
_DEEPEST = 4
#: At most so many entries of a folder are looked at, and so many tables and configs read.
_ENTRIES = 10_000
_FILES = 50
_CHECKPOINT = re.compile(r"^checkpoint-(\d{1,15})$")


def read_file(path: Path) -> Reading:
    """Read one file of a run, of a kind that its name or its keys tell.

    Raises:
        InputError: the file is of no kind that is known, or is malformed.
    """
    if _EVENTS in path.name:
        return read_events(path)
    if path.suffix in _TABLES:
        return _TABLES[path.suffix](path)
    if path.suffix in _YAML:
        return read_config(path)
    if path.suffix == ".bin":
        return read_pickled_arguments(path)
    if path.suffix == ".json":
        return _json_reader(path)(path)
    read_bytes(path)
    raise InputError(
        f"{path}: is no log of a kind that is read; name a {STATE}, a training_args.json, a YAML config, a TensorBoard "
        "event file, or a CSV or JSONL log"
    )


def _json_reader(path: Path) -> Reader:
    value = read_object(path, LIMIT)
    if "log_history" in value:
        return read_state
    if "base_digest" in value and "tasks" in value:
        return read_own_record
    return read_adapter_config if "peft_type" in value else read_arguments


def read_folder(folder: Path) -> list[Reading]:
    """Return what the files of a run say, those first that say what was done and not what was planned.

    A file that cannot be read is told in a reading's ``unread``.

    Raises:
        InputError: the folder cannot be listed, or holds no log.
    """
    found = _found(folder)
    if not _says_something(found):
        unread = [line for reading in found for line in reading.unread]
        more = f" ({unread[0]})" if unread else ""
        raise InputError(
            f"{folder}: holds no training log that can be read{more}; add a {STATE}, a YAML config or a CSV log"
        )
    return found


def holds_log(folder: Path) -> bool:
    """Whether a folder's files say anything of a training.

    Raises:
        InputError: the folder cannot be listed.
    """
    return _says_something(_found(folder))


def _says_something(found: Sequence[Reading]) -> bool:
    return any(reading.facts or reading.curve.series for reading in found)


def _found(folder: Path) -> list[Reading]:
    files, left = _inside(folder)
    found = [Reading(unread=tuple(left)), *_states(files, folder)]
    for reader, paths in _readers(files):
        found += [_tried(reader, path) for path in paths]
    events = sorted((path for path in files if _EVENTS in path.name), key=lambda path: (path.name, str(path)))
    if events:
        found.append(_tried(lambda _: read_events(*events), events[0]))
    return found


def _readers(files: Sequence[Path]) -> Iterator[tuple[Reader, list[Path]]]:
    """Return readers and their files: records, then arguments, configs, tables, results, the adapter's config."""
    yield _by_keys, [path for path in files if path.name == _OWN]
    yield read_arguments, [path for path in files if path.name in _ARGUMENTS]
    yield read_pickled_arguments, [path for path in files if path.name == _PICKLED][:1]
    yield read_any_config, [path for path in files if path.suffix in _YAML][:_FILES]
    yield _table_or_none, [path for path in files if path.suffix in _TABLES][:_FILES]
    yield read_arguments, [path for path in files if path.name in _RESULTS]
    yield read_adapter_config, [path for path in files if path.name == _ADAPTER][:1]


def _states(files: Sequence[Path], folder: Path) -> list[Reading]:
    """Return the state that went furthest: the folder's own, or that of its newest checkpoint."""
    states = [_tried(read_state, path) for path in files if path.name == STATE]
    read = [state for state in states if not state.unread]
    steps: list[Any] = [state.facts["steps"].value if "steps" in state.facts else 0 for state in read]
    best = [read[max(range(len(read)), key=lambda i: (steps[i], -i))]] if read else []
    return [*best, *(state for state in states if state.unread)]


def _by_keys(path: Path) -> Reading:
    """Read a record of a training, whose ``steps`` are those that were taken, whoever wrote it."""
    if _json_reader(path) is read_own_record:
        return read_own_record(path)
    known = {key: field for key, field in OTHERWISE.items() if key != "steps"} | {"n_train": "rows"}
    return Reading(read_facts(read_object(path, LIMIT), str(path), known=known))


def _table_or_none(path: Path) -> Reading:
    """Read a table of a run's steps; another one, such as a data set, is nobody's log and may be of any size."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        head = file.read(1 << 16)
    return _TABLES[path.suffix](path) if looks_like_log(path, head) else Reading()


def _tried(reader: Reader, path: Path) -> Reading:
    try:
        return reader(path)
    except InputError as error:
        return Reading(unread=(str(error),))
    except OSError as error:
        return Reading(unread=(f"{path}: cannot be read ({error.strerror})",))


def _inside(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the regular files of a run by name, and lines on those that lead elsewhere.

    They are those of the folder itself, of folders of logs in it, and of its newest checkpoint.
    """
    try:
        home = folder.resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder}: cannot be read ({error}); name a folder") from None
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")  # a hub's cache keeps its files there
    kept: list[Path] = []
    left: list[str] = []
    for path in _walk(folder, 0):
        try:
            real = path.resolve(strict=True)
        except (OSError, RuntimeError):
            continue
        if not any(real.is_relative_to(place) for place in allowed):
            left.append(f"{path}: left unread, as it leads out of the folder; copy it in")
        elif real.is_file():
            kept.append(path)
    return kept, left[:_FILES]


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    try:
        with os.scandir(folder) as entries:
            listed = sorted((entry for entry, _ in zip(entries, range(_ENTRIES), strict=False)), key=lambda e: e.name)
    except (OSError, ValueError) as error:
        if depth:
            return
        raise InputError(f"{folder}: cannot be listed ({getattr(error, 'strerror', None) or error})") from None
    folders = [entry for entry in listed if entry.is_dir(follow_symlinks=False)]
    yield from (Path(entry.path) for entry in listed if entry not in folders and _is_wanted(entry.name))
    for entry in folders:
        if depth < _DEEPEST and (depth or entry.name in _FOLDERS):
            yield from _walk(Path(entry.path), depth + 1)
    numbers = [(int(match[1]), entry.path) for entry in folders if (match := _CHECKPOINT.match(entry.name))]
    if numbers and not depth:
        yield from _walk(Path(max(numbers)[1]), _DEEPEST)


def _is_wanted(name: str) -> bool:
    named = {STATE, *_ARGUMENTS, *_RESULTS, _PICKLED, _OWN, _ADAPTER}
    return name in named or _EVENTS in name or Path(name).suffix in (*_TABLES, *_YAML)
