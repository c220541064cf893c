"""A Sentence Transformers folder: the model at its top, and further modules with weights of their own in subfolders.

``modules.json`` lists them. Their tensors are the model's as well: ``linear.weight`` of ``2_Dense`` is called
``2_Dense/linear.weight``.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from consilience.checkpoints.checkpoint import Bytes, Checkpoint, Storage, TensorInfo
from consilience.checkpoints.files import Stamp, regular_size
from consilience.errors import InputError

LIST = "modules.json"
MODULE_FILE = "model.safetensors"
_WEIGHTS = (MODULE_FILE, "pytorch_model.bin")
#: A module may hold modules (a router does), but not many levels of them.
_DEPTH = 3


class JoinedStorage:
    """The bytes of a model and of its modules, each in its own storage."""

    def __init__(self, main: Storage | None, modules: Mapping[str, Checkpoint]) -> None:
        self.main, self.modules = main, modules

    def _place(self, tensor: TensorInfo) -> tuple[Storage, TensorInfo]:
        module = module_of(tensor.name, list(self.modules))
        if module is not None:
            return self.modules[module].storage, replace(tensor, name=tensor.name.removeprefix(f"{module}/"))
        assert self.main is not None
        return self.main, tensor

    def _parts(self) -> list[Storage]:
        return [*([self.main] if self.main is not None else []), *(part.storage for part in self.modules.values())]

    def read(self, tensor: TensorInfo, start: int, out: Bytes) -> None:
        """Fill ``out`` with the tensor's bytes from byte ``start`` on."""
        storage, place = self._place(tensor)
        storage.read(place, start, out)

    def view(self, tensor: TensorInfo) -> Bytes:
        """Return all of the tensor's bytes without a copy."""
        storage, place = self._place(tensor)
        return storage.view(place)

    def stamps(self) -> list[Stamp]:
        """Return the stamps of all files."""
        return [entry for part in self._parts() for entry in part.stamps()]

    def shared(self) -> dict[str, str]:
        """Return alias -> first name for tensors of the model that are the same memory."""
        return self.main.shared() if self.main is not None else {}

    def close(self) -> None:
        """Release files."""
        for part in self._parts():
            part.close()


def module_folders(folder: Path) -> dict[str, Path]:
    """Return the weight file of every module in a subfolder, by that subfolder's name; none without a modules.json.

    Raises:
        InputError: the list is not readable, or leads out of the folder.
    """
    path = folder / LIST
    if not path.is_file():
        return {}
    found: dict[str, Path] = {}
    for entry in _entries(path):
        name = entry.get("path")
        if not isinstance(name, str) or name.startswith("/") or any(part in ("..", ".") for part in name.split("/")):
            raise InputError(f"{path}: module path {name!r} leads out of the folder; restore the file")
        if name:
            found |= _weights_below(folder, name.strip("/"), _DEPTH)
    return found


def _entries(path: Path) -> list[dict[str, Any]]:
    if regular_size(path) > 1 << 20:
        raise InputError(f"{path}: is too large for a list of modules; restore the file")
    try:
        value: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); restore the file") from None
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in cast(list[Any], value)):
        raise InputError(f"{path}: is not a list of modules; restore the file")
    return cast(list[dict[str, Any]], value)


def _weights_below(root: Path, name: str, depth: int) -> dict[str, Path]:
    folder = root / name
    if folder.is_symlink() or not folder.is_dir() or not depth:
        return {}
    files = [folder / file for file in _WEIGHTS if (folder / file).is_file()]
    found = {name: files[0]} if files else {}
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        found |= _weights_below(root, f"{name}/{inner.name}", depth - 1)
    return found


def joined(main: Checkpoint | None, modules: Mapping[str, Checkpoint]) -> tuple[dict[str, TensorInfo], Storage]:
    """Return the tensors of a model and its modules, and where their bytes are."""
    tensors = dict(main.tensors) if main is not None else {}
    for module, part in modules.items():
        named = {f"{module}/{name}": info for name, info in part.tensors.items()}
        tensors |= {name: replace(info, name=name) for name, info in named.items()}
    return tensors, JoinedStorage(main.storage if main is not None else None, modules)


def module_of(name: str, modules: Sequence[str]) -> str | None:
    """Return the module that a tensor belongs to; None: to the model at the folder's top."""
    return max((module for module in modules if name.startswith(f"{module}/")), key=len, default=None)
