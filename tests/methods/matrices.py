"""Random matrices, and folders of models and adapters that hold them, for tests of whole-matrix methods."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

Array = npt.NDArray[Any]
CONFIG = '{"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj"], "base_model_name_or_path": null}'


def draw(*shape: int, seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def write(folder: Path, tensors: dict[str, Array], config: str, name: str = "model.safetensors") -> Path:
    folder.mkdir()
    save_file({n: np.ascontiguousarray(a, np.float32) for n, a in tensors.items()}, folder / name)
    (folder / ("config.json" if name.startswith("model") else "adapter_config.json")).write_text(config)
    return folder
