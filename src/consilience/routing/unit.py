"""Vectors of length 1."""

import torch
from torch import Tensor


def unit(vectors: Tensor) -> Tensor:
    """Return vectors [..., E] divided by their lengths; a vector of 0 stays 0."""
    length = vectors.norm(dim=-1, keepdim=True)
    return torch.where(length > 0, vectors / torch.where(length > 0, length, 1.0), 0.0)
