"""Small models on disk, whose task vectors are known."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Tensors = Mapping[str, Any]
SHAPES: dict[str, tuple[int, ...]] = {
    "model.layers.0.mlp.weight": (300, 24),
    "model.layers.1.mlp.weight": (24, 40),
    "model.norm.weight": (24,),
}


def write_model(folder: Path, tensors: Tensors, **files: str) -> Path:
    """Write a dense float32 model, and text files beside it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file(
        {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}, folder / "model.safetensors"
    )
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def write_adapter(folder: Path, module: str, rank: int, seed: int) -> tuple[Any, Any]:
    """Write a PEFT adapter of one module, with a scale of 2, and return its factors a [rank, in] and b [out, rank]."""
    out, inside = SHAPES[f"{module}.weight"][:2]
    generator = np.random.default_rng(seed)
    a, b = (generator.normal(size=shape).astype(np.float32) for shape in ((rank, inside), (out, rank)))
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["mlp"]}
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    names = {f"base_model.model.{module}.lora_{side}.weight": value for side, value in (("A", a), ("B", b))}
    save_file(names, folder / "adapter_model.safetensors")
    return a, b


def drawn(seed: int, scale: float = 1.0) -> dict[str, Any]:
    """Return normal tensors of the shapes above."""
    generator = np.random.default_rng(seed)
    return {name: (scale * generator.normal(size=shape)).astype(np.float32) for name, shape in SHAPES.items()}


def moved(base: Tensors, delta: Tensors, by: float = 1.0) -> dict[str, Any]:
    """Return a base plus a multiple of task vectors."""
    return {name: base[name] + np.float32(by) * delta[name] for name in base}


#: The fixture ``make``.
Make = Callable[..., dict[str, Any]]
