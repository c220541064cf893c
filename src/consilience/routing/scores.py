"""The formulas of routing: from a token's activation and a query's similarities to weights of experts.

Shapes: activations u [..., d], prototypes v [K, d], logits and weights [..., K]; K experts.

    phatgoose   s_k = LN(u) . LN(v_k) / sqrt(d)           LN without gain or bias: sqrt(d) cos(centred u, centred v)
    arrow       s_k = |v_k . u| / T                       v_k: top right singular vector of B_k A_k
    average     s_k = v_k . u / (T sqrt(d))               v_k: mean activation on the expert's own rows, of length 1

Sources: PHATGOOSE (arXiv:2402.05859), Arrow (arXiv:2405.11157), GLIDER (arXiv:2410.07172) and its code. Known
disagreements: GLIDER's code divides Arrow's products by 10, PHATGOOSE's by 10 sqrt(d), mttl's by its temperature, 1;
``temperature`` has them all.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.routing.settings import Local, Settings

#: What the published code adds to the sum of the weights that it divides by.
EPSILON = 1e-6
#: Of the layer normalisations.
NORM_EPSILON = 1e-5


def prototypes(local: Local, vectors: Tensor) -> Tensor:
    """Return what activations are multiplied with, [K, d], of the experts' vectors [K, d]; zero rows stay zero."""
    if local == "phatgoose":
        return F.layer_norm(vectors, vectors.shape[-1:], eps=NORM_EPSILON)
    return vectors


def local_logits(settings: Settings, products: Tensor, u: Tensor) -> Tensor:
    """Return local logits [..., K] in float32 of ``products`` = u . prototypes [..., K] and activations u [..., d].

    LN(v) sums to zero, so that LN(u) . LN(v) = u . LN(v) / std(u): one product with the activation itself will do.
    """
    products = products.float()
    width = u.shape[-1]
    if settings.local == "phatgoose":
        deviation = torch.sqrt(u.float().var(-1, correction=0, keepdim=True) + NORM_EPSILON)
        return products / (deviation * math.sqrt(width))
    if settings.local == "arrow":
        return products.abs() / settings.temperature
    return products / (settings.temperature * math.sqrt(width))


def standardised(values: Tensor) -> Tensor:
    """Return values [..., K] less their mean over the experts, divided by their standard deviation; 0 where it is 0."""
    centred = values - values.mean(-1, keepdim=True)
    deviation = centred.square().mean(-1, keepdim=True).sqrt()
    return torch.where(deviation > 0, centred / torch.where(deviation > 0, deviation, 1.0), 0.0)


def top_k_weights(logits: Tensor, k: int) -> Tensor:
    """Return softmax(z), its k largest kept and divided by (their sum + 1e-6), as the published code does; 0: all."""
    probabilities = logits.softmax(-1)
    if k in (0, logits.shape[-1]) or k > logits.shape[-1]:
        return probabilities / (probabilities.sum(-1, keepdim=True) + EPSILON)
    kept, where = probabilities.topk(k, -1)
    return torch.zeros_like(probabilities).scatter_(-1, where, kept / (kept.sum(-1, keepdim=True) + EPSILON))


def top_p_weights(logits: Tensor, p: float) -> Tensor:
    """Return softmax(z) over the fewest experts whose probabilities sum to at least ``p``, one at least."""
    order = logits.argsort(-1, descending=True)
    ranked = logits.gather(-1, order).softmax(-1)
    before = ranked.cumsum(-1) - ranked
    dropped = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, order, before >= p)
    dropped.scatter_(-1, order[..., :1], False)
    return logits.masked_fill(dropped, -math.inf).softmax(-1)


def weights(settings: Settings, logits: Tensor) -> Tensor:
    """Return the experts' weights of logits z [..., K]: not negative, summing to 1 (up to 1e-6)."""
    return top_p_weights(logits, settings.top_p) if settings.top_p else top_k_weights(logits, settings.top_k)
