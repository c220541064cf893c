"""The floor of a coefficient step: one forward and backward pass of the plain model, two passes over the task vectors.

    theta = theta_0 + sum_k alpha_k (theta_k - theta_0)          before the forward pass
    dL/dalpha_k = < dL/dtheta, theta_k - theta_0 >               after the backward pass

It is what a careful user writes in torch: files are mapped, buffers are made once, dense tensors go by in tiles that
stay in the cache, adapters are multiplied as factors. It checks nothing, streams nothing and keeps all gradients.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.adapters import factors_of
from benchmarks.step_experts import SCALE, Kind
from benchmarks.synthetic import weight_files

if TYPE_CHECKING:
    from torch import Tensor

TILE = 1 << 16
"""Elements of a tile: two float32 buffers of it fit a second-level cache."""


def mapped(folder: Path) -> "dict[str, Tensor]":
    """Return a checkpoint's tensors, mapped from its files: they take no anonymous memory."""
    from safetensors.torch import load_file

    return {name: value for path in weight_files(folder) for name, value in load_file(path).items()}


class Dense:
    """Task vectors of full checkpoints, as differences that are never stored."""

    def __init__(self, base: Path, experts: Sequence[Path]) -> None:
        import torch

        self.base, self.experts = mapped(base), [mapped(folder) for folder in experts]
        self.names = sorted(self.base)
        self._buffer = torch.empty(TILE)
        self._origin = torch.empty(TILE)

    def _tiles(self, name: str) -> "list[tuple[slice, Tensor, Tensor]]":
        count = self.base[name].numel()
        spans = [slice(at, min(count, at + TILE)) for at in range(0, count, TILE)]
        return [(s, self._buffer[: s.stop - s.start], self._origin[: s.stop - s.start]) for s in spans]

    def blend(self, alpha: "Tensor", weights: "Mapping[str, Tensor]") -> None:
        """Write the blend of coefficients [K] into the weights."""
        shares = alpha.tolist()
        rest = 1.0 - sum(shares)
        for name in self.names:
            out, base = weights[name].view(-1), self.base[name].view(-1)
            experts = [expert[name].view(-1) for expert in self.experts]
            for span, buffer, _ in self._tiles(name):
                tile = out[span].copy_(base[span]).mul_(rest)
                for share, expert in zip(shares, experts, strict=True):
                    tile.add_(buffer.copy_(expert[span]), alpha=share)

    def products(self, gradients: "Mapping[str, Tensor]") -> "dict[str, list[float]]":
        """Return the inner products [K] of every tensor."""
        found: dict[str, list[float]] = {}
        for name in self.names:
            base, gradient = self.base[name].view(-1), gradients[name].view(-1)
            experts = [expert[name].view(-1) for expert in self.experts]
            total = [0.0] * len(experts)
            for span, buffer, origin in self._tiles(name):
                origin.copy_(base[span])
                tile = gradient[span]
                for k, expert in enumerate(experts):
                    total[k] += float(buffer.copy_(expert[span]).sub_(origin).dot(tile))
            found[name] = total
        return found


class LowRank:
    """Task vectors of adapters, as factors: ``left`` [m, sum r] times ``right`` [sum r, n]."""

    def __init__(self, base: Path, experts: Sequence[Path]) -> None:
        stored, adapters = mapped(base), [factors_of(mapped(folder)) for folder in experts]
        self.factors = {name: [adapter[name] for adapter in adapters] for name in adapters[0]}
        self.names = sorted(self.factors)
        self.base = {name: stored[name] for name in self.names}

    def blend(self, alpha: "Tensor", weights: "Mapping[str, Tensor]") -> None:
        """Write the blend of coefficients [K] into the weights."""
        import torch

        shares = [SCALE * share for share in alpha.tolist()]
        for name in self.names:
            left = torch.cat([b * share for (b, _), share in zip(self.factors[name], shares, strict=True)], 1)
            right = torch.cat([a for _, a in self.factors[name]])
            weights[name].copy_(self.base[name]).addmm_(left, right)

    def products(self, gradients: "Mapping[str, Tensor]") -> "dict[str, list[float]]":
        """Return the inner products [K] of every tensor."""
        import torch

        found: dict[str, list[float]] = {}
        for name in self.names:
            left = torch.cat([b for b, _ in self.factors[name]], 1)
            right = torch.cat([a for _, a in self.factors[name]])
            each = ((gradients[name] @ right.T) * left).sum(0)
            found[name] = (SCALE * each.view(len(self.factors[name]), -1).sum(1)).tolist()
        return found


def task_vectors(kind: Kind, base: Path, experts: Sequence[Path]) -> Dense | LowRank:
    """Open the experts."""
    return {"dense": Dense, "lora": LowRank}[kind](base, experts)


def plain_model(base: Path) -> Any:
    """Load a model as transformers has it, in float32, without gradients."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    return model.eval().requires_grad_(False)
