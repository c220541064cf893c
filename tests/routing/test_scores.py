"""Routing's formulas against independent ones, and their invariants."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from consilience.errors import InputError
from consilience.routing import scores
from consilience.routing.settings import Settings

Shapes = st.tuples(st.integers(1, 5), st.integers(2, 9), st.integers(0, 2**31 - 1))


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def phatgoose(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """sqrt(d) cos(u - mean, v - mean), where layer normalisation adds 1e-5 to either's mean square."""
    u, v = u - u.mean(-1, keepdim=True), v - v.mean(-1, keepdim=True)
    lengths = [torch.sqrt(x.square().sum(-1) + 1e-5 * x.shape[-1]) for x in (u, v)]
    return math.sqrt(u.shape[-1]) * (u @ v.T) / (lengths[0][:, None] * lengths[1][None])


def logits(settings: Settings, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scale = scores.inverse_deviation(u) if settings.local == "phatgoose" else None
    return scores.local_logits(settings, u @ scores.prototypes(settings.local, v).T, scale)


@given(Shapes)
def test_phatgoose_is_a_scaled_cosine(shape: tuple[int, int, int]) -> None:
    k, d, seed = shape
    u, v = 30 * drawn(seed, 4, d), 30 * drawn(seed + 1, k, d)
    assert torch.allclose(logits(Settings("phatgoose"), u, v).double(), phatgoose(u, v), atol=1e-3)


@given(Shapes, st.floats(0.5, 50), st.floats(-50, 50))
def test_phatgoose_ignores_scale_and_shift(shape: tuple[int, int, int], c: float, shift: float) -> None:
    k, d, seed = shape
    u, v, settings = 100 * drawn(seed, 3, d), 100 * drawn(seed + 1, k, d), Settings("phatgoose")
    expected = logits(settings, u, v)
    assert torch.allclose(logits(settings, c * u + shift, v), expected, atol=2e-3)
    assert torch.allclose(logits(settings, u, c * v + shift), expected, atol=2e-3)


def test_an_expert_without_a_vector_is_neutral() -> None:
    v = drawn(1, 3, 6)
    v[1] = 0
    for local in ("phatgoose", "arrow", "average"):
        assert not logits(Settings(local), drawn(2, 5, 6), v)[:, 1].any()


def test_arrow_ignores_the_sign_of_its_vectors() -> None:
    u, v, settings = drawn(1, 5, 6), drawn(2, 3, 6), Settings("arrow", temperature=2.5)
    found = logits(settings, u, v)
    assert torch.equal(found, logits(settings, u, -v))
    assert np.allclose(found, np.abs(u.numpy() @ v.numpy().T) / 2.5, atol=1e-6)


@given(Shapes, st.integers(0, 6))
def test_top_k_is_a_convex_combination_of_at_most_k(shape: tuple[int, int, int], k: int) -> None:
    experts, _, seed = shape
    z = 3 * drawn(seed, 7, experts).float()
    found = scores.weights(Settings(top_k=k), z)
    assert (found >= 0).all()
    assert torch.allclose(found.sum(-1), torch.ones(7), atol=1e-4)
    assert ((found > 0).sum(-1) <= (k or experts)).all()
    kept = z.topk(min(k or experts, experts), -1)
    other = torch.zeros_like(z).scatter(-1, kept.indices, kept.values.softmax(-1))
    assert torch.allclose(found, other, atol=1e-6)
    # As published: softmax first, and 1e-6 added to the sum of what is kept, which is 1 / K at least.
    published = z.softmax(-1).gather(-1, kept.indices)
    published = published / (published.sum(-1, keepdim=True) + 1e-6)
    assert torch.allclose(found.gather(-1, kept.indices), published, atol=2e-6 * experts)


@given(Shapes, st.floats(-20, 20))
def test_a_common_constant_changes_nothing(shape: tuple[int, int, int], constant: float) -> None:
    experts, _, seed = shape
    z = drawn(seed, 7, experts)
    for settings in (Settings(top_k=2), Settings(top_p=0.6)):
        assert torch.allclose(scores.weights(settings, z), scores.weights(settings, z + constant), atol=1e-6)


@given(Shapes)
def test_experts_may_come_in_any_order(shape: tuple[int, int, int]) -> None:
    experts, _, seed = shape
    z = drawn(seed, 7, experts)
    order = torch.randperm(experts, generator=torch.Generator().manual_seed(seed))
    for settings in (Settings(top_k=2), Settings(top_p=0.6)):
        found = scores.weights(settings, z)[:, order]
        assert torch.allclose(found, scores.weights(settings, z[:, order]), atol=1e-12)


@given(Shapes)
def test_two_copies_with_half_the_odds_are_one_expert(shape: tuple[int, int, int]) -> None:
    experts, width, seed = shape
    z, outputs = drawn(seed, 7, experts), drawn(seed + 1, experts, width)
    halved = torch.cat([z[:, :1] - math.log(2), z[:, 1:], z[:, :1] - math.log(2)], -1)
    mixed = scores.weights(Settings(top_k=0), halved) @ torch.cat([outputs, outputs[:1]])
    assert torch.allclose(mixed, scores.weights(Settings(top_k=0), z) @ outputs, atol=1e-5)


@given(st.integers(1, 6), st.floats(0.01, 1), st.integers(0, 1000))
def test_top_p_keeps_the_fewest(experts: int, p: float, seed: int) -> None:
    z = 2 * drawn(seed, 5, experts)
    found, probabilities = scores.top_p_weights(z, p), z.softmax(-1)
    for row, all_ in zip(found, probabilities, strict=True):
        used = row > 0
        mass = float(all_[used].sum())
        assert mass >= p - 1e-9
        assert int(used.sum()) == 1 or mass - float(all_[used].min()) < p
        assert torch.allclose(row[used], all_[used] / mass)


@given(Shapes)
def test_standardised_has_no_unit(shape: tuple[int, int, int]) -> None:
    experts, _, seed = shape
    z = drawn(seed, 7, experts)
    found = scores.standardised(z)
    assert torch.allclose(found, scores.standardised(5 * z + 3), atol=1e-9)
    if experts > 1:
        assert torch.allclose(found.square().mean(-1), torch.ones(7, dtype=torch.float64))
    assert not scores.standardised(torch.ones(2, 3)).any()


def test_a_whole_number_may_come_as_a_float() -> None:
    assert type(Settings.from_plain({"top_k": 2.0}, "routing").top_k) is int


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("local", "phatgose", "did you mean 'phatgoose'"),
        ("scale", -1, "scale: -1"),
        ("scale", "much", "or adaptive"),
        ("top_k", 1.5, "top_k: 1.5"),
        ("top_k", -1, "top_k: -1"),
        ("top_p", 2, "top_p: 2"),
        ("temperature", 0, "temperature: 0"),
        ("standardise", "yes", "standardise: 'yes'"),
        ("fallback", "mena", "did you mean 'mean'"),
        ("fallback", "mean", "needs scale: adaptive"),
        ("topk", 2, "did you mean 'top_k'"),
        ("scale", math.nan, "scale: nan"),
        ("scale", 10**400, "scale: 1000"),
        ("top_k", 10**400, "top_k: 1000"),
        ("temperature", 10**400, "temperature: 1000"),
    ],
)
def test_settings_say_what_is_wrong(key: str, value: object, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Settings.from_plain({key: value}, "routing")
