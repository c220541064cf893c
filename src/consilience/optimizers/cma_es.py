"""CMA-ES: coefficients drawn from a normal distribution that learns from how they rank.

    w_i ~ N(m, sigma^2 C),  i = 1..lambda;    m <- sum of the better half by weight;    sigma, C <- from the steps taken

Only the order of the losses counts, so any score will do: it need not be smooth, nor differentiable. Reads ``sigma``
and ``population`` of the settings; learning rate, schedule, clipping and weight decay have no meaning here.

The coefficients that it stands for are those of the mean m, not the best that were drawn: steps on different samples
have incomparable losses, among which the best is the luckiest; and in n dimensions every draw is sigma sqrt(n) away
from the mean, whose error is that of the draws averaged. The mean is evaluated before each generation, on the
generation's samples: one evaluation in lambda + 1, for a history that reads like any other optimizer's.

Source: Hansen and Ostermeier, Evolutionary Computation 9(2), 2001, as implemented by the package ``cma``. Above 100
coefficients C is diagonal (Ros and Hansen, PPSN 2008): time and memory are linear in n, and beyond a hundred dimensions
it needs fewer evaluations even where the loss is not separable. LoraHub (arXiv:2307.13269) searches its coefficients
by evolution with an L1 penalty, which is our anchor at zero.
"""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from consilience.coefficients.coefficients import Alpha
from consilience.errors import InputError
from consilience.optimizers.anchor import Anchor
from consilience.optimizers.gradient import Loss, Terms
from consilience.optimizers.parameterisation import Parameterisation
from consilience.optimizers.settings import Descent

if TYPE_CHECKING:
    from torch import Tensor

Vector = npt.NDArray[np.float64]

#: More coefficients than this have a diagonal covariance.
SEPARABLE_ABOVE = 100
#: The population never becomes narrower than this: its width must not underflow in a long run.
_NARROWEST = 1e-12
#: Keeps these random numbers apart from others that are drawn from the same seed.
_STREAM = 0xC3A


class CmaEs:
    """Evolves the learned entries of w; one step is one generation.

    Its state is every loss that it was told. From these it is replayed: the same seed draws the same populations.
    """

    def __init__(self, settings: Descent, parameterisation: Parameterisation, anchor: Anchor, seed: int) -> None:
        """Start at the parameterisation's start.

        Raises:
            InputError: the package ``cma`` is missing.
        """
        self.settings, self.map, self.anchor, self.seed = settings, parameterisation, anchor, seed
        self.size = self.map.start.shape[0] * int(self.map.learned.sum())
        self.strategy = self._begin()
        self.told: list[list[float]] = []

    def _begin(self) -> Any:
        try:
            import cma
        except ImportError:
            raise InputError(
                "optimizer: 'cma' needs the package cma; install it with: pip install 'consilience[evolve]'"
            ) from None
        generator = np.random.default_rng([_STREAM, self.seed])

        def draw(count: int, size: int) -> Vector:
            return generator.standard_normal((count, size))

        # Two dimensions are the fewest that the package can do; those that are too many move nothing.
        start = np.full(max(2, self.size), 0.5)
        start[: self.size] = self.map.initial()[:, self.map.learned].numpy().ravel()
        options: dict[str, Any] = {
            "randn": draw,
            "seed": np.nan,  # leave numpy's global generator alone
            "verbose": -10,  # print nothing, write no files, and read none from the working directory
            "minstd": _NARROWEST,
            "CMA_diagonal": self.size > SEPARABLE_ABOVE,
        }
        if self.settings.cma.population:
            options["popsize"] = self.settings.cma.population
        bounds = (0.0, 1.0) if self.map.kind == "box" else self.settings.bounds
        if bounds is not None:
            options["bounds"] = list(bounds)
        return cma.CMAEvolutionStrategy(start, self.settings.cma.sigma, options)

    @property
    def w(self) -> "Tensor":
        """The mean of the distribution [K, N]."""
        # The bounds' transformation there and back may cost the start its last bit.
        return self._place(self.strategy.result.xfavorite) if self.told else self.map.initial()

    @property
    def alpha(self) -> Alpha:
        """The coefficients of the mean."""
        return self.map.coefficients(self.w)

    def step(self, loss: Loss, number: int) -> Terms:
        """Do one generation and return the terms at the mean before it; see ``Optimizer.step``."""
        terms = self._terms(loss, self.w, number)
        if self.size:
            drawn = self.strategy.ask()
            self._tell(drawn, [_rankable(sum(self._terms(loss, self._place(x), number).values())) for x in drawn])
        return terms

    def _tell(self, drawn: list[Vector], fitness: list[float]) -> None:
        self.strategy.tell(drawn, fitness)
        self.told.append(fitness)

    def _terms(self, loss: Loss, w: "Tensor", number: int) -> Terms:
        terms, _ = loss(self.map.coefficients(w), number, gradient=False)
        return terms | {"anchor": float(self.anchor.penalty(self.map.alpha(w)))}

    def _place(self, x: Vector) -> "Tensor":
        """Return w with ``x`` in its learned entries."""
        import torch

        w = self.map.initial()
        w[:, self.map.learned] = torch.tensor(x[: self.size].reshape(w.shape[0], -1))
        return w

    def state(self) -> dict[str, Any]:
        """Return every loss told [generations, population], and the mean to check a replay by."""
        return {"fitness": np.reshape(self.told, (len(self.told), self.strategy.popsize)), "w": self.w.numpy()}

    def restore(self, state: dict[str, Any]) -> None:
        """Replay a state.

        Raises:
            InputError: the replay ends elsewhere: the state was written under another version of ``cma``.
        """
        self.strategy, self.told = self._begin(), []
        for fitness in state["fitness"]:
            self._tell(self.strategy.ask(), [float(value) for value in fitness])
        if not np.allclose(self.w.numpy(), state["w"], rtol=1e-6, atol=1e-9):
            raise InputError(
                "state.safetensors: the population cannot be replayed with this version of cma; delete the file to "
                "learn again, or go back to the version it was begun with"
            )


def _rankable(value: float) -> float:
    """Return the value, or infinity for NaN: a diverged merge is the worst."""
    return float("inf") if math.isnan(value) else value
