"""Open what a user named: a Hugging Face folder, a safetensors or torch file."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from consilience.checkpoints.checkpoint import Bytes, Checkpoint, FileStorage, MemoryStorage, TensorInfo, from_entries
from consilience.checkpoints.json_files import read_object
from consilience.checkpoints.safetensors_file import read_header
from consilience.errors import InputError, nearest

SAFETENSORS_INDEX = "model.safetensors.index.json"
TORCH_INDEX = "pytorch_model.bin.index.json"
TORCH_SUFFIXES = (".bin", ".pt", ".pth")
WEIGHT_SUFFIXES = (".safetensors", *TORCH_SUFFIXES, ".gguf", ".h5", ".msgpack", ".onnx")


def safe_name(name: Any, where: str) -> str:
    """Return ``name`` if it can only be a file inside its own folder; a stranger's index must not lead out of it."""
    if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\\0"):
        raise InputError(f"{where}: file name {name!r} leads out of the checkpoint's folder; restore the index")
    return name


def index_files(index: Path) -> dict[str, list[str]]:
    """Return file -> tensor names from a sharded checkpoint's index."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: has no weight_map; restore the index")
    files: dict[str, list[str]] = {}
    for tensor, file in cast(dict[str, Any], weight_map).items():
        files.setdefault(safe_name(file, f"{index}: tensor {tensor!r}"), []).append(tensor)
    return files


def _check_index(index: Path, file: str, listed: Iterable[str], present: Iterable[str]) -> None:
    listed, present = set(listed), set(present)
    if listed - present:
        name = min(listed - present)
        raise InputError(f"{index}: tensor {name!r} is not in {file}; restore the index or the shard")
    if present - listed:
        name = min(present - listed)
        raise InputError(f"{index}: {file} holds tensor {name!r}, which the index does not list; restore the index")


def _open_safetensors(label: str, folder: Path | None, files: list[Path]) -> Checkpoint:
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for number, file in enumerate(files):
        entries, metadata = read_header(file)
        twice = tensors.keys() & entries.keys()
        if twice:
            raise InputError(f"{file}: tensor {min(twice)!r} is also in another shard; restore the checkpoint")
        tensors |= from_entries(entries, number)
    return Checkpoint(label, tensors, FileStorage(files), files[0], folder, None, metadata)


def _open_torch(label: str, folder: Path | None, files: list[Path]) -> Checkpoint:
    from consilience.checkpoints.torch_file import read_torch_file

    tensors: dict[str, TensorInfo] = {}
    arrays: dict[str, Bytes] = {}
    identity: list[tuple[str, int, int]] = []
    for file in files:
        infos, views, ties = read_torch_file(file)
        tensors |= {name: info for name, info in infos.items() if name not in ties}
        arrays |= views
        stat = file.stat()
        identity.append((str(file), stat.st_size, stat.st_mtime_ns))
    return Checkpoint(label, tensors, MemoryStorage(arrays, identity), files[0], folder)


def _weight_files(folder: Path) -> tuple[list[Path], Path | None]:
    """Return a model folder's weight files and their index, if it has one."""
    single = folder / "model.safetensors"
    for index, suffix in ((folder / SAFETENSORS_INDEX, ".safetensors"), (folder / TORCH_INDEX, ".bin")):
        if index.exists():
            names = sorted(index_files(index))
            if suffix == ".safetensors" and single.exists() and single.name not in names:
                raise InputError(
                    f"{folder}: holds both model.safetensors and {index.name}, and loaders disagree on which counts; remove one"
                )
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise InputError(f"{index}: shard {missing[0]} is missing from {folder}; download it again")
            return [folder / name for name in names], index
    found = [p for p in sorted(folder.iterdir()) if p.suffix == ".safetensors" and not p.name.startswith("adapter_")]
    if not found:
        names = {"pytorch_model.bin"} | {p.name for p in folder.iterdir() if p.suffix in (".pt", ".pth")}
        found = [folder / name for name in sorted(names) if (folder / name).is_file()]
    if not found:
        raise InputError(f"{folder}: holds no model weights (no .safetensors, .bin, .pt or .pth file)")
    if single in found:
        return [single], None
    if len(found) > 1:
        raise InputError(
            f"{folder}: holds {len(found)} weight files and no {SAFETENSORS_INDEX}; name one file, or add the index"
        )
    return found, None


def open_checkpoint(path: str | Path, label: str | None = None) -> Checkpoint:
    """Open a model folder or weight file from its headers; no tensor is read.

    Raises:
        InputError: the path does not exist, or what is there is not a readable checkpoint.
    """
    path = Path(path)
    label = label or str(path)
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise InputError(f"{path}: no such file or folder{nearest(path.name, siblings)}")
    if path.is_file():
        if path.suffix == ".safetensors":
            return _open_safetensors(label, None, [path])
        if path.suffix in TORCH_SUFFIXES:
            return _open_torch(label, None, [path])
        raise InputError(f"{path}: not a weight file this version reads (.safetensors, .bin, .pt, .pth)")
    files, index = _weight_files(path)
    opened = _open_safetensors if files[0].suffix == ".safetensors" else _open_torch
    checkpoint = opened(label, path, files)
    if index is not None and files[0].suffix == ".safetensors":
        for number, file in enumerate(files):
            present = (t.name for t in checkpoint.tensors.values() if t.file == number)
            _check_index(index, file.name, index_files(index)[file.name], present)
    config = path / "config.json"
    loaded = read_object(config) if config.exists() else None
    return Checkpoint(label, checkpoint.tensors, checkpoint.storage, path, path, loaded, checkpoint.metadata)
