"""What multiplies B A of each of an adapter's modules, by whatever program wrote it.

| program | scale |
|---|---|
| PEFT | ``alpha / r`` (``alpha / sqrt(r)`` for rank-stabilised LoRA) of ``adapter_config.json`` and its patterns |
| diffusers | the same of the config in the file's metadata; without it 1 |
| kohya | ``alpha / r`` of the tensor ``X.alpha``; without it 1 |
| MLX | ``lora_parameters.scale`` of its ``adapter_config.json`` |
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from consilience.checkpoints.checkpoint import Checkpoint, TensorInfo
from consilience.checkpoints.patterns import matching_keys
from consilience.errors import InputError

#: Config keys that do not change what a trained adapter computes, or that are read.
_NEUTRAL = frozenset([
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "target_modules", "exclude_modules", "lora_dropout", "modules_to_save",
    "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "velora_config", "qalora_group_size", "runtime_config",
    "ensure_weight_tying", "init_lora_weights", "r", "lora_alpha", "fan_in_fan_out", "bias", "use_rslora",
    "rank_pattern", "alpha_pattern", "trainable_token_indices", "token_indices", "init_weights", "target_parameters",
])  # fmt: skip
#: Initialisations of the factors alone. Others (pissa, olora, corda, loftq, lora_ga, ...) also edit the base's weights,
#: so that the adapter only fits the edited base.
_FACTORS_ONLY = ("gaussian", "eva", "orthogonal", "mica")
#: Where diffusers keeps an adapter's config in a file's metadata.
_METADATA = "lora_adapter_metadata"
#: What diffusers and ComfyUI put before the names of a pipeline's parts.
_PARTS = frozenset([
    "unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3", "prior", "controlnet",
    "diffusion_model",
])  # fmt: skip


class Scales(Protocol):
    """Scales by module."""

    def scale(self, module: str, rank: int, alpha: float | None) -> float:
        """Return what multiplies B A; ``alpha`` is what the file says beside the factors."""
        ...

    def notes(self, modules: Iterable[str]) -> list[str]:
        """Return what a user is told of choices that the files left open."""
        ...


def scales_of(
    checkpoint: Checkpoint, config: dict[str, Any] | None, modules: Iterable[str], file: Path, config_path: Path | None
) -> Scales:
    """Return the scales of an adapter's modules.

    Args:
        checkpoint: the adapter's tensors.
        config: what ``adapter_config.json`` says, if there is one.
        modules: the modules that have factors.
        file: the weights, and
        config_path: the config, for errors.

    Raises:
        InputError: the config is malformed or of another kind of adapter, or the scale is in none of the files.
    """
    modules = list(modules)
    if config is not None and is_mlx(config):
        return _mlx(config, str(config_path))
    if config is not None:
        return PeftScales.of(config, modules, str(config_path))
    if _METADATA in checkpoint.metadata:
        return _diffusers(checkpoint.metadata[_METADATA], modules, str(file))
    _refuse_without_alpha(checkpoint, str(file))
    return _AlphaScales(str(file))


def is_mlx(config: Mapping[str, Any]) -> bool:
    """Whether an ``adapter_config.json`` is MLX' rather than PEFT's."""
    return "peft_type" not in config and ("lora_parameters" in config or "fine_tune_type" in config)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e18


def check_config(where: str, config: dict[str, Any]) -> None:
    """Refuse a PEFT config of an adapter whose effect is not ``scale * B @ A``: a key that is on is never guessed at.

    Raises:
        InputError: names the key.
    """
    kind = config.get("peft_type")
    if kind not in ("LORA", "TRAINABLE_TOKENS"):
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


@dataclass(frozen=True, slots=True)
class PeftScales:
    """Ranks and alphas of a PEFT config: by default, and by module the keys of its patterns that apply, in order."""

    config: dict[str, Any]
    where: str
    ranks: dict[str, list[str]]
    alphas: dict[str, list[str]]

    @classmethod
    def of(cls, config: dict[str, Any], modules: Iterable[str], where: str) -> "PeftScales":
        """Look modules up in the patterns of a checked config."""
        modules = list(modules)

        def keys(name: str) -> dict[str, list[str]]:
            return matching_keys(list(cast(dict[str, Any], config.get(name) or {})), modules, f"{where}: {name}")

        return cls(config, where, keys("rank_pattern"), keys("alpha_pattern"))

    def scale(self, module: str, rank: int, alpha: float | None) -> float:
        """Return what multiplies B A. Of several keys for one module, the factors show which rank was meant."""
        by_rank = {key: self.config["rank_pattern"][key] for key in self.ranks[module]}
        ranks = list(by_rank.values()) or [self.config.get("r")]
        keys = self._alphas(module, by_rank, rank)
        said: Any = self.config["alpha_pattern"][keys[0]] if keys else self.config.get("lora_alpha")
        said = said if alpha is None else alpha
        if not all(_is_number(r) and r > 0 for r in ranks) or not _is_number(said):
            raise InputError(
                f"{self.where}: {module}: r {ranks[0]!r} or lora_alpha {said!r} is not a number to use; restore the "
                "config"
            )
        if rank not in ranks:
            raise InputError(
                f"{self.where}: {module}: config says rank {ranks[0]} but the factors have rank {rank}; restore the "
                "config"
            )
        return said / math.sqrt(rank) if self.config.get("use_rslora") else said / rank

    def ranks_of(self, module: str) -> list[int]:
        """Return the ranks that the config gives a module: one, or one of each key of ``rank_pattern`` that applies."""
        ranks = [self.config["rank_pattern"][key] for key in self.ranks[module]] or [self.config.get("r")]
        return [rank for rank in dict.fromkeys(ranks) if isinstance(rank, int) and rank > 0]

    def _alphas(self, module: str, by_rank: dict[str, Any], rank: int) -> list[str]:
        """Return a module's alpha keys, a key that also gives its factors' rank before the others."""
        return sorted(self.alphas[module], key=lambda key: by_rank.get(key) != rank and len(by_rank) > 1)

    def notes(self, modules: Iterable[str]) -> list[str]:
        """Say where more than one alpha speaks of a module."""
        for module in modules:
            keys = self.alphas[module]
            if len({repr(self.config["alpha_pattern"][key]) for key in keys}) > 1:
                return [
                    f"{self.where}: {module}: alpha_pattern's {' and '.join(map(repr, keys[:2]))} both apply; PEFT "
                    "takes the first in the file, which need not be the one it was trained with"
                ]
        return []


def _diffusers(text: str, modules: list[str], file: str) -> Scales:
    """Read the configs that diffusers keeps in a file's metadata: ``transformer.r`` and so on, or ``r`` alone."""
    where = f"{file}: {_METADATA}"
    try:
        values: Any = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise InputError(f"{where}: is not a JSON object; restore the file's metadata")
    values = cast(dict[str, Any], values)
    whole = "r" in values or "lora_alpha" in values
    parts: dict[str, PeftScales] = {}
    for part in dict.fromkeys("" if whole else module.split(".", 1)[0] for module in modules):
        own = values if whole else {k.split(".", 1)[1]: v for k, v in values.items() if k.startswith(f"{part}.")}
        if not own:
            raise InputError(f"{where}: says nothing of {part!r}, which has factors; restore the file's metadata")
        within = [_within(module, part) for module in modules if not part or module.startswith(f"{part}.")]
        check_config(where, {"peft_type": "LORA"} | own)
        parts[part] = PeftScales.of(own, within, where)
    return _DiffusersScales(parts)


def _within(module: str, part: str) -> str:
    return module.removeprefix(f"{part}.") if part else module


@dataclass(frozen=True, slots=True)
class _DiffusersScales:
    parts: dict[str, PeftScales]

    def _part(self, module: str) -> str:
        return "" if "" in self.parts else module.split(".", 1)[0]

    def scale(self, module: str, rank: int, alpha: float | None) -> float:
        part = self._part(module)
        return self.parts[part].scale(_within(module, part), rank, alpha)

    def notes(self, modules: Iterable[str]) -> list[str]:
        return [note for m in modules for note in self.parts[self._part(m)].notes([_within(m, self._part(m))])][:1]


@dataclass(frozen=True, slots=True)
class _AlphaScales:
    """Scales of a file alone: ``alpha / r``, or 1 where it has no alpha, as kohya and diffusers read such a file."""

    where: str
    without: list[str] = field(default_factory=list[str])

    def scale(self, module: str, rank: int, alpha: float | None) -> float:
        if alpha is None:
            self.without.append(module)
            return 1.0
        return alpha / rank

    def notes(self, modules: Iterable[str]) -> list[str]:
        if not self.without:
            return []
        said = f"{len(self.without)} modules have no alpha; their scale is 1, as kohya and diffusers take it"
        return [f"{self.where}: {said}"]


def _refuse_without_alpha(checkpoint: Checkpoint, file: str) -> None:
    """Refuse factors named as PEFT names them where nothing says their scale."""
    names = checkpoint.tensors
    alphas = any(name.endswith(".alpha") for name in names)
    down_up = any(name.endswith((".down.weight", "lora_down.weight")) for name in names)
    part, _, rest = next(iter(names)).partition(".")
    if alphas or down_up or (part in _PARTS and not rest.startswith("h.")):
        return
    raise InputError(
        f"{file}: is a LoRA adapter without its adapter_config.json, and lora_alpha, hence the scale of its update, is "
        "nowhere else; put the config beside it"
    )


def _mlx(config: Mapping[str, Any], where: str) -> Scales:
    parameters: Any = config.get("lora_parameters")
    kind = config.get("fine_tune_type", "lora")
    if kind == "full":
        return _Constant(1.0)
    if kind != "lora" or config.get("use_dora"):
        raise InputError(
            f"{where}: fine_tune_type {kind!r} of MLX is not lora; fuse it with mlx_lm.fuse --dequantize and pass the "
            "model"
        )
    scale: Any = cast(dict[str, Any], parameters).get("scale") if isinstance(parameters, dict) else None
    if not _is_number(scale) or "alpha" in cast(dict[str, Any], parameters):
        raise InputError(
            f"{where}: lora_parameters has no scale alone, as MLX writes it now (older versions multiply it with "
            "alpha / rank); fuse the adapter with mlx_lm.fuse --dequantize and pass the model"
        )
    return _Constant(float(scale))


@dataclass(frozen=True, slots=True)
class _Constant:
    value: float

    def scale(self, module: str, rank: int, alpha: float | None) -> float:
        return self.value

    def notes(self, modules: Iterable[str]) -> list[str]:
        return []


_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "U8": "u1", "I8": "i1"}


def read_alpha(checkpoint: Checkpoint, tensor: TensorInfo, file: str) -> float:
    """Return the value of a tensor ``X.alpha``.

    Raises:
        InputError: it is no finite number.
    """
    raw = checkpoint.read(tensor.name)
    if tensor.numel == 1 and tensor.dtype.name == "BF16":
        value = float((raw.view("<u2").astype("<u4") << 16).view("<f4")[0])
    elif tensor.numel == 1 and tensor.dtype.name in _NUMPY:
        value = float(raw.view(np.dtype(_NUMPY[tensor.dtype.name]))[0])
    else:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{file}: tensor {tensor.name!r} is no finite number; download it again")
    return value
