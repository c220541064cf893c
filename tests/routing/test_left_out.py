"""Experts that are left out of a routed model: as if it had been built without them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from routed_models import make_experts
from tiny_models import make_llama, make_tokenizer
from torch import Tensor

from consilience.routing.explaining.explain import explain
from consilience.routing.instructions.semantics import Instructions, InstructionSettings, Source
from consilience.routing.model import Routing
from consilience.routing.settings import Settings

IDS = torch.tensor([[5, 9, 40, 77, 120, 33], [8, 8, 61, 200, 3, 17]])
WORDS = {
    "e0": ("sort these numbers 3 1 2", "sort the numbers 9 8", "put the numbers 7 5 in order"),
    "e1": ("what rhymes with cat", "find a rhyme for house", "which word rhymes with tree"),
    "e2": ("spell the word necessary", "how do you spell rhythm", "spell it backwards"),
}
#: One of e1's, whose own expert alone would make the scale large, and one of e2's.
QUERIES = [WORDS["e1"][0], WORDS["e2"][1]]
TFIDF = InstructionSettings.from_plain({"embedder": "tfidf"}, "x")
SETTINGS = [
    Settings(scale="adaptive", most_scale=20.0),
    Settings(scale="adaptive", most_scale=20.0, fallback="mean"),
    Settings(scale=3.0, standardise=True, top_k=0),
    Settings("arrow", scale=3.0, standardise=True, temperature=0.5),
    Settings("none", scale=3.0),
]


def built(settings: Settings, names: tuple[str, ...], dtype: torch.dtype = torch.float32) -> Any:
    """A model that routes among some experts by what instructions of all three, fitted together, say."""
    model = make_llama().requires_grad_(False)
    experts = [one for one in make_experts(model) if one.name in names]
    told = Instructions.build(
        replace(TFIDF, held_in=2), [Source(name, examples=texts) for name, texts in WORDS.items()]
    )

    def kept(queries: Any, settings: Settings) -> Any:
        whole = told(queries, replace(settings, scale=0.0, fallback="local"))
        cosines = whole.cosines[:, [list(WORDS).index(name) for name in names]]
        if settings.scale == "adaptive":
            assert told.adaptive is not None
            return replace(whole, cosines=cosines, scale=told.adaptive.scale(cosines, settings.most_scale))
        return replace(whole, cosines=cosines, scale=torch.full((len(queries),), float(settings.scale)))

    model.to(dtype)
    Routing(model, experts, settings, make_tokenizer(), told if len(names) == len(WORDS) else kept)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_rest_routes_as_if_alone(settings: Settings, dtype: torch.dtype) -> None:
    whole, rest = built(settings, ("e0", "e1", "e2"), dtype), built(settings, ("e0", "e2"), dtype)
    with whole.routing.queries(QUERIES), rest.routing.queries(QUERIES):
        everyone, expected = logits(whole), logits(rest)
        with whole.routing.without("e1"):
            found = logits(whole)
        assert torch.equal(logits(whole), everyone)
    near = 1e-5 if dtype is torch.float32 else 0.03
    assert (found - expected).norm() < near * expected.norm()
    assert (everyone - expected).norm() > 3 * near * expected.norm()


def test_the_order_of_leaving_out_and_asking_does_not_matter() -> None:
    model = built(SETTINGS[1], ("e0", "e1", "e2"))
    with model.routing.without("e1"), model.routing.queries(QUERIES):
        first = logits(model)
    with model.routing.queries(QUERIES), model.routing.without("e1"):
        assert torch.equal(logits(model), first)


def test_an_explanation_tells_the_scale_of_the_rest() -> None:
    model = built(SETTINGS[0], ("e0", "e1", "e2"))
    whole = explain(model, QUERIES[0], max_new_tokens=1)
    with model.routing.without("e1"):
        rest = explain(model, QUERIES[0], max_new_tokens=1)
    alone = explain(built(SETTINGS[0], ("e0", "e2")), QUERIES[0], max_new_tokens=1)
    assert rest.scale == pytest.approx(alone.scale)
    assert whole.scale is not None
    assert alone.scale is not None
    assert alone.scale < whole.scale


def test_a_local_router_that_is_changed_leaves_them_out_still() -> None:
    model = built(Settings(), ("e0", "e1", "e2"))
    seen: list[Tensor] = []
    with model.routing.without("e0"), model.routing.watched(lambda _, weights: seen.append(weights)):
        model.routing.set(local="arrow")
        logits(model)
    assert max(float(weights[..., 0].max()) for weights in seen) == 0
    assert model.routing.router.excluded is None
