"""Routed layers in bfloat16 on a CPU, whose small steps are compiled."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from routed_models import make_experts
from tiny_models import make_llama
from torch import Tensor

from consilience.kernels import routed
from consilience.routing import scores
from consilience.routing.install import install
from consilience.routing.layer import Experts, Factors
from consilience.routing.router import Router
from consilience.routing.scores import NORM_EPSILON
from consilience.routing.settings import Settings

NAMES = tuple("abcdefghi")
IN, OUT = 64, 48
RANKS = (2, 3, 0, 1, 2, 4, 2, 1, 2)


def _layer(settings: Settings, dtype: torch.dtype = torch.bfloat16) -> Experts:
    """A layer of nine experts of different ranks; the third leaves it alone."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(3))
    factors = [None if not r else Factors(0.3 * draw(r, IN), 0.3 * draw(OUT, r)) for r in RANKS]
    return Experts("one", factors, 0.2 * draw(len(RANKS), IN), torch.zeros(1, dtype=dtype), Router(NAMES, settings))


def _exact(layer: Experts, u: Tensor, y: Tensor) -> Tensor:
    """The layer's equation in float64, token by token, from the factors as they are stored."""
    router, settings = layer.router, layer.router.settings
    into, out_of, found = layer.into.double(), layer.out_of.double(), y.double().clone()
    for s in range(len(u)):
        for t in range(u.shape[1]):
            x = u[s, t].double()
            z = into[layer.total :] @ x
            if settings.local == "phatgoose":
                z = z / (x.var(unbiased=False) + NORM_EPSILON).sqrt()
            elif settings.local == "none":
                z = 0 * z
            else:
                z = (z.abs() if settings.local == "arrow" else z) / settings.temperature
            z = z if router.bias is None else z + router.bias[s % len(router.bias)].double()
            z = z if router.excluded is None else z.masked_fill(router.excluded, -torch.inf)
            best = z.sort(descending=True).indices[: settings.top_k]
            shares = (z[best] - z[best].max()).exp()
            weights = torch.zeros_like(z).scatter(0, best, shares / shares.sum())
            if router.known is not None:
                known, even = router.known[s].double(), z.isfinite().double()
                weights = known * weights + (1 - known) * even / even.sum()
            for k, share in enumerate(weights.tolist()):
                span = slice(layer.edges[k], layer.edges[k + 1])
                found[s, t] += share * (into[span] @ x) @ out_of[span]
    return found


def _inputs(sequences: int, tokens: int) -> tuple[Tensor, Tensor]:
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(sequences + 10 * tokens))
    return draw(sequences, tokens, IN).bfloat16(), draw(sequences, tokens, OUT).bfloat16()


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1),
        (3, 2),
        *(pytest.param(shape, marks=pytest.mark.slow) for shape in [(2, 1), (1, 4), (8, 1), (2, 20), (1, 80)]),
    ],
)
@pytest.mark.parametrize(
    "settings",
    [
        Settings("phatgoose"), Settings("phatgoose", top_k=1), Settings("arrow"), Settings("arrow", temperature=3.0),
        Settings("average", temperature=0.5, top_k=3), Settings("none", scale=5.0),
    ],
)  # fmt: skip
def test_kernels_follow_the_equation(settings: Settings, shape: tuple[int, int], monkeypatch: Any) -> None:
    layer = _layer(settings)
    u, y = _inputs(*shape)
    calls: list[str] = []
    for name in ("add_own", "add_chosen", "weigh"):
        monkeypatch.setattr(routed, name, _told(getattr(routed, name), calls, name))
    layer.router.bias = torch.randn(shape[0], 9, generator=torch.Generator().manual_seed(5))
    with torch.no_grad(), layer.router.without("e", "f"):
        found = layer.add(u, y.clone())
        expected = _exact(layer, u, y)
    # Many tokens' hidden values are rounded, as those of a plain layer's products are.
    assert torch.allclose(found.double(), expected, rtol=2**-8, atol=2**-5)
    used = shape[0] * shape[1] * settings.top_k
    assert calls == ["add_own" if used <= 9 else "add_chosen" if used <= 72 else "weigh"]


@pytest.mark.parametrize(("shape", "kernel"), [((1, 1), "add_own"), ((2, 1), "add_chosen"), ((2, 6), "weigh")])
def test_the_mean_is_what_unrecognised_queries_get(shape: tuple[int, int], kernel: str, monkeypatch: Any) -> None:
    layer = _layer(Settings("phatgoose", scale="adaptive", fallback="mean"))
    u, y = _inputs(*shape)
    calls: list[str] = []
    monkeypatch.setattr(routed, kernel, _told(getattr(routed, kernel), calls, kernel))
    router = layer.router
    router.bias, router.known = torch.zeros(shape[0], 9), torch.tensor([0.3, 0.0])[: shape[0]]
    with torch.no_grad(), router.without("e", "f"):
        found = layer.add(u, y.clone())
        assert torch.allclose(found.double(), _exact(layer, u, y), rtol=2**-8, atol=2**-5)
        router.known = router.known + 0.7
        assert torch.allclose(layer.add(u, y.clone()).double(), _exact(layer, u, y), rtol=2**-8, atol=2**-5)
    assert calls == [kernel, kernel]


def _told(of: Any, calls: list[str], name: str) -> Any:
    def called(*args: Any) -> None:
        calls.append(name)
        of(*args)

    return called


def test_queries_of_different_sequences_are_kept_apart() -> None:
    layer = _layer(Settings("none", scale=1.0, top_k=1))
    u, y = _inputs(4, 1)
    layer.router.bias = 9.0 * torch.eye(9)[[8, 0, 5, 2]]
    with torch.no_grad():
        found, expected = layer.add(u, y.clone()), _exact(layer, u, y)
        assert torch.allclose(found.double(), expected, rtol=2**-8, atol=2**-6)
        assert torch.equal(found[3], y[3])
        layer.router.bias = layer.router.bias.flip(0)
        assert torch.allclose(layer.add(u, y.clone()).double(), _exact(layer, u, y), rtol=2**-8, atol=2**-6)


@pytest.mark.parametrize(
    "changes", [{"top_k": 0}, {"top_k": 9}, {"top_p": 0.7}, {"standardise": True}, {"local": "average"}]
)
def test_every_setting_agrees_with_float32(changes: dict[str, Any]) -> None:
    chosen: dict[str, Any] = {"local": "phatgoose"} | changes
    settings = Settings(**chosen)
    half, single = _layer(settings), _layer(settings, torch.float32)
    single.into, single.out_of = half.into.float(), half.out_of.float()
    u, y = _inputs(2, 3)
    with torch.no_grad():
        expected = single.add(u.float(), y.float())
        assert torch.allclose(half.add(u, y.clone()).float(), expected, rtol=2**-6, atol=2**-4)


def test_gradients_pass_through_a_layer() -> None:
    layer = _layer(Settings("phatgoose"))
    u, y = _inputs(1, 1)
    u.requires_grad_()
    found = layer.add(u, y.clone())
    found.float().square().sum().backward()
    assert u.grad is not None
    assert u.grad.abs().sum() > 0
    with torch.no_grad():
        assert torch.allclose(found, layer.add(u, y.clone()), rtol=2**-7, atol=2**-5)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 20)])
@pytest.mark.parametrize("local", ["phatgoose", "arrow"])
def test_a_pass_that_is_watched_is_the_pass_that_is_not(local: Any, shape: tuple[int, int]) -> None:
    layer, seen = _layer(Settings(local, top_k=2)), list[Tensor]()
    u, y = _inputs(*shape)
    layer.router.bias = torch.randn(shape[0], 9, generator=torch.Generator().manual_seed(5))
    with torch.no_grad(), layer.router.without("e"):
        plain = layer.add(u, y.clone())
        with layer.router.watched(lambda _, weights: seen.append(weights)):
            assert torch.equal(layer.add(u, y.clone()), plain)
        (weights,) = seen
        assert weights.shape == (*shape, 9)
        assert torch.allclose(weights.sum(-1), torch.ones(shape))
        assert (weights > 0).sum() == 2 * shape[0] * shape[1]
        # Their effect is what was added, up to rounding to bfloat16.
        own = torch.cat([weights[..., [k]].expand(*shape, layer.edges[k + 1] - layer.edges[k]) for k in range(9)], -1)
        hidden = u.float() @ layer.into[: layer.total].float().T
        effect = (hidden * own) @ layer.out_of.float()
        assert torch.allclose(plain.float(), y.float() + effect, rtol=2**-7, atol=2**-5)


@pytest.mark.parametrize("local", ["phatgoose", "arrow"])
def test_a_token_is_routed_one_way_however_many_go_with_it(local: Any) -> None:
    layer, seen = _layer(Settings(local, top_k=2)), list[Tensor]()
    u, y = _inputs(1, 60)
    with torch.no_grad(), layer.router.watched(lambda _, weights: seen.append(weights[0])):
        together = layer.add(u, y.clone())
        alone = torch.cat([layer.add(u[:, t : t + 1].contiguous(), y[:, t : t + 1].clone()) for t in range(60)], 1)
    assert torch.allclose(torch.cat(seen[1:]), seen[0], atol=1e-6)
    assert torch.allclose(alone.float(), together.float(), rtol=2**-7, atol=2**-5)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (2, 6)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_no_number_is_not_hidden(shape: tuple[int, int], dtype: torch.dtype) -> None:
    layer = _layer(Settings("phatgoose"), dtype)
    u, y = (one.to(dtype) for one in _inputs(*shape))
    u[0, -1, 3] = torch.nan
    with torch.no_grad():
        found = layer.add(u, y.clone())
    assert found[0, -1].isnan().all()
    assert found.isnan().any(-1).sum() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0,)])
def test_nothing_gives_nothing(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = _layer(Settings("phatgoose"), dtype)
    with torch.no_grad():
        assert layer.add(torch.zeros(*shape, IN, dtype=dtype), torch.zeros(*shape, OUT, dtype=dtype)).numel() == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_trace_holds_the_experts(tokens: int) -> None:
    layer = _layer(Settings("phatgoose"))
    first, (u, y) = _inputs(2, tokens), _inputs(2, tokens)
    u = u.flip(0) * 1.5
    with torch.no_grad():
        traced: Any = torch.jit.trace(lambda u, y: layer.add(u, y), first, check_trace=False)
        found, expected = traced(u, y.clone()), _exact(layer, u, y)
    assert torch.allclose(found.double(), expected, rtol=2**-6, atol=2**-4)
    assert not torch.allclose(y.double(), expected, rtol=2**-6, atol=2**-4)


def test_a_model_may_be_copied_and_moved_to_another_type() -> None:
    model = make_llama().to(torch.bfloat16).requires_grad_(False)
    install(model, make_experts(model), Settings("phatgoose"))
    ids = torch.tensor([[3, 4, 5]])
    with torch.inference_mode():
        before = model(ids).logits
        assert torch.equal(copy.deepcopy(model)(ids).logits, before)
        assert torch.allclose(copy.deepcopy(model).float()(ids).logits, before.float(), atol=0.1)
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("tokens", [1, 8, 80])
def test_activations_of_any_size_are_normalised(size: float, tokens: int) -> None:
    layer = _layer(Settings("phatgoose"))
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(1))
    u, y = (size * (1 + draw(1, tokens, IN))).bfloat16(), torch.zeros(1, tokens, OUT).bfloat16()
    with torch.no_grad():
        found = layer.add(u, y.clone())
    assert torch.allclose(found.double() / size, _exact(layer, u, y) / size, rtol=2**-8, atol=2**-4)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_deviations_are_those_of_a_layer_normalisation(size: float, dtype: torch.dtype) -> None:
    u = (size * (1 + torch.randn(3, 5, IN, generator=torch.Generator().manual_seed(1)))).to(dtype)
    exact = (u.double().var(-1, unbiased=False, keepdim=True) + NORM_EPSILON).rsqrt()
    assert torch.allclose(scores.inverse_deviation(u).double(), exact, rtol=1e-5)


def test_many_deviations_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    u = torch.randn(3, 5, IN, generator=torch.Generator().manual_seed(2))
    whole = scores.inverse_deviation(u)
    monkeypatch.setattr(scores, "PART", 4 * IN)
    assert whole.shape == (3, 5, 1)
    assert torch.equal(scores.inverse_deviation(u), whole)
