"""Spaces of blends of K experts: which coefficients may be reached, how far, and along which directions.

    simplex        theta = sum_k alpha_k theta_k,  alpha >= 0, sum alpha = 1           softmax
    affine         the same with alpha of any sign
    task_vector    theta = theta_0 + sum_k lambda_k tau_k,  lambda free                real
    low_rank       along the directions in which experts differ most, from their mean  ``LowRank``
    hierarchical   a softmax inside clusters of like experts times one across them     ``Hierarchical``

Where theta may go is measured by the Gram matrix G [K, K] of the experts (``G_ij = <tau_i, tau_j>``; any common origin
will do for coefficients that sum to 1, task vectors must be task vectors), without reading a parameter again:

    |theta(alpha) - mean_k theta_k|^2 = (alpha - 1/K)^T G (alpha - 1/K).

Every space is a ``Parameterisation``, so that any optimizer moves in it. GLUE (arXiv:2512.22467) mixes on the simplex
and names the hull and many experts as limitations; the other spaces are ours.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import numpy.typing as npt

from consilience.coefficients.coefficients import Alpha
from consilience.coefficients.spectrum import Spectrum
from consilience.errors import InputError
from consilience.methods.signature import Range
from consilience.optimizers.parameterisation import Around, Kind, Parameterisation, as_array, parameterise

if TYPE_CHECKING:
    from torch import Tensor

Space = Literal["simplex", "affine", "task_vector", "low_rank", "hierarchical"]
Matrix = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

#: The map of each space that knows no more of the experts than their number.
KINDS: dict[Space, Kind] = {"simplex": "softmax", "affine": "affine", "task_vector": "real"}
_OF_MANY = ("low_rank", "hierarchical")
#: Singular values below this share of the largest are what rounding leaves of 0.
_NOTHING = 1e-6
#: How far beyond the radius rounding may carry a point that was put on it, as a share of its square.
_SLACK = 1e-9


@dataclass(frozen=True, kw_only=True)
class BlendSpace:
    """Where the coefficients of a mixture may lie.

    Args:
        space: see the module's docstring; low_rank and hierarchical are for many experts.
        radius: greatest distance from the experts' mean, in units of their own root mean square distance from it.
        parts: directions of low_rank, or clusters of hierarchical; 0: about the square root of the number of experts.
    """

    space: Annotated[
        Space,
        "convex weights (the paper); weights of any sign that sum to 1; free coefficients of task vectors; for many "
        "experts: along directions in which they differ most, or a softmax inside clusters times one across them",
    ] = "simplex"
    radius: Annotated[
        float, Range(0), "greatest distance from the experts' mean, in units of their own from it; 0: any"
    ] = 0.0
    parts: Annotated[
        int, Range(0), "directions of low_rank, or clusters of hierarchical; 0: about the root of the experts' number"
    ] = 0

    def map(self, alpha: Alpha, learned: object, spectrum: Callable[[], Spectrum]) -> Parameterisation:
        """Return the map whose start is ``alpha`` [K, N]; the spectrum is asked for where it is needed.

        Raises:
            InputError: see ``make_space``.
        """
        known = spectrum() if self.radius or self.space in _OF_MANY else None
        gram, unit = (None, 0.0) if known is None else (known.metric, known.spread)
        return make_space(self.space, alpha, learned, gram=gram, radius=self.radius * unit, parts=self.parts)


def make_space(
    space: Space,
    alpha: Alpha,
    learned: object,
    *,
    gram: Matrix | None = None,
    radius: float = 0.0,
    parts: int = 0,
) -> Parameterisation:
    """Return a space from its name, with a trust region if ``radius`` is positive.

    Args:
        space: see ``BlendSpace``.
        alpha: [K, N] where to start.
        learned: [N] which columns move.
        gram: [K, K] of the experts, or [N, K, K], one for each column; see ``trust``.
        radius: greatest distance of theta from the experts' mean, as of parameters (0: any).
        parts: directions of low_rank, or clusters of hierarchical; 0: about the square root of K.

    Raises:
        InputError: the start is out of reach, a trust region lacks the Gram matrix, or experts are too few or too
            alike for so many parts.
    """
    if radius and gram is None:
        raise InputError("trust: a radius needs the experts' Gram matrix; pass it, or leave the radius at 0")
    if space in KINDS:
        found: Parameterisation = parameterise(KINDS[space], alpha, learned)
    else:
        assert gram is not None
        whole = gram if gram.ndim == 2 else gram.sum(0)
        if space == "low_rank":
            found = low_rank(whole, parts or max(1, round(len(alpha) ** 0.5)), alpha, learned)
        else:
            found = hierarchical(cluster(whole, parts), alpha, learned)
    return trust(found, gram, radius) if radius and gram is not None else found


def spread(gram: Matrix) -> float:
    """Return the root mean square distance of the experts from their mean: a unit for a trust region's radius."""
    return float(np.sqrt(np.mean(np.diag(centred(gram)))))


def centred(gram: Matrix) -> Matrix:
    """Return the Gram matrix of ``theta_k - mean``: ``C G C`` with ``C = I - 11^T / K``."""
    off = gram - gram.mean(0, keepdims=True)
    return off - off.mean(1, keepdims=True)


@dataclass(frozen=True)
class Trusted(Around):
    """A map whose blends stay within ``radius`` of the experts' mean.

    A point beyond is drawn towards alpha = 1/K until it is at the radius: in the metric of G that is the nearest point
    of the ball, and on the simplex or the affine plane it stays there. ``project`` does so to w after a step; in
    between (SPSA's outer points, CMA-ES's draws) the map does.

    ``gram`` is [K, K] where columns share it, or [N, K, K], one for each column's parameters: the distance is that of
    all learned columns together.
    """

    gram: "Tensor"
    radius: float

    @property
    def plain(self) -> bool:
        """Whether w is alpha."""
        return self.inner.plain

    def distance(self, alpha: "Tensor") -> "Tensor":
        """Return the squared distance of ``alpha`` [K, N] from the experts' mean."""
        import torch

        off = ((alpha - 1 / len(alpha)) * self.learned).T
        return torch.einsum("nk,nkj,nj->", off, self.gram.expand(len(off), -1, -1), off)

    def alpha(self, w: "Tensor") -> "Tensor":
        """Return the coefficients of ``w``, within the radius."""
        return self._inside(self.inner.alpha(w), self.radius**2 * (1 + _SLACK))

    def _inside(self, alpha: "Tensor", bound: float) -> "Tensor":
        import torch

        mean = 1 / len(alpha)
        shrink = (bound / self.distance(alpha).clamp(min=bound)).sqrt()
        return torch.where(self.learned, mean + shrink * (alpha - mean), alpha)

    def invert(self, alpha: "Tensor") -> "Tensor":
        """Return a w whose coefficients are ``alpha``, if it lies within the radius."""
        return self.inner.invert(alpha)

    def project(self, w: "Tensor") -> None:
        """Bring ``w`` back within the radius, in place."""
        self.inner.project(w)
        alpha = self.inner.alpha(w)
        if float(self.distance(alpha)) > self.radius**2:
            w.copy_(self.inner.invert(self._inside(alpha, self.radius**2)))


def trust(inner: Parameterisation, gram: Matrix, radius: float) -> Trusted:
    """Return ``inner`` within ``radius`` of the experts' mean; see ``Trusted``.

    Raises:
        InputError: the radius is not positive, or the start lies beyond it.
    """
    import torch

    if not radius > 0:
        raise InputError(f"trust: the radius is {radius:g}; give a positive distance")
    found = Trusted(inner, torch.tensor(gram, dtype=torch.float64), radius)
    distance = float(found.distance(inner.alpha(inner.initial()))) ** 0.5
    if not distance <= radius * (1 + _SLACK):
        raise InputError(
            f"trust: the start lies {distance:g} from the experts' mean, beyond the radius {radius:g}; raise the "
            "radius, or start at 1/K"
        )
    return found


@dataclass(frozen=True)
class LowRank:
    """Blends along the r directions in which the experts differ most: ``alpha = 1/K + V z``, w = z [r, N].

    ``basis`` is V [K, r]; its columns sum to 0, so coefficients sum to 1. ``fixed`` [K, N] is what columns that are not
    learned keep, ``start`` [r, N] the first z.
    """

    basis: "Tensor"
    fixed: "Tensor"
    start: "Tensor"
    learned: "Tensor"
    kind: str = "low_rank"
    plain: bool = False

    def alpha(self, w: "Tensor") -> "Tensor":
        """Return the coefficients of ``w`` [r, N]."""
        import torch

        return torch.where(self.learned, 1 / len(self.basis) + self.basis @ w, self.fixed)

    def coefficients(self, w: "Tensor") -> Alpha:
        """Return the coefficients of ``w`` as an array of their own."""
        return as_array(self.alpha(w.detach()))

    def invert(self, alpha: "Tensor") -> "Tensor":
        """Return the coordinates of the blend nearest to ``alpha`` [K, N] (in alpha, not in theta)."""
        return self.basis.T @ (alpha - 1 / len(self.basis)) * self.learned

    def initial(self) -> "Tensor":
        """Return the first coordinates."""
        return self.start.clone()

    def project(self, w: "Tensor") -> None:
        """Do nothing: all coordinates are allowed."""


def low_rank(gram: Matrix, rank: int, alpha: Alpha, learned: object) -> LowRank:
    """Return the space of the ``rank`` first right singular vectors of the centred experts, from their Gram matrix.

    Args:
        gram: [K, K] of the experts, from any common origin.
        rank: r.
        alpha: [K, N] where to start: at the nearest point of the space.
        learned: [N] which columns move.

    Raises:
        InputError: the experts do not differ in so many directions.
    """
    import torch

    values, vectors = np.linalg.eigh(centred(gram))
    kept = int((np.sqrt(np.maximum(values, 0)) > _NOTHING * np.sqrt(max(values[-1], 0.0))).sum())
    if not 1 <= rank <= kept:
        raise InputError(
            f"parts: {rank} is not among 1 to {kept}, in so many directions the experts differ; choose one"
        )
    chosen = vectors[:, ::-1][:, :rank]
    # LAPACK leaves a vector's sign open; with the largest entry positive a run is the same everywhere.
    largest = np.take_along_axis(chosen, np.abs(chosen).argmax(0)[None], 0)
    basis = torch.from_numpy(chosen * np.sign(largest))
    fixed, mask = torch.tensor(alpha, dtype=torch.float64), torch.as_tensor(learned)
    return LowRank(basis, fixed, basis.T @ (fixed - 1 / len(gram)) * mask, mask)


@dataclass(frozen=True)
class Hierarchical:
    """A softmax inside clusters times a softmax across them, for many experts.

        s_c = sum_{k in c} w_k / sqrt|c|,      alpha_k = e^{s_c} / sum_b e^{s_b}  *  e^{w_k} / sum_{j in c} e^{w_j}

    A random direction in w moves a cluster's score as far as a single expert's. K clusters of one are the softmax. w is
    [K, N]; ``label`` [K] is each expert's cluster, counted from 0.
    """

    label: "Tensor"
    start: "Tensor"
    learned: "Tensor"
    kind: str = "hierarchical"
    plain: bool = False
    member: "Tensor" = field(init=False)

    def __post_init__(self) -> None:
        import torch

        member = torch.nn.functional.one_hot(self.label).to(self.start.dtype).T
        object.__setattr__(self, "member", member)

    def alpha(self, w: "Tensor") -> "Tensor":
        """Return the coefficients of ``w`` [K, N]."""
        import torch

        across = torch.softmax(self.member @ w / self.member.sum(1, keepdim=True).sqrt(), 0)
        inside = torch.empty_like(w)
        for own in self.member.bool():
            inside = torch.where(own[:, None], torch.softmax(w.masked_fill(~own[:, None], -torch.inf), 0), inside)
        return torch.where(self.learned, across[self.label] * inside, self.start)

    def coefficients(self, w: "Tensor") -> Alpha:
        """Return the coefficients of ``w`` as an array of their own."""
        return as_array(self.alpha(w.detach()))

    def invert(self, alpha: "Tensor") -> "Tensor":
        """Return the w of ``alpha``: scores are the logarithms of the clusters' sums."""
        import torch

        size = self.member.sum(1, keepdim=True)
        held = torch.where(self.learned, alpha, torch.full_like(alpha, 1 / len(alpha)))
        logs = held.log()
        inside = logs - (self.member @ logs / size)[self.label]
        score = (self.member @ held).log()
        return torch.where(self.learned, inside + (score / size.sqrt())[self.label], torch.zeros_like(alpha))

    def initial(self) -> "Tensor":
        """Return the w of the start."""
        return self.invert(self.start)

    def project(self, w: "Tensor") -> None:
        """Do nothing: all values are allowed."""


def hierarchical(labels: Labels, alpha: Alpha, learned: object) -> Hierarchical:
    """Return the hierarchical map of experts whose clusters are ``labels`` [K], 0 to C - 1, started at ``alpha``.

    Raises:
        InputError: the start is not positive.
    """
    import torch

    inner = parameterise("softmax", alpha, learned)
    return Hierarchical(torch.tensor(labels, dtype=torch.int64), inner.start, inner.learned)


def cluster(gram: Matrix, count: int = 0) -> Labels:
    """Return the cluster of each expert [K], by average linkage of ``1 - cos(tau_i, tau_j)``.

    The two clusters are joined whose members are nearest on average, until ``count`` are left. Clusters are numbered by
    their first expert. A task vector of 0 is at distance 1 from all others.

    Args:
        gram: [K, K] of the task vectors.
        count: how many clusters (0: about sqrt(K)).

    Raises:
        InputError: there are fewer experts than clusters.
    """
    experts = len(gram)
    wanted = count or max(1, round(experts**0.5))
    if not 1 <= wanted <= experts:
        raise InputError(f"parts: {wanted} clusters cannot be made of {experts} experts; choose 1 to {experts}")
    norm = np.sqrt(np.diag(gram))
    scale = np.divide(1.0, norm, out=np.zeros_like(norm), where=norm > 0)
    distance = 1 - gram * np.outer(scale, scale)
    groups = [[k] for k in range(experts)]
    while len(groups) > wanted:
        member = np.array([[1 / len(g) if k in g else 0.0 for k in range(experts)] for g in groups])
        between = member @ distance @ member.T
        between[np.tril_indices(len(groups))] = np.inf
        first, second = np.unravel_index(int(between.argmin()), between.shape)
        groups[first] += groups.pop(int(second))
    labels = np.zeros(experts, np.int64)
    for number, group in enumerate(groups):
        labels[group] = number
    return labels
