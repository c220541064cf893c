"""Queries that are held for a while: settings that change, threads that generate, experts that come and go."""

import pickle
from threading import Event, Thread
from typing import Any

import pytest
import torch
from routed_models import make_experts, routed_llama
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from consilience.errors import InputError
from consilience.routing.settings import Settings

IDS = torch.tensor([[5, 9, 40, 77]])
LENGTH: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0, "do_sample": False}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def generated(model: Any, ids: Tensor, **more: Any) -> Tensor:
    return model.generate(ids, attention_mask=torch.ones_like(ids), **LENGTH, **more)


@pytest.mark.parametrize(
    "changes", [{"scale": 0.0}, {"scale": 30.0}, {"standardise": True}, {"local": "arrow"}, {"scale": "adaptive"}]
)
def test_settings_that_change_within_count_at_once(changes: dict[str, Any]) -> None:
    inner, outer = routed_llama(Settings(scale=2.0)), routed_llama(Settings(scale=2.0))
    with inner.routing.queries(["aab"]):
        before = logits(inner)
        inner.routing.set(**changes)
        found = logits(inner)
    outer.routing.set(**changes)
    with outer.routing.queries(["aab"]):
        assert torch.equal(found, logits(outer))
    assert not torch.equal(found, before)


def test_the_outer_queries_come_back() -> None:
    model = routed_llama(Settings(scale=5.0))
    with model.routing.queries(["aaa"]):
        outer = logits(model)
        with model.routing.queries(["bbb"]):
            assert not torch.equal(logits(model), outer)
        assert torch.equal(logits(model), outer)
        model.routing.set(scale=0.0)
        model.routing.set(scale=5.0)
        assert torch.equal(logits(model), outer)


def test_settings_that_change_within_count_for_the_outer_queries_too() -> None:
    model, fresh = routed_llama(Settings(scale=5.0)), routed_llama(Settings(scale=9.0, top_k=1))
    with model.routing.queries(["aaa"]):
        with model.routing.queries(["bbb"]):
            model.routing.set(scale=9.0, top_k=1)
        found = logits(model)
    with fresh.routing.queries(["aaa"]):
        assert torch.equal(found, logits(fresh))


class Waiting(StoppingCriteria):
    """Stops nothing; at the first token, lets another thread come as far as it can."""

    def __init__(self) -> None:
        self.begun, self.go_on = Event(), Event()

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        if not self.begun.is_set():
            self.begun.set()
            self.go_on.wait(30)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_threads_that_generate_wait_for_each_other() -> None:
    model = routed_llama(Settings("none", scale=40.0))
    prompts = torch.tensor([[70, 70, 70]]), torch.tensor([[71, 71, 71]])
    expected = [generated(model, ids) for ids in prompts]
    assert not torch.equal(expected[0][:, 3:], expected[1][:, 3:])
    with model.routing.queries(model.routing.asked.semantics.asked[:1]):
        assert not torch.equal(generated(model, prompts[1]), expected[1]), "whose query it is must matter"
    waiting, found = Waiting(), dict[int, Tensor]()

    def run(index: int, **more: Any) -> None:
        found[index] = generated(model, prompts[index], **more)

    first = Thread(target=run, args=(0,), kwargs={"stopping_criteria": StoppingCriteriaList([waiting])})
    second = Thread(target=run, args=(1,))
    first.start()
    assert waiting.begun.wait(30)
    second.start()
    second.join(0.3)
    waiting.go_on.set()
    for thread in (first, second):
        thread.join(60)
    assert [torch.equal(found[index], expected[index]) for index in (0, 1)] == [True, True]


def test_a_thread_generates_by_the_queries_that_another_holds() -> None:
    """What a streamer does: the thread that reads holds the queries, another generates."""
    model = routed_llama(Settings("none", scale=40.0))
    found: list[Tensor] = []
    with model.routing.queries(["bbb"]):
        thread = Thread(target=lambda: found.append(generated(model, IDS)))
        thread.start()
        thread.join(30)
        assert not thread.is_alive()
        assert torch.equal(found[0], generated(model, IDS))
    with model.routing.only("e1"):
        assert torch.equal(found[0], generated(model, IDS))


@pytest.mark.parametrize("way", ["only", "plain", "without", "queries"])
def test_experts_do_not_change_while_something_of_theirs_is_set(way: str) -> None:
    model = routed_llama(Settings())
    routing, before = model.routing, logits(model)
    within = {"only": "e0", "without": "e0", "queries": ["aab"]}
    with (
        getattr(routing, way)(*([within[way]] if way in within else [])),
        pytest.raises(InputError, match="cannot change within only, plain, without or queries"),
    ):
        routing.replace(make_experts(model, 2), None)
    assert routing.names == ("e0", "e1", "e2")
    assert torch.equal(logits(model), before)
    routing.replace(make_experts(model, 2), None)
    assert routing.names == ("e0", "e1")


def test_a_model_that_was_used_can_be_stored() -> None:
    model = routed_llama(Settings())
    before = logits(model)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), before)


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.5, 0.0, 0.0], [1.0, float("nan"), 0.0], 1.0])
def test_wrong_weights_are_refused(weights: Any) -> None:
    routing = routed_llama(Settings()).routing
    with (
        pytest.raises(InputError, match=r"weights: .* give a finite number for each of 3 experts"),
        routing.only(weights),
    ):
        pass
    assert routing.router.fixed is None
