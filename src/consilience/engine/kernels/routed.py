"""What a routed layer does to bfloat16 on a CPU besides large products: scores, weights, few tokens' own factors.

As tensor operations each of these steps takes longer to begin than to do, and there are about twenty of them a layer.
"""

from typing import Any

import numpy as np

from consilience.engine.kernels.jit import inlined, reporting
from consilience.engine.kernels.pieces import widened

#: Ways to a local logit of a product z = u . prototype: 0, z * scale, |z|, z; the last two over the temperature.
NONE, SCALED, MAGNITUDE, PLAIN = range(4)


@inlined
def _narrow(value: Any) -> Any:
    """The bits of the nearest bfloat16, ties to even; what is no number stays none."""
    bits = np.float32(value).view(np.uint32)
    if value != value:
        return np.uint16(0x7FC0)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@inlined
def _choose(logits: Any, bias: Any, scale: Any, way: int, temperature: Any, k: int, weights: Any) -> None:
    """Turn products [K] into logits, and write the softmax of the k largest into ``weights`` [K]; the others have 0."""
    count = len(logits)
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
        weights[e] = max(weights[e], np.float32(0)) / total


@reporting
def weigh(products: Any, edges: Any, bias: Any, scales: Any, way: int, temperature: Any, k: int) -> None:
    """Multiply A u of all experts by the experts' weights, in place.

    Args:
        products: bits of u A^T and u . prototypes, uint16 [T, R + K].
        edges: where each expert's rows begin and the last's end, [K + 1].
        bias: added to the logits, float32 [T, K].
        scales: of the products with prototypes, float32 [T].
        way: to a local logit.
        temperature: divides the logits of two ways.
        k: experts a token.
    """
    count, total = len(edges) - 1, edges[-1]
    logits, weights = np.empty(count, np.float32), np.empty(count, np.float32)
    for t in range(len(products)):
        row = products[t]
        for e in range(count):
            logits[e] = widened(row[total + e])
        _choose(logits, bias[t], scales[t], way, temperature, k, weights)
        for e in range(count):
            for r in range(edges[e], edges[e + 1]):
                row[r] = _narrow(widened(row[r]) * weights[e]) if weights[e] > 0 else np.uint16(0)


@inlined
def _dot(row: Any, x: Any) -> Any:
    total = np.float32(0)
    for i in range(x.size):
        total += widened(row[i]) * x[i]
    return total


@reporting
def add_own(
    u: Any, into: Any, out_of: Any, edges: Any, bias: Any, scales: Any, way: int, temperature: Any, k: int, y: Any
) -> None:
    """Add to each of few tokens the factors of the k experts that it uses; nothing else is read.

    Args:
        u: bits of the activations, uint16 [T, in].
        into: bits of all A and of the prototypes, uint16 [R + K, in].
        out_of: bits of all B, transposed, uint16 [R, out].
        edges: where each expert's rows begin and the last's end, [K + 1].
        bias: added to the logits, float32 [T, K].
        scales: of the products with prototypes, float32 [T].
        way: to a local logit.
        temperature: divides the logits of two ways.
        k: experts a token.
        y: bits of the outputs, uint16 [T, out], which are written to.
    """
    count, total = len(edges) - 1, edges[-1]
    x, added = np.empty(u.shape[1], np.float32), np.empty(y.shape[1], np.float32)
    logits, weights = np.empty(count, np.float32), np.empty(count, np.float32)
    for t in range(len(u)):
        for i in range(x.size):
            x[i] = widened(u[t, i])
        for e in range(count):
            logits[e] = _dot(into[total + e], x)
        _choose(logits, bias[t], scales[t], way, temperature, k, weights)
        added[:] = 0
        for e in range(count):
            if weights[e] > 0:
                for r in range(edges[e], edges[e + 1]):
                    hidden, row = _dot(into[r], x) * weights[e], out_of[r]
                    for j in range(added.size):
                        added[j] += hidden * widened(row[j])
        for j in range(added.size):
            y[t, j] = _narrow(widened(y[t, j]) + added[j])


@reporting
def inverse_deviations(u: Any, epsilon: float, out: Any) -> None:
    """Write 1 / sqrt(var(u) + epsilon) of each activation, uint16 bits [T, in], into ``out``, float32 [T]."""
    for t in range(len(u)):
        total = np.float32(0)
        for i in range(u.shape[1]):
            total += widened(u[t, i])
        mean, squares = total / np.float32(u.shape[1]), np.float32(0)
        for i in range(u.shape[1]):
            away = widened(u[t, i]) - mean
            squares += away * away
        out[t] = 1 / np.sqrt(squares / u.shape[1] + epsilon)
