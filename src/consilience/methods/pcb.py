"""PCB-Merging: weigh entries by how they compete within their task vector and across task vectors."""

import math
from typing import Annotated, Any

import numpy as np

from consilience.jit import kernel
from consilience.kernels.exponential import exponentials
from consilience.methods.program import Arithmetic, Elementwise, Quantiles, Score, Sums
from consilience.methods.signature import Default, Range, TensorSpec, elementwise

#: Share of the magnitudes at either end that is clamped, as in the paper's code.
_CLAMPED = 1e-4
#: Added to the halved bits of what is not negative.
_POSITIVE = np.uint32(0x40000000)


@kernel
def _magnitudes(rows: Any, base: Any, start: int, out: Any) -> None:
    for k in range(rows.shape[0]):
        row, result = rows[k], out[k]
        for i in range(row.size):
            result[i] = np.float32(abs(row[i]))


@kernel
def _competition(rows: Any, low: Any, high: Any, out: Any) -> None:
    """Write ``exp(K b^2) tanh(tau_k sum_j tau_j)`` to ``out`` [K, n]: b is |tau_k|, clamped, 0 at low, 1 at high."""
    count, size = rows.shape
    total, powers = np.zeros(size), np.empty(size)
    largest = math.exp(count)
    for k in range(count):
        row = rows[k]
        for i in range(size):
            total[i] += np.float64(row[i])
    for k in range(count):
        row, result, least = rows[k], out[k], low[k]
        scale = 1.0 / (high[k] - least) if high[k] > least else 0.0
        for i in range(size):
            balance = (min(max(abs(np.float64(row[i])), least), high[k]) - least) * scale
            powers[i] = count * (balance * balance - 1.0)
        exponentials(powers)
        for i in range(size):
            x = np.float64(row[i]) * total[i]
            # tanh(x) = x - x^3 / 3 + 2 x^5 / 15 to the last place where x is small, as it is for task vectors
            small = x * (1.0 - x * x * (1.0 / 3.0 - x * x * (2.0 / 15.0)))
            result[i] = largest * powers[i] * (small if abs(x) < 1e-3 else math.tanh(x))


@kernel
def _ordered(rows: Any, base: Any, start: int, out: Any, low: Any, high: Any) -> None:
    """Write the competition as floats above 0 in the same order: one bit of the significand is lost."""
    scores = np.empty(rows.shape)
    _competition(rows, low, high, scores)
    bits = out.view(np.uint32)
    for k in range(rows.shape[0]):
        for i in range(rows.shape[1]):
            half = np.float32(abs(scores[k, i])).view(np.uint32) >> np.uint32(1)
            bits[k, i] = _POSITIVE + half if scores[k, i] >= 0 else _POSITIVE - np.uint32(1) - half


@kernel
def _balanced(
    rows: Any, base: Any, start: int, weights: Any, out: Any, low: Any, high: Any, least: Any, most: Any
) -> None:
    scores = np.empty(rows.shape)
    _competition(rows, low, high, scores)
    for i in range(out.size):
        total, divisor = 0.0, 0.0
        for k in range(len(weights)):
            x = np.float64(rows[k, i])
            magnitude = min(max(abs(x), low[k]), high[k])
            clamped = magnitude if x > 0 else -magnitude if x < 0 else 0.0
            even = np.float32(abs(scores[k, i])).view(np.uint32) & ~np.uint32(1)  # as it was ranked
            size = np.float64(np.uint32(even).view(np.float32))
            above = (size if scores[k, i] >= 0 else -size) - least[k]
            share = min(above / (most[k] - least[k]), 1.0) if above > 0 else 0.0
            total += weights[k] * clamped * share
            divisor += share
        out[i] = total / max(divisor, 1e-12)


def competition_of(ordered: Any) -> Any:
    """Return the competition that stands behind what was ranked, [K] float64."""
    bits = np.asarray(ordered, np.float32).view(np.uint32).astype(np.int64)
    positive = bits >= int(_POSITIVE)
    half = np.where(positive, bits - int(_POSITIVE), int(_POSITIVE) - 1 - bits).astype(np.uint32)
    values = (half << np.uint32(1)).view(np.float32).astype(np.float64)
    return np.where(positive, values, -values)


@elementwise(source="Du et al. 2024, Parameter Competition Balancing, arXiv:2410.02396", experts=(1, 64))
def pcb(
    tensor: TensorSpec,
    *,
    ratio: Annotated[float, Default(0.1), Range(0, 1), "share of each task vector's entries that is not left out"],
    lambda_: Annotated[float, Default(1.0), "multiplier of the merged task vector"],
) -> Elementwise:
    """Weigh every entry by its competition with its own task vector's entries and with the other task vectors'.

    s_k   = exp(K b_k^2) tanh(tau_k sum_j tau_j),   b_k = |tau_k|, clamped, scaled to [0, 1] over the tensor
    p_k   = s_k, clamped from below to its (1 - ratio) quantile, scaled to [0, 1] over the tensor
    theta = theta_0 + lambda sum_k p_k c_k / sum_k p_k,   c_k = tau_k with |tau_k| clamped

    Magnitudes are clamped to their quantiles at 1e-4 and 1 - 1e-4. Known disagreement: the paper's code takes all these
    quantiles over the whole flattened model, here they are of each tensor.
    """
    count, size = len(tensor.experts), tensor.numel
    everyone = tuple(range(count))
    ones = (1.0,) * count

    def ranks(*places: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return counts from above, and rows, of every expert's sorted entries at places."""
        return tuple(size - max(0, min(size - 1, at)) for at in places for _ in everyone), everyone * len(places)

    def merge(*args: Any) -> Arithmetic:
        return Arithmetic(_balanced, ones, args)

    def compete(sums: Sums) -> Elementwise:
        assert sums.quantiles is not None
        low, high = sums.quantiles.reshape(2, count)

        def finish(later: Sums) -> Elementwise:
            assert later.quantiles is not None
            least, most = competition_of(later.quantiles).reshape(2, count)
            return Elementwise("task_vectors", merge(low, high, least, most), scale=lambda_)

        score = Score(_ordered, (low, high), count)
        wanted = Quantiles(score, *ranks(int(size * (1 - ratio)), size - 1))
        return Elementwise("task_vectors", unknown, needs="quantiles", finish=finish, quantiles=wanted)

    unknown = merge(*(np.zeros(count) for _ in range(4)))
    wanted = Quantiles(Score(_magnitudes, (), count), *ranks(int(size * _CLAMPED), int(size * (1 - _CLAMPED) - 1)))
    return Elementwise("task_vectors", unknown, needs="quantiles", finish=compete, quantiles=wanted, stages=2)
