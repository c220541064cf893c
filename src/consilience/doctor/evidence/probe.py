"""What probe data say of a merge before it is made: losses, slopes, curvatures, barriers, gradients that disagree.

For each task k, with d_k = sum_j p_j tau_j - tau_k:

    scan      f_k(x_k + s d_k) at a few s in (0, 1]; s = 1 is the merge with weights p
    S[k, j]   <grad f_k(x_k), tau_j>, one backward pass
    c_k       least squares of f_k(x_k + s d_k) - f_k(x_k) - s <grad, d_k> on s^2 ||d_k||^2 / 2
    barrier   the largest f_k(x_k + s d_k) above the straight line between its ends

and at the base, where g_k = df_k/dalpha [K] and G = tau^T tau, inside the span of the task vectors (the part of a
gradient that weights can follow; ||P grad||^2 = g^T G^+ g):

    zeta_k    ||P (grad f_k - mean_j grad f_j)||, heterogeneity
    sigma_k^2 variance of one row's projected gradient, from two halves: m/2 ||P (grad_1 - grad_2)||^2 / 2 for m rows
"""

from dataclasses import dataclass

import numpy as np

from consilience.doctor.evidence.landscape import Landscape
from consilience.doctor.theory.bound import distances
from consilience.doctor.theory.geometry import Matrix, Vector
from consilience.doctor.theory.weights import predicted_losses
from consilience.progress import NullProgress, Progress

#: Where the way from an expert to the merge is measured.
SCAN = (0.25, 0.5, 0.75, 1.0)
#: Eigenvalues of G below this share of the largest are left out of G^+.
_NULL = 1e-10


@dataclass(frozen=True, eq=False)
class Probe:
    """What was measured; vectors are by task, [K].

    Attributes:
        weights: p.
        base: losses of the base.
        own: losses of each task's own expert.
        scan: losses by point of ``SCAN`` and task, [S, K].
        slopes: S [K, K].
        curvatures: c, in nats per squared unit of length; may be negative.
        barriers: in nats.
        heterogeneity: zeta at the base.
        noise: sigma^2 at the base; NaN where a task has a single row.
        base_gradient: ||P mean_k grad f_k|| at the base.
        gram: G.
        rows: of each task.
    """

    weights: Vector
    base: Vector
    own: Vector
    scan: Matrix
    slopes: Matrix
    curvatures: Vector
    barriers: Vector
    heterogeneity: Vector
    noise: Vector
    base_gradient: float
    gram: Matrix
    rows: tuple[int, ...]

    @property
    def merged(self) -> Vector:
        """The measured losses of the merge with weights p."""
        return self.scan[-1]

    def predicted(self, p: Vector) -> Vector:
        """Return the losses of a merge with other weights, [K], as the quadratic model has them."""
        return np.asarray(predicted_losses(p, self.own, self.gram, self.slopes, self.curvatures), np.float64)


def probe(landscape: Landscape, gram: Matrix, p: Vector, progress: Progress | None = None) -> Probe:
    """Measure what ``Probe`` holds: of a task five losses and, with gradients, one on all rows, two on half.

    Args:
        landscape: the tasks' losses.
        gram: G, the inner products of the task vectors, [K, K].
        p: the weights of the merge in question, [K].
        progress: told of what has been measured.

    Raises:
        InputError: a loss is not finite.
    """
    count = len(p)
    progress = progress or NullProgress()
    progress.phase("measuring the experts", count * (len(SCAN) + 4), "losses")
    base, own, slopes = np.zeros(count), np.zeros(count), np.zeros((count, count))
    halves = np.zeros((count, 2, count))
    scan = np.zeros((len(SCAN), count))
    for k in range(count):
        rows = list(landscape.rows(k))
        parts = [rows[::2], rows[1::2]] if len(rows) > 1 else [rows, rows]
        for side, part in enumerate(parts):
            halves[k, side] = landscape.slope(k, np.zeros(count), part)[1]
            progress.advance()
        base[k] = landscape.loss(k, np.zeros(count))
        progress.advance()
        own[k], slopes[k] = landscape.slope(k, np.eye(count)[k], rows)
        progress.advance()
        for at, s in enumerate(SCAN):
            scan[at, k] = landscape.loss(k, (1 - s) * np.eye(count)[k] + s * p)
            progress.advance()
    known = [len(landscape.rows(k)) for k in range(count)]
    heterogeneity, noise, together = _disagreement(halves, gram, known)
    return Probe(
        p,
        base,
        own,
        scan,
        slopes,
        _curvatures(own, slopes, scan, p, distances(gram, p)),
        _barriers(own, scan),
        heterogeneity,
        noise,
        together,
        gram,
        tuple(known),
    )


def _curvatures(own: Vector, slopes: Matrix, scan: Matrix, p: Vector, moves: Vector) -> Vector:
    """Return c_k of the scans; 0 where an expert does not move."""
    s = np.array(SCAN)
    rise = scan - own - s[:, None] * (slopes @ p - np.diag(slopes))
    bends = 2 * (s[:, None] ** 2 * rise).sum(0) / (s**4).sum()
    return np.where(moves > 0, bends / np.where(moves > 0, moves, 1.0), 0.0)


def _barriers(own: Vector, scan: Matrix) -> Vector:
    s = np.array(SCAN)[:, None]
    return np.clip((scan - ((1 - s) * own + s * scan[-1])).max(0), 0, None)


def _disagreement(halves: Matrix, gram: Matrix, rows: list[int]) -> tuple[Vector, Vector, float]:
    """Return zeta [K], sigma^2 [K] and the mean gradient's norm, of gradients by halves of the rows, [K, 2, K]."""
    inverse = pseudo_inverse(gram)
    means = halves.mean(1)
    away = means - means.mean(0)
    apart = halves[:, 0] - halves[:, 1]
    lengths = np.einsum("ki,ij,kj->k", apart, inverse, apart)
    noise = np.array([m / 4 * value if m > 1 else np.nan for m, value in zip(rows, lengths, strict=True)])
    zeta = np.sqrt(np.clip(np.einsum("ki,ij,kj->k", away, inverse, away), 0, None))
    together = means.mean(0)
    return zeta, noise, float(np.sqrt(max(0.0, together @ inverse @ together)))


def pseudo_inverse(gram: Matrix) -> Matrix:
    """Return G^+ of a Gram matrix, its null space by the largest eigenvalue."""
    values, vectors = np.linalg.eigh(gram)
    kept = values > _NULL * max(float(values[-1]), 0.0)
    return (vectors[:, kept] / values[kept]) @ vectors[:, kept].T
