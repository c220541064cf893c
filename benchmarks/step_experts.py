"""Synthetic experts of a real base for `benchmarks.coefficient_step`: seeded perturbations, dense or as LoRA adapters.

A *dense* expert is a full bf16 checkpoint, every tensor the base plus noise of 1 to 2 % of that tensor's standard
deviation; a *LoRA* expert is a float32 PEFT adapter on all linear layers of the blocks whose product is as large.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from benchmarks.adapters import MODULES, write_adapter
from benchmarks.synthetic import require_free, weight_files

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["dense", "lora"]
KINDS: tuple[Kind, ...] = get_args(Kind)
RANK = 16
SCALE = 2.0
"""``lora_alpha / r``."""
SHARE = 0.01
"""Standard deviation of the first expert's task vectors, as a share of the tensor's own; others have up to twice it."""
FORMAT = 1
"""Raise when the bytes of an expert change, so that old ones are made anew."""


def share_of(number: int) -> float:
    """Return how large the task vectors of expert ``number`` (from 0) are."""
    return SHARE * (1 + (number % 5) / 4)


def _tensors(base: Path) -> "Iterator[tuple[str, Tensor]]":
    from safetensors.torch import load_file

    for path in weight_files(base):
        yield from load_file(path).items()


def _write_dense(base: Path, folder: Path, number: int, seed: int) -> None:
    """Write the full checkpoint of one expert."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(10_000 * seed + number)
    state: dict[str, torch.Tensor] = {}
    for name, stored in _tensors(base):
        value = stored.float()
        # A tensor that is constant has no standard deviation to speak of: norms often are.
        size = share_of(number) * max(float(value.std(correction=0)), 0.1 * float(value.abs().mean()))
        noise = torch.empty_like(value).normal_(std=size, generator=generator)
        state[name] = (value + noise).to(stored.dtype)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(base / "config.json", folder / "config.json")


def _write_lora(base: Path, folder: Path, number: int, seed: int) -> None:
    """Write the adapter of one expert."""
    import torch

    generator = torch.Generator().manual_seed(10_000 * seed + 5_000 + number)
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, stored in _tensors(base):
        module = name.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] not in MODULES:
            continue
        rows, columns = stored.shape
        # The product's entries have variance SCALE^2 RANK sd(A)^2 sd(B)^2.
        size = share_of(number) * float(stored.float().std()) / SCALE * columns**0.5 / RANK**0.5
        a = torch.empty(RANK, columns).normal_(std=columns**-0.5, generator=generator)
        b = torch.empty(rows, RANK).normal_(std=size, generator=generator)
        factors[module] = b, a
    write_adapter(folder, factors, RANK, int(SCALE * RANK))


def make_experts(base: Path, cache: Path, kind: Kind, count: int, *, seed: int = 0) -> dict[str, Path]:
    """Return the folders of ``count`` experts by name; those that ``cache`` lacks are made.

    Args:
        base: a Hugging Face folder of safetensors.
        cache: where the experts lie; each is a folder that appears only when it is complete.
        kind: "dense" or "lora".
        count: how many.
        seed: names the random streams.

    Raises:
        OSError: the disk is too full.
    """
    size = sum(path.stat().st_size for path in weight_files(base))
    stamp = json.dumps({"format": FORMAT, "seed": seed, "base": size})
    found: dict[str, Path] = {}
    for number in range(count):
        folder = cache / f"{kind}-{number}"
        found[f"expert{number}"] = folder
        marked = folder / "complete.json"
        if marked.is_file() and marked.read_text(encoding="utf-8") == stamp:
            continue
        cache.mkdir(parents=True, exist_ok=True)
        require_free(cache, 2 * size + (1 << 30), f"expert {number}")
        shutil.rmtree(folder, ignore_errors=True)
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=cache))
        try:
            {"dense": _write_dense, "lora": _write_lora}[kind](base, made, number, seed)
            (made / "complete.json").write_text(stamp, encoding="utf-8")
            made.rename(folder)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
    return found
