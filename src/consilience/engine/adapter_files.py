"""A PEFT LoRA adapter's two files, written: factors under PEFT's names, and a config that gives every module its rank.

``lora_alpha = r`` throughout, so that an update is B A as it stands.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from consilience.checkpoints.checkpoint import TensorInfo
from consilience.checkpoints.dtypes import DType
from consilience.checkpoints.open import open_checkpoint
from consilience.checkpoints.safetensors_file import encode_header
from consilience.kernels import encode as enc

Array = npt.NDArray[np.float64]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def factor_names(module: str, embedding: bool = False) -> tuple[str, str]:
    """Return what PEFT calls the factors A and B of a module."""
    middle, end = (".lora_embedding_", "") if embedding else (".lora_", ".weight")
    return f"base_model.model.{module}{middle}A{end}", f"base_model.model.{module}{middle}B{end}"


def write_tensors(path: Path, tensors: Sequence[tuple[str, Array, DType]], **metadata: str) -> None:
    """Write named arrays, each rounded to its dtype, as a safetensors file."""
    header, _ = encode_header([(n, dtype, values.shape) for n, values, dtype in tensors], {"format": "pt"} | metadata)
    with open(path, "wb") as file:
        file.write(header)
        for _, values, dtype in tensors:
            raw = np.empty(values.size * dtype.itemsize, np.uint8)
            enc.encode(np.ascontiguousarray(values).reshape(-1), dtype, raw)
            file.write(raw.data)


def gather(parts: Sequence[Path], path: Path) -> None:
    """Write the tensors of several safetensors files as one, a tensor at a time."""
    opened = [open_checkpoint(part) for part in parts]
    try:
        held: list[tuple[Any, TensorInfo]] = [(one, tensor) for one in opened for tensor in one.tensors.values()]
        header, _ = encode_header([(t.name, t.dtype, t.shape) for _, t in held], {"format": "pt"})
        with open(path, "wb") as file:
            file.write(header)
            for one, tensor in held:
                file.write(one.read(tensor.name).data)
            file.flush()
            os.fsync(file.fileno())
    finally:
        for one in opened:
            one.storage.close()


def lora_config(
    ranks: Mapping[str, int],
    modules: Iterable[str],
    *,
    base: str | None,
    task_type: str | None,
    fan_in_fan_out: bool = False,
) -> dict[str, Any]:
    """Return an adapter's PEFT config.

    Args:
        ranks: rank of every adapted module, by its name.
        modules: names of the model's modules that could be adapted: targets are named so that no other one is hit.
        base: what the adapter calls its base.
        task_type: PEFT's name of the task, such as CAUSAL_LM.
        fan_in_fan_out: weights are stored [in, out].
    """
    most = max(set(ranks.values()), key=list(ranks.values()).count)
    # PEFT takes the first pattern that a name ends in: longer names go first, and those of the common rank with them.
    longest = sorted(ranks, key=lambda module: (-len(module), module))
    pattern = {module: ranks[module] for module in longest} if len(set(ranks.values())) > 1 else {}
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": _targets(ranks, list(modules)),
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
    }


def _targets(adapted: Iterable[str], modules: Sequence[str]) -> list[str] | str:
    """Return what PEFT finds exactly the adapted modules by: endings of names, whole names, or a pattern of these."""
    names = set(adapted)
    endings = {name.rsplit(".", 1)[-1] for name in names}
    for words in (endings, names):
        if not any(_hits(words, module) for module in modules if module not in names):
            return sorted(words)
    return f"^({'|'.join(map(re.escape, sorted(names)))})$"


def _hits(words: set[str], module: str) -> bool:
    """Whether one of the words is a module's name or its end, from some dot on."""
    parts = module.split(".")
    return any(".".join(parts[start:]) in words for start in range(len(parts)))
