"""A routed model computes what the formulas say: against hooks that route token by token, whatever the padding."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from oracle import Rule, normalised, routed_by_hooks, token_weights
from routed_models import LLAMA, T5, make_experts
from torch import Tensor

from consilience.routing import layer
from consilience.routing.expert import Expert
from consilience.routing.install import install
from consilience.routing.router import Router, Similarity
from consilience.routing.settings import Settings
from tests.tasks.tiny_models import make_llama, make_t5

#: Prompts of different lengths; no token is the padding's, 0.
PROMPTS = ([5, 9, 40, 77, 120, 33, 8], [61, 200, 3], [17, 8, 8, 61, 250])
ANSWERS = ([0, 44, 7], [0, 91, 5, 5, 30], [0, 12])
COSINES = torch.tensor([[0.9, 0.2, 0.4], [0.1, 0.8, 0.3], [0.5, 0.5, 0.7]])

MAKE = {"llama": make_llama, "t5": make_t5}
TARGETS = {"llama": LLAMA, "t5": T5}


def plain(kind: str) -> Any:
    return MAKE[kind]().double().requires_grad_(False)


def routed(kind: str, settings: Settings) -> tuple[Any, Router, list[Expert]]:
    model = plain(kind)
    experts = make_experts(model, 3, TARGETS[kind])
    return model, install(model, experts, settings), experts


def padded(rows: Sequence[Sequence[int]], side: str) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return ids, mask


def batch_of(kind: str, rows: Sequence[int], side: str) -> dict[str, Tensor]:
    ids, mask = padded([PROMPTS[i] for i in rows], side)
    if kind == "llama":
        return {"input_ids": ids, "attention_mask": mask}
    # T5 pads its decoder on the right: its first token is the one it starts with.
    answers, known = padded([ANSWERS[i] for i in rows], "right")
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": answers, "decoder_attention_mask": known}


def logits(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """Logits [tokens, V] of every row, without those of padding."""
    known = batch.get("decoder_attention_mask", batch["attention_mask"])
    found = model(**batch, use_cache=False).logits
    return [row[mask.bool()] for row, mask in zip(found, known, strict=True)]


def check(kind: str, side: str, settings: Settings, similarity: Similarity | None = None) -> None:
    """Compare a batch of the routed model with every row alone in the plain one."""
    model, router, experts = routed(kind, settings)
    router.instruct(similarity)
    found, other, bases = logits(model, batch_of(kind, (0, 1, 2), side)), plain(kind), plain(kind)
    for i, row in enumerate(found):
        added, known = None, 1.0
        if similarity is not None:
            added = (similarity.scale[i] * similarity.cosines[i : i + 1]).double().numpy()
            known = float(similarity.scale[i]) / settings.most_scale if settings.fallback == "mean" else 1.0
        alone, rule = batch_of(kind, (i,), side), Rule(settings.local, settings.top_k, settings.temperature)
        with routed_by_hooks(other, experts, replace(rule, added=added, known=known)):
            expected = logits(other, alone)[0]
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)
        # Experts that hardly count would hide a wrong routing.
        assert float((expected - logits(bases, alone)[0]).abs().max()) > 0.1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("local", ["phatgoose", "arrow", "average"])
def test_padded_batches_are_routed_as_every_row_alone(local: Any, kind: str, side: str) -> None:
    check(kind, side, Settings(local, top_k=2))


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("local", ["phatgoose", "arrow"])
def test_experts_that_are_multiplied_one_by_one(local: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "DENSE_SHARE", -1.0)
    check(kind, "left", Settings(local, top_k=1, temperature=1.5))


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_instructions_are_added_to_every_tokens_logits(kind: str) -> None:
    check(kind, "right", Settings("phatgoose", scale=3.0), Similarity(COSINES, torch.tensor([3.0, 0.5, 10.0])))


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("dense", [0.5, -1.0])
def test_queries_that_are_no_experts_get_the_mean(kind: str, dense: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "DENSE_SHARE", dense)
    settings = Settings("phatgoose", scale="adaptive", most_scale=4.0, fallback="mean")
    check(kind, "left", settings, Similarity(COSINES, torch.tensor([0.0, 1.5, 4.0])))


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_generation_with_a_cache_is_that_of_the_hooks(kind: str) -> None:
    more: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    model, _, experts = routed(kind, Settings("phatgoose"))
    ids, mask = padded(PROMPTS, "left")
    found = model.generate(ids, attention_mask=mask, **more)[:, -4:]
    other = plain(kind)
    for i, prompt in enumerate(PROMPTS):
        with routed_by_hooks(other, experts, Rule("phatgoose", 2)):
            expected = other.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **more)
        assert found[i].tolist() == expected[0, -4:].tolist()


def test_the_oracle_is_the_formula_on_numbers_worked_out_by_hand() -> None:
    """Two of three experts with probabilities 1/2, 1/3 and 1/6, and a normalised vector."""
    found = token_weights([np.log(3), np.log(2), np.log(1)], 2)
    assert found == pytest.approx([0.6, 0.4, 0.0], rel=3e-6)
    assert normalised(np.array([1.0, 3.0])) == pytest.approx([-1.0, 1.0], abs=1e-5)
