"""PEFT LoRA adapters: pairs of factors on named tensors of a base, plus tensors saved whole.

A LoRA pair adds ``scale * B @ A`` to a weight; ``scale = alpha / r`` (``alpha / sqrt(r)`` for rank-stabilised LoRA,
arXiv 2312.03732). Whatever else an adapter's config asks for either changes nothing after training, and is ignored by
name, or is refused by name: an unknown key that is switched on is never guessed at.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from consilience.checkpoints.checkpoint import Checkpoint, TensorInfo
from consilience.checkpoints.json_files import read_object
from consilience.checkpoints.open import open_checkpoint
from consilience.errors import InputError

#: Config keys that do not change what a trained adapter computes.
_NEUTRAL = frozenset(
    ["task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "target_modules", "exclude_modules", "lora_dropout", "modules_to_save", "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core", "loftq_config", "eva_config", "qalora_group_size", "runtime_config", "velora_config", "ensure_weight_tying", "init_lora_weights", "r", "lora_alpha", "fan_in_fan_out", "bias", "use_rslora", "rank_pattern", "alpha_pattern", "lora_ga_config", "corda_config"]
)
#: Initialisations that edit the base's weights, so that the adapter only fits the edited base.
_EDITS_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


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
    """An opened LoRA adapter: its pairs and whole tensors by target name, and the checkpoint that holds their bytes."""

    path: Path
    checkpoint: Checkpoint
    config: dict[str, Any]
    pairs: dict[str, LoraPair]
    whole: dict[str, TensorInfo]


def is_adapter(path: Path) -> bool:
    """Whether a folder holds a PEFT adapter rather than a model."""
    return (path / "adapter_config.json").is_file() and not (path / "config.json").is_file()


def _refuse_unsupported(path: Path, config: dict[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{path}: peft_type {kind!r} is not LoRA; merge it into its base with PEFT and pass the model")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_EDITS_BASE):
        raise InputError(
            f"{path}: init_lora_weights {init!r} edits the base's weights; convert the adapter with PEFT's "
            "path_initial_model_for_weight_conversion first"
        )
    for key, value in config.items():
        if key not in _NEUTRAL and value not in (None, False, {}, []):
            raise InputError(
                f"{path}: {key} = {value!r} is not supported; merge it into its base with PEFT and pass the model"
            )


def _pattern(patterns: Any, module: str, default: float, where: str) -> float:
    """Look a module up in rank_pattern or alpha_pattern, as PEFT does: the first key that matches the name's end."""
    for key, value in cast(dict[str, float], patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error as error:
            raise InputError(
                f"{where}: pattern {key!r} is not a regular expression ({error}); restore the config"
            ) from None
    return default


_PREFIX = re.compile(r"^base_model\.model\.")
_PAIR = re.compile(r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.[^.]+)?(\.weight)?$")


def _strip(name: str) -> str:
    return _PREFIX.sub("", name).replace(".modules_to_save.default.", ".").replace(".base_layer.", ".")


def _scale(config: dict[str, Any], module: str, rank: int, where: str) -> float:
    r = _pattern(config.get("rank_pattern"), module, cast(float, config.get("r", 0)), where)
    alpha = _pattern(config.get("alpha_pattern"), module, cast(float, config.get("lora_alpha", 0)), where)
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in (r, alpha))
    if not numbers or r <= 0:
        raise InputError(f"{where}: r {r!r} or lora_alpha {alpha!r} is not a positive number; restore the config")
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
    config = read_object(path / "adapter_config.json")
    _refuse_unsupported(path, config)
    files = [path / name for name in ("adapter_model.safetensors", "adapter_model.bin") if (path / name).is_file()]
    if not files:
        raise InputError(f"{path}: holds no adapter_model.safetensors or adapter_model.bin; download it again")
    checkpoint = open_checkpoint(files[0], label)
    where = str(files[0])
    sides: dict[tuple[str, bool], dict[str, TensorInfo]] = {}
    whole: dict[str, TensorInfo] = {}
    for name, tensor in checkpoint.tensors.items():
        if "lora_magnitude" in name:
            raise InputError(
                f"{where}: tensor {name!r}: DoRA magnitudes are not supported; merge it into its base with PEFT"
            )
        match = _PAIR.match(_strip(name))
        if match:
            sides.setdefault((match["module"], bool(match["embedding"])), {})[match["side"]] = tensor
        elif ".lora_" in name:
            raise InputError(f"{where}: tensor {name!r} is not a LoRA factor this version knows; merge it with PEFT")
        else:
            whole[_strip(name)] = tensor
    pairs = {
        f"{module}.weight": _pair(config, module, embedding, found, where)
        for (module, embedding), found in sides.items()
    }
    both = pairs.keys() & whole.keys()
    for name in both:  # save_embedding_layers stores the frozen layer beside its factors: the factors are the update
        del whole[name]
    return Adapter(path, checkpoint, config, pairs, whole)


def _pair(config: dict[str, Any], module: str, embedding: bool, found: dict[str, TensorInfo], where: str) -> LoraPair:
    if set(found) != {"A", "B"}:
        missing = "AB".replace(next(iter(found)), "")
        raise InputError(f"{where}: {module} has no lora_{missing} factor; download it again")
    a, b = found["A"], found["B"]
    shapes_fit = len(a.shape) >= 2 and len(b.shape) >= 2 and a.shape[0] == math.prod(b.shape[1:]) and a.shape[0] > 0
    if not shapes_fit or not (a.dtype.mergeable and b.dtype.mergeable):
        raise InputError(
            f"{where}: {module}: factors A {list(a.shape)} {a.dtype.name} and B {list(b.shape)} {b.dtype.name} do not multiply"
        )
    transposed = embedding or bool(config.get("fan_in_fan_out"))
    return LoraPair(f"{module}.weight", a, b, _scale(config, module, a.shape[0], where), transposed)
