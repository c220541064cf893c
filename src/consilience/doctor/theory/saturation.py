"""What one more expert will bring: uniform merges of random subsets, in closed form and fitted to measured losses.

With g the mean of G_kk = ||tau_k||^2 and h the mean of <tau_j, tau_k> over j != k, over random subsets A of size k

    E||m_A||^2 = h + (g - h) / k,    E V_A = (1 - 1/k) (g - h),    m_A = (1/k) sum_{i in A} tau_i

and the quadratic model's mean loss over all K tasks is exactly a constant plus A / k (derived here; c_j and S[j, i] =
<grad f_j(x_j), tau_i> as in ``weights``):

    E q_j(k) = f_j + mean_i S_ji - S_jj + (c_j / 2) (E||m_A||^2 - 2 mean_i G_ji + G_jj)

That is the K-axis of the law L = L* + A / (k + b), fitted to losses of merged language models in arXiv 2509.24244; the
fit of its three numbers to measured losses is ``fit``. Predictions rank; they are no guarantee, and beyond the experts
at hand they take the next one to be like them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from consilience.errors import InputError

Array = npt.NDArray[np.float64]

#: Values of b that are tried first, and the range in which it is sought as a multiple of the largest k.
_GRID = 241
_FARTHEST = 10.0
#: Sizes and losses beyond this are mistakes.
_LARGEST = 1e12


def expected_spread(gram: npt.ArrayLike, size: int) -> float:
    """Return ``E V = (1 - 1/k) (g - h)`` over uniform merges of random subsets of ``size`` experts, in u^2.

    A size beyond K is of experts like these: their means g and h stay.

    Args:
        gram: inner products of task vectors [K, K].
        size: k.

    Raises:
        InputError: G is no matrix of at least two experts, or k < 1.
    """
    g = _gram(gram, size)
    return (1 - 1 / size) * float(_own(g) - _cross(g))


def expected_losses(
    size: int, gram: npt.ArrayLike, losses: npt.ArrayLike, slopes: npt.ArrayLike, curvatures: npt.ArrayLike
) -> Array:
    """Return every task's expected loss under uniform merges of random subsets of k of the K experts, [K], in nats.

    All K tasks count, whether their expert is in the subset or not; see ``expected_member_losses`` for those that are.

    Args:
        size: k, 1 to K.
        gram: inner products of task vectors [K, K], in u^2.
        losses: f_j, [K].
        slopes: S[j, i] = <grad f_j(x_j), tau_i>, [K, K], in nats.
        curvatures: c_j, [K], in nats / u^2.

    Raises:
        InputError: shapes do not fit, or k is not in 1 to K.
    """
    g = _gram(gram, size, within=True)
    f, s, c = _losses(g, losses, slopes, curvatures)
    merged = _cross(g) + (_own(g) - _cross(g)) / size
    return f + s.mean(1) - np.diag(s) + c / 2 * (merged - 2 * g.mean(1) + np.diag(g))


def expected_member_losses(
    size: int, gram: npt.ArrayLike, losses: npt.ArrayLike, slopes: npt.ArrayLike, curvatures: npt.ArrayLike
) -> Array:
    """Return the same for random subsets that hold task j's expert, [K]: what merging costs those that are merged.

        E||m_A - tau_j||^2 = [(k - 1) E||u_i||^2 + (k - 1)(k - 2) E<u_i, u_l>] / k^2,    u_i = tau_i - tau_j, i != l

    Arguments and errors are those of ``expected_losses``.
    """
    g = _gram(gram, size, within=True)
    f, s, c = _losses(g, losses, slopes, curvatures)
    count = len(g)
    others = (s.sum(1) - np.diag(s)) / (count - 1)
    away = [_moves_away(g, j) for j in range(count)]
    moved = np.array([(size - 1) * own + (size - 1) * (size - 2) * cross for own, cross in away]) / size**2
    return f + (1 - 1 / size) * (others - np.diag(s)) + c / 2 * moved


def with_typical_expert(gram: npt.ArrayLike) -> Array:
    """Return G [K + 1, K + 1] with one more expert that is like the others: ||tau||^2 = g, inner products h.

    ``expected_spread`` of all K + 1 then continues its curve. Derived here; the next expert may be unlike the others.

    Raises:
        InputError: G is no matrix of at least two experts.
    """
    g = _gram(gram, 1)
    count = len(g)
    grown = np.full((count + 1, count + 1), _cross(g))
    grown[:count, :count] = g
    grown[count, count] = _own(g)
    return grown


@dataclass(frozen=True, slots=True)
class Predicted:
    """A loss at k merged experts and its interval; ``low`` and ``high`` are None where nothing tells them."""

    size: float
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Saturation:
    """The fit of ``L = limit + gain / (k + shift)`` to ``sizes`` and ``losses``, and the sum of its squared residuals.

    ``free`` is the number of points beyond the three that the fit uses up. ``identified`` is False where the shift
    ended at the edge of its range: then losses are nearly linear in k, and ``limit`` means nothing.
    """

    limit: float
    gain: float
    shift: float
    squares: float
    sizes: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def free(self) -> int:
        """Points less three."""
        return len(self.sizes) - 3

    @property
    def identified(self) -> bool:
        """Whether the shift is inside its range."""
        return self.shift < 0.99 * _FARTHEST * max(self.sizes)

    def at(self, size: float) -> float:
        """Return the fitted loss of k merged experts."""
        return self.limit + self.gain / (size + self.shift)

    def next_gain(self, size: float) -> float:
        """Return by how much expert k + 1 is predicted to lower the loss of k; negative where it raises it."""
        return self.at(size) - self.at(size + 1)

    def predict(self, size: float, level: float = 0.9) -> Predicted:
        """Return the loss of a new merge of k experts with a prediction interval.

        The interval holds the prediction intervals of the linear fits at every shift that the data do not rule out (the
        profile likelihood's region of the same level), for independent normal errors of one size. Three points leave no
        error to measure, so that there is no interval.

        Raises:
            InputError: the size is below 1, or the level not inside 0 to 1.
        """
        if not size >= 1:
            raise InputError(f"size = {size!r}: give a number of experts of at least 1")
        if not 0 < level < 1:
            raise InputError(f"level = {level!r}: give a share above 0 and below 1")
        if not self.free:
            return Predicted(size, self.at(size), None, None)
        k, y = np.array(self.sizes), np.array(self.losses)
        reach = student_quantile((1 + level) / 2, self.free)
        allowed = self.squares * (1 + reach**2 / self.free) + np.finfo(np.float64).eps * float(y @ y)
        ends = [
            self._interval(size, shift, reach)
            for shift in (*_shifts(k), self.shift)
            if _fit_at(k, y, shift)[2] <= allowed
        ]
        return Predicted(size, self.at(size), min(low for low, _ in ends), max(high for _, high in ends))

    def _interval(self, size: float, shift: float, reach: float) -> tuple[float, float]:
        """Return the prediction interval of the linear fit at one shift."""
        k, y = np.array(self.sizes), np.array(self.losses)
        limit, gain, squares = _fit_at(k, y, shift)
        x, here = 1 / (k + shift), 1 / (size + shift)
        lever = 1 / len(k) + (here - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum()
        half = reach * math.sqrt(squares / self.free * (1 + lever))
        value = limit + gain * here
        return value - half, value + half


def fit(sizes: Sequence[float], losses: Sequence[float]) -> Saturation:
    """Fit ``L = L* + A / (k + b)``, b >= 0, to losses of merges of k experts by least squares.

    Several merges of one size are several points. A may be negative: losses on the merged experts' own tasks rise with
    k. The form is arXiv 2509.24244's.

    Args:
        sizes: k of every merge, at least 1.
        losses: its loss, in nats.

    Raises:
        InputError: fewer than three different sizes, or numbers that are not finite.
    """
    if len(sizes) != len(losses):
        raise InputError(f"{len(sizes)} sizes and {len(losses)} losses: give one of each a merge")
    k, y = np.asarray(sizes, np.float64), np.asarray(losses, np.float64)
    if len(set(k.tolist())) < 3:
        raise InputError(f"{len(set(k.tolist()))} different numbers of experts: measure merges of at least three")
    if not (((k >= 1) & (k <= _LARGEST)).all() and (np.abs(y) <= _LARGEST).all()):
        raise InputError(f"sizes and losses: give numbers of at most {_LARGEST:g}, and sizes of at least 1")
    grid = _shifts(k)
    squares = [_fit_at(k, y, shift)[2] for shift in grid]
    best = int(np.argmin(squares))
    shift = _narrow(k, y, grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)])
    shift = min((shift, grid[best]), key=lambda value: _fit_at(k, y, value)[2])
    limit, gain, left = _fit_at(k, y, shift)
    return Saturation(limit, gain, shift, left, tuple(k.tolist()), tuple(y.tolist()))


def _shifts(k: Array) -> list[float]:
    """Return the values of b that are tried, denser near 0."""
    return (_FARTHEST * float(k.max()) * np.linspace(0, 1, _GRID) ** 2).tolist()


def _fit_at(k: Array, y: Array, shift: float) -> tuple[float, float, float]:
    """Return limit, gain and the sum of squared residuals of the straight line in 1 / (k + b)."""
    x = 1 / (k + shift)
    away = x - x.mean()
    gain = float(away @ (y - y.mean()) / (away @ away))
    left = y - y.mean() - gain * away
    return float(y.mean() - gain * x.mean()), gain, float(left @ left)


def _narrow(k: Array, y: Array, low: float, high: float) -> float:
    """Return the best shift between two, by golden sections."""
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(80):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if _fit_at(k, y, left)[2] <= _fit_at(k, y, right)[2]:
            high = right
        else:
            low = left
    return (low + high) / 2


def student_quantile(share: float, freedom: int) -> float:
    """Return the quantile of Student's t of a whole number of degrees of freedom, for shares of at least 1/2.

    By bisection of the distribution's finite sums (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    low, high = 0.0, 1.0
    while _student(high, freedom) < share and high < 1e12:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _student(middle, freedom) < share else (low, middle)
    return (low + high) / 2


def _student(t: float, freedom: int) -> float:
    """Return the probability of a value below t >= 0."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    if freedom % 2:
        term, inner = math.cos(angle), 0.0
        for i in range(1, (freedom + 1) // 2):
            inner, term = inner + term, term * square * 2 * i / (2 * i + 1)
        within = 2 / math.pi * (angle + sine * inner)
    else:
        term, inner = 1.0, 0.0
        for i in range(1, freedom // 2 + 1):
            inner, term = inner + term, term * square * (2 * i - 1) / (2 * i)
        within = sine * inner
    return (1 + within) / 2


def _own(gram: Array) -> float:
    return float(np.trace(gram)) / len(gram)


def _cross(gram: Array) -> float:
    return float(gram.sum() - np.trace(gram)) / (len(gram) * (len(gram) - 1))


def _moves_away(gram: Array, j: int) -> tuple[float, float]:
    """Return E||u_i||^2 and E<u_i, u_l> over the other experts, u_i = tau_i - tau_j."""
    others = [i for i in range(len(gram)) if i != j]
    inner = gram[np.ix_(others, others)] - gram[others, j][:, None] - gram[others, j][None] + gram[j, j]
    return _own(inner), _cross(inner) if len(inner) > 1 else 0.0


def _gram(gram: npt.ArrayLike, size: int, *, within: bool = False) -> Array:
    found = np.asarray(gram, np.float64)
    if found.ndim != 2 or found.shape[0] != found.shape[1] or len(found) < 2 or not np.isfinite(found).all():
        raise InputError(f"gram: has shape {list(found.shape)}; give finite inner products of at least two experts")
    if size < 1 or (within and size > len(found)):
        raise InputError(
            f"size = {size}: give a number of experts of at least 1{f', at most {len(found)}' if within else ''}"
        )
    return found


def _losses(
    gram: Array, losses: npt.ArrayLike, slopes: npt.ArrayLike, curvatures: npt.ArrayLike
) -> tuple[Array, Array, Array]:
    count = len(gram)
    f, s, c = (np.asarray(value, np.float64) for value in (losses, slopes, curvatures))
    if f.shape != (count,) or s.shape != (count, count) or c.shape != (count,):
        raise InputError(f"losses, slopes, curvatures: give [{count}], [{count}, {count}] and [{count}] numbers")
    return f, s, c
