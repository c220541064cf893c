"""The bare loop that merges are compared with: safetensors and torch, the mean of N checkpoints in fp32, one file out.

    python -m benchmarks.floor_torch OUT.safetensors FOLDER FOLDER ...

It is what a careful user writes in ten lines: no recipe, no checks, no fsync, no verification, no side files. It is
measured as a whole process, imports included.
"""

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def main(out: str, *folders: str) -> None:
    """Average the checkpoints in ``folders`` (same names in all) and save the result as ``out``."""
    with ExitStack() as stack:
        models: list[dict[str, Any]] = []
        for folder in folders:
            files = sorted(Path(folder).glob("*.safetensors"))
            handles = [stack.enter_context(safe_open(str(file), framework="pt")) for file in files]
            models.append({name: handle for handle in handles for name in handle.keys()})  # noqa: SIM118
        merged: dict[str, torch.Tensor] = {}
        for name, handle in models[0].items():
            total = handle.get_tensor(name).to(torch.float32)
            for model in models[1:]:
                total += model[name].get_tensor(name)
            merged[name] = (total / len(models)).to(torch.bfloat16)
    save_file(merged, out, metadata={"format": "pt"})


if __name__ == "__main__":
    main(*sys.argv[1:])
