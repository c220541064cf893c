"""An optimizer that remembers its path, its passes and its seconds, through interruptions too."""

import time
from typing import Any

import numpy as np

from consilience.coefficients.coefficients import Alpha
from consilience.mixing.problem import Counts
from consilience.optimizers.gradient import Loss, Optimizer, Terms

_OWN = "traced."


class Traced:
    """Wraps an optimizer; what it adds to the state begins with ``traced.``."""

    def __init__(self, inner: Optimizer, counts: Counts) -> None:
        self.inner, self.counts = inner, counts
        self._path = [inner.alpha]
        self._before = 0.0
        self._begun = time.perf_counter()

    @property
    def alpha(self) -> Alpha:
        """The coefficients now."""
        return self.inner.alpha

    @property
    def trajectory(self) -> Alpha:
        """The coefficients at the start and after every step [steps + 1, K, N]."""
        return np.stack(self._path)

    def seconds(self) -> float:
        """Return the wall time so far, that of interrupted runs included."""
        return self._before + time.perf_counter() - self._begun

    def step(self, loss: Loss, number: int) -> Terms:
        """Do one step; see ``Optimizer.step``."""
        terms = self.inner.step(loss, number)
        self._path.append(self.inner.alpha)
        return terms

    def state(self) -> dict[str, Any]:
        """Return the optimizer's state, with ours."""
        passes = [self.counts.forwards, self.counts.backwards, self.counts.validation]
        ours = {"path": self.trajectory, "passes": np.array(passes), "seconds": np.array(self.seconds())}
        return self.inner.state() | {f"{_OWN}{name}": value for name, value in ours.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take a state back."""
        self.inner.restore({name: value for name, value in state.items() if not name.startswith(_OWN)})
        self._path = list(state[f"{_OWN}path"])
        counts = [int(count) for count in state[f"{_OWN}passes"]]
        self.counts.forwards, self.counts.backwards, self.counts.validation = counts
        self._before, self._begun = float(state[f"{_OWN}seconds"]), time.perf_counter()
