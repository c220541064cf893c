"""What a routed layer does to bfloat16 on a CPU besides large products: scores, weights, few tokens' own factors.

As tensor operations each of these steps takes longer to begin than to do, and there are about twenty of them a layer.
"""

from typing import Any

import numpy as np

from consilience.jit import inlined, reporting
from consilience.kernels.pieces import widened

#: Ways to a local logit of a product z = u . prototype: 0, z / std(u), |z|, z; the last two over the temperature.
NONE, SCALED, MAGNITUDE, PLAIN = range(4)
#: Of the layer normalisation in ``SCALED``.
NORM_EPSILON = 1e-5


@inlined
def _narrow(value: Any) -> Any:
    """The bits of the nearest bfloat16, ties to even; what is no number stays none."""
    bits = np.float32(value).view(np.uint32)
    if value != value:
        return np.uint16(0x7FC0)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@inlined
def _inverse_deviation(u: Any) -> Any:
    """1 / sqrt(var(u) + 1e-5) of an activation's bits [in]: what a layer normalisation multiplies by."""
    total, squares = np.float32(0), np.float32(0)
    for i in range(u.size):
        total += widened(u[i])
    mean = total / np.float32(u.size)
    for i in range(u.size):
        away = widened(u[i]) - mean
        squares += away * away
    return np.float32(1 / np.sqrt(squares / u.size + NORM_EPSILON))


@inlined
def _choose(logits: Any, u: Any, bias: Any, known: Any, way: int, temperature: Any, k: int, weights: Any) -> None:
    """Turn products [K] into logits, and write the softmax of the k largest into ``weights`` [K]; the others have 0.

    Then ``known`` of that is taken and 1 - ``known`` of the mean of all whose ``bias`` is not -inf.
    """
    count = len(logits)
    scale = _inverse_deviation(u) if way == SCALED else np.float32(1)
    for e in range(count):
        z = logits[e]
        if way == NONE:
            z = np.float32(0)
        elif way == SCALED:
            z = z * scale
        elif way == MAGNITUDE:
            z = abs(z) / temperature
        else:
            z = z / temperature
        logits[e] = z + bias[e]
        weights[e] = np.float32(-1)
    total, top = np.float32(0), np.float32(0)
    for n in range(k):
        best = -1
        for e in range(count):
            if weights[e] < 0 and (best < 0 or logits[e] > logits[best]):
                best = e
        if n == 0:
            top = logits[best]
        weights[best] = np.exp(logits[best] - top)
        total += weights[best]
    for e in range(count):
        weights[e] = np.float32(0) if weights[e] < 0 else weights[e] / total
    if known < 1:
        present = 0
        for e in range(count):
            present += bias[e] > -np.inf
        for e in range(count):
            even = np.float32(1) / np.float32(present) if bias[e] > -np.inf else np.float32(0)
            weights[e] = known * weights[e] + (np.float32(1) - known) * even


@inlined
def _dot(row: Any, x: Any) -> Any:
    total = np.float32(0)
    for i in range(x.size):
        total += widened(row[i]) * x[i]
    return total


@inlined
def _dots(rows: Any, at: int, end: int, x: Any, out: Any) -> None:
    """``out[r] = rows[r] . x`` for ``at <= r < end``; four rows at once, for each is waited for."""
    r = at
    while r + 4 <= end:
        row0, row1, row2, row3 = rows[r], rows[r + 1], rows[r + 2], rows[r + 3]
        total0, total1, total2, total3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        for i in range(x.size):
            total0 += widened(row0[i]) * x[i]
            total1 += widened(row1[i]) * x[i]
            total2 += widened(row2[i]) * x[i]
            total3 += widened(row3[i]) * x[i]
        out[r], out[r + 1], out[r + 2], out[r + 3] = total0, total1, total2, total3
        r += 4
    for last in range(r, end):
        out[last] = _dot(rows[last], x)


@inlined
def _add_rows(rows: Any, at: int, end: int, hidden: Any, weight: Any, total: Any) -> None:
    """``total += weight * hidden[r] * rows[r]`` summed over ``at <= r < end``; four rows at once."""
    r = at
    while r + 4 <= end:
        row0, row1, row2, row3 = rows[r], rows[r + 1], rows[r + 2], rows[r + 3]
        h0, h1, h2, h3 = hidden[r] * weight, hidden[r + 1] * weight, hidden[r + 2] * weight, hidden[r + 3] * weight
        for j in range(total.size):
            total[j] += h0 * widened(row0[j]) + h1 * widened(row1[j]) + h2 * widened(row2[j]) + h3 * widened(row3[j])
        r += 4
    for last in range(r, end):
        row, h = rows[last], hidden[last] * weight
        for j in range(total.size):
            total[j] += h * widened(row[j])


@reporting
def weigh(
    u: Any, products: Any, edges: Any, bias: Any, known: Any, way: int, temperature: Any, k: int, told: Any
) -> None:
    """Multiply A u of all experts by the experts' weights, in place.

    Args:
        u: bits of the activations, uint16 [B, T, in].
        products: bits of u A^T and u . prototypes, uint16 [B, T, R + K].
        edges: where each expert's rows begin and the last's end, [K + 1].
        bias: added to the logits of each sequence, float32 [B, K].
        known: share of the routed weights of each sequence, float32 [B]; the rest is the experts' mean.
        way: to a local logit.
        temperature: divides the logits of two ways.
        k: experts a token.
        told: the weights, float32 [B, T, K], which are written to; of no entries: nobody asks for them.
    """
    count, total = len(edges) - 1, edges[-1]
    logits, weights = np.empty(count, np.float32), np.empty(count, np.float32)
    for b in range(u.shape[0]):
        for t in range(u.shape[1]):
            row = products[b, t]
            for e in range(count):
                logits[e] = widened(row[total + e])
            _choose(logits, u[b, t], bias[b], known[b], way, temperature, k, weights)
            if told.size:
                told[b, t] = weights
            for e in range(count):
                for r in range(edges[e], edges[e + 1]):
                    row[r] = _narrow(widened(row[r]) * weights[e]) if weights[e] != 0 else np.uint16(0)


@inlined
def _add_chosen(out_of: Any, edges: Any, hidden: Any, weights: Any, added: Any, y: Any) -> None:
    """``y += sum_e weights[e] B_e hidden_e`` over the experts that are used."""
    added[:] = 0
    for e in range(len(weights)):
        if weights[e] != 0:
            _add_rows(out_of, edges[e], edges[e + 1], hidden, weights[e], added)
    for j in range(added.size):
        y[j] = _narrow(widened(y[j]) + added[j])


@reporting
def add_chosen(
    u: Any, products: Any, out_of: Any, edges: Any, bias: Any, known: Any, way: int, temperature: Any, k: int,
    told: Any, y: Any,
) -> None:  # fmt: skip
    """Add to each token the B A u of the k experts that it uses, where A u of all is known; no other B is read.

    Args:
        u: bits of the activations, uint16 [B, T, in].
        products: bits of u A^T and u . prototypes, uint16 [B, T, R + K].
        out_of: bits of all B, transposed, uint16 [R, out].
        edges: where each expert's rows begin and the last's end, [K + 1].
        bias: added to the logits of each sequence, float32 [B, K].
        known: share of the routed weights of each sequence, float32 [B]; the rest is the experts' mean.
        way: to a local logit.
        temperature: divides the logits of two ways.
        k: experts a token.
        told: the weights, float32 [B, T, K], which are written to; of no entries: nobody asks for them.
        y: bits of the outputs, uint16 [B, T, out], which are written to.
    """
    count, total = len(edges) - 1, edges[-1]
    added, hidden = np.empty(y.shape[2], np.float32), np.empty(total + count, np.float32)
    weights = np.empty(count, np.float32)
    for b in range(u.shape[0]):
        for t in range(u.shape[1]):
            for r in range(hidden.size):
                hidden[r] = widened(products[b, t, r])
            _choose(hidden[total:], u[b, t], bias[b], known[b], way, temperature, k, weights)
            if told.size:
                told[b, t] = weights
            _add_chosen(out_of, edges, hidden, weights, added, y[b, t])


@reporting
def add_own(
    u: Any, into: Any, out_of: Any, edges: Any, bias: Any, known: Any, way: int, temperature: Any, k: int,
    told: Any, y: Any,
) -> None:  # fmt: skip
    """Add to each of few tokens the factors of the k experts that it uses; nothing else is read.

    Args:
        u: bits of the activations, uint16 [B, T, in].
        into: bits of all A and of the prototypes, uint16 [R + K, in].
        out_of: bits of all B, transposed, uint16 [R, out].
        edges: where each expert's rows begin and the last's end, [K + 1].
        bias: added to the logits of each sequence, float32 [B, K].
        known: share of the routed weights of each sequence, float32 [B]; the rest is the experts' mean.
        way: to a local logit.
        temperature: divides the logits of two ways.
        k: experts a token.
        told: the weights, float32 [B, T, K], which are written to; of no entries: nobody asks for them.
        y: bits of the outputs, uint16 [B, T, out], which are written to.
    """
    count, total = len(edges) - 1, edges[-1]
    x, added = np.empty(u.shape[2], np.float32), np.empty(y.shape[2], np.float32)
    hidden, weights = np.empty(total + count, np.float32), np.empty(count, np.float32)
    for b in range(u.shape[0]):
        for t in range(u.shape[1]):
            for i in range(x.size):
                x[i] = widened(u[b, t, i])
            _dots(into, total, total + count, x, hidden)
            for e in range(total, total + count):
                hidden[e] = widened(_narrow(hidden[e]))  # as those of many tokens are: a token is routed one way
            _choose(hidden[total:], u[b, t], bias[b], known[b], way, temperature, k, weights)
            if told.size:
                told[b, t] = weights
            for e in range(count):
                if weights[e] != 0:
                    _dots(into, edges[e], edges[e + 1], x, hidden)
            _add_chosen(out_of, edges, hidden, weights, added, y[b, t])
