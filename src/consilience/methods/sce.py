"""SCE: select the elements that differ most between experts, calculate weights, erase minority signs."""

from typing import Annotated, Any, Literal

import numpy as np

from consilience.jit import kernel
from consilience.kernels.reduce import LEAF, sum_squares
from consilience.methods.mergekit import Int8Mask
from consilience.methods.program import Arithmetic, Elementwise, Score, Sums, Tally, Top
from consilience.methods.signature import Default, Range, TensorSpec, elementwise


@kernel
def variance(rows: Any, base: Any, start: int, out: Any) -> None:
    """Write each element's variance over the rows, in float64 up to its rounding; equal rows have exactly 0."""
    count, size = rows.shape
    total, squares = np.zeros(size), np.zeros(size)
    first = rows[0]
    for k in range(1, count):
        row = rows[k]
        for i in range(size):
            more = np.float64(row[i]) - np.float64(first[i])
            total[i] += more
            squares[i] += more * more
    result = out[0]
    for i in range(size):
        result[i] = np.float32((squares[i] - total[i] * total[i] / count) / count)


@kernel
def energies(rows: Any, base: Any, start: int, out: Any) -> None:
    """Write each row's sum of squares."""
    buffer = np.empty(LEAF)
    for k in range(rows.shape[0]):
        out[k] = sum_squares(rows[k], buffer)


@kernel
def _agreeing_mean(rows: Any, base: Any, start: int, weights: Any, out: Any) -> None:
    """Per element: the weighted mean of the rows whose sign is that of the rows' plain sum (0 counts as +)."""
    zero = rows.dtype.type(0)
    for i in range(out.size):
        total = 0.0
        for k in range(len(weights)):
            total += np.float64(rows[k, i])
        positive = total >= 0.0
        agreeing = zero
        divisor = zero
        for k in range(len(weights)):
            x = rows[k, i]
            agrees = x > zero if positive else x < zero
            weight = rows.dtype.type(weights[k])
            agreeing += weight * x if agrees else zero
            divisor += weight if agrees else zero
        out[i] = agreeing / max(divisor, rows.dtype.type(1e-6))


@elementwise(source="Wan et al. 2024, FuseChat, arXiv:2408.07990", mergekit={"select_topk": 1.0, "shares": "floored"})
def sce(
    tensor: TensorSpec,
    *,
    select_topk: Annotated[float, Default(0.1), Range(0, 1), "share of the elements, by variance, that is merged"],
    shares: Annotated[
        Literal["energy", "floored"],
        Default("energy"),
        "energy: the paper's; floored: mergekit's, equal ones where the mean squares sum to less than 1e-6",
    ],
    lambda_: Annotated[float, Default(1.0), "multiplier of the merged task vector"],
    int8_mask: Int8Mask,
) -> Elementwise:
    """Merge the elements whose variance over the experts is largest, by weights from what is left of each expert.

    S: tau'_k = tau_k at the floor(select_topk * n) elements of largest variance over k (n: those with one), else 0
    C: w_k = sum tau'_k^2 / sum_j sum tau'_j^2, over the tensor
    E: theta = theta_0 + lambda sum_{k in A} w_k tau'_k / sum_{k in A} w_k,   A: sign(tau'_k) = sign(sum_j tau'_j)

    Known disagreement: mergekit takes equal weights where sum_j mean(tau'_j^2) < 1e-6, which is so for most
    fine-tunes' tensors (``shares: floored``), and selects everything unless told. The sign 0 counts as +.
    """
    del int8_mask
    rows, size = len(tensor.experts), tensor.numel
    keep = Top(Score(variance), select_topk) if select_topk < 1 else None
    equal = (1.0 / rows,) * rows

    def finish(sums: Sums) -> Elementwise:
        assert sums.tally is not None
        total = float(sums.tally.sum())
        small = total / size < 1e-6 if shares == "floored" else total == 0.0
        weights = equal if small or not total < float("inf") else tuple(float(x) / total for x in sums.tally)
        return Elementwise("task_vectors", Arithmetic(_agreeing_mean, weights), keep=keep, scale=lambda_)

    return Elementwise(
        "task_vectors", Arithmetic(_agreeing_mean, equal), keep=keep, scale=lambda_, needs="tally", finish=finish,
        tally=Tally(energies, rows),
    )  # fmt: skip
