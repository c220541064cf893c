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

from consilience.kernels.routed import NORM_EPSILON
from consilience.routing.settings import Local, Settings

#: Entries that are normalised at once on a CPU.
PART = 1 << 18


def prototypes(local: Local, vectors: Tensor) -> Tensor:
    """Return what activations are multiplied with, [K, d], of the experts' vectors [K, d]; zero rows stay zero.

    LN(v) sums to zero, so that LN(u) . LN(v) = u . LN(v) / std(u): products with the activation itself will do.
    """
    width = vectors.shape[-1]
    if local == "phatgoose":
        return F.layer_norm(vectors, (width,), eps=NORM_EPSILON) / math.sqrt(width)
    return vectors / math.sqrt(width) if local == "average" else vectors


def inverse_deviation(u: Tensor) -> Tensor:
    """Return 1 / sqrt(var(u) + 1e-5) of activations [..., d], [..., 1]: what a layer normalisation multiplies by.

    The normalisation's own kernel is ten times as fast as ``torch.var`` on a CPU; it also makes the normalised
    activations, so that many are taken in parts. There it rounds what it finds of half-precision activations.
    """
    if u.numel() <= PART or not u.is_cpu:
        wide = u.float() if u.is_cpu and u.element_size() < 4 else u
        return torch.native_layer_norm(wide, (u.shape[-1],), None, None, NORM_EPSILON)[2]
    flat = u.reshape(-1, u.shape[-1])
    parts = flat.split(max(1, PART // u.shape[-1]))
    return torch.cat([inverse_deviation(part) for part in parts]).view(*u.shape[:-1], 1)


def local_logits(settings: Settings, products: Tensor, scale: Tensor | None) -> Tensor:
    """Return local logits [..., K] in float32 of ``products`` = u . prototypes [..., K].

    ``scale`` [..., 1] is the activations' ``inverse_deviation``, which phatgoose needs.
    """
    products = products.float()
    if settings.local == "phatgoose":
        assert scale is not None
        return products * scale
    if settings.local == "arrow":
        products = products.abs()
    return products if settings.temperature == 1 else products / settings.temperature


def standardised(values: Tensor, used: Tensor | None = None) -> Tensor:
    """Return values [..., K] less their mean over the experts, divided by their standard deviation; 0 where it is 0.

    Mean and deviation are those of the experts ``used`` [K], true or false; None: of all.
    """
    counted = torch.ones_like(values[..., :1]) if used is None else used.to(values)
    shares = counted.expand_as(values) / counted.expand_as(values).sum(-1, keepdim=True)
    centred = values - (values * shares).sum(-1, keepdim=True)
    deviation = (centred.square() * shares).sum(-1, keepdim=True).sqrt()
    return torch.where(deviation > 0, centred / torch.where(deviation > 0, deviation, 1.0), 0.0)


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the weights [..., k] of the k largest logits, softmax(z) divided by their sum, and whose they are.

    That is the softmax of the k largest. The published code adds 1e-6 to the sum, which lowers weights by 1e-6 K at
    most.
    """
    kept, where = logits.topk(k, -1)
    return kept.softmax(-1), where


def spread(values: Tensor, where: Tensor, experts: int) -> Tensor:
    """Return weights [..., K] of the weights [..., k] of some experts; the others have 0."""
    return values.new_zeros(*values.shape[:-1], experts).scatter_(-1, where, values)


def top_p_weights(logits: Tensor, p: float) -> Tensor:
    """Return softmax(z) over the fewest experts whose probabilities sum to at least ``p``, one at least."""
    order = logits.argsort(-1, descending=True)
    ranked = logits.gather(-1, order).softmax(-1)
    before = ranked.cumsum(-1) - ranked
    dropped = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, order, before >= p)
    dropped.scatter_(-1, order[..., :1], False)
    return logits.masked_fill(dropped, -math.inf).softmax(-1)


def with_mean(weights: Tensor, known: Tensor, used: Tensor | None) -> Tensor:
    """Return ``known`` [..., 1] of weights [..., K], and 1 - ``known`` of the mean of the experts ``used`` [K]."""
    even = torch.ones_like(weights) if used is None else used.to(weights).expand_as(weights)
    return known * weights + (1 - known) * even / even.sum(-1, keepdim=True)


def choose(settings: Settings, logits: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the weights of all experts, [..., K] and None, or of the k that are used, [..., k], and whose they are."""
    if settings.top_p:
        return top_p_weights(logits, settings.top_p), None
    if 0 < settings.top_k < logits.shape[-1]:
        return top_k(logits, settings.top_k)
    return logits.softmax(-1), None


def weights(settings: Settings, logits: Tensor) -> Tensor:
    """Return the experts' weights of logits z [..., K]: not negative, summing to 1."""
    values, where = choose(settings, logits)
    return values if where is None else spread(values, where, logits.shape[-1])
