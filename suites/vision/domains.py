"""Who sees which images: a shared pre-training, experts on shards that differ in their classes, and the target.

All of it is rows of one data set's training images, disjoint from each other, and, for the report alone, rows of its
published test images. Rows are a function of the labels, the sizes and the seed.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from consilience.errors import InputError
from suites.vision.images import Rows

Labels = npt.NDArray[np.int64]

#: Draws of the Dirichlet law before giving up on shards that all reach the least size.
_DRAWS = 2_000


@dataclass(frozen=True)
class Sizes:
    """How many images each purpose gets: shared pre-training, all experts together, the target's three splits.

    ``least`` is the smallest shard an expert may get. The defaults let one setting (ten experts, all baselines, one
    seed) of the default networks fit 15 minutes on 2 cores.
    """

    pretraining: int = 2_000
    experts: int = 20_000
    train: int = 1_000
    validation: int = 1_000
    test: int = 3_000
    least: int = 100


@dataclass(frozen=True)
class Domains:
    """Rows by purpose: ``test`` counts the published test images, everything else the training images."""

    pretraining: Rows
    experts: tuple[Rows, ...]
    train: Rows
    validation: Rows
    test: Rows

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """The number of images each expert is trained on: what weighting by data size goes by."""
        return tuple(len(rows) for rows in self.experts)


def dirichlet_shards(labels: Labels, experts: int, delta: float, seed: int, least: int = 1) -> tuple[Rows, ...]:
    """Deal every image to one of ``experts`` shards, each class by shares of its own.

        p_c ~ Dirichlet(delta, ..., delta) over the experts, for every class c;  expert k gets a share p_ck of class c

    Small ``delta``: each class goes to few experts, and shards differ in size; large: all shards are alike. Every image
    is dealt, so every class is in some shard. The shares are drawn again until no shard is smaller than ``least``.

    Args:
        labels: int64 [n].
        experts: the number of shards.
        delta: the concentration, above 0.
        seed: decides everything.
        least: the smallest size a shard may have.

    Returns:
        The rows of ``labels`` that each expert gets, ascending.

    Raises:
        InputError: an argument is out of range, or no draw gives every expert ``least`` images.

    Source: Yurochkin et al. 2019 (arXiv:1905.12022), section 4, the usual law of class-skewed shards. The one GLUE's
    experiments draw is not known in more detail than "Dirichlet, delta".
    """
    if experts < 1 or not np.isfinite(delta) or delta <= 0:
        raise InputError(f"experts={experts}, delta={delta:g}: there must be an expert, and delta above 0")
    generator = np.random.default_rng(seed)
    shuffled = [generator.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    for _ in range(_DRAWS):
        shares = generator.dirichlet(np.full(experts, delta), len(shuffled))
        dealt = [_deal(rows, share) for rows, share in zip(shuffled, shares, strict=True)]
        shards = tuple(np.sort(np.concatenate(parts)) for parts in zip(*dealt, strict=True))
        if min(len(shard) for shard in shards) >= least:
            return shards
    raise InputError(
        f"delta={delta:g}: in {_DRAWS} draws some of {experts} experts had fewer than {least} images; raise delta or "
        f"lower least"
    )


def _deal(rows: Rows, shares: npt.NDArray[np.float64]) -> list[Rows]:
    """Cut ``rows`` at the cumulative sums of the shares."""
    ends = np.rint(np.cumsum(shares)[:-1] * len(rows)).astype(np.int64)
    return [np.asarray(part, np.int64) for part in np.split(rows, ends)]


def skewed(
    train: Labels, test: Labels, sizes: Sizes, *, experts: int, delta: float, seed: int, target: float | None = None
) -> Domains:
    """Make the domain experiment: experts on Dirichlet(``delta``) shards, and a target that needs many of them.

    Args:
        train: labels of the training images.
        test: labels of the published test images.
        sizes: images per purpose.
        experts: the number of experts.
        delta: the shards' concentration.
        seed: decides everything.
        target: None draws the target from all classes as they come; a number draws its class shares from
            Dirichlet(``target``), for all three of its splits alike.

    Raises:
        InputError: the data set is too small for these sizes, or ``dirichlet_shards`` refuses.
    """
    generator = np.random.default_rng([seed, 1])
    shares = _target_shares(train, target, generator)
    held, pool = _draw(train, generator.permutation(len(train)), sizes.train + sizes.validation, shares, "training")
    reported, _ = _draw(test, generator.permutation(len(test)), sizes.test, shares, "test")
    if len(pool) < sizes.pretraining + sizes.experts:
        wanted = sizes.pretraining + sizes.experts
        raise InputError(f"{len(pool)} training images are left for {wanted} of base and experts; lower the sizes")
    # Drawn by class they come in an order that depends on it, and the cut into training and validation must not.
    held = generator.permutation(held)
    shared, dealt = pool[: sizes.pretraining], pool[sizes.pretraining :][: sizes.experts]
    shards = dirichlet_shards(train[dealt], experts, delta, seed, sizes.least)
    return Domains(
        np.sort(shared),
        tuple(np.sort(dealt[shard]) for shard in shards),
        np.sort(held[: sizes.train]),
        np.sort(held[sizes.train :]),
        np.sort(reported),
    )


def halves(train: Labels, test: Labels, sizes: Sizes, *, seed: int) -> Domains:
    """Make the split experiment: one expert sees classes 0-4 alone, the other 5-9, and the target needs both.

    Raises:
        InputError: the data set is too small for these sizes, or has not ten classes.
    """
    if not np.array_equal(np.unique(train), np.arange(10)):
        raise InputError("classes: the split experiment needs a data set of ten classes; choose mnist or fashion-mnist")
    whole = skewed(train, test, sizes, experts=1, delta=1.0, seed=seed)
    dealt = whole.experts[0]
    return Domains(
        whole.pretraining,
        (dealt[train[dealt] < 5], dealt[train[dealt] >= 5]),
        whole.train,
        whole.validation,
        whole.test,
    )


def _target_shares(
    labels: Labels, target: float | None, generator: np.random.Generator
) -> npt.NDArray[np.float64] | None:
    if target is None:
        return None
    if not np.isfinite(target) or target <= 0:
        raise InputError(f"target={target:g}: the concentration of the target's classes must be above 0")
    return generator.dirichlet(np.full(int(labels.max()) + 1, target))


def _draw(
    labels: Labels, pool: Rows, count: int, shares: npt.NDArray[np.float64] | None, what: str
) -> tuple[Rows, Rows]:
    """Take ``count`` rows of a shuffled pool, by class shares if there are any; return them and the rest."""
    if shares is None:
        if count > len(pool):
            raise InputError(f"{count} {what} images are wanted for the target, {len(pool)} are there; lower the sizes")
        return pool[:count], pool[count:]
    ends = np.rint(np.cumsum(shares / shares.sum()) * count).astype(np.int64)
    wanted = np.diff(ends, prepend=0)
    taken = np.zeros(len(pool), bool)
    for number, want in enumerate(wanted):
        places = np.flatnonzero(labels[pool] == number)
        if want > len(places):
            raise InputError(
                f"{want} {what} images of class {number} are wanted for the target, {len(places)} are there; lower the "
                f"sizes"
            )
        taken[places[:want]] = True
    return pool[taken], pool[~taken]


def class_counts(labels: Labels, rows: Rows, classes: int) -> list[int]:
    """Return how many of ``rows`` are of each class."""
    return np.bincount(labels[rows], minlength=classes).tolist()
