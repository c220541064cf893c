"""Adapters that work beside their layer: its weight stays the base's, and coefficients act on activations.

    y = x W_0^T + sum_p [ (x R^T) * a_p ] L_p^T          R = [R_1; ...; R_K],  L = [L_1, ..., L_K],  p: pieces of rows

with ``a_p[j] = scale_k alpha[k, p]`` for the columns j of expert k. A step then neither rebuilds the weight, nor makes
its gradient, nor reads a stored byte, and autograd gives dL/dalpha itself. It costs 4 T R (m + n) multiplications where
the weight costs 2 T m n for its gradient and 4 m n R for its blend and its products, for T tokens, R ranks and an
[m, n] layer. A chunk that ends inside a row makes that row one product of its own: ``y_i = x . v_i``, ``v_i`` [n] the
row of the update.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from consilience.engine.block import Scratch
from consilience.engine.plan import TensorPlan
from consilience.student import low_rank
from consilience.student.extents import Extent

#: Tokens of a usual step, for what pays.
TOKENS = 512


@dataclass
class Leaf:
    """The coefficients [K, N] of the present step as a torch tensor that gradients reach; None: nothing is added."""

    alpha: Any = None


class Factored:
    """One linear layer's adapters of all experts, and their update as a function of the layer's input."""

    def __init__(self, tensor: TensorPlan, extent: Extent, leaf: Leaf, scratch: Scratch, device: Any) -> None:
        import torch

        self.leaf, self.calls = leaf, 0
        sides, owners, scales = _stored_factors(tensor, scratch)
        self._left = torch.cat([left for left, _ in sides], 1).to(device)
        self._right = torch.cat([right for _, right in sides], 0).to(device)
        self._owner = torch.tensor(owners, device=device)
        self._scale = torch.tensor(scales, dtype=torch.float64, device=device)[:, None]
        self._index = torch.from_numpy(extent.indices).to(device)
        self._runs, self._broken = _runs(extent, tensor.shape[0], self._right.shape[1])

    @property
    def finite(self) -> bool:
        """Whether every factor holds finite values."""
        return all(bool(side.isfinite().all()) for side in (self._left, self._right))

    def hook(self, _module: Any, inputs: Any, output: Any) -> Any:
        """Add the update to a layer's output: a forward hook."""
        self.calls += 1
        return output if self.leaf.alpha is None else output + self.update(inputs[0]).to(output.dtype)

    def update(self, x: Any) -> Any:
        """Return the update [..., m] of inputs ``x`` [..., n] at the present coefficients."""
        import torch
        from torch.nn.functional import linear

        alpha = self.leaf.alpha
        x = x if torch.is_autocast_enabled(x.device.type) else x.to(alpha.dtype)
        left, right = self._left.to(alpha.dtype), self._right.to(alpha.dtype)
        weights = alpha[:, self._index][self._owner] * self._scale.to(alpha.dtype)  # [R, pieces]
        u = linear(x, right)
        if len(self._runs) == 1 and not self._broken:
            return linear(u * weights[:, 0], left)
        parts: list[Any] = []
        for first, last, piece in self._runs:
            if piece is not None:
                parts.append(linear(u * weights[:, piece], left[first:last]))
            elif first in self._broken:
                parts.append(linear(x, self._row(first, left, right, weights)))
            else:
                parts.append(u.new_zeros((*u.shape[:-1], last - first)))
        kind = parts[0].dtype
        return torch.cat([part.to(kind) for part in parts], -1)

    def _row(self, row: int, left: Any, right: Any, weights: Any) -> Any:
        """Return row ``row`` [1, n] of the update, put together from the pieces that share it."""
        import torch

        parts: list[Any] = []
        at = 0
        for low, high, piece in self._broken[row]:
            parts.append(right.new_zeros(low - at))
            parts.append((left[row] * weights[:, piece]) @ right[:, low:high])
            at = high
        parts.append(right.new_zeros(right.shape[1] - at))
        return torch.cat([part.to(right.dtype) for part in parts])[None]


Run = tuple[int, int, int | None]


def _runs(extent: Extent, height: int, width: int) -> tuple[list[Run], dict[int, list[tuple[int, int, int]]]]:
    """Return all rows as runs and the pieces of every broken row (first column, last + 1, piece).

    A run is (first, last + 1, piece); its piece is None if it is a broken row, or rows that no piece covers.
    """
    split = low_rank.split_pieces(extent.starts, extent.stops, width)
    broken: dict[int, list[tuple[int, int, int]]] = {}
    for row, low, high, piece in split.parts:
        broken.setdefault(row, []).append((low, high, piece))
    held: list[Run] = [*split.whole, *((row, row + 1, None) for row in broken)]
    runs: list[Run] = []
    at = 0
    for first, last, piece in sorted(held, key=lambda run: run[0]):
        if at < first:
            runs.append((at, first, None))
        runs.append((first, last, piece))
        at = last
    if at < height:
        runs.append((at, height, None))
    return runs, broken


def _stored_factors(tensor: TensorPlan, scratch: Scratch) -> tuple[list[tuple[Any, Any]], list[int], list[float]]:
    """Return every expert's (left, right) in the type it is stored in, whose each rank is, and its scale."""
    import torch

    kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
    sides: list[tuple[Any, Any]] = []
    owners: list[int] = []
    scales: list[float] = []
    for k, source in enumerate(tensor.rows):
        if source.pair is not None:
            stored = source.pair.b.dtype.name, source.pair.a.dtype.name
            real = np.float64 if "F64" in stored else np.float32
            wide = torch.float64 if real is np.float64 else torch.float32
            kind = kinds.get(stored[0], wide) if stored[0] == stored[1] else wide
            left, right = (torch.from_numpy(side).to(kind, copy=True) for side in scratch.factors(source, real))
            sides.append((left, right))
            owners += [k] * left.shape[1]
            scales += [source.pair.scale] * left.shape[1]
    return sides, owners, scales


def suits(tensor: TensorPlan, pieces: int) -> bool:
    """Whether a tensor's update is adapters alone, cheaper through the activations than through the weight."""
    if len(tensor.shape) != 2 or tensor.program is None or tensor.program.stages or tensor.base.pair is not None:
        return False
    if any(row.dense is not None for row in tensor.rows):
        return False
    (m, n), ranks = tensor.shape, sum(row.pair.rank for row in tensor.rows if row.pair is not None)
    beside = 4 * TOKENS * ranks * (m + n) + 4 * TOKENS * n * (pieces - 1)
    return beside <= 2 * TOKENS * m * n + 4 * m * n * ranks


def layers_of(model: Any, parameters: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return the linear layer of every named tensor that belongs to one layer alone and is not the output layer's."""
    import torch

    owners: dict[int, list[Any]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found: dict[str, Any] = {}
    for name in names:
        held = owners.get(id(parameters[name]), [])
        if len(held) == 1 and held[0] is not head and type(held[0]).forward is torch.nn.Linear.forward:
            found[name] = held[0]
    return found
