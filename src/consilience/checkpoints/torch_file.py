"""Torch ``.pt`` / ``.bin`` files, always with ``weights_only``: pickled code is never run.

Needs the extra ``[torch]``. Files are memory-mapped by torch where their format allows it.
"""

import importlib
import pickle
from pathlib import Path
from typing import Any, cast

import numpy as np

from consilience.checkpoints.checkpoint import Bytes, TensorInfo
from consilience.checkpoints.dtypes import DTYPES
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
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return cast(Bytes, flat.view(torch.uint8).numpy()) if flat.numel() else np.empty(0, np.uint8)


def torch_info(name: str, tensor: Any, where: str) -> TensorInfo:
    """Describe a torch tensor."""
    code = _TORCH_DTYPES.get(str(tensor.dtype))
    if code is None:
        raise InputError(f"{where}: tensor {name!r}: dtype {tensor.dtype} is not one this version reads; convert it")
    return TensorInfo(name, DTYPES[code], tuple(int(n) for n in tensor.shape))


def _load(path: Path) -> Any:
    torch = import_torch(f"{path}: reading a torch file")
    for mmap in (True, False):  # the legacy (not zip) format cannot be mapped
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError:
            raise InputError(
                f"{path}: holds pickled objects other than tensors, which could run code; save its state dict as safetensors"
            ) from None
        except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if not mmap:
                first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise InputError(f"{path}: not a readable torch file ({first[:160]}); download it again") from None
    raise AssertionError("unreachable")


def read_torch_file(path: Path) -> tuple[dict[str, TensorInfo], dict[str, Bytes], dict[str, str]]:
    """Return the tensors of a torch file, a byte view of each, and ties read from shared storage (alias -> name).

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
    tensors = {name: torch_info(name, tensor, str(path)) for name, tensor in state.items()}
    arrays = {name: tensor_bytes(tensor) for name, tensor in state.items()}
    seen: dict[tuple[int, tuple[int, ...], int], str] = {}
    ties: dict[str, str] = {}
    for name, tensor in state.items():
        key = (tensor.untyped_storage().data_ptr(), tuple(tensor.shape), tensor.storage_offset())
        if tensor.numel() and key in seen:
            ties[name] = seen[key]
        seen.setdefault(key, name)
    return tensors, arrays, ties
