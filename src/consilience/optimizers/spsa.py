"""Simultaneous perturbation: a gradient from two evaluations of the loss, however many coefficients there are.

    g = 1/m sum_j d_j u_j,      d_j = (L(w + mu u_j) - L(w - mu u_j)) / (2 mu),       u_j [K, N] at random

E[g] = dL/dw + O(mu^2), exactly dL/dw where L is linear or quadratic. One such g is as long as the whole gradient in
every coordinate (E|g|^2 = n |dL/dw|^2 for n coefficients), so learning rates are smaller than with a gradient, or
several directions are averaged. Both evaluations are of the same samples, or their difference would be the samples'.

Nothing is differentiated: the model runs forward only, in the memory of inference.

What is perturbed. ``w``: the points are alpha(w +- mu u), always in the map's range, and g estimates dL/dw =
(dalpha/dw)^T dL/dalpha. ``alpha``: the points are alpha(w) +- mu u, and g, which estimates dL/dalpha, moves w as it is:
mirror descent with the map's link, which for softmax is exponentiated gradient,

    softmax(w - eta g)_k = alpha_k e^{-eta g_k} / sum_j alpha_j e^{-eta g_j}.

There u sums to 0 over experts where the coefficients do, so that the points still sum to 1; they may have small
negative entries.

How large mu is. A difference must stand clear of what evaluating the loss twice would give: tuning chooses mu such that
the median |L+ - L-| over a few directions is 10 to 30 times the standard deviation of L under jitter of one float32
rounding of the coefficients, and under repetition.

How many directions. Every few steps the part of the estimates that lasts (their mean, squared, less what chance leaves
of it) is compared with the part that does not; m is doubled below ``NOISY`` and halved above ``CLEAR``.

Source: Spall, "Multivariate stochastic approximation using a simultaneous perturbation gradient approximation", IEEE
Transactions on Automatic Control 37(3), 1992; gains: Spall, "Implementation of the simultaneous perturbation algorithm
for stochastic optimization", IEEE Transactions on Aerospace and Electronic Systems 34(3), 1998. GLUE
(arXiv:2512.22467) perturbs softmax coefficients with one direction a step; mu, learning rate, the law of u and which
of ``w`` and ``alpha`` is perturbed are not known to us, so that every default here is ours. For +-1, Spall's choice,
and other laws see ``directions``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from consilience.errors import InputError
from consilience.optimizers.anchor import Anchor
from consilience.optimizers.diagnosis import Measured, Record, pack, unpack
from consilience.optimizers.directions import STREAM, Array, draw
from consilience.optimizers.gradient import Gradient, Loss, ManyPoints, Optimizer, Terms, rate_at
from consilience.optimizers.parameterisation import Kind, Parameterisation, as_array
from consilience.optimizers.settings import Descent, SpsaSettings

if TYPE_CHECKING:
    from torch import Tensor

#: Tuning is content with a median difference of so many times the noise, and aims between.
LOWEST, GREATEST = 10.0, 30.0
#: Bounds on the ratio of what lasts in the estimates to what does not, at which the number of directions changes.
NOISY, CLEAR = 0.2, 1.0
#: Steps between two looks at that ratio.
WINDOW = 8
#: Share of the old in the running mean square of slopes.
_MEMORY = 0.9
#: Directions whose differences tuning takes the median of, evaluations that it measures noise by, and its rounds.
_PROBES, _REPEATS, _ROUNDS = 5, 3, 4
#: Step of central differences of the map, which is smooth and in float64.
_NEAR = 1e-4
#: Rounding of a float32, relative.
_ULP = 2.0**-23


@dataclass
class Memory:
    """What one estimate leaves for the next: ``noise`` is 0 until mu is tuned, arrays are [R, N]."""

    mu: float
    count: int
    last: Array
    total: Array
    noise: float = 0.0
    square: float = 0.0
    seen: int = 0
    power: float = 0.0
    window: int = 0

    def arrays(self) -> dict[str, Any]:
        """Return a copy as arrays."""
        return {key: np.array(value) for key, value in vars(self).items()}

    @classmethod
    def of(cls, arrays: dict[str, Any]) -> "Memory":
        """Return the memory whose arrays these are."""
        values: dict[str, Any] = {
            key: value.item() if value.ndim == 0 else value.copy() for key, value in arrays.items()
        }
        return cls(**values)


@dataclass
class Spsa:
    """The two-point estimate of the gradient in w, averaged over ``directions`` directions.

    The anchor is added to both values where its map leaves it no proximal step. Under "box" the two points may lie
    ``mu`` outside [0, 1]: the loss is defined there too, and pulling them in would bias the estimate at the bounds.

    Args:
        map: from w [R, N] to coefficients [K, N].
        anchor: the penalty on the coefficients.
        seed: of the directions.
        descent: how w moves; what of it is SPSA's own is ``settings``. Tuning begins at its ``mu``, and ``directions``
            are the fewest where their number may change.

    ``record`` is what was measured, a step each.
    """

    map: Parameterisation
    anchor: Anchor
    seed: int
    descent: Descent = field(default_factory=Descent)
    record: list[Measured] = field(default_factory=list[Measured], init=False)
    memory: Memory = field(init=False)

    def __post_init__(self) -> None:
        self.memory = self._fresh()

    @property
    def settings(self) -> SpsaSettings:
        """SPSA's own settings."""
        return self.descent.spsa

    def _fresh(self) -> Memory:
        nothing = np.zeros(tuple(self.map.start.shape))
        return Memory(self.settings.mu, self.settings.directions, nothing, nothing.copy())

    def __call__(self, loss: Loss, w: "Tensor", step: int) -> tuple[Terms, "Tensor"]:
        """Return terms, averaged over all evaluations, and gradient; see ``Estimator``.

        Raises:
            InputError: a value of the loss is not finite.
        """
        import torch

        if self.settings.tune_mu and not self.memory.noise:
            self._tune(loss, w, step)
        mu, directions = self.mu_at(step), self.draw(step)
        terms, values = self._values(loss, self._points(w, directions, mu), step)
        plus, minus = np.array(values[0::2]), np.array(values[1::2])
        scale = self._scale((plus - minus) / (2 * mu))
        gradient, mean = torch.zeros_like(w), Terms()
        for high, low, u in zip(plus, minus, directions, strict=True):
            gradient += float((high - low) / (2 * mu * len(directions) * scale)) * u
        for part in terms:
            for name, value in part.items():
                mean[name] = mean.get(name, 0.0) + value / len(terms)
        self._note(step, mu, w, directions, plus, minus, gradient.numpy() * scale)
        return mean, gradient

    def mu_at(self, step: int) -> float:
        """Return mu at ``step``: Spall's gain mu / (t + 1)^0.101 under his schedule, else constant."""
        return self.memory.mu / (step + 1) ** 0.101 if self.descent.schedule == "spall" else self.memory.mu

    def draw(self, step: int) -> "Tensor":
        """Return the directions of a step [directions, R, N], 0 where nothing is learned.

        They depend on the seed and the step alone, so that a run that goes on is the run that was not interrupted.
        """
        return self._draw(step, self.memory.count)

    def _draw(self, step: int, count: int, stream: int = 0) -> "Tensor":
        import torch

        own, learned = self.settings, self.map.learned.numpy()
        flat = own.zero_sum or (own.perturb == "alpha" and self.map.kind in ("softmax", "affine"))
        rows = self.map.start.shape[0]
        return torch.from_numpy(draw(own.law, self.seed, step, count, rows, learned, zero_sum=flat, stream=stream))

    def _points(self, w: "Tensor", directions: "Tensor", mu: float) -> list["Tensor"]:
        """Return the coefficients at both ends of every direction, one after the other."""
        if self.settings.perturb == "alpha":
            alpha = self.map.alpha(w)
            return [alpha + sign * mu * u for u in directions for sign in (1, -1)]
        return [self.map.alpha(w + sign * mu * u) for u in directions for sign in (1, -1)]

    def _values(self, loss: Loss, points: Sequence["Tensor"], step: int) -> tuple[list[Terms], list[float]]:
        """Return the terms at every point, and their sums with the anchor's share."""
        tables = [as_array(point) for point in points]
        if isinstance(loss, ManyPoints):
            terms = loss.at(tables, step)
        else:
            terms = [loss(table, step, gradient=False)[0] for table in tables]
        values = [sum(part.values()) + self._penalty(point) for part, point in zip(terms, points, strict=True)]
        if not all(map(math.isfinite, values)):
            raise InputError(
                f"the loss is not finite at step {step} of spsa (mu = {self.memory.mu:g}); lower learning_rate or mu, "
                "or use precision=float32"
            )
        return terms, values

    def _penalty(self, alpha: "Tensor") -> float:
        return 0.0 if self.map.plain else float(self.anchor.penalty(alpha))

    def _tune(self, loss: Loss, w: "Tensor", step: int) -> None:
        """Choose mu by the noise of the loss; see the module's docstring."""
        import torch

        memory, (low, high) = self.memory, self.settings.mu_range
        alpha = self.map.alpha(w)
        generator = np.random.default_rng([STREAM + 2, self.seed, step])
        signs = torch.from_numpy(generator.integers(0, 2, (_REPEATS, *alpha.shape)) * 2.0 - 1.0)
        jittered = [alpha * (1 + _ULP * self.map.learned * sign) for sign in signs]
        _, values = self._values(loss, [alpha] * _REPEATS + jittered, step)
        # The loss itself is a float64 at best, so that nothing is measured more finely than this.
        memory.noise = max(float(np.std(values, ddof=1)), float(np.spacing(np.max(np.abs(values)))))
        memory.mu = min(max(memory.mu, low), high)
        for trial in range(_ROUNDS):
            directions = self._draw(trial, _PROBES, stream=1)
            _, values = self._values(loss, self._points(w, directions, memory.mu), step)
            ratio = float(np.median(np.abs(np.subtract(values[0::2], values[1::2])))) / memory.noise
            if LOWEST <= ratio <= GREATEST:
                return
            wanted = math.sqrt(LOWEST * GREATEST) / max(ratio, 1e-3)
            chosen = min(max(memory.mu * wanted, low), high)
            if chosen == memory.mu:
                return
            memory.mu = chosen

    def _scale(self, slopes: Array) -> float:
        """Return what slopes are divided by: their running root mean square, or 1."""
        if not self.settings.normalise:
            return 1.0
        memory = self.memory
        memory.seen += 1
        memory.square = _MEMORY * memory.square + (1 - _MEMORY) * float(np.mean(slopes**2))
        return math.sqrt(memory.square / (1 - _MEMORY**memory.seen)) or 1.0

    def _note(
        self, step: int, mu: float, w: "Tensor", directions: "Tensor", plus: Array, minus: Array, estimate: Array
    ) -> None:
        memory, learned = self.memory, self.map.learned
        alpha = self.map.alpha(w)
        shown = alpha[:, learned] if bool(learned.any()) else alpha
        slopes = (plus - minus) / (2 * mu)
        measured = Measured(
            step=step,
            mu=mu,
            plus=tuple(plus.tolist()),
            minus=tuple(minus.tolist()),
            expected=self._expected(step, w, directions, slopes),
            power=float((estimate**2).sum()),
            lag=float((estimate * memory.last).sum()),
            alpha=tuple(shown.mean(1).tolist()),
        )
        self.record.append(measured)
        memory.last = estimate
        memory.total = memory.total + estimate
        memory.power += measured.power
        memory.window += 1
        if memory.window == WINDOW:
            self._adapt()

    def _adapt(self) -> None:
        memory, most = self.memory, self.settings.most_directions
        if most:
            signal = (float((memory.total**2).sum()) - memory.power) / (WINDOW * (WINDOW - 1))
            noise = memory.power / WINDOW - signal
            if signal < NOISY * noise:
                memory.count = max(memory.count, min(2 * memory.count, most))
            elif signal > CLEAR * noise:
                memory.count = max(self.settings.directions, memory.count // 2)
        memory.total, memory.power, memory.window = np.zeros_like(memory.total), 0.0, 0

    def _expected(self, step: int, w: "Tensor", directions: "Tensor", slopes: Array) -> float:
        """Return the root mean square of |delta alpha| that such slopes bring, were directions independent of them.

        To first order |J delta w|, with J u from central differences at the directions drawn. Adam moves a coordinate
        by its rate times sqrt((1 - beta_1) / (1 + beta_1)) where the estimates have no common part, else by up to its
        rate.
        """
        own = self.descent
        rate = own.learning_rate * rate_at(own.schedule, step, own.steps)
        ends = ((self.map.alpha(w + _NEAR * u), self.map.alpha(w - _NEAR * u)) for u in directions)
        moved = [float(((high - low) / (2 * _NEAR)).square().sum()) for high, low in ends]
        if own.rule != "sgd":
            size = float(directions.square().sum(dim=(1, 2)).mean())
            free = self.map.start.shape[0] * int(self.map.learned.sum())
            damped = (1 - own.betas[0]) / (1 + own.betas[0])
            return rate * math.sqrt(damped * free * float(np.mean(moved)) / size) if size else 0.0
        slope = 1.0 if own.spsa.normalise else math.sqrt(float(np.mean(slopes**2)))
        return rate * slope * math.sqrt(float(np.mean(moved)) / len(moved))

    def state(self) -> dict[str, Any]:
        """Return memory and record."""
        return {f"memory.{key}": value for key, value in self.memory.arrays().items()} | pack(self.record)

    def restore(self, state: dict[str, Any]) -> None:
        """Take a state back; one without memory is the beginning."""
        own = "memory."
        arrays = {key.removeprefix(own): value for key, value in state.items() if key.startswith(own)}
        self.memory = Memory.of(arrays) if arrays else self._fresh()
        self.record = unpack(state)


def make_spsa(settings: Descent, parameterisation: Parameterisation, anchor: Anchor, seed: int) -> Gradient:
    """Return gradient descent on the estimate; ``settings.rule`` says what is done with it ("sgd": GLUE's step).

    Raises:
        ValueError: mu or its range is not positive, or there is no direction.
        InputError: the coefficients are to be perturbed under a map that no mirror descent belongs to.
    """
    own, (low, high) = settings.spsa, settings.spsa.mu_range
    if not own.mu > 0 or own.directions < 1 or not 0 < low <= high:
        raise ValueError(f"mu = {own.mu}, mu_range = {low, high} and directions = {own.directions} must be positive")
    if own.perturb == "alpha" and parameterisation.kind not in get_args(Kind):
        raise InputError(
            f"perturb: alpha cannot be perturbed in {parameterisation.kind} coordinates; perturb w, or mix without them"
        )
    return Gradient(settings, parameterisation, anchor, Spsa(parameterisation, anchor, seed, settings))


def record_of(optimizer: Optimizer) -> Record | None:
    """Return what an optimizer's estimates measured, or None if it makes none."""
    estimator = optimizer.estimator if isinstance(optimizer, Gradient) else None
    if not isinstance(estimator, Spsa):
        return None
    mapped = estimator.map
    size = mapped.start.shape[0] * int(mapped.learned.sum())
    return Record(
        steps=tuple(estimator.record),
        size=size,
        noise=estimator.memory.noise,
        simplex=mapped.kind in ("softmax", "hierarchical"),
        plain=estimator.descent.rule == "sgd",
    )
