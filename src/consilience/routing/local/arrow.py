"""Arrow: an expert is recognised by the direction its update answers to most, without any data.

    v = argmax_{||v|| = 1} ||B A v||            the top right singular vector of B A [out, in]

Source: Arrow (arXiv:2405.11157). From the small factors: with QR of B = Q_b R_b and of A^T = Q_a R_a, the product is
Q_b (R_b R_a^T) Q_a^T, so v is Q_a times the top right singular vector of an r x r matrix. PEFT's own Arrow takes 15
power iterations from a random start, which is less exact where the two largest singular values are close.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from consilience.routing.layer import LowRank


def direction(factors: LowRank) -> Tensor:
    """Return v [in] of an update, in float32; its sign is arbitrary and made such that the largest entry is positive.

    An update of zero has no direction: its v is 0.
    """
    b, a = factors.b.double(), factors.a.double()
    _, right_b = torch.linalg.qr(b)
    left_a, right_a = torch.linalg.qr(a.t())
    _, values, rows = torch.linalg.svd(right_b @ right_a.t())
    if not float(values[0]) > 0:
        return torch.zeros(factors.shape[1])
    v = left_a @ rows[0]
    return (v * torch.sign(v[v.abs().argmax()])).float()


def directions(factors: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """Return v of every module of an expert."""
    return {module: direction(one) for module, one in factors.items()}
