"""State dicts in memory as models: numpy arrays or torch tensors by name."""

import copy
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from consilience.checkpoints.checkpoint import Bytes, Checkpoint, MemoryStorage, TensorInfo
from consilience.checkpoints.dtypes import ALIASES, DTYPES, DType
from consilience.errors import InputError
from consilience.experts.model import Model

StateDict = Mapping[str, Any]

_NUMPY = {"bool": "BOOL", "complex64": "C64"} | {
    f"{kind}int{bits}": f"{kind.upper()}{bits}" if kind else f"I{bits}"
    for kind in ("", "u")
    for bits in (8, 16, 32, 64)
}


def is_torch(value: Any) -> bool:
    """Whether ``value`` is a torch tensor (without importing torch)."""
    return type(value).__module__.partition(".")[0] == "torch"


def _numpy_info(name: str, array: Any, where: str) -> TensorInfo:
    masked = int(np.ma.count_masked(array)) if isinstance(array, np.ma.MaskedArray) else 0
    if masked:
        raise InputError(
            f"{where}: tensor {name!r}: {masked} of its {array.size} values are masked and so have nothing to merge; "
            "fill them in: array.filled(0.0)"
        )
    code = ALIASES.get(array.dtype.name) or _NUMPY.get(array.dtype.name)
    if code is None:
        raise InputError(f"{where}: tensor {name!r}: dtype {array.dtype} is not one this version merges; convert it")
    return TensorInfo(name, DTYPES[code], tuple(array.shape))


def _bytes(array: Any) -> Bytes:
    native = array.dtype.newbyteorder("=")
    flat = np.ascontiguousarray(array, dtype=native).reshape(-1)
    return cast(Bytes, flat.view(np.uint8)) if flat.size else np.empty(0, np.uint8)


def from_state_dict(name: str, state: StateDict) -> Model:
    """Wrap a state dict; tensors are viewed, not copied, where they are contiguous, in native order and on the CPU.

    Raises:
        InputError: a value is not a numpy array or torch tensor, has a dtype that is not merged, or masked elements.
    """
    tensors: dict[str, TensorInfo] = {}
    arrays: dict[str, Bytes] = {}
    for key, value in cast(Mapping[Any, Any], state).items():
        if not isinstance(key, str):
            raise InputError(f"{name}: the key {key!r} is a {type(key).__name__}; a state dict has tensors by name")
        if is_torch(value):
            from consilience.checkpoints.torch_file import tensor_bytes, torch_info

            tensors[key], arrays[key] = torch_info(key, value, name), tensor_bytes(value)
        elif isinstance(value, np.ndarray):
            tensors[key], arrays[key] = _numpy_info(key, value, name), _bytes(cast(Any, value))
        else:
            raise InputError(f"{name}: {key!r} is a {type(value).__name__}, not a numpy array or torch tensor")
    return Model(name, name, Checkpoint(name, tensors, MemoryStorage(arrays)))


def state_of(model: Any) -> StateDict:
    """Return a state dict as it is, or that of a torch module."""
    return cast(StateDict, model) if isinstance(model, Mapping) else model.state_dict()


def into_module(module: Any, merged: dict[str, Any]) -> Any:
    """Return a copy of a torch module whose parameters and buffers are ``merged``, in the types these have.

    What the module ties stays tied, and what its state dict leaves out is as in the module.

    Raises:
        InputError: the module cannot be copied, or its state dict has what is neither a parameter nor a buffer.
    """
    try:
        result = copy.deepcopy(module)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"base: the module cannot be copied ({reason}); pass its state_dict()") from None
    places = dict(result.named_parameters(remove_duplicate=False)) | dict(result.named_buffers(remove_duplicate=False))
    strange = next((name for name in merged if name not in places), None)
    if strange is not None:
        raise InputError(f"base: {strange!r} is no parameter or buffer of the module; pass its state_dict()")
    for name, tensor in merged.items():
        places[name].data = tensor
    return result


def numpy_dtype(dtype: DType) -> Any:
    """Return the numpy dtype of a checkpoint dtype (bfloat16 from ml_dtypes)."""
    if dtype.name == "BF16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    names = {"F64": "float64", "F32": "float32", "F16": "float16"} | {code: name for name, code in _NUMPY.items()}
    return np.dtype(names[dtype.name])


def to_like(raw: Bytes, dtype: DType, shape: tuple[int, ...], like: Any) -> Any:
    """Return the bytes as an array of the same library as ``like``."""
    if is_torch(like):
        from consilience.checkpoints.dtypes import TORCH_NAMES
        from consilience.checkpoints.torch_file import import_torch

        torch = import_torch("returning torch tensors")
        kind = getattr(torch, TORCH_NAMES[dtype.name]) if dtype.mergeable else like.dtype
        value = torch.from_numpy(raw).view(kind).reshape(shape) if raw.size else torch.empty(shape, dtype=kind)
        return value.to(like.device)
    return raw.view(numpy_dtype(dtype)).reshape(shape)
