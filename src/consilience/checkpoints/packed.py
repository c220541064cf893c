"""Weights that a quantiser packed: which tensors store which weight, in which format.

A packed weight is several tensors: integers or 8-bit floats, and beside them scales, zero points, shapes. Only together
are they a weight, so none of them is merged, converted or dropped alone. They are known by their parts (``FORMATS``),
by what config.json says of the model, and, where neither is known, by integers beside a scale.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

from consilience.checkpoints.checkpoint import Checkpoint, TensorInfo
from consilience.checkpoints.dtypes import DType

#: Where config.json says how a model is quantised.
CONFIG_KEYS = ("quantization_config", "compression_config")
#: Where ModelOpt says it again, beside config.json.
QUANTIZATION_FILE = "hf_quant_config.json"
_NESTED = ("text_config", "llm_config", "language_config", "thinker_config", "vision_config")
_UNQUANTISED = "pass the unquantised model"
_TRANSFORMERS = (
    "pass the unquantised model, or what transformers writes of it: "
    "from_pretrained(..., quantization_config={config}), then save_pretrained(..., save_original_format=False)"
)
_DEQUANTIZE = (
    "pass the unquantised model, or what transformers writes of it: from_pretrained, then dequantize() before any "
    "forward pass, then save_pretrained"
)


@dataclass(frozen=True)
class Format:
    """How one quantiser lays a weight out.

    A tensor whose name has one of the ``endings`` gives it away. The rest of that name is ``{s}``, its module ``{m}``
    and its last part ``{p}``: of these are made ``weight``, the name that the weight has unquantised, and ``parts``,
    the names (or, with ``*``, beginnings of names) of the tensors that hold it. A plain model may have such names
    too: one of the parts must hold narrow integers or 8-bit floats (``numbers``).
    """

    name: str
    endings: tuple[str, ...]
    weight: str
    parts: tuple[str, ...]
    advice: str = _UNQUANTISED
    numbers: bool = True


_MX = _TRANSFORMERS.format(config="Mxfp4Config(dequantize=True)")
_FP8 = _TRANSFORMERS.format(config="FineGrainedFP8Config(dequantize=True)")
_MODULE, _WEIGHT = ("{s}.*",), "{s}.weight"
_SCALED = (_WEIGHT, "{s}.weight_*", "{s}.input_*", "{s}.output_*")

#: In the order in which they are tried.
FORMATS = (
    Format("MXFP4", ("_blocks",), "{s}", ("{s}_blocks", "{s}_scales"), _MX),
    Format("torchao", ("_qdata",), "{m}.{p}", ("{s}_*",)),
    Format("HQQ", (".W_q",), _WEIGHT, _MODULE),
    Format("quanto", ("._data._data", "._data"), "{s}", ("{s}._*", "{m}.input_scale", "{m}.output_scale")),
    Format("GPTQ or AWQ", (".qweight",), _WEIGHT, _MODULE),
    Format("bitsandbytes 4-bit", (".absmax",), "{s}", ("{s}", "{s}.*"), _DEQUANTIZE),
    Format("bitsandbytes 8-bit", (".SCB",), _WEIGHT, (_WEIGHT, "{s}.SCB", "{s}.weight_format"), _DEQUANTIZE),
    Format("FP8 with block scales", ("_scale_inv",), "{s}",
           ("{s}", "{s}_scale_inv", "{m}.activation_scale", "{m}.input_scale"), _FP8),
    Format("NVFP4", (".weight_global_scale", ".weight_scale_2"), _WEIGHT, _SCALED),
    Format("compressed-tensors", (".weight_packed",), _WEIGHT, _SCALED),
    Format("EETQ", (".weight_scales",), _WEIGHT, (_WEIGHT, "{s}.weight_scales")),
    Format("weights beside weight_scale", (".weight_scale",), _WEIGHT, _SCALED, numbers=False),
    Format("Quark", (".weight_quantizer.scale",), _WEIGHT,
           (_WEIGHT, "{s}.weight_quantizer.*", "{s}.input_quantizer.*", "{s}.output_quantizer.*")),
    Format("AQLM", (".codebooks",), _WEIGHT, ("{s}.codes", "{s}.codebooks", "{s}.scales")),
    Format("VPTQ", (".centroids.weight",), _WEIGHT, _MODULE),
    Format("ExLlamaV2", (".q_weight",), _WEIGHT, ("{s}.q_*",)),
    Format("ExLlamaV3", (".trellis",), _WEIGHT, _MODULE),
    Format("HIGGS", (".tables2",), _WEIGHT, _MODULE),
    Format("SpQR", (".dense_weights",), _WEIGHT, _MODULE),
    Format("MLX", (".biases",), _WEIGHT, (_WEIGHT, "{s}.scales", "{s}.biases")),
)  # fmt: skip
_ENDINGS = tuple(ending for layout in FORMATS for ending in layout.endings)
#: Formats whose tensors leave open which quantiser wrote them.
_SHARED = ("GPTQ or AWQ", "weights beside weight_scale", "compressed-tensors")
#: What config.json's quant_method is called; others are called as they are written there.
_METHODS = {
    "gptq": "GPTQ", "awq": "AWQ", "mxfp4": "MXFP4", "hqq": "HQQ", "fp8": "FP8", "aqlm": "AQLM", "bitnet": "BitNet",
    "compressed-tensors": "compressed-tensors", "fbgemm_fp8": "FBGEMM FP8", "modelopt": "ModelOpt",
    "auto-round": "AutoRound", "higgs": "HIGGS", "quark": "Quark", "eetq": "EETQ", "vptq": "VPTQ", "exl2": "ExLlamaV2",
    "exl3": "ExLlamaV3",
}  # fmt: skip
#: Integers of these types may be packed weights: wider ones, and booleans, are indices and masks.
_NARROW = ("U8", "I8", "U16", "I16", "U32", "I32")


@dataclass(frozen=True)
class PackedWeight:
    """A weight that is stored packed: its name unquantised, the format, the tensors that hold it."""

    name: str
    format: str
    parts: tuple[str, ...]
    advice: str


@dataclass(frozen=True)
class Packing:
    """A checkpoint's packed weights, by the names they would have unquantised."""

    weights: dict[str, PackedWeight] = field(default_factory=dict[str, PackedWeight])

    @cached_property
    def parts(self) -> dict[str, PackedWeight]:
        """The packed weight that each tensor is a part of."""
        return {part: weight for weight in self.weights.values() for part in weight.parts}

    def get(self, name: str) -> PackedWeight | None:
        """Return the packed weight that ``name`` is, or is a part of."""
        return self.weights.get(name) or self.parts.get(name)

    @property
    def formats(self) -> str:
        """The names of the formats, as a sentence says them."""
        return " and ".join(sorted({weight.format for weight in self.weights.values()}))


def quantization_of(config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what config.json says of quantisation (its text model's config included); None: nothing."""
    config = config or {}
    nested = [config[key] for key in _NESTED if isinstance(config.get(key), dict)]
    for part in [config, *nested]:
        for key in CONFIG_KEYS:
            if isinstance(part.get(key), dict):
                return cast(dict[str, Any], part[key])
    return None


def quantises_when_run(config: Mapping[str, Any]) -> bool:
    """Whether the model quantises plain weights at every forward pass, as BitNet's master weights are meant to be."""
    said = quantization_of(config) or {}
    return said.get("quant_method") == "bitnet" and said.get("quantization_mode") == "online"


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config that says nothing of quantisation."""
    plain = {key: value for key, value in config.items() if key not in CONFIG_KEYS}
    return {k: without_quantization(v) if k in _NESTED and isinstance(v, dict) else v for k, v in plain.items()}


def _present(names: list[str], template: str, words: Mapping[str, str]) -> list[str]:
    """Return the tensors that a template names, among sorted ``names``; a bias is never packed with its weight."""
    name = template.format(**words)
    beginning = name.removesuffix("*")
    found: list[str] = []
    for position in range(bisect_left(names, beginning), len(names)):
        if not names[position].startswith(beginning) or (name == beginning != names[position]):
            break
        found.append(names[position])
    return [one for one in found if one.rpartition(".")[2] != "bias"]


def is_packed_type(dtype: DType) -> bool:
    """Whether packed numbers may have this type."""
    return dtype.name in _NARROW or (dtype.floating and not dtype.mergeable)


def _is_numbers(tensor: TensorInfo) -> bool:
    """Whether a tensor's type and shape may be those of packed numbers."""
    return is_packed_type(tensor.dtype) and (len(tensor.shape) > 1 or tensor.dtype.floating)


def _scales_beside(names: list[str], name: str) -> list[str]:
    """Return the scales beside a tensor: in its module, or named after it."""
    module = name.rpartition(".")[0]
    near = {*(_present(names, "{m}.*", {"m": module}) if module else ()), *_present(names, "{w}*", {"w": name})}
    return sorted(one for one in near if one != name and "scale" in one.rpartition(".")[2].lower())


def packing_of(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any] | None = None) -> Packing:
    """Return the packed weights among named tensors, from headers and config alone.

    Args:
        tensors: the checkpoint's tensors.
        config: its config.json, which names the format where the tensors leave it open.
    """
    said = quantization_of(config)
    method = str(said.get("quant_method") or "") if said else ""
    names = sorted(tensors)
    weights: dict[str, PackedWeight] = {}
    taken: set[str] = set()

    def add(weight: PackedWeight) -> None:
        weights[weight.name] = weight
        taken.update(weight.parts)

    marked = [name for name in names if name.endswith(_ENDINGS)]
    for layout in FORMATS if marked else ():
        for name in marked:
            if name not in taken and (weight := _laid_out(layout, name, names, tensors, method)) is not None:
                add(weight)
    for name in names:
        if name not in taken and _is_numbers(tensors[name]):
            beside = [part for part in _scales_beside(names, name) if part not in taken]
            if beside or said or tensors[name].dtype.floating:
                add(_unknown(tensors, name, beside, method))
    return Packing(weights)


def _laid_out(
    layout: Format, name: str, names: list[str], tensors: Mapping[str, TensorInfo], method: str
) -> PackedWeight | None:
    """Return the packed weight that a tensor gives away, if it does so in this format."""
    ending = next((ending for ending in layout.endings if name.endswith(ending)), None)
    if ending is None:
        return None
    stem = name.removesuffix(ending)
    module, _, last = stem.rpartition(".")
    words = {"s": stem, "m": module, "p": last.removeprefix("_")}
    parts = tuple(dict.fromkeys(part for one in layout.parts for part in _present(names, one, words)))
    if layout.numbers and not any(is_packed_type(tensors[part].dtype) for part in parts):
        return None
    said = _METHODS.get(method, method)
    label = said if layout.name in _SHARED and said else layout.name
    return PackedWeight(layout.weight.format(**words), label, parts, layout.advice)


def _unknown(tensors: Mapping[str, TensorInfo], name: str, beside: list[str], method: str) -> PackedWeight:
    """Return the packed weight that integers or 8-bit floats are, of a format that the table does not have."""
    kind = "8-bit floats" if tensors[name].dtype.floating else "packed integers of an unknown format"
    module, _, last = name.rpartition(".")
    weight = name if last == "weight" or not module or f"{module}.weight" in tensors else f"{module}.weight"
    advice = _FP8 if method == "fp8" else _UNQUANTISED
    return PackedWeight(weight, _METHODS.get(method, method) or kind, (name, *beside), advice)


def packing(checkpoint: Checkpoint | None) -> Packing:
    """Return a checkpoint's packed weights."""
    return Packing() if checkpoint is None else packing_of(checkpoint.tensors, checkpoint.config)
