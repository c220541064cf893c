"""LoRA adapters: pairs of factors on named tensors of a base, plus tensors saved whole.

A LoRA pair adds ``scale * B @ A`` to a weight; ``scale = alpha / r`` (``alpha / sqrt(r)`` for rank-stabilised LoRA,
arXiv 2312.03732). Whatever else an adapter's files ask for either changes nothing after training, and is ignored by
name, or is refused by name. Files of PEFT, diffusers, kohya and MLX are read: ``adapter_files.py`` finds them,
``lora_names.py`` reads their names and ``lora_scale.py`` their scales.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from consilience.checkpoints.adapter_files import locate_adapter
from consilience.checkpoints.adapter_parameters import (
    ParameterFactors,
    by_parameter,
    parameter_factors,
    parameter_keys,
    parameters_of,
)
from consilience.checkpoints.checkpoint import Checkpoint, TensorInfo
from consilience.checkpoints.json_files import read_object
from consilience.checkpoints.lora_scale import PeftScales, check_config, is_mlx, read_alpha, scales_of
from consilience.checkpoints.open import EMPTY, open_checkpoint
from consilience.checkpoints.peft_names import sort_tensors
from consilience.errors import InputError


@dataclass(frozen=True, slots=True)
class LoraPair:
    """Two factors that add ``scale * B @ A`` (or its transpose) to the base tensor ``target``.

    ``a`` is [r, in], ``b`` is [out, r] as PEFT stores them; trailing convolution dimensions are flattened.
    ``transposed`` marks targets stored [in, out] (Conv1D) and embeddings, whose update is ``(B @ A).T``; which linear
    targets these are only their base shows (``experts/conv1d.py``). ``swapped``: what stands for A is a B stored
    [r, out], and for B an A stored [in, r], as MLX stores them, so that the update is transposed for any other target.
    ``experts``: how many updates ``scale * B_e @ A_e`` the factors hold, each of rank r, for a target
    [experts, out, in] (or, transposed, [experts, in, out]); they are packed as ``adapter_parameters.py`` says.
    """

    target: str
    a: TensorInfo
    b: TensorInfo
    scale: float
    transposed: bool
    embedding: bool = False
    swapped: bool = False
    experts: int = 1

    @property
    def rank(self) -> int:
        """The common inner size of the factors, of one expert's where they hold several."""
        return self.a.shape[0] // self.experts

    @property
    def delta_shape(self) -> tuple[int, int]:
        """Rows and columns of the update, as the target stores them; of several experts, a row is one's."""
        out, into = self.b.shape[0], math.prod(self.a.shape[1:])
        if self.experts > 1:
            return self.experts, out * into
        return (into, out) if self.transposed else (out, into)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the update could be of a tensor of this shape, turned as that may need."""
        flat = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
        if self.experts > 1:
            return self.delta_shape == flat
        return self.delta_shape == flat or (not self.embedding and self.delta_shape[::-1] == flat)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Rows of an embedding or head that were trained alone: their numbers, and their new values."""

    rows: tuple[int, ...]
    values: TensorInfo


@dataclass(frozen=True)
class Adapter:
    """An opened LoRA adapter: its pairs and whole tensors by target name, and the checkpoint that holds their bytes.

    ``path`` is its folder, or its file where it is one alone. A target may have both: PEFT saves an adapted embedding's
    own weight beside its factors, and both count. ``names`` has, for targets that were renamed after the base's files,
    what the adapter itself calls them; ``tokens`` are rows of a target that were trained alone; ``parameters`` are
    factors of parameters that only their base tells apart, and ``assembled`` whether some pairs come of such; ``notes``
    are what a user is told of how it was read.
    """

    path: Path
    checkpoint: Checkpoint
    config: dict[str, Any]
    pairs: dict[str, LoraPair]
    whole: dict[str, TensorInfo]
    names: dict[str, str] = field(default_factory=dict[str, str])
    tokens: dict[str, Tokens] = field(default_factory=dict[str, Tokens])
    parameters: tuple[ParameterFactors, ...] = ()
    assembled: bool = False
    notes: tuple[str, ...] = ()

    @property
    def folder(self) -> Path | None:
        """The folder that is the adapter; None: it is a file alone."""
        return self.path if self.path.is_dir() else None


def _is_row(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def open_adapter(path: str | Path, label: str | None = None) -> Adapter:
    """Open a LoRA adapter, a folder or a file of weights, from headers alone.

    Raises:
        InputError: the adapter is malformed, or of a kind whose effect is not ``scale * B @ A``.
    """
    files = locate_adapter(Path(path))
    config = read_object(files.config) if files.config is not None else None
    if config is not None and not is_mlx(config):
        check_config(str(files.config), config)
    checkpoint = open_checkpoint(files.weights, label)
    tensors = sort_tensors(checkpoint.tensors, str(files.weights))
    sides = tensors.sides
    keys = parameter_keys(config, str(files.config))
    modules = [module for module, _ in sides]
    named = [name for module in modules for name in parameters_of(module, keys)]
    scales = scales_of(checkpoint, config, [*modules, *named], files.weights, files.config)
    rows = {module: side["A"].shape[0] for (module, _), side in sides.items() if "A" in side and side["A"].shape}
    apart = by_parameter(rows, keys, scales) if keys and isinstance(scales, PeftScales) else set[str]()
    others = [*tensors.whole.values(), *tensors.rows.values()]
    if config is None and others:
        name = others[0].name
        raise InputError(
            f"{files.weights}: tensor {name!r} stands beside LoRA factors and is none; give the adapter as the folder "
            "with its adapter_config.json"
        )
    pairs: dict[str, LoraPair] = {}
    parameters: list[ParameterFactors] = []
    for (module, embedding), found in sides.items():
        alpha = found.pop("alpha", None)
        pair = _pair(module, embedding, found, str(files.weights))
        if module in apart and isinstance(scales, PeftScales):
            parameters.append(parameter_factors(module, pair.a, pair.b, keys, scales, str(files.weights)))
            continue
        said = None if alpha is None else read_alpha(checkpoint, alpha, str(files.weights))
        pair = replace(pair, scale=scales.scale(module, pair.rank, said))
        if pair.target in pairs:
            raise InputError(f"{files.weights}: {module} has both linear and embedding factors; restore the file")
        pairs[pair.target] = pair
    notes = (*files.notes, *scales.notes(module for module, _ in sides))
    tokens = _tokens(config or {}, tensors.rows, str(files.config))
    return Adapter(
        files.home,
        checkpoint,
        config or {},
        pairs,
        tensors.whole,
        tokens=tokens,
        parameters=tuple(parameters),
        notes=notes,
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


def _pair(module: str, embedding: bool, found: dict[str, TensorInfo], file: str) -> LoraPair:
    """Return one module's pair, its scale still to be found; ``file`` names the weights in errors."""
    if set(found) != {"A", "B"}:
        missing = "AB".replace(next(iter(found)), "")
        raise InputError(f"{file}: {module} has no lora_{missing} factor; download it again")
    a, b = found["A"], found["B"]
    swapped = a.name.endswith(".lora_b")
    _check_factors(module, a, b, swapped, file)
    return LoraPair(f"{module}.weight", a, b, 1.0, embedding or swapped, embedding, swapped)


def _check_factors(module: str, a: TensorInfo, b: TensorInfo, swapped: bool, file: str) -> None:
    empty = next((tensor for tensor in (a, b) if tensor.numel == 0), None)
    if empty is not None:
        raise InputError(f"{file}: tensor {empty.name!r} has shape {list(empty.shape)}: {EMPTY}")
    rank = a.shape[0] if len(a.shape) >= 2 else 0
    if len(b.shape) > 2 and 0 < math.prod(b.shape[1:]) < rank and rank % math.prod(b.shape[1:]) == 0:
        raise InputError(f"{file}: {module}: adapts a grouped convolution; merge it into its base with PEFT")
    if swapped and max(len(a.shape), len(b.shape)) > 2:
        raise InputError(
            f"{file}: {module}: adapts the experts of a mixture at once; fuse the adapter with mlx_lm.fuse "
            "--dequantize and pass the model"
        )
    shapes_fit = rank > 0 and len(b.shape) >= 2 and rank == math.prod(b.shape[1:])
    if not shapes_fit or not (a.dtype.mergeable and b.dtype.mergeable):
        raise InputError(
            f"{file}: {module}: factors A {list(a.shape)} {a.dtype.name} and B {list(b.shape)} {b.dtype.name} "
            "do not multiply; download it again"
        )
