"""Adapters that work beside their layer: its weight stays the base's, and coefficients act on activations.

    y = x W_0^T + sum_p [ (x R^T) * a_p ] L_p^T          R = [R_1; ...; R_K],  L = [L_1, ..., L_K],  p: pieces of rows

with ``a_p[j] = scale_k alpha[k, p]`` for the columns j of expert k. A step then neither rebuilds the weight nor makes
its gradient; dL/dalpha comes from what the adapters see. It costs 4 T R (m + n) multiplications where the weight costs
2 T m n for its gradient and 4 m n R for its blend and its products, for T tokens, R ranks and an [m, n] layer. A chunk
that ends inside a row makes that row one product of its own: ``y_i = x . v_i``, ``v_i`` [n] the row of the update.

Held side by side are the factors of as many layers as ``Leaf.room`` allows: on an accelerator all, on the CPU a part
of the model's own bytes. Those of the others are read from mapped files whenever they are used, so that memory does not
grow with the number of experts. While the model plays one expert, that expert's are held and the others left out: an
answer takes a pass for every token.

Under autocast every linear layer converts its input by itself, and the update would once more. Layers that take the
same input (queries, keys and values; gate and up) get it converted once.

A trained correction dL R_0 + L_0 dR (``learned/correction.py``) is made in the same products as the adapters' updates:
y + [z * (a, 1)] [L, dL, L_0]^T with z = x [R; R_0; dR]^T.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from consilience.checkpoints.mapped import mapped
from consilience.experts.model import Source
from consilience.experts.stack import Stack
from consilience.student import low_rank
from consilience.student.extents import Extent

#: Tokens of a usual step, for what pays.
TOKENS = 512


@dataclass
class Leaf:
    """What the layers of a student share.

    ``alpha`` [K, N] are the coefficients of the present step, which gradients reach, ``expert`` the one that the model
    plays instead; with neither, nothing is added. ``room`` is how many bytes of factors may still be held.
    """

    alpha: Any = None
    expert: int | None = None
    room: float = float("inf")
    _cast: tuple[Any, ...] = ()
    _buffers: dict[Any, Any] = field(default_factory=dict[Any, Any])

    def buffer(self, purpose: str, shape: tuple[int, ...], like: Any) -> Any:
        """Return a tensor of the type of ``like``, whose memory the next call for this purpose takes again."""
        size, key = prod(shape), (purpose, like.dtype)
        if key not in self._buffers or self._buffers[key].numel() < size:
            self._buffers[key] = like.new_empty(size)
        return self._buffers[key][:size].view(shape)

    def narrowed(self, _module: Any, inputs: Any) -> Any:
        """Hand on what autocast makes of a layer's input: a forward pre-hook."""
        x = inputs[0]
        device = x.device.type
        if not torch.is_autocast_enabled(device) or x.dtype != torch.float32:
            return None
        known = (x._version, torch.get_autocast_dtype(device), torch.is_grad_enabled())
        if not (self._cast and self._cast[0] is x and self._cast[1] == known):
            self._cast = x, known, x.to(known[1])
        return (self._cast[2], *inputs[1:])

    def play(self, expert: int | None) -> None:
        """Let the layers be an expert's, or (None) the base's until there are coefficients."""
        self.alpha, self.expert, self._cast = None, expert, ()


class Factored:
    """One linear layer's adapters of all experts, and their update as a function of the layer's input."""

    def __init__(self, tensor: Stack, extent: Extent, leaf: Leaf, device: Any) -> None:
        self.leaf, self.calls = leaf, 0
        pairs = [(k, source) for k, source in enumerate(tensor.rows) if source.pair is not None]
        self._sides = [stored_factors(source) for _, source in pairs]
        ranks = [left.shape[1] for left, _ in self._sides]
        self.height, self.width, self.rank = *tensor.shape, sum(ranks)
        numbers = torch.tensor(ranks)
        self._owner = torch.tensor([k for k, _ in pairs]).repeat_interleave(numbers).to(device)
        scales = [source.pair.scale for _, source in pairs if source.pair is not None]
        scale = torch.tensor(scales, dtype=torch.float64).repeat_interleave(numbers)
        # Some accelerators have no float64.
        self._scale = (scale if torch.device(device).type == "cpu" else scale.float()).to(device)[:, None]
        self._index = torch.from_numpy(extent.indices).to(device)
        self.runs, self.broken = _runs(extent, self.height, self.width)
        self._held: _Held | None = None
        self._pairs = {k: (*side, scale) for (k, _), side, scale in zip(pairs, self._sides, scales, strict=True)}
        self._own: tuple[Any, ...] | None = None
        #: L_0 [m, c], R_0 [c, n], dL [m, c], dR [c, n] of a correction.
        self.correction: tuple[Any, Any, Any, Any] | None = None

    @property
    def takes_correction(self) -> bool:
        """Whether a correction can be made with the adapters' updates: every row has its coefficients."""
        return not self.broken and all(piece is not None for *_, piece in self.runs)

    @property
    def finite(self) -> bool:
        """Whether every factor holds finite values."""
        return all(bool(side.isfinite().all()) for sides in self._sides for side in sides)

    def hook(self, _module: Any, inputs: Any, output: Any) -> Any:
        """Add the update to a layer's output: a forward hook."""
        self.calls += 1
        if self.leaf.expert is not None:
            return self._played(self.leaf.expert, inputs[0], output)
        return output if self.leaf.alpha is None else output + self.update(inputs[0]).to(output.dtype)

    def forget(self) -> None:
        """Release the factors of the expert that was played."""
        self._own = None

    def _played(self, expert: int, x: Any, output: Any) -> Any:
        """Return a layer's output with one expert's update."""
        if expert not in self._pairs:
            return output
        device = x.device.type
        kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if self._own is None or self._own[0] != (expert, kind):
            left, right, scale = self._pairs[expert]
            self._own = (expert, kind), left.T.to(x.device, kind), right.T.to(x.device, kind), scale
        _, left, right, scale = self._own
        return output + (((x.to(kind) @ right) * scale) @ left).to(output.dtype)

    def update(self, x: Any) -> Any:
        """Return the update [..., m] of inputs ``x`` [..., n] at the present coefficients."""
        alpha, device = self.leaf.alpha, x.device.type
        auto = torch.is_autocast_enabled(device)
        kind = torch.get_autocast_dtype(device) if auto else alpha.dtype
        weights = alpha[:, self._index][self._owner] * self._scale.to(alpha.dtype)  # [R, pieces]
        flat = x.reshape(-1, self.width).to(kind)
        moved = (None, None) if self.correction is None else self.correction[2:]
        return _Update.apply(flat, weights, *moved, self).view(*x.shape[:-1], self.height)

    def sides(self, like: Any, *, fresh: bool) -> tuple[Any, Any]:
        """Return L [m, R] and R [R, n], with the type and device of ``like``, until the next call for any layer.

        With a correction these are [L, dL, L_0] and [R; R_0; dR]; ``fresh``: its moved sides may have changed.
        """
        kind = like.dtype, like.device, self.correction is not None
        if self._held is None or self._held.kind != kind:
            lefts, rights = self._parts()
            rank = sum(left.shape[1] for left in lefts)
            size = (self.height + self.width) * rank * like.element_size()
            self.leaf.room += 0 if self._held is None else self._held.size
            self._held = None
            if size > self.leaf.room:
                left = self.leaf.buffer("left", (self.height, rank), like)
                right = self.leaf.buffer("right", (rank, self.width), like)
                return _side_by_side(lefts, left, 1), _side_by_side(rights, right, 0)
            self.leaf.room -= size
            left, right = like.new_empty(self.height, rank), like.new_empty(rank, self.width)
            self._held = _Held(kind, size, _side_by_side(lefts, left, 1), _side_by_side(rights, right, 0))
        elif fresh and self.correction is not None:
            moved_left, moved_right = (side.detach() for side in self.correction[2:])
            self._held.left.narrow(1, self.rank, moved_left.shape[1]).copy_(moved_left)
            self._held.right[-len(moved_right) :].copy_(moved_right)
        return self._held.left, self._held.right

    def _parts(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Return what stands side by side in L, and in R."""
        lefts, rights = zip(*self._sides, strict=True)
        if self.correction is None:
            return lefts, rights
        left, right, moved_left, moved_right = (side.detach() for side in self.correction)
        return (*lefts, moved_left, left), (*rights, right, moved_right)

    def row(self, row: int, left: Any, right: Any, weights: Any) -> Any:
        """Return one broken row [n] of the update."""
        values = right.new_zeros(self.width)
        for low, high, piece in self.broken[row]:
            values[low:high] = (left[row] * weights[:, piece]) @ right[:, low:high]
        return values


@dataclass(frozen=True)
class _Held:
    """Sides that stay from call to call: for which type, device and correction or none, their bytes, and L and R."""

    kind: tuple[Any, ...]
    size: int
    left: Any
    right: Any


class _Update(torch.autograd.Function):
    """The update of flat inputs x [T, n] at weights [R, pieces], with a correction's moved sides if there is one.

    Kept for the backward pass is z = x R^T [T, R], and x where a correction or a broken row needs it.
    """

    @staticmethod
    def forward(ctx: Any, x: Any, weights: Any, moved_left: Any, moved_right: Any, layer: Factored) -> Any:
        left, right = layer.sides(x, fresh=True)
        z = x @ right.T
        narrow = _with_ones(weights, z)
        ctx.layer = layer
        ctx.save_for_backward(z, weights, x if layer.broken or moved_left is not None else None)
        if len(layer.runs) == 1 and not layer.broken:
            return (z * narrow[:, 0]) @ left.T
        out = x.new_zeros(x.shape[0], layer.height)
        for first, last, piece in layer.runs:
            if piece is not None:
                out[:, first:last] = (z * narrow[:, piece]) @ left[first:last].T
        for row in layer.broken:
            out[:, row] = x @ layer.row(row, left, right, narrow)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        layer: Factored = ctx.layer
        z, weights, x = ctx.saved_tensors
        gradient = gradient.to(z.dtype)
        left, right = layer.sides(gradient, fresh=False)
        rank, narrow = len(weights), _with_ones(weights, z)
        slope, into = torch.zeros_like(weights), torch.zeros_like(z)
        for first, last, piece in layer.runs:
            if piece is not None:
                seen = gradient[:, first:last] @ left[first:last]  # [T, R]
                slope[:, piece] += (seen[:, :rank] * z[:, :rank]).sum(0, dtype=weights.dtype)
                into.addcmul_(seen, narrow[:, piece])
        found = into @ right
        moved_left = moved_right = None
        if z.shape[1] > rank:
            count = (z.shape[1] - rank) // 2
            moved_left = (gradient.T @ z[:, rank : rank + count]).to(weights.dtype)
            moved_right = (into[:, rank + count :].T @ x).to(weights.dtype)
        for row in layer.broken:
            own = gradient[:, row]
            found.addr_(own, layer.row(row, left, right, narrow))
            pulled = own @ x  # [n]
            for low, high, piece in layer.broken[row]:
                slope[:, piece] += left[row] * (right[:, low:high] @ pulled[low:high])
        return found, slope, moved_left, moved_right, None


def _side_by_side(parts: Sequence[Any], out: Any, axis: int) -> Any:
    """Write parts into ``out`` along an axis, in its type."""
    at = 0
    for part in parts:
        out.narrow(axis, at, part.shape[axis]).copy_(part)
        at += part.shape[axis]
    return out


def _with_ones(weights: Any, z: Any) -> Any:
    """Return the weights in the type of z [T, R'], and 1 for what is beside the adapters: [R', pieces]."""
    narrow = weights.to(z.dtype)
    if z.shape[1] == len(weights):
        return narrow
    return torch.cat([narrow, narrow.new_ones(z.shape[1] - len(weights), narrow.shape[1])])


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


def stored_factors(source: Source) -> tuple[Any, Any]:
    """Return one pair as (left [m, r], right [r, n]): the file's own pages, in the type they are stored in."""
    pair, storage = source.pair, source.pair_storage
    assert pair is not None
    assert storage is not None
    b, a = mapped(storage, pair.b).view(-1, pair.rank), mapped(storage, pair.a).view(pair.rank, -1)
    return (a.T, b.T) if pair.transposed else (b, a)


def suits(tensor: Stack, pieces: int) -> bool:
    """Whether a tensor's update is adapters alone, cheaper through the activations than through the weight."""
    if len(tensor.shape) != 2 or tensor.base.pair is not None or not tensor.low_rank:
        return False
    pairs = [row.pair for row in tensor.rows if row.pair is not None]
    if any(side.dtype.name not in ("BF16", "F16", "F32", "F64") for pair in pairs for side in (pair.a, pair.b)):
        return False
    (m, n), ranks = tensor.shape, sum(pair.rank for pair in pairs)
    beside = 4 * TOKENS * ranks * (m + n) + 4 * TOKENS * n * (pieces - 1)
    return beside <= 2 * TOKENS * m * n + 4 * m * n * ranks


def layers_of(model: Any, parameters: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return the linear layer of every named tensor that belongs to one layer alone and is not the output layer's."""
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
