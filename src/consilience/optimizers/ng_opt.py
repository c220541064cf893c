"""NGOpt: nevergrad's choice of a gradient-free search by the number of coefficients and evaluations.

One step is one evaluation. The coefficients it stands for are its recommendation, by default the best that were drawn.
Reads ``steps`` (its budget, by which it chooses) and ``bounds`` of the settings; learning rate, schedule, clipping and
weight decay have no meaning here.

Source: the package ``nevergrad``. LoraHub (arXiv:2307.13269) searches so, in [-1.5, 1.5], from 0, in 40 evaluations.
"""

import math
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from consilience.coefficients.coefficients import Alpha
from consilience.errors import InputError
from consilience.optimizers.anchor import Anchor
from consilience.optimizers.gradient import Loss, Terms
from consilience.optimizers.parameterisation import Parameterisation
from consilience.optimizers.settings import Descent

if TYPE_CHECKING:
    from torch import Tensor

#: Keeps these random numbers apart from others that are drawn from the same seed.
_STREAM = 0x46F


class NgOpt:
    """Searches the learned entries of w; its state is every loss it was told, from which it is replayed."""

    def __init__(self, settings: Descent, parameterisation: Parameterisation, anchor: Anchor, seed: int) -> None:
        """Start at the parameterisation's start.

        Raises:
            InputError: the package ``nevergrad`` is missing.
        """
        self.settings, self.map, self.anchor, self.seed = settings, parameterisation, anchor, seed
        self.search = self._begin()
        self.told: list[float] = []

    def _begin(self) -> Any:
        try:
            import nevergrad
        except ImportError:
            raise InputError(
                "optimizer: 'ngopt' needs the package nevergrad; install it with: pip install 'consilience[evolve]'"
            ) from None
        start = self.map.initial()[:, self.map.learned].numpy()
        array = nevergrad.p.Array(init=start)
        if self.settings.bounds is not None:
            array.set_bounds(*self.settings.bounds)
        # It may hand over to COBYLA in a thread of its own, which comments on small budgets.
        warnings.filterwarnings("ignore", message="COBYLA", category=UserWarning)
        array.random_state = np.random.RandomState([_STREAM, self.seed])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it comments on its own choices
            return nevergrad.optimizers.NGOpt(parametrization=array, budget=max(1, self.settings.steps))

    @property
    def w(self) -> "Tensor":
        """What is recommended now."""
        return self._place(self.search.provide_recommendation().value) if self.told else self.map.initial()

    @property
    def alpha(self) -> Alpha:
        """The coefficients of the recommendation."""
        return self.map.coefficients(self.w)

    def step(self, loss: Loss, number: int) -> Terms:
        """Evaluate one candidate and return its terms; see ``Optimizer.step``."""
        candidate = self._ask()
        w = self._place(candidate.value)
        terms, _ = loss(self.map.coefficients(w), number, gradient=False)
        terms = terms | {"anchor": float(self.anchor.penalty(self.map.alpha(w)))}
        value = sum(terms.values())
        # A diverged merge is the worst; nevergrad wants numbers.
        self._tell(candidate, value if math.isfinite(value) else 1e30)
        return terms

    def _ask(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.search.ask()

    def _tell(self, candidate: Any, value: float) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.search.tell(candidate, value)
        self.told.append(value)

    def _place(self, x: Any) -> "Tensor":
        """Return w with ``x`` in its learned entries."""
        import torch

        w = self.map.initial()
        w[:, self.map.learned] = torch.tensor(np.asarray(x, np.float64).reshape(w.shape[0], -1))
        return w

    def state(self) -> dict[str, Any]:
        """Return every loss told, and the recommendation to check a replay by."""
        return {"told": np.array(self.told, np.float64), "w": self.w.numpy()}

    def restore(self, state: dict[str, Any]) -> None:
        """Replay a state.

        Raises:
            InputError: the replay ends elsewhere: the state was written under another version of ``nevergrad``.
        """
        self.search, self.told = self._begin(), []
        for value in np.asarray(state["told"]).ravel():
            self._tell(self._ask(), float(value))
        if not np.allclose(self.w.numpy(), state["w"], rtol=1e-6, atol=1e-9):
            raise InputError(
                "state.safetensors: the search cannot be replayed with this version of nevergrad; delete the file to "
                "learn again, or go back to the version it was begun with"
            )
