"""Synthetic LoRA adapters in PEFT's format, on all linear layers of a Llama's blocks."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"


def write_adapter(folder: Path, factors: "Mapping[str, tuple[Tensor, Tensor]]", rank: int, alpha: int) -> None:
    """Write the factors (B [out, r], A [r, in]) of modules by name, and PEFT's configuration."""
    from safetensors.torch import save_file

    state: dict[str, Tensor] = {}
    for name, (b, a) in factors.items():
        state |= {f"{PREFIX}{name}{A}": a, f"{PREFIX}{name}{B}": b}
    save_file(state, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(MODULES),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def factors_of(stored: "Mapping[str, Tensor]") -> "dict[str, tuple[Tensor, Tensor]]":
    """Return the factors (B, A) of an adapter's tensors, by the parameter that their product is added to."""
    stems = [name.removesuffix(A) for name in stored if name.endswith(A)]
    return {f"{stem.removeprefix(PREFIX)}.weight": (stored[stem + B], stored[stem + A]) for stem in stems}
