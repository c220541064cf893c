"""Adapters without their products: the blend and its gradient through the factors of all experts at once.

    theta = theta_0 + [L_1 a_1, ..., L_K a_K] [R_1; ...; R_K]          L_k = s_k B_k, R_k = A_k
    < G, L_k R_k > over rows i = sum_i (G R_k^T)[i] . L_k[i]
    < L_i R_i, L_j R_j > = sum( (L_i^T L_j) * (R_i R_j^T) )             [r_i, r_j] matrices only

One matrix product of inner size sum_k r_k per tensor each way, where K products and K sums would read and write every
element K times. Chunks are runs of whole rows but for the rows that hold a boundary, which are done piece by piece.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from consilience.coefficients.coefficients import Alpha
from consilience.experts.block import Scratch
from consilience.experts.stack import Stack


@dataclass(frozen=True)
class Factors:
    """All experts' factors of one tensor: ``left`` [m, R], ``right`` [R, n], and whose each of the R columns is."""

    left: Any
    right: Any
    expert: Any


def suits(stack: Stack) -> bool:
    """Whether a tensor is changed by nothing but LoRA pairs, on a base without one."""
    return stack.base.pair is None and not stack.wide and stack.low_rank


def read_factors(tensor: Stack, scratch: Scratch, device: Any) -> Factors:
    """Read the factors of every expert that changes the tensor."""
    import torch

    lefts: list[Any] = []
    rights: list[Any] = []
    owners: list[int] = []
    for k, source in enumerate(tensor.rows):
        if source.pair is not None:
            left, right = scratch.factors(source, np.float32)
            lefts.append(left * np.float32(source.pair.scale))
            rights.append(right)
            owners += [k] * left.shape[1]
    left = torch.from_numpy(np.concatenate(lefts, 1)).to(device)
    return Factors(left, torch.from_numpy(np.concatenate(rights, 0)).to(device), torch.tensor(owners, device=device))


@dataclass(frozen=True)
class Split:
    """Pieces of a matrix: whole rows (first, last, piece), parts of rows (row, first column, last column, piece)."""

    whole: list[tuple[int, int, int]]
    parts: list[tuple[int, int, int, int]]


def split_pieces(starts: Sequence[int], stops: Sequence[int], width: int) -> Split:
    """Return how pieces of a flat tensor lie in rows of ``width`` elements."""
    whole: list[tuple[int, int, int]] = []
    parts: list[tuple[int, int, int, int]] = []
    for piece, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        first, last = -(-start // width), stop // width
        if first > last:  # inside one row
            parts.append((start // width, start % width, start % width + stop - start, piece))
            continue
        if start % width:
            parts.append((start // width, start % width, width, piece))
        if first < last:
            whole.append((first, last, piece))
        if stop % width:
            parts.append((last, 0, stop % width, piece))
    return Split(whole, parts)


def add_update(factors: Factors, alpha: Alpha, starts: Sequence[int], stops: Sequence[int], theta: Any) -> None:
    """Add ``sum_k alpha[k, piece] L_k R_k`` to ``theta`` [m, n] in place; ``alpha`` is [K, pieces]."""
    import torch

    split = split_pieces(starts, stops, theta.shape[1])
    weights = torch.from_numpy(alpha.astype(np.float32)).to(factors.left.device)[factors.expert]
    for first, last, piece in split.whole:
        theta[first:last].addmm_(factors.left[first:last] * weights[:, piece], factors.right)
    for row, low, high, piece in split.parts:
        theta[row, low:high] += (factors.left[row] * weights[:, piece]) @ factors.right[:, low:high]


def inner_products(factors: Factors, gradient: Any, starts: Sequence[int], stops: Sequence[int], experts: int) -> Alpha:
    """Return ``< gradient, L_k R_k >`` over every piece, [pieces, K] in float64; ``gradient`` is [m, n] float32."""
    import torch

    split = split_pieces(starts, stops, gradient.shape[1])
    columns = torch.zeros(len(starts), factors.left.shape[1], dtype=torch.float64, device=factors.left.device)
    products = (gradient @ factors.right.T) * factors.left if split.whole else None
    for first, last, piece in split.whole:
        assert products is not None
        columns[piece] += products[first:last].sum(0, dtype=torch.float64)
    for row, low, high, piece in split.parts:
        columns[piece] += (factors.right[:, low:high] @ gradient[row, low:high]) * factors.left[row]
    out = torch.zeros(len(starts), experts, dtype=torch.float64, device=columns.device)
    return np.asarray(out.index_add_(1, factors.expert, columns).cpu().numpy())


def gram(factors: Factors, base: Iterable[tuple[int, Any]], experts: int) -> Alpha:
    """Return the inner products of ``theta_0, L_1 R_1, ..., L_K R_K``, [1 + K, 1 + K] in float64.

    Args:
        factors: of all experts.
        base: theta_0 as (first row, float32 values [n, columns]), block by block.
        experts: K.
    """
    import torch

    own = torch.nn.functional.one_hot(factors.expert, experts).double()
    left, right = factors.left.double(), factors.right.double()
    out = torch.zeros(1 + experts, 1 + experts, dtype=torch.float64)
    out[1:, 1:] = own.T @ ((left.T @ left) * (right @ right.T)) @ own
    for first, rows in base:
        flat = rows.flatten().double()
        out[0, 0] += flat @ flat
        met = (rows @ factors.right.T) * factors.left[first : first + len(rows)]
        out[0, 1:] += met.sum(0, dtype=torch.float64) @ own
    out[1:, 0] = out[0, 1:]
    return out.numpy()
