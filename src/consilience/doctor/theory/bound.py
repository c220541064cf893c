"""A bound on the excess risk of a merge, by expert and by cause; derived here, not the theorem of arXiv 2601.21690.

    E F(x) - F(x*) <= sum_k w_k { A_k + E||grad f_k(x_k)||^2 / (2L) + L E D_k^2
                                  + |p_k| eps_k sqrt(2 L E f_k(x)) + (L / 2) p_k^2 eps_k^2 }
    x = x_0 + sum_k p_k tau_k,   D_k = ||x - x_k||,   A_k = E[f_k(x_k) - min f_k]

Task k has n_k independent samples, an empirical risk f_k, and an expert x_k = x_0 + tau_k that T_k steps of minibatch
SGD reach from x_0, with batches of b_k drawn with replacement and step sizes eta_t; H_k = sum_t eta_t is its training
length. F = sum_k w_k F_k is the population risk of all tasks, w_k >= 0 sums to 1, and x* minimises F. Assumed are (A1)
losses of single samples that are non-negative and L-smooth, (A2) per-sample gradients of a task with a variance of at
most sigma_k^2, (A3) ||grad f_k(x_0) - grad f(x_0)|| <= zeta_k with f = sum_k w_k f_k. That stability splits the excess
risk of a merge into optimisation and generalisation, which pull in opposite directions, is the paper's claim (in its
abstract); its theorem and constants were not to be had. Every formula and constant below is derived here, with the
proofs in docs/theory-of-merging.md.

The values rank settings and name causes. They are no guarantee: constants are loose by an order of magnitude or more,
and L and sigma_k^2 are estimates at best. What is not known is None, and a sum that needs it is None: never 0. Losses
are in nats (or whatever f is in), parameters in their own unit u, gradients in nats / u, L in nats / u^2, step sizes
and training lengths in u^2 / nats.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from consilience.errors import InputError

Array = npt.NDArray[np.float64]
#: A number, or None where it is not known.
Maybe = float | None
#: One number for each expert, [K]; None for all of them, or for one, where it is not known.
PerExpert = Sequence[Maybe] | None

PARTS = ("optimisation", "gradient", "displacement", "stability")
CAUSES = ("unequal", "heterogeneity", "drift", "noise")


# Lemma 1: how far an expert moves when one of its samples is replaced.


def gradient_power(rates: Sequence[float], gradients: Sequence[float], variance: Maybe) -> Maybe:
    """Return ``sum_t 4 eta_t^2 (||grad f(x_t)||^2 + sigma^2)``, what drives Lemma 1, from values by step.

    A logged norm is that of a minibatch's gradient, before clipping: its square is sigma^2 / b too large in the mean.

    Args:
        rates: eta_t, [T].
        gradients: ||grad f(x_t)||, [T].
        variance: sigma^2, in (nats / u)^2.

    Raises:
        InputError: rates and gradients differ in number.
    """
    if len(rates) != len(gradients):
        raise InputError(f"{len(rates)} learning rates and {len(gradients)} gradient norms: give one of each a step")
    eta, norms = np.asarray(rates, np.float64), np.asarray(gradients, np.float64)
    return _known(lambda sigma: float(4 * (eta**2 * (norms**2 + sigma)).sum()), variance)


def constant_power(rate: Maybe, steps: Maybe, gradient: Maybe, variance: Maybe) -> Maybe:
    """Return ``gradient_power`` of ``steps`` steps of one size with one squared gradient norm, ``gradient``."""
    return _known(lambda eta, t, g, sigma: 4 * t * eta**2 * (g + sigma), rate, steps, gradient, variance)


def stability_bound(*, steps: Maybe, rows: Maybe, batch: Maybe, power: Maybe, growth: Maybe) -> Maybe:
    """Return Lemma 1's bound on the mean squared move of an expert when one of its n samples is replaced, in u^2.

        eps^2 <= e^(1 + 2 rho) [(T + 1) / n^2 + 1 / (b n)] sum_t eta_t^2 G_t,    G_t = 4 (E||grad f(x_t)||^2 + sigma^2)

    Derived here, under (A1) and (A2). Beyond rho of about 1 it says nothing in absolute terms; to rank experts, use
    ``stability_leading``.

    Args:
        steps: T.
        rows: n.
        batch: b, samples a step.
        power: sum_t eta_t^2 G_t, from ``gradient_power`` or ``constant_power``.
        growth: rho, from ``growth``.
    """
    return _known(
        lambda t, n, b, power, rho: _exp(1 + 2 * rho) * ((t + 1) / n**2 + 1 / (b * n)) * power if power else 0.0,
        steps, _positive("rows", rows), _positive("batch", batch), power, growth,
    )  # fmt: skip


def stability_leading(*, steps: Maybe, rows: Maybe, batch: Maybe, power: Maybe) -> Maybe:
    """Return how Lemma 1's bound behaves, ``[T / n^2 + 1 / (b n)] sum_t eta_t^2 G_t``, in u^2: for ranking.

    With constant steps it is 4 eta^2 (T^2 / n^2 + T / (b n)) (||grad f||^2 + sigma^2). Derived here.
    """
    return _known(
        lambda t, n, b, power: (t / n**2 + 1 / (b * n)) * power,
        steps, _positive("rows", rows), _positive("batch", batch), power,
    )  # fmt: skip


def growth(length: Maybe, smoothness: Maybe, *, convex: bool = False) -> Maybe:
    """Return Lemma 1's rho: L H, or 0 for convex losses and step sizes of at most 2 / L."""
    return 0.0 if convex else _known(lambda h, smooth: h * smooth, length, smoothness)


def noise_variance(noise_scale: Maybe, gradient: Maybe, batch: Maybe) -> Maybe:
    """Return sigma^2 of a logged gradient noise scale B: ``B g / (1 + B / b)``, in (nats / u)^2.

    B = sigma^2 / ||grad f||^2 (the simple noise scale of arXiv 1812.06162), and the mean squared norm g of gradients of
    batches of b is ||grad f||^2 + sigma^2 / b.
    """
    return _known(lambda scale, g, b: scale * g / (1 + scale / b), noise_scale, gradient, _positive("batch", batch))


# Lemma 2: what is left of it in the merge.


def stability_part(p: float, eps_squared: Maybe, merged_loss: Maybe, smoothness: Maybe) -> Maybe:
    """Return Lemma 2's bound on ``E[F_k(x) - f_k(x)]`` at the merge, in nats.

        |p_k| eps_k sqrt(2 L E f_k(x)) + (L / 2) p_k^2 eps_k^2

    Replacing a sample of task k moves the merge by exactly p_k times what it moves x_k. Derived here, under (A1).

    Args:
        p: the expert's merge weight, of any sign.
        eps_squared: eps_k^2 in u^2, from Lemma 1.
        merged_loss: E f_k(x), the merge's loss on the task's training samples.
        smoothness: L.
    """
    if p == 0:
        return 0.0
    return _known(
        lambda eps, loss, smooth: abs(p) * math.sqrt(2 * eps * smooth * max(loss, 0.0)) + smooth * p**2 * eps / 2,
        eps_squared, merged_loss, smoothness,
    )  # fmt: skip


# Lemma 3: what merging costs.


def distances(gram: Array, p: Array) -> Array:
    """Return ``D_k^2 = ||sum_j p_j tau_j - tau_k||^2`` for merge weights of any sum, in u^2.

    Args:
        gram: inner products of task vectors [..., K, K], such as one matrix a layer.
        p: merge weights [..., K].
    """
    away = p[..., None, :] - np.eye(gram.shape[-1])
    return np.clip(np.einsum("...ki,...ij,...kj->...k", away, gram, away), 0, None)


def spread(gram: Array, p: Array) -> Array:
    """Return ``V = sum_k p_k D_k^2``, in u^2: the mean squared distance of the experts from the merge.

    Where p sums to 1, it is ``spread_of_lengths`` and ``spread_of_pairs`` too (an identity).
    """
    return (p * distances(gram, p)).sum(-1)


def spread_of_lengths(gram: Array, p: Array) -> Array:
    """Return ``sum_k p_k ||tau_k||^2 - ||sum_k p_k tau_k||^2``, in u^2."""
    return (p * np.einsum("...kk->...k", gram)).sum(-1) - np.einsum("...i,...ij,...j->...", p, gram, p)


def spread_of_pairs(gram: Array, p: Array) -> Array:
    """Return ``1/2 sum_jk p_j p_k ||tau_j - tau_k||^2``, in u^2."""
    own = np.einsum("...kk->...k", gram)
    pairs = own[..., :, None] + own[..., None, :] - gram - np.swapaxes(gram, -1, -2)
    return np.einsum("...i,...ij,...j->...", p, pairs, p) / 2


@dataclass(frozen=True, slots=True)
class Spread:
    """The four parts of the bound on V by expert, [K] each, in u^2; their sum over experts and parts bounds E V."""

    unequal: tuple[Maybe, ...]
    heterogeneity: tuple[Maybe, ...]
    drift: tuple[Maybe, ...]
    noise: tuple[Maybe, ...]

    def part(self, name: str) -> Maybe:
        """Return one of ``CAUSES`` summed over experts; None where an expert's is not known."""
        return total(getattr(self, name))

    @property
    def bound(self) -> Maybe:
        """The bound on V; None where a part is not known."""
        return total([self.part(name) for name in CAUSES])


def spread_bound(
    p: Sequence[float],
    *,
    lengths: PerExpert = None,
    gradient: Maybe = None,
    heterogeneity: PerExpert = None,
    smoothness: Maybe = None,
    excursions: PerExpert = None,
    squares: PerExpert = None,
    variances: PerExpert = None,
    batches: PerExpert = None,
) -> Spread:
    """Return Lemma 3's four parts of the bound on ``E V`` for merge weights that are >= 0 and sum to 1.

        V <= 4 { Var_p(H) ||grad f(x_0)||^2 + sum_k p_k H_k^2 zeta_k^2
                 + L^2 sum_k p_k H_k^2 max_t E||x_k^t - x_0||^2 + sum_k p_k S_k sigma_k^2 / b_k },  S_k = sum_t eta_t^2

    Derived here, for SGD, under (A1)-(A3). Of Adam, weight decay or LoRA factors H says less, and Var_p(H) is only
    meaningful among experts of one optimizer.

    Args:
        p: merge weights [K].
        lengths: H_k = sum_t eta_t, [K].
        gradient: ||grad f(x_0)||.
        heterogeneity: zeta_k, [K].
        smoothness: L.
        excursions: max_t E||x_k^t - x_0||^2, [K]; ||tau_k||^2 stands in for it as a proxy that may be too small.
        squares: S_k, eta_k^2 T_k for constant steps, [K].
        variances: sigma_k^2, [K].
        batches: b_k, [K].

    Raises:
        InputError: p is not on the simplex, or a list has another length than p.
    """
    weights = _simplex("p", p)
    h = _listed("lengths", lengths, len(weights))
    zeta = _listed("heterogeneity", heterogeneity, len(weights))
    far = _listed("excursions", excursions, len(weights))
    s = _listed("squares", squares, len(weights))
    sigma = _listed("variances", variances, len(weights))
    b = [_positive("batches", value) for value in _listed("batches", batches, len(weights))]
    mean = total([_scaled(w, value) for w, value in zip(weights, h, strict=True)])
    return Spread(
        _each(weights, lambda h, mean, g: 4 * (h - mean) ** 2 * g**2, h, _same(mean, h), _same(gradient, h)),
        _each(weights, lambda h, zeta: 4 * h**2 * zeta**2, h, zeta),
        _each(weights, lambda h, smooth, far: 4 * (smooth * h) ** 2 * far, h, _same(smoothness, h), far),
        _each(weights, lambda s, sigma, b: 4 * s * sigma / b, s, sigma, b),
    )


# The optimisation error of an expert, and the sum of everything.


def optimisation_bound(
    *, initial: Maybe, rate: Maybe, steps: Maybe, pl: Maybe, smoothness: Maybe, variance: Maybe, batch: Maybe
) -> Maybe:
    """Return a bound on ``A_k = E[f_k(x_k) - min f_k]`` after T constant steps, in nats.

        A_k <= (1 - eta mu)^T A_k(0) + eta L sigma^2 / (2 mu b)

    Derived here, under (A1), (A2), eta <= 1 / L, and the Polyak-Lojasiewicz condition ||grad f_k||^2 >= 2 mu (f_k -
    min f_k).

    Args:
        initial: A_k(0), the base's excess loss.
        rate: eta.
        steps: T.
        pl: mu, at most L.
        smoothness: L.
        variance: sigma^2.
        batch: b.

    Raises:
        InputError: eta > 1 / L, or mu > L or <= 0: the inequality does not hold there.
    """
    if rate is not None and smoothness is not None and rate * smoothness > 1 + 1e-12:
        raise InputError(f"rate = {rate:g}: the bound needs at most 1 / smoothness = {1 / smoothness:g}")
    if pl is not None and (pl <= 0 or (smoothness is not None and pl > smoothness * (1 + 1e-12))):
        raise InputError(f"pl = {pl:g}: give a number above 0 and at most the smoothness")
    return _known(
        lambda first, eta, t, mu, smooth, sigma, b: (
            max(0.0, 1 - eta * mu) ** t * first + eta * smooth * sigma / (2 * mu * b)
        ),
        initial, rate, steps, pl, smoothness, variance, _positive("batch", batch),
    )  # fmt: skip


def temperature(*, squares: Maybe, length: Maybe, batch: Maybe) -> Maybe:
    """Return ``sum_t eta_t^2 / (b sum_t eta_t)``, which is ``eta / b`` of a constant rate: SGD's temperature.

    The floor that noise sets to a training, ``optimisation_bound``'s second part, is ``L sigma^2 / (2 mu)`` times it:
    what logs know of that floor. As ``eta / b`` it is known as what decides how noisy a training ends (arXiv
    1711.04623); of the figures that logs alone give, it ranked merges best in docs/results/doctor.md.

    Args:
        squares: sum of eta_t^2.
        length: H, sum of eta_t.
        batch: b.
    """
    return _known(lambda square, whole, b: square / (whole * b), squares, _positive("length", length),
                  _positive("batch", batch))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Terms:
    """The bound on the excess risk by expert and part, in nats: for ranking settings and naming causes, no guarantee.

    ``weights`` [K] are the tasks' w_k; the parts [K] are those of each task on its own, before they are weighted:
    ``optimisation`` A_k, ``gradient`` ||grad f_k(x_k)||^2 / (2L), ``displacement`` L D_k^2, ``stability`` of Lemma 2.
    """

    weights: tuple[float, ...]
    optimisation: tuple[Maybe, ...]
    gradient: tuple[Maybe, ...]
    displacement: tuple[Maybe, ...]
    stability: tuple[Maybe, ...]

    def part(self, name: str) -> Maybe:
        """Return one of ``PARTS`` weighted and summed over experts; None where one that counts is not known."""
        return total([_scaled(w, value) for w, value in zip(self.weights, getattr(self, name), strict=True)])

    def expert(self, k: int) -> Maybe:
        """Return the sum of an expert's parts, not weighted; None where one is not known."""
        return total([getattr(self, name)[k] for name in PARTS])

    @property
    def total(self) -> Maybe:
        """The whole bound; None where a part is not known."""
        return total([self.part(name) for name in PARTS])

    @property
    def dominant(self) -> str | None:
        """The largest of the parts that are known; None where none is. A part that is not known may be larger."""
        known = {name: value for name in PARTS if (value := self.part(name)) is not None}
        return max(known, key=lambda name: known[name]) if known else None

    @property
    def missing(self) -> tuple[tuple[str, int], ...]:
        """The parts that are not known, as (name, expert)."""
        return tuple((name, k) for name in PARTS for k, value in enumerate(getattr(self, name)) if value is None)


def excess_risk(
    w: Sequence[float],
    p: Sequence[float],
    *,
    smoothness: Maybe = None,
    optimisation: PerExpert = None,
    gradients: PerExpert = None,
    moves: PerExpert = None,
    stabilities: PerExpert = None,
    merged_losses: PerExpert = None,
) -> Terms:
    """Return the theorem's right-hand side by expert and part; derived here, for ranking, never a guarantee.

    Args:
        w: task weights [K], >= 0, sum 1.
        p: merge weights [K], of any sum.
        smoothness: L.
        optimisation: A_k, [K], measured or from ``optimisation_bound``.
        gradients: E||grad f_k(x_k)||^2, [K].
        moves: D_k^2, [K], from ``distances``.
        stabilities: eps_k^2, [K], from ``stability_bound``.
        merged_losses: E f_k(x), [K].

    Raises:
        InputError: w is not on the simplex, or a list has another length than w.
    """
    weights = _simplex("w", w)
    if len(p) != len(weights):
        raise InputError(f"p: has {len(p)} values; give one for each of the {len(weights)} experts")
    ends = _listed("gradients", gradients, len(weights))
    moved = _listed("moves", moves, len(weights))
    eps = _listed("stabilities", stabilities, len(weights))
    losses = _listed("merged_losses", merged_losses, len(weights))
    smooth = _positive("smoothness", smoothness)
    return Terms(
        weights,
        tuple(_listed("optimisation", optimisation, len(weights))),
        tuple(_known(lambda g, smooth: g / (2 * smooth), value, smooth) for value in ends),
        tuple(_known(lambda d, smooth: smooth * d, value, smooth) for value in moved),
        tuple(stability_part(*each, smooth) for each in zip(p, eps, losses, strict=True)),
    )


def total(values: Sequence[Maybe]) -> Maybe:
    """Return a sum, or None where one of its numbers is not known."""
    known = [value for value in values if value is not None]
    return math.fsum(known) if len(known) == len(values) else None


def _known(formula: Callable[..., float], *values: Maybe) -> Maybe:
    return None if any(value is None for value in values) else formula(*values)


def _each(weights: Sequence[float], formula: Callable[..., float], *columns: Sequence[Maybe]) -> tuple[Maybe, ...]:
    """Return p_k times a formula of every expert's values; what has no weight need not be known."""
    return tuple(_scaled(w, _known(formula, *row)) for w, row in zip(weights, zip(*columns, strict=True), strict=True))


def _scaled(weight: float, value: Maybe) -> Maybe:
    return 0.0 if weight == 0 else _known(lambda value: weight * value, value)


def _same(value: Maybe, like: Sequence[Maybe]) -> list[Maybe]:
    return [value] * len(like)


def _listed(name: str, values: PerExpert, count: int) -> list[Maybe]:
    if values is None:
        return [None] * count
    if len(values) != count:
        raise InputError(f"{name}: has {len(values)} values; give one for each of the {count} experts, None if unknown")
    return [None if value is None else float(value) for value in values]


def _simplex(name: str, weights: Sequence[float]) -> tuple[float, ...]:
    found = tuple(float(weight) for weight in weights)
    if not found or not all(weight >= 0 for weight in found) or abs(math.fsum(found) - 1) > 1e-6:
        raise InputError(f"{name} = {list(found)}: give weights of at least 0 that sum to 1")
    return found


def _positive(name: str, value: Maybe) -> Maybe:
    if value is not None and not value > 0:
        raise InputError(f"{name} = {value!r}: give a number above 0, or None if it is not known")
    return value


def _exp(x: float) -> float:
    """Return e^x; infinite where that is beyond float64, as the bound then is."""
    return math.exp(x) if x < 700 else math.inf
