"""The suite's held-out loss against the plain formula, on a tiny random model."""

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from suites.language import evaluate, train  # noqa: E402

PAIRS = [([1, 2, 3], [4, 5]), ([6], [7]), ([8, 9, 1, 2, 3], [4, 5, 6, 7])]


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def test_response_losses_match_unpadded_log_softmax(model: Any) -> None:
    with torch.no_grad():
        losses, rows = evaluate.response_losses(model, evaluate.collate(PAIRS, pad=0))
        for i, (before, after) in enumerate(PAIRS):
            logits = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
            expected = [-float(logits[len(before) + j - 1, token]) for j, token in enumerate(after)]
            assert losses[rows == i].tolist() == pytest.approx(expected, abs=1e-5)


class _Tokenizer:
    """One token a character, a to j; the chat template adds nothing, and 0 ends the turn."""

    eos_token_id = 0
    pad_token_id = 0

    def apply_chat_template(self, turn: list[dict[str, str]], **_: Any) -> str:
        return turn[0]["content"]

    def __call__(self, text: str, **_: Any) -> Any:
        class Ids:
            input_ids = [ord(c) - 96 for c in text]  # noqa: RUF012

        return Ids


def test_heldout_loss_weighs_tokens_and_accuracy_picks_the_likelier_choice(model: Any) -> None:
    def nats(prompt: str, response: str) -> float:
        before, after = [ord(c) - 96 for c in prompt], [*(ord(c) - 96 for c in response), 0]
        with torch.no_grad():
            logits = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
        return -math.fsum(float(logits[len(before) + j - 1, token]) for j, token in enumerate(after))

    rows = [{"prompt": "abc", "response": "de"}, {"prompt": "f", "response": "ghij"}]
    expected = (nats("abc", "de") + nats("f", "ghij")) / 8
    assert evaluate.heldout_loss(model, _Tokenizer(), rows) == pytest.approx(expected, abs=1e-5)

    prompts = ["a", "bcd", "hij", "gg", "ee"]
    labels = [int(nats(prompt, "b") < nats(prompt, "a")) for prompt in prompts]
    labels[0] = 1 - labels[0]
    rated = [{"prompt": p, "choices": ["a", "b"], "label": y} for p, y in zip(prompts, labels, strict=True)]
    assert evaluate.accuracy(model, _Tokenizer(), rated) == pytest.approx(0.8)


def test_learning_rate_warms_up_to_its_peak_and_decays_to_zero() -> None:
    rates = [train.learning_rate_at(step, 200, 1e-3) for step in range(200)]
    assert rates[0] == pytest.approx(1e-3 / 12)
    assert max(rates) == rates[11] == rates[12] == 1e-3
    assert rates[12:] == sorted(rates[12:], reverse=True)
    assert 0 < rates[-1] < 1e-6


def test_batches_visit_every_row_once_a_pass_and_repeat_with_the_seed() -> None:
    def two_passes(seed: int) -> list[list[int]]:
        batches = train.batches(10, 3, seed)
        return [next(batches) for _ in range(6)]

    drawn = two_passes(0)
    for part in (drawn[:3], drawn[3:]):
        flat = [i for batch in part for i in batch]
        assert len(set(flat)) == 9
    assert drawn[:3] != drawn[3:]
    assert drawn == two_passes(0) != two_passes(1)
