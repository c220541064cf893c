"""PEFT LoRA adapters: pairs of factors on named tensors of a base, plus tensors saved whole.

A LoRA pair adds ``scale * B @ A`` to a weight; ``scale = alpha / r`` (``alpha / sqrt(r)`` for rank-stabilised LoRA,
arXiv 2312.03732). Whatever else an adapter's config asks for either changes nothing after training, and is ignored by
name, or is refused by name: an unknown key that is switched on is never guessed at.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from consilience.checkpoints.checkpoint import Checkpoint, TensorInfo
from consilience.checkpoints.json_files import read_object
from consilience.checkpoints.open import open_checkpoint
from consilience.errors import InputError

#: Config keys that do not change what a trained adapter computes, or that are read below.
_NEUTRAL = frozenset([
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "target_modules", "exclude_modules", "lora_dropout", "modules_to_save",
    "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "velora_config", "qalora_group_size", "runtime_config",
    "ensure_weight_tying", "init_lora_weights", "r", "lora_alpha", "fan_in_fan_out", "bias", "use_rslora",
    "rank_pattern", "alpha_pattern",
])  # fmt: skip
#: Initialisations of the factors alone. Others (pissa, olora, corda, loftq, lora_ga, ...) also edit the base's weights,
#: so that the adapter only fits the edited base.
_FACTORS_ONLY = ("gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True, slots=True)
class LoraPair:
    """Two factors that add ``scale * B @ A`` (or its transpose) to the base tensor ``target``.

    ``a`` is [r, in], ``b`` is [out, r] as PEFT stores them; trailing convolution dimensions are flattened.
    ``transposed`` marks targets stored [in, out] (Conv1D) and embeddings, whose update is ``(B @ A).T``.
    """

    target: str
    a: TensorInfo
    b: TensorInfo
    scale: float
    transposed: bool

    @property
    def rank(self) -> int:
        """The common inner size of the factors."""
        return self.a.shape[0]

    @property
    def delta_shape(self) -> tuple[int, int]:
        """Rows and columns of the update, as the target stores them."""
        out, into = self.b.shape[0], math.prod(self.a.shape[1:])
        return (into, out) if self.transposed else (out, into)


@dataclass(frozen=True)
class Adapter:
    """An opened LoRA adapter: its pairs and whole tensors by target name, and the checkpoint that holds their bytes.

    A target may have both: PEFT saves an adapted embedding's own weight beside its factors, and both count. ``names``
    has, for targets that were renamed after the base's files, what the adapter itself calls them.
    """

    path: Path
    checkpoint: Checkpoint
    config: dict[str, Any]
    pairs: dict[str, LoraPair]
    whole: dict[str, TensorInfo]
    names: dict[str, str] = field(default_factory=dict[str, str])


def is_adapter(path: Path) -> bool:
    """Whether a folder holds a PEFT adapter rather than a model."""
    return (path / "adapter_config.json").is_file() and not (path / "config.json").is_file()


def _refuse_unsupported(where: str, config: dict[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(
            f"{where}: peft_type {kind!r} is not LORA; merge it into its base with PEFT and pass the model"
        )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _FACTORS_ONLY:
        raise InputError(
            f"{where}: init_lora_weights {init!r} edits the base's weights; convert the adapter with PEFT's "
            "path_initial_model_for_weight_conversion first"
        )
    for key, value in config.items():
        if key not in _NEUTRAL and value not in (None, False, {}, []):
            raise InputError(
                f"{where}: {key} = {value!r} is not supported; merge it into its base with PEFT and pass the model"
            )
    for key in ("use_rslora", "fan_in_fan_out"):
        if not isinstance(config.get(key), bool | None):
            raise InputError(f"{where}: {key} must be true or false, not {config[key]!r}; restore the config")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key), dict | None):
            raise InputError(f"{where}: {key} must map module names to numbers; restore the config")


def _pattern(patterns: Any, module: str, default: Any, where: str) -> Any:
    """Look a module up in rank_pattern or alpha_pattern, as PEFT does: the first key that matches the name's end."""
    for key, value in cast(dict[str, Any], patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(
                f"{where}: pattern {key!r} is not a regular expression ({error}); restore the config"
            ) from None
    return default


_PREFIX = re.compile(r"^base_model\.model\.")
_PAIR = re.compile(
    r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.(?!weight$|bias$)[^.]+)?(\.weight)?$"
)


def _strip(name: str) -> str:
    return _PREFIX.sub("", name).replace(".modules_to_save.default.", ".").replace(".base_layer.", ".")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e18


def _scale(config: dict[str, Any], module: str, rank: int, where: str) -> float:
    r = _pattern(config.get("rank_pattern"), module, config.get("r"), where)
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"), where)
    if not _is_number(r) or not _is_number(alpha) or r <= 0:
        raise InputError(
            f"{where}: {module}: r {r!r} or lora_alpha {alpha!r} is not a number to use; restore the config"
        )
    if rank != r:
        raise InputError(
            f"{where}: {module}: config says rank {r} but the factors have rank {rank}; restore the config"
        )
    return alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r


def open_adapter(path: str | Path, label: str | None = None) -> Adapter:
    """Open a PEFT LoRA adapter folder from headers alone.

    Raises:
        InputError: the adapter is malformed, or of a kind whose effect is not ``scale * B @ A``.
    """
    path = Path(path)
    config_path = path / "adapter_config.json"
    config = read_object(config_path)
    _refuse_unsupported(str(config_path), config)
    files = [path / name for name in ("adapter_model.safetensors", "adapter_model.bin") if (path / name).is_file()]
    if not files:
        raise InputError(f"{path}: holds no adapter_model.safetensors or adapter_model.bin; download it again")
    checkpoint = open_checkpoint(files[0], label)
    sides, whole = _sorted_tensors(checkpoint.tensors, str(files[0]))
    pairs: dict[str, LoraPair] = {}
    for (module, embedding), found in sides.items():
        pair = _pair(config, module, embedding, found, (str(config_path), str(files[0])))
        if pair.target in pairs:
            raise InputError(f"{files[0]}: {module} has both linear and embedding factors; restore the file")
        pairs[pair.target] = pair
    return Adapter(path, checkpoint, config, pairs, whole)


_Sides = dict[tuple[str, bool], dict[str, TensorInfo]]


def _sorted_tensors(tensors: dict[str, TensorInfo], where: str) -> tuple[_Sides, dict[str, TensorInfo]]:
    """Return the factors by (module, whether an embedding) and side, and the whole tensors by target name."""
    sides: _Sides = {}
    whole: dict[str, TensorInfo] = {}
    for name, tensor in tensors.items():
        if "lora_magnitude" in name:
            raise InputError(
                f"{where}: tensor {name!r}: DoRA magnitudes are not supported; merge it into its base with PEFT"
            )
        match = _PAIR.match(_strip(name))
        if match is None and ".lora_" in name:
            raise InputError(f"{where}: tensor {name!r} is not a LoRA factor this version knows; merge it with PEFT")
        place = sides.setdefault((match["module"], bool(match["embedding"])), {}) if match else whole
        key = match["side"] if match else _strip(name)
        if key in place:
            raise InputError(
                f"{where}: tensors {place[key].name!r} and {name!r} speak of the same weight; save one adapter a folder"
            )
        place[key] = tensor
    return sides, whole


def _pair(
    config: dict[str, Any], module: str, embedding: bool, found: dict[str, TensorInfo], where: tuple[str, str]
) -> LoraPair:
    """Return one module's pair; ``where`` names the config and the weights in errors."""
    config_path, file = where
    if set(found) != {"A", "B"}:
        missing = "AB".replace(next(iter(found)), "")
        raise InputError(f"{file}: {module} has no lora_{missing} factor; download it again")
    a, b = found["A"], found["B"]
    rank = a.shape[0] if len(a.shape) >= 2 else 0
    if len(b.shape) > 2 and 0 < math.prod(b.shape[1:]) < rank and rank % math.prod(b.shape[1:]) == 0:
        raise InputError(f"{file}: {module}: adapts a grouped convolution; merge it into its base with PEFT")
    shapes_fit = rank > 0 and len(b.shape) >= 2 and rank == math.prod(b.shape[1:])
    if not shapes_fit or not (a.dtype.mergeable and b.dtype.mergeable):
        raise InputError(
            f"{file}: {module}: factors A {list(a.shape)} {a.dtype.name} and B {list(b.shape)} {b.dtype.name} "
            "do not multiply; download it again"
        )
    transposed = embedding or bool(config.get("fan_in_fan_out"))
    return LoraPair(f"{module}.weight", a, b, _scale(config, module, rank, config_path), transposed)
