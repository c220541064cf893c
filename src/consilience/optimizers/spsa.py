"""Simultaneous perturbation: a gradient from two evaluations of the loss, however many coefficients there are.

    g = (L(w + mu delta) - L(w - mu delta)) / (2 mu) * delta,        delta in {-1, +1}^{K x N} at random

E[g] = dL/dw + O(mu^2), exactly dL/dw where L is linear or quadratic. One such g is as long as the whole gradient in
every coordinate (E|g|^2 = n |dL/dw|^2 for n coefficients), so learning rates are smaller than with a gradient, or
several directions are averaged. Both evaluations are of the same samples, or their difference would be the samples'.

Nothing is differentiated: the model runs forward only, in the memory of inference.

Source: Spall, "Multivariate stochastic approximation using a simultaneous perturbation gradient approximation", IEEE
Transactions on Automatic Control 37(3), 1992. GLUE (arXiv:2512.22467) perturbs softmax coefficients with one direction
a step and mu, learning rate and the law of delta unstated; +-1 is Spall's choice (normal ones have n + 2 for n above).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from consilience.optimizers.anchor import Anchor
from consilience.optimizers.gradient import Descent, Gradient, Loss, Terms
from consilience.optimizers.parameterisation import Parameterisation

if TYPE_CHECKING:
    from torch import Tensor

#: Keeps these random numbers apart from others that are drawn from the same seed.
_STREAM = 0x5B5A


@dataclass(frozen=True)
class Spsa:
    """The two-point estimate of the gradient in w, averaged over ``directions`` directions.

    The anchor is added to both values where its map leaves it no proximal step. Under "box" the two points may lie
    ``mu`` outside [0, 1]: the loss is defined there too, and pulling them in would bias the estimate at the bounds.
    """

    map: Parameterisation
    anchor: Anchor
    seed: int
    mu: float
    directions: int

    def __call__(self, loss: Loss, w: "Tensor", step: int) -> tuple[Terms, "Tensor"]:
        """Return terms, averaged over all evaluations, and gradient; see ``Estimator``."""
        import torch

        gradient, mean = torch.zeros_like(w), Terms()
        for delta in self.draw(step):
            values: list[float] = []
            for point in (w + self.mu * delta, w - self.mu * delta):
                terms, _ = loss(self.map.coefficients(point), step, gradient=False)
                for name, value in terms.items():
                    mean[name] = mean.get(name, 0.0) + value / (2 * self.directions)
                values.append(sum(terms.values()) + self._penalty(point))
            gradient += (values[0] - values[1]) / (2 * self.mu * self.directions) * delta
        return mean, gradient

    def draw(self, step: int) -> "Tensor":
        """Return the directions of a step [directions, K, N]: +-1, and 0 where nothing is learned.

        They depend on the seed and the step alone, so that a run that goes on is the run that was not interrupted.
        """
        import torch

        shape = (self.directions, *self.map.start.shape)
        signs = np.random.default_rng([_STREAM, self.seed, step]).integers(0, 2, shape) * 2.0 - 1.0
        return torch.from_numpy(signs) * self.map.learned

    def _penalty(self, w: "Tensor") -> float:
        return 0.0 if self.map.plain else float(self.anchor.penalty(self.map.alpha(w)))


def make_spsa(settings: Descent, parameterisation: Parameterisation, anchor: Anchor, seed: int) -> Gradient:
    """Return gradient descent on the estimate; ``settings.rule`` says what is done with it.

    Raises:
        ValueError: mu is not positive, or there is no direction.
    """
    if not settings.mu > 0 or settings.directions < 1:
        raise ValueError(f"mu = {settings.mu} and directions = {settings.directions} must be positive")
    estimator = Spsa(parameterisation, anchor, seed, settings.mu, settings.directions)
    return Gradient(settings, parameterisation, anchor, estimator)
