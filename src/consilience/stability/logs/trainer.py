"""What transformers' Trainer leaves behind: its state, its arguments, its results."""

import io
import pickletools
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from consilience.checkpoints.json_files import read_object
from consilience.checkpoints.torch_file import import_torch
from consilience.errors import InputError
from consilience.stability.logs.curve import collect
from consilience.stability.logs.facts import read_facts
from consilience.stability.logs.reading import LIMIT, Reading, read_bytes

#: Keys that mean something else in files of settings than in a recipe.
OTHERWISE = {"length": "", "r": "", "n": "", "steps": "", "epoch": ""}
#: No pickle of arguments is larger, in bytes.
_LARGEST = 1 << 20
#: Opcodes that build plain values, and cannot ask for more memory than they take up.
_SAFE = frozenset([
    "PROTO", "FRAME", "STOP", "MARK", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "NONE", "NEWTRUE", "NEWFALSE",
    "BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "SETITEM", "SETITEMS", "APPEND",
    "APPENDS", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "BINPUT", "BINGET", "MEMOIZE",
])  # fmt: skip
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
    """Read a ``training_args.bin`` if it holds nothing but plain values; else say in one line that it was left unread.

    The Trainer pickles an object of its own class, which only code can restore, and no code is run: of a file like that
    the opcodes are looked at, and nothing else happens.

    Raises:
        InputError: the file is no torch file, or a key's value is of the wrong kind.
    """
    if not _plain(path):
        return Reading(unread=(f"{path}: left unread, as only running its code would restore it; {_INSTEAD}",))
    torch = import_torch(f"{path}: reading a torch file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about how the file was written; the user is told in one line
            value: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a malformed pickle can make torch raise anything
        raise InputError(f"{path}: not a readable torch file ({type(error).__name__}); {_INSTEAD}") from None
    if not isinstance(value, Mapping):
        return Reading(unread=(f"{path}: left unread, as it holds no settings by name; {_INSTEAD}",))
    return Reading(read_facts(cast(Mapping[Any, Any], value), str(path), known=OTHERWISE))


def _plain(path: Path) -> bool:
    """Whether no opcode of the pickle in a torch file names a class or function, or takes up much memory."""
    try:
        return all(opcode.name in _SAFE for opcode, _, _ in pickletools.genops(_pickle(path)))
    except ValueError:
        return False


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
