"""PEFT LoRA adapters: pairs of factors on named tensors of a base, plus tensors saved whole.

A LoRA pair adds ``scale * B @ A`` to a weight; ``scale = alpha / r`` (``alpha / sqrt(r)`` for rank-stabilised LoRA,
arXiv 2312.03732). Whatever else an adapter's config asks for either changes nothing after training, and is ignored by
name, or is refused by name: an unknown key that is switched on is never guessed at.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from consilience.checkpoints.checkpoint import Checkpoint, TensorInfo
from consilience.checkpoints.json_files import read_object
from consilience.checkpoints.open import open_checkpoint
from consilience.checkpoints.patterns import matching_keys
from consilience.checkpoints.peft_names import sort_tensors
from consilience.errors import InputError

#: Config keys that do not change what a trained adapter computes, or that are read below.
_NEUTRAL = frozenset([
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "target_modules", "exclude_modules", "lora_dropout", "modules_to_save",
    "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "velora_config", "qalora_group_size", "runtime_config",
    "ensure_weight_tying", "init_lora_weights", "r", "lora_alpha", "fan_in_fan_out", "bias", "use_rslora",
    "rank_pattern", "alpha_pattern", "trainable_token_indices", "token_indices", "init_weights",
])  # fmt: skip
#: Initialisations of the factors alone. Others (pissa, olora, corda, loftq, lora_ga, ...) also edit the base's weights,
#: so that the adapter only fits the edited base.
_FACTORS_ONLY = ("gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True, slots=True)
class LoraPair:
    """Two factors that add ``scale * B @ A`` (or its transpose) to the base tensor ``target``.

    ``a`` is [r, in], ``b`` is [out, r] as PEFT stores them; trailing convolution dimensions are flattened.
    ``transposed`` marks targets stored [in, out] (Conv1D) and embeddings, whose update is ``(B @ A).T``; which linear
    targets these are only their base shows (``experts/conv1d.py``).
    """

    target: str
    a: TensorInfo
    b: TensorInfo
    scale: float
    transposed: bool
    embedding: bool = False

    @property
    def rank(self) -> int:
        """The common inner size of the factors."""
        return self.a.shape[0]

    @property
    def delta_shape(self) -> tuple[int, int]:
        """Rows and columns of the update, as the target stores them."""
        out, into = self.b.shape[0], math.prod(self.a.shape[1:])
        return (into, out) if self.transposed else (out, into)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the update could be of a tensor of this shape, turned as that may need."""
        flat = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
        return self.delta_shape == flat or (not self.embedding and self.delta_shape[::-1] == flat)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Rows of an embedding or head that were trained alone: their numbers, and their new values."""

    rows: tuple[int, ...]
    values: TensorInfo


@dataclass(frozen=True)
class Adapter:
    """An opened LoRA adapter: its pairs and whole tensors by target name, and the checkpoint that holds their bytes.

    A target may have both: PEFT saves an adapted embedding's own weight beside its factors, and both count. ``names``
    has, for targets that were renamed after the base's files, what the adapter itself calls them; ``tokens`` are rows
    of a target that were trained alone; ``notes`` are what a user is told of how it was read.
    """

    path: Path
    checkpoint: Checkpoint
    config: dict[str, Any]
    pairs: dict[str, LoraPair]
    whole: dict[str, TensorInfo]
    names: dict[str, str] = field(default_factory=dict[str, str])
    tokens: dict[str, Tokens] = field(default_factory=dict[str, Tokens])
    notes: tuple[str, ...] = ()


def is_adapter(path: Path) -> bool:
    """Whether a folder holds a PEFT adapter rather than a model."""
    return (path / "adapter_config.json").is_file() and not (path / "config.json").is_file()


def _refuse_unsupported(where: str, config: dict[str, Any]) -> None:
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


def _is_row(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e18


@dataclass(frozen=True, slots=True)
class _Patterns:
    """An adapter's ranks and alphas: by default, and by module the keys of its patterns that apply, in order."""

    config: dict[str, Any]
    where: str
    ranks: dict[str, list[str]]
    alphas: dict[str, list[str]]

    @classmethod
    def of(cls, config: dict[str, Any], modules: Iterable[str], where: str) -> "_Patterns":
        modules = list(modules)

        def of(name: str) -> dict[str, list[str]]:
            return matching_keys(list(cast(dict[str, Any], config.get(name) or {})), modules, f"{where}: {name}")

        return cls(config, where, of("rank_pattern"), of("alpha_pattern"))

    def scale(self, module: str, rank: int) -> float:
        """Return what multiplies B A. Of several keys for one module, the factors show which rank was meant."""
        by_rank = {key: self.config["rank_pattern"][key] for key in self.ranks[module]}
        ranks = list(by_rank.values()) or [self.config.get("r")]
        keys = self._alphas(module, by_rank, rank)
        alpha: Any = self.config["alpha_pattern"][keys[0]] if keys else self.config.get("lora_alpha")
        if not all(_is_number(r) and r > 0 for r in ranks) or not _is_number(alpha):
            raise InputError(
                f"{self.where}: {module}: r {ranks[0]!r} or lora_alpha {alpha!r} is not a number to use; restore the "
                "config"
            )
        if rank not in ranks:
            raise InputError(
                f"{self.where}: {module}: config says rank {ranks[0]} but the factors have rank {rank}; restore the "
                "config"
            )
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def _alphas(self, module: str, by_rank: dict[str, Any], rank: int) -> list[str]:
        """Return a module's alpha keys, a key that also gives its factors' rank before the others."""
        return sorted(self.alphas[module], key=lambda key: by_rank.get(key) != rank and len(by_rank) > 1)

    def note(self, modules: Iterable[str]) -> str | None:
        """Return what to say where more than one alpha speaks of a module."""
        for module in modules:
            keys = self.alphas[module]
            if len({repr(self.config["alpha_pattern"][key]) for key in keys}) > 1:
                return (
                    f"{self.where}: {module}: alpha_pattern's {' and '.join(map(repr, keys[:2]))} both apply; PEFT "
                    "takes the first in the file, which need not be the one it was trained with"
                )
        return None


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
    tensors = sort_tensors(checkpoint.tensors, str(files[0]))
    patterns = _Patterns.of(config, [module for module, _ in tensors.sides], str(config_path))
    pairs: dict[str, LoraPair] = {}
    for (module, embedding), found in tensors.sides.items():
        pair = _pair(patterns, module, embedding, found, str(files[0]))
        if pair.target in pairs:
            raise InputError(f"{files[0]}: {module} has both linear and embedding factors; restore the file")
        pairs[pair.target] = pair
    note = patterns.note(module for module, _ in tensors.sides)
    return Adapter(
        path,
        checkpoint,
        config,
        pairs,
        tensors.whole,
        tokens=_tokens(config, tensors.rows, str(config_path)),
        notes=() if note is None else (note,),
    )


def _tokens(config: dict[str, Any], found: dict[str, TensorInfo], where: str) -> dict[str, Tokens]:
    """Return the rows that were trained alone, by target: which they are stands in the config."""
    listed = config.get("trainable_token_indices")
    if listed is None:
        listed = config.get("token_indices")
    tokens: dict[str, Tokens] = {}
    for target, values in found.items():
        module = target.removesuffix(".weight")
        rows = listed
        if isinstance(listed, dict):
            by_module = cast(dict[str, Any], listed)
            keys = [key for key in by_module if f".{module}".endswith(f".{key}")]
            # A head that follows its embedding's rows is not in the config.
            keys = keys or (list(by_module) if len(by_module) == 1 else [])
            rows = by_module[keys[0]] if keys else None
        numbers = cast(list[Any], rows) if isinstance(rows, list) else []
        if not numbers or len(set(map(repr, numbers))) < len(numbers) or not all(map(_is_row, numbers)):
            raise InputError(
                f"{where}: trainable_token_indices of {module!r} must be different row numbers, not {rows!r}; restore "
                "the config"
            )
        tokens[target] = Tokens(tuple(numbers), values)
    return tokens


def _pair(patterns: _Patterns, module: str, embedding: bool, found: dict[str, TensorInfo], file: str) -> LoraPair:
    """Return one module's pair; ``file`` names the weights in errors."""
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
    turned = embedding or bool(patterns.config.get("fan_in_fan_out"))
    return LoraPair(f"{module}.weight", a, b, patterns.scale(module, rank), turned, embedding)
