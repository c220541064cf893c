"""Torch ``.pt`` / ``.bin`` files, always with ``weights_only``: pickled code is never run.

Needs the extra ``[torch]``. Files are memory-mapped by torch where their format allows it.
"""

import importlib
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any, cast

import numpy as np

from consilience.checkpoints.checkpoint import Bytes, TensorInfo
from consilience.checkpoints.dtypes import DTYPES
from consilience.checkpoints.files import mistaken, regular_size
from consilience.errors import InputError

#: Keys under which training scripts nest the state dict.
_NESTED = ("state_dict", "model", "model_state_dict", "module")

_TORCH_DTYPES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
    "torch.complex64": "C64",
}


def import_torch(purpose: str) -> Any:
    """Import torch, or say in one line which extra brings it."""
    try:
        return importlib.import_module("torch")
    except ImportError:
        raise InputError(f"{purpose} needs torch; install it with: pip install 'consilience[torch]'") from None


def tensor_bytes(tensor: Any) -> Bytes:
    """Return a flat byte view of a torch tensor (copied only when it is not contiguous or not on the CPU)."""
    torch = import_torch("reading a torch tensor")
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return cast(Bytes, flat.view(torch.uint8).numpy()) if flat.numel() else np.empty(0, np.uint8)


def as_tensor(raw: Bytes, info: TensorInfo, where: str) -> Any:
    """Return a stored tensor's bytes as a torch tensor, without a copy.

    Raises:
        InputError: its dtype is not one that is read.
    """
    torch = import_torch("reading a torch tensor")
    name = next((name for name, code in _TORCH_DTYPES.items() if code == info.dtype.name), None)
    if name is None:
        raise InputError(f"{where}: tensor {info.name!r}: dtype {info.dtype.name} is not one this reads; convert it")
    kind = getattr(torch, name.removeprefix("torch."))
    return torch.from_numpy(raw).view(kind).reshape(info.shape) if raw.size else torch.empty(info.shape, dtype=kind)


def torch_info(name: str, tensor: Any, where: str, file: int = 0) -> TensorInfo:
    """Describe a torch tensor.

    Raises:
        InputError: its dtype is not one that is read, or it is not a plain array of its own elements.
    """
    code = _TORCH_DTYPES.get(str(tensor.dtype))
    if code is None:
        raise InputError(f"{where}: tensor {name!r}: dtype {tensor.dtype} is not one this version reads; convert it")
    if str(tensor.layout) != "torch.strided" or tensor.is_meta:
        kind = "meta" if tensor.is_meta else str(tensor.layout).removeprefix("torch.")
        raise InputError(f"{where}: tensor {name!r} is a {kind} tensor; save it as a dense one")
    return TensorInfo(name, DTYPES[code], tuple(int(n) for n in tensor.shape), file)


def _refuse_compressed(path: Path) -> None:
    """Refuse zip members that unpack to more than they take: torch never writes any, a bomb is made of them."""
    regular_size(path)
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            packed = [m.filename for m in archive.infolist() if m.compress_type != zipfile.ZIP_STORED]
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise InputError(f"{path}: not a readable torch file ({error}); download it again") from None
    if packed:
        raise InputError(f"{path}: member {packed[0]!r} is compressed, which torch never does; save it again")


def _load(path: Path) -> Any:
    regular_size(path)
    with open(path, "rb") as file:
        known = mistaken(file.read(256))
    if known is not None:
        raise InputError(f"{path}: {known}")
    torch = import_torch(f"{path}: reading a torch file")
    _refuse_compressed(path)
    for mmap in (True, False):  # the legacy (not zip) format cannot be mapped
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about how the file was written; the user is told in one line
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError:
            raise InputError(
                f"{path}: holds pickled objects other than tensors, which could run code; save its state dict as "
                "safetensors"
            ) from None
        except Exception as error:  # a malformed pickle can make torch raise anything
            if not mmap:
                first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise InputError(f"{path}: not a readable torch file ({first[:160]}); download it again") from None
    raise AssertionError("unreachable")


def _refuse_expanded(name: str, tensor: Any, where: str) -> None:
    """Refuse a view that is larger than what it views: a few bytes could ask for all memory."""
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise InputError(f"{where}: tensor {name!r} is an expanded view of fewer elements; save it contiguous")


def read_torch_file(path: Path, file: int = 0) -> tuple[dict[str, TensorInfo], dict[str, Bytes]]:
    """Return the tensors of a torch file and a byte view of each; tensors that share memory stay separate names.

    Raises:
        InputError: the file is unreadable, pickles anything but tensors, or is not a flat state dict.
    """
    value = _load(path)
    if isinstance(value, dict):
        nested = [key for key in _NESTED if isinstance(cast(dict[Any, Any], value).get(key), dict)]
        value = cast(dict[Any, Any], value)[nested[0]] if nested else value
    torch = import_torch("reading a torch file")
    if not isinstance(value, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in cast(dict[Any, Any], value).items()
    ):
        raise InputError(f"{path}: not a flat state dict of named tensors; save model.state_dict() instead")
    state = cast(dict[str, Any], value)
    tensors: dict[str, TensorInfo] = {}
    for name, tensor in state.items():
        tensors[name] = torch_info(name, tensor, str(path), file)
        _refuse_expanded(name, tensor, str(path))
    return tensors, {name: tensor_bytes(tensor) for name, tensor in state.items()}
