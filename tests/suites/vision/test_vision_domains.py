"""Who sees which images: nothing twice, nothing lost, and shares that follow the Dirichlet law."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilience.errors import InputError
from suites.vision.domains import Domains, Labels, Sizes, class_counts, dirichlet_shards, halves, skewed

TRAIN: Labels = np.random.default_rng(0).permutation(np.arange(3000) % 10)
TEST: Labels = np.arange(1000) % 10
SIZES = Sizes(pretraining=100, experts=2000, train=150, validation=100, test=400, least=10)


@given(st.integers(0, 2**31), st.integers(1, 12), st.floats(1e-6, 1e3), st.integers(1, 400), st.integers(1, 12))
def test_every_image_is_dealt_exactly_once(seed: int, experts: int, delta: float, count: int, classes: int) -> None:
    labels = np.random.default_rng(seed).integers(0, classes, count)
    shards = dirichlet_shards(labels, experts, delta, seed, least=0)
    assert len(shards) == experts
    assert sorted(np.concatenate(shards).tolist()) == list(range(count))
    assert all(np.all(np.diff(shard) > 0) for shard in shards)
    # So every class is in somebody's shard, and somebody has at least its K-th part.
    counts = np.array([class_counts(labels, shard, classes) for shard in shards])
    assert (counts.max(0) * experts >= np.bincount(labels, minlength=classes) - experts).all()


@pytest.mark.parametrize("delta", [0.1, 0.5, 5.0])
def test_shares_vary_as_the_dirichlet_law_says(delta: float) -> None:
    # Var p_k = (1/K) (1 - 1/K) / (K delta + 1), over many classes.
    experts, classes, each = 5, 2000, 100
    labels = np.repeat(np.arange(classes), each)
    shards = dirichlet_shards(labels, experts, delta, 0, least=0)
    shares = np.array([class_counts(labels, shard, classes) for shard in shards]) / each
    expected = (1 / experts) * (1 - 1 / experts) / (experts * delta + 1)
    assert shares.var(axis=1).mean() == pytest.approx(expected, rel=0.06)
    assert shares.mean(axis=1) == pytest.approx(np.full(experts, 1 / experts), abs=0.03)


def test_small_shards_are_drawn_again() -> None:
    for seed in range(5):
        shards = dirichlet_shards(TRAIN, 10, 0.1, seed, least=40)
        assert min(len(shard) for shard in shards) >= 40
    with pytest.raises(InputError, match=r"delta=0\.1: in 2000 draws some of 10 experts had fewer than 299"):
        dirichlet_shards(TRAIN, 10, 0.1, 0, least=299)


@pytest.mark.parametrize(("experts", "delta"), [(0, 1.0), (2, 0.0), (2, -1.0), (2, float("nan")), (2, float("inf"))])
def test_arguments_out_of_range_are_one_line(experts: int, delta: float) -> None:
    with pytest.raises(InputError, match="delta above 0"):
        dirichlet_shards(TRAIN, experts, delta, 0)


def _disjoint(found: Domains) -> None:
    own = [found.pretraining, *found.experts, found.train, found.validation]
    for one, other in combinations(own, 2):
        assert not set(one.tolist()) & set(other.tolist())


@pytest.mark.parametrize("target", [None, 0.5])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_domain_experiment_shares_no_image(seed: int, target: float | None) -> None:
    sizes = replace(SIZES, test=150)
    found = skewed(TRAIN, TEST, sizes, experts=4, delta=0.3, seed=seed, target=target)
    _disjoint(found)
    sizes_found = (len(found.pretraining), sum(found.shard_sizes), len(found.train), len(found.validation))
    assert sizes_found == (100, 2000, 150, 100)
    assert len(set(found.test.tolist())) == 150
    again = skewed(TRAIN, TEST, sizes, experts=4, delta=0.3, seed=seed, target=target)
    assert np.array_equal(found.experts[2], again.experts[2])
    assert np.array_equal(found.train, again.train)


def test_seeds_differ() -> None:
    one, other = (skewed(TRAIN, TEST, SIZES, experts=4, delta=0.3, seed=seed) for seed in (0, 1))
    assert not np.array_equal(one.train, other.train)
    assert not np.array_equal(one.test, other.test)


def test_a_skewed_target_has_the_same_classes_in_all_its_splits() -> None:
    found = skewed(TRAIN, TEST, replace(SIZES, test=150), experts=2, delta=1.0, seed=3, target=0.5)
    held = np.concatenate([found.train, found.validation])
    shares = np.array(class_counts(TRAIN, held, 10)) / len(held)
    reported = np.array(class_counts(TEST, found.test, 10)) / len(found.test)
    assert np.abs(shares - reported).max() < 0.01
    # The target's own train and validation are drawn from those alike, within the noise of a draw of 100.
    tuned = np.array(class_counts(TRAIN, found.validation, 10)) / 100
    assert np.abs(tuned - shares).max() < 0.15


def test_a_skewed_target_that_a_class_cannot_fill_is_one_line() -> None:
    with pytest.raises(InputError, match=r"test images of class \d are wanted for the target"):
        skewed(TRAIN, TEST, SIZES, experts=2, delta=1.0, seed=3, target=0.05)
    with pytest.raises(InputError, match=r"target=0: the concentration"):
        skewed(TRAIN, TEST, SIZES, experts=2, delta=1.0, seed=3, target=0.0)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (replace(SIZES, experts=2651), "are left for 2751 of base and experts"),
        (replace(SIZES, train=2999), "3099 training images are wanted"),
        (replace(SIZES, test=1001), "1001 test images are wanted"),
    ],
)
def test_too_small_a_data_set_is_one_line(sizes: Sizes, said: str) -> None:
    with pytest.raises(InputError) as caught:
        skewed(TRAIN, TEST, sizes, experts=4, delta=1.0, seed=0)
    assert said in str(caught.value)


def test_the_split_experiment_needs_both_experts() -> None:
    found = halves(TRAIN, TEST, SIZES, seed=0)
    _disjoint(found)
    low, high = found.experts
    assert set(TRAIN[low]) == {0, 1, 2, 3, 4}
    assert set(TRAIN[high]) == {5, 6, 7, 8, 9}
    assert len(low) + len(high) == SIZES.experts
    for labels, rows in ((TRAIN, found.train), (TRAIN, found.validation), (TEST, found.test)):
        assert set(labels[rows]) == set(range(10))
    with pytest.raises(InputError, match="ten classes"):
        halves(TRAIN % 5, TEST, SIZES, seed=0)
