"""Open what a user named: a Hugging Face folder, a safetensors or torch file."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from consilience.checkpoints.checkpoint import Bytes, Checkpoint, FileStorage, MemoryStorage, TensorInfo, from_entries
from consilience.checkpoints.files import Stamp, exists, path_of, regular_size, stamp, why_absent
from consilience.checkpoints.json_files import read_object
from consilience.checkpoints.modules import joined, module_folders
from consilience.checkpoints.safetensors_file import read_header
from consilience.errors import InputError

#: What an empty tensor is, where its model has values.
EMPTY = (
    "it was saved on one of several machines or cards, each with a part (DeepSpeed ZeRO-3, FSDP); save it gathered "
    "(stage3_gather_16bit_weights_on_model_save), or build it with zero_to_fp32.py"
)
SAFETENSORS_INDEX = "model.safetensors.index.json"
TORCH_INDEX = "pytorch_model.bin.index.json"
TORCH_SUFFIXES = (".bin", ".pt", ".pth")
WEIGHT_SUFFIXES = (".safetensors", *TORCH_SUFFIXES, ".gguf", ".h5", ".msgpack", ".onnx")


def safe_name(name: Any, where: str) -> str:
    """Return ``name`` if it can only be a file inside its own folder; a stranger's index must not lead out of it."""
    if not isinstance(name, str):
        raise InputError(f"{where}: {name!r} is no file name; restore the index")
    if name in ("", ".", "..") or any(c in name for c in "/\\\0"):
        raise InputError(f"{where}: file name {name!r} leads out of the checkpoint's folder; restore the index")
    return name


def index_files(index: Path) -> dict[str, list[str]]:
    """Return file -> tensor names from a sharded checkpoint's index."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: has no weight_map; restore the index")
    suffix = ".bin" if index.name == TORCH_INDEX else ".safetensors"
    files: dict[str, list[str]] = {}
    for tensor, file in cast(dict[str, Any], weight_map).items():
        name = safe_name(file, f"{index}: tensor {tensor!r}")
        if not name.endswith(suffix):
            raise InputError(f"{index}: tensor {tensor!r}: file {name!r} is not a {suffix} file; restore the index")
        files.setdefault(name, []).append(tensor)
    return files


def _check_index(index: Path, file: str, listed: Iterable[str], present: Iterable[str]) -> None:
    listed, present = set(listed), set(present)
    if listed - present:
        name = min(listed - present)
        raise InputError(f"{index}: tensor {name!r} is not in {file}; restore the index or the shard")
    if present - listed:
        name = min(present - listed)
        raise InputError(f"{index}: {file} holds tensor {name!r}, which the index does not list; restore the index")


def _refuse_twice(file: Path, known: dict[str, Any], found: dict[str, Any]) -> None:
    twice = known.keys() & found.keys()
    if twice:
        raise InputError(f"{file}: tensor {min(twice)!r} is also in another shard; restore the checkpoint")


def _open_safetensors(label: str, folder: Path | None, files: list[Path]) -> Checkpoint:
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for file in files:
        regular_size(file)
    storage = FileStorage(files)  # before the headers are read, so that a file that is replaced meanwhile is noticed
    for number, file in enumerate(files):
        entries, own = read_header(file)
        metadata |= own
        _refuse_twice(file, tensors, entries)
        tensors |= from_entries(entries, number)
    return Checkpoint(label, tensors, storage, files[0], folder, None, metadata)


def _open_torch(label: str, folder: Path | None, files: list[Path]) -> Checkpoint:
    from consilience.checkpoints.torch_file import read_torch_file

    tensors: dict[str, TensorInfo] = {}
    arrays: dict[str, Bytes] = {}
    stamps: list[Stamp] = []
    for number, file in enumerate(files):
        regular_size(file)
        before = stamp(file)
        infos, views = read_torch_file(file, number)
        _refuse_twice(file, tensors, infos)
        tensors |= infos
        arrays |= views
        stamps.append(before)
    return Checkpoint(label, tensors, MemoryStorage(arrays, stamps), files[0], folder)


def _sharded(folder: Path, index: Path) -> tuple[list[Path], dict[str, list[str]]]:
    """Return the files an index names, and which tensors it says each holds."""
    shards = index_files(index)
    missing = [name for name in sorted(shards) if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{index}: shard {missing[0]} is missing from {folder}; download it again")
    return [folder / name for name in sorted(shards)], shards


def holds_model(folder: Path) -> bool:
    """Whether a folder holds a model's weights under the names they go by, whatever else is there."""
    names = ("model.safetensors", SAFETENSORS_INDEX, "pytorch_model.bin", TORCH_INDEX)
    return any((folder / name).is_file() for name in names)


def _weight_files(folder: Path) -> tuple[list[Path], Path | None]:
    """Return a model folder's weight files, or its index where it is sharded; safetensors go before pickles."""
    single, index, torch_index = (folder / n for n in ("model.safetensors", SAFETENSORS_INDEX, TORCH_INDEX))
    if index.exists():
        if single.exists() and single.name not in index_files(index):
            raise InputError(
                f"{folder}: holds both model.safetensors and {index.name}, and loaders disagree on which counts; "
                "remove one"
            )
        return [], index
    if single.exists():
        return [single], None
    if torch_index.exists():
        return [], torch_index
    entries = sorted(folder.iterdir())
    found = [p for p in entries if p.suffix == ".safetensors" and not p.name.startswith("adapter_")]
    found = found or [p for p in entries if p.name == "pytorch_model.bin" and p.is_file()]
    found = found or [p for p in entries if p.suffix in (".pt", ".pth") and p.is_file()]
    if not found:
        raise InputError(
            f"{folder}: holds no model weights (no .safetensors, pytorch_model.bin, .pt or .pth file); "
            "name a model's folder or file"
        )
    if len(found) > 1:
        raise InputError(
            f"{folder}: holds {len(found)} weight files and no {SAFETENSORS_INDEX}; name one file, or add the index"
        )
    return found, None


def _open_folder(label: str, folder: Path) -> Checkpoint:
    """Open a model's folder, the weights of its further modules included."""
    modules = {name: open_checkpoint(file, label) for name, file in module_folders(folder).items()}
    main = None if modules and not _has_weights(folder) else _open_model(label, folder)
    if not modules:
        return cast(Checkpoint, main)
    tensors, storage = joined(main, modules)
    config, metadata = (main.config, main.metadata) if main is not None else (None, {"format": "pt"})
    return Checkpoint(label, tensors, storage, folder, folder, config, metadata, tuple(modules))


def _has_weights(folder: Path) -> bool:
    """Whether there are weights at a folder's top, not in its modules' folders alone."""
    return any(path.name.endswith((*WEIGHT_SUFFIXES, ".index.json")) for path in folder.iterdir())


def _open_model(label: str, folder: Path) -> Checkpoint:
    files, index = _weight_files(folder)
    shards: dict[str, list[str]] = {}
    if index is not None:
        files, shards = _sharded(folder, index)
    opened = _open_safetensors if files[0].suffix == ".safetensors" else _open_torch
    checkpoint = opened(label, folder, files)
    for number, file in enumerate(files if index is not None else []):
        present = (t.name for t in checkpoint.tensors.values() if t.file == number)
        _check_index(cast(Path, index), file.name, shards[file.name], present)
    config = folder / "config.json"
    loaded = read_object(config) if config.exists() or config.is_symlink() else None
    return Checkpoint(label, checkpoint.tensors, checkpoint.storage, folder, folder, loaded, checkpoint.metadata)


def open_checkpoint(path: str | Path, label: str | None = None) -> Checkpoint:
    """Open a model folder or weight file from its headers; no tensor is read.

    Raises:
        InputError: the path does not exist, or what is there is not a readable checkpoint.
    """
    path = path_of(path, "path")
    label = label or str(path)
    if not exists(path):
        raise InputError(f"{path}: {why_absent(path)}")
    if path.is_dir():
        try:
            checkpoint = _open_folder(label, path)
        except OSError as error:
            raise InputError(f"{error.filename or path}: cannot be read ({error.strerror}); restore it") from None
    elif path.suffix == ".safetensors":
        checkpoint = _open_safetensors(label, None, [path])
    elif path.suffix in TORCH_SUFFIXES:
        checkpoint = _open_torch(label, None, [path])
    else:
        raise InputError(f"{path}: not a weight file this version reads (.safetensors, .bin, .pt, .pth); convert it")
    if not checkpoint.tensors:
        raise InputError(f"{path}: holds no tensors; restore it, or name another model")
    return checkpoint
