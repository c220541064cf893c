"""Checkpoints whose matrices are 8-bit floats with scales, read as floats.

What a file holds is told by config.json (``quant_method``), never guessed:

    fp8                 {weight}_scale_inv, one per block of weight_block_size, or one in all without blocks
    fbgemm_fp8          {module}.weight_scale, one per output channel
    compressed-tensors  {module}.weight_scale, if "float-quantized": one in all, per channel or per block_structure
    modelopt            {module}.weight_scale, one in all (quant_algo FP8)

Each multiplies the weight; scales of activations are for computing in 8 bits, and go. A checkpoint is read so as a
whole or not at all: one weight of another layout, a rotation, scales of a cache leave it as it is.
"""

from dataclasses import replace
from typing import Any, cast

from consilience.checkpoints.checkpoint import Checkpoint, TensorInfo
from consilience.checkpoints.dtypes import ALIASES, DTYPES, DType
from consilience.checkpoints.packed import PackedWeight, Packing, packing, quantization_of, without_quantization
from consilience.errors import InputError

_TYPES = ("F8_E4M3", "F8_E5M2")
#: Scales beside a weight that are those of activations.
_ACTIVATIONS = ("activation_scale", "input_scale", "output_scale", "input_scale_ub")
#: Scales of what attention keeps, which say that a model computes with 8-bit states too.
_CACHE = ("k_scale", "v_scale", "q_scale", "kv_scale")
#: Granularities: one scale in all, per row, or per block of so many rows and columns.
_Granularity = str | tuple[int, int]


def read_as_floats(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint in which each scaled 8-bit matrix is one tensor of floats; else the same one.

    Its tensors are of the type that config.json names (bfloat16 if none), which is what they are written as; their
    values are float32.

    Raises:
        InputError: a scale is missing, or of the wrong shape.
    """
    said = quantization_of(checkpoint.config)
    granularities = _granularities(said) if said else []
    weights = packing(checkpoint).weights if granularities else {}
    if not weights or not all(_is_scaled(checkpoint, weight) for weight in weights.values()):
        return checkpoint
    if any(name.rpartition(".")[2] in _CACHE for name in checkpoint.tensors):
        return checkpoint
    assert said is not None
    dtype = _own_type(checkpoint.config or {})
    decoded = {name: _decoded(checkpoint, name, said, granularities, dtype) for name in weights}
    parts = {part for weight in weights.values() for part in weight.parts}
    tensors = {n: decoded.get(n, info) for n, info in checkpoint.tensors.items() if n in decoded or n not in parts}
    formats = Packing(weights).formats
    kinds = ", ".join(sorted({checkpoint.tensors[name].dtype.name for name in weights}))
    note = (
        f"{len(weights)} weights are stored as {formats} ({kinds}) and read as floats, each times its scale; the "
        "output stores floats, without scales"
    )
    config = without_quantization(checkpoint.config or {})
    return replace(checkpoint, tensors=tensors, config=config, notes=(*checkpoint.notes, note))


def _own_type(config: dict[str, Any]) -> DType:
    nested = [cast(dict[str, Any], value) for value in config.values() if isinstance(value, dict)]
    named = [part.get(key) for part in (config, *nested) for key in ("dtype", "torch_dtype")]
    return DTYPES[next((ALIASES[name] for name in named if isinstance(name, str) and name in ALIASES), "BF16")]


def _granularities(said: dict[str, Any]) -> list[_Granularity]:
    """Return the granularities that a quantisation config allows; none: it is of no layout that is known here."""
    method, groups = said.get("quant_method"), said.get("config_groups")
    options: list[_Granularity | None] = []
    if method == "fp8":
        block = said.get("weight_block_size", (128, 128))
        options = ["tensor" if block is None else _block(block)]
    elif method == "fbgemm_fp8":
        options = ["channel"]
    elif method == "modelopt" and said.get("quant_algo") == "FP8":
        options = ["tensor"]
    elif method == "compressed-tensors" and said.get("format") == "float-quantized" and isinstance(groups, dict):
        options = [] if said.get("transform_config") else [*map(_of_group, cast(dict[str, Any], groups).values())]
    known = [option for option in options if option is not None]
    return known if len(known) == len(options) else []


def _block(value: Any) -> tuple[int, int] | None:
    """Return a block's rows and columns; None: these are none."""
    sides = cast(list[Any], value) if isinstance(value, list | tuple) else []
    fit = len(sides) == 2 and all(type(side) is int and side > 0 for side in sides)
    return (sides[0], sides[1]) if fit else None


def _of_group(group: Any) -> _Granularity | None:
    """Return the granularity of a group of compressed-tensors' config; None: it is of no known layout."""
    weights = cast(dict[str, Any], group).get("weights") if isinstance(group, dict) else None
    facts = cast(dict[str, Any], weights) if isinstance(weights, dict) else {}
    if facts.get("type") != "float" or facts.get("num_bits") != 8 or not facts.get("symmetric", True):
        return None
    strategy = facts.get("strategy")
    if strategy == "block":
        return _block(facts.get("block_structure"))
    return cast(str, strategy) if strategy in ("tensor", "channel") else None


def _scale_name(name: str, method: str) -> str:
    return f"{name}_scale_inv" if method == "fp8" else f"{name}_scale"


def _is_scaled(checkpoint: Checkpoint, weight: PackedWeight) -> bool:
    """Whether a packed weight is a matrix of 8-bit floats with nothing beside it but scales that are floats."""
    tensors, method = checkpoint.tensors, str((quantization_of(checkpoint.config) or {})["quant_method"])
    info, beside, module = tensors.get(weight.name), _scale_name(weight.name, method), weight.name.rpartition(".")[0]
    known = {weight.name, beside, *(f"{module}.{last}" for last in _ACTIVATIONS)}
    if not set(weight.parts) <= known or info is None or info.dtype.name not in _TYPES or len(info.shape) != 2:
        return False
    return beside not in tensors or tensors[beside].dtype.name in ("F32", "BF16", "F16")


def _decoded(
    checkpoint: Checkpoint, name: str, said: dict[str, Any], granularities: list[_Granularity], dtype: DType
) -> TensorInfo:
    from consilience.checkpoints.scaled_floats import ScaledFloats  # compiled code, which other checkpoints do without

    info, beside = checkpoint.tensors[name], _scale_name(name, str(said["quant_method"]))
    where = f"{checkpoint.label}: tensor {name!r} ({info.dtype.name}, {list(info.shape)})"
    scale = checkpoint.tensors.get(beside)
    if scale is None:
        raise InputError(f"{where}: its scale {beside!r} is missing; download or quantise the model again")
    wanted = [(_shapes(info.shape, granularity), granularity) for granularity in granularities]
    for shapes, granularity in wanted:
        if scale.shape in shapes:
            return replace(info, dtype=dtype, codec=ScaledFloats(info, scale, _sides(info.shape, granularity)))
    asked = " or ".join(f"{list(shapes[0])} ({_words(granularity)})" for shapes, granularity in wanted)
    raise InputError(
        f"{where}: its scale {beside!r} has shape {list(scale.shape)}, and config.json asks for {asked}; restore the "
        "config, or quantise the model again"
    )


def _shapes(shape: tuple[int, ...], granularity: _Granularity) -> list[tuple[int, ...]]:
    """Return the shapes that the scales of a matrix may have."""
    if granularity == "tensor":
        return [(), (1,), (1, 1)]
    height, width = _sides(shape, granularity)
    grid = (-(-shape[0] // height), -(-shape[1] // width))
    return [grid, (shape[0],)] if granularity == "channel" else [grid]


def _sides(shape: tuple[int, ...], granularity: _Granularity) -> tuple[int, int]:
    rows, columns = max(shape[0], 1), max(shape[1], 1)
    if isinstance(granularity, tuple):
        return min(granularity[0], rows), min(granularity[1], columns)
    return (1, columns) if granularity == "channel" else (rows, columns)


def _words(granularity: _Granularity) -> str:
    if isinstance(granularity, tuple):
        return f"blocks of {granularity[0]} x {granularity[1]}"
    return "one scale" if granularity == "tensor" else "one per row"
