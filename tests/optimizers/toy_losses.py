"""Losses whose minimum is known, and the pieces an optimizer is made of."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from consilience.coefficients.coefficients import Alpha
from consilience.optimizers.anchor import Anchor
from consilience.optimizers.gradient import Terms
from consilience.optimizers.parameterisation import Kind, Parameterisation, parameterise


class Quadratic:
    """0.5 (alpha - goal_t)' H (alpha - goal_t), where the samples of step t move the goal by ``noise``."""

    def __init__(self, goal: Any, curvature: Any = None, noise: float = 0.0) -> None:
        self.goal = np.asarray(goal, np.float64)
        self.curvature = np.eye(self.goal.size) if curvature is None else np.asarray(curvature)
        self.noise = noise
        self.calls: list[tuple[int, bool, Alpha]] = []

    def __call__(self, alpha: Alpha, step: int, *, gradient: bool) -> tuple[Terms, Alpha | None]:
        self.calls.append((step, gradient, alpha.copy()))
        shift = self.noise * np.random.default_rng(step).standard_normal(self.goal.shape)
        off = (alpha - self.goal - shift).ravel()
        slope = (self.curvature @ off).reshape(alpha.shape)
        value = float(0.5 * off @ self.curvature @ off)
        return {"near": 0.75 * value, "far": 0.25 * value}, slope if gradient else None


class Linear:
    """<slope, alpha>."""

    def __init__(self, slope: Any) -> None:
        self.slope = np.asarray(slope, np.float64)

    def __call__(self, alpha: Alpha, step: int, *, gradient: bool) -> tuple[Terms, Alpha | None]:
        return {"linear": float((self.slope * alpha).sum())}, self.slope if gradient else None


def pieces(
    kind: Kind, start: Any, learned: Sequence[bool] | None = None, gamma: float = 0.0
) -> tuple[Parameterisation, Anchor]:
    """Return a parameterisation at ``start`` [K, N] and the anchor there."""
    values = np.asarray(start, np.float64)
    mapped = parameterise(kind, values, np.array([True] * values.shape[1] if learned is None else learned))
    return mapped, Anchor(mapped.alpha(mapped.initial()), mapped.learned, gamma)


def tensor(values: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.float64)
