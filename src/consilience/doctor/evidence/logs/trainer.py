"""What transformers' Trainer leaves behind: its state, its arguments, its results."""

import io
import zipfile
from pathlib import Path
from typing import Any, cast

from consilience.checkpoints.json_files import read_object
from consilience.doctor.evidence.logs.curve import collect
from consilience.doctor.evidence.logs.facts import number, read_facts
from consilience.doctor.evidence.logs.pickled import Named, plain_values, read_pickle
from consilience.doctor.evidence.logs.reading import LIMIT, Reading, read_bytes
from consilience.errors import InputError

#: Keys that mean something else in files of settings than in a recipe.
OTHERWISE = {"length": "", "r": "", "n": "", "steps": "", "epoch": ""}
#: No pickle of arguments is larger, in bytes.
_LARGEST = 1 << 20
_INSTEAD = "save args.to_dict() as training_args.json, or keep the run's YAML or trainer_state.json"


def read_state(path: Path) -> Reading:
    """Read a ``trainer_state.json``: its log, the steps and epochs done and planned.

    ``train_batch_size`` is that of one process for one forward pass: accumulation and processes are not in the file.

    Raises:
        InputError: the file is no such state, or a key's value is of the wrong kind.
    """
    state = read_object(path, LIMIT)
    log: Any = state.get("log_history", [])
    if not isinstance(log, list):
        raise InputError(f"{path}: log_history: must be a list, not {type(log).__name__}; restore the file")
    entries = [cast(dict[str, Any], row) for row in cast(list[Any], log) if isinstance(row, dict)]
    known = {"train_batch_size": "batch_per_device", **dict.fromkeys(["length", "steps", "noise_scale", "rows"], "")}
    facts = read_facts({key: value for key, value in state.items() if key != "log_history"}, str(path), known=known)
    if "epochs" in facts:
        facts.pop("planned_epochs", None)
    return Reading(facts, collect([(row.get("step"), row) for row in entries], str(path)))


def read_arguments(path: Path) -> Reading:
    """Read ``training_args.json``, ``args.json`` or a results file: settings by the names of any framework.

    Raises:
        InputError: the file is no JSON object, or a key's value is of the wrong kind.
    """
    known = OTHERWISE | ({"epoch": "epochs"} if path.name.endswith("results.json") else {})
    return Reading(read_facts(read_object(path), str(path), known=known))


def read_pickled_arguments(path: Path) -> Reading:
    """Read a ``training_args.bin``: the settings in its pickle, as far as they are plain values; no code is run.

    The Trainer pickles an object of its own class, which is not restored: its settings are read off the opcodes.

    Raises:
        InputError: the file is no torch file, or a key's value is of the wrong kind.
    """
    try:
        root = read_pickle(_pickle(path))
    except ValueError as error:
        return Reading(unread=(f"{path}: left unread, as its pickle is none of settings ({error}); {_INSTEAD}",))
    value: Any = root.state if isinstance(root, Named) else root
    if not isinstance(value, dict) or not value:
        return Reading(unread=(f"{path}: left unread, as it holds no settings by name; {_INSTEAD}",))
    return Reading(read_facts(_settings(cast(dict[str, Any], value)), str(path), known=OTHERWISE))


def _settings(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state's plain values, with what decides the batch and the optimizer under one key each.

    A process's batch is that of all its devices, as ``trainer_state.json`` has it too.
    """
    values = plain_values(state)
    if (number(values.get("max_steps")) or 0) > 0:
        values.pop("num_train_epochs", None)  # the Trainer goes by steps then
    own, local = values.get("per_device_train_batch_size"), number(values.get("_n_gpu"))
    if local is not None and local > 1 and isinstance(own, int):
        values["per_device_train_batch_size"] = own * int(local)
    processes = state.get("distributed_state")
    if local is not None and isinstance(processes, Named):
        values["num_processes"] = processes.state.get("num_processes")
    if isinstance(values.get("optim"), str) and isinstance(values.get("optim_args"), str):
        values["optim"] = f"{values['optim']}, {values['optim_args']}"
    return values


def _pickle(path: Path) -> bytes:
    """Return the pickle in a torch file, which is a zip archive of uncompressed members."""
    data = read_bytes(path, _LARGEST)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            member = next(entry for entry in archive.infolist() if entry.filename.endswith("data.pkl"))
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
            found = b"" if packed else archive.read(member)
    except Exception as error:  # a malformed archive can make zipfile raise anything
        raise InputError(f"{path}: not a readable torch file ({type(error).__name__}); {_INSTEAD}") from None
    if packed:
        raise InputError(f"{path}: is packed as torch never does; {_INSTEAD}")
    return found
