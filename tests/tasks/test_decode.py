"""Decoding in rounds against one token at a time, a row alone, with every logit from a full forward pass."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make_llama, make_t5, make_tokenizer

from consilience.tasks import decode as module
from consilience.tasks.decode import Draws, decode, draws
from consilience.tasks.generate import generation_config, sample

PAD, END = 0, 2
STEPS = 21


@pytest.fixture(scope="module", params=["llama", "window"])
def model(request: pytest.FixtureRequest) -> Any:
    """A decoder whose rows end after different numbers of tokens."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(3)
    if request.param == "llama":
        made: Any = make_llama()
    else:
        config = MistralConfig(
            vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, sliding_window=6,
        )  # fmt: skip
        made = MistralForCausalLM(config).eval()
    with torch.no_grad():
        made.get_output_embeddings().weight.mul_(8)  # far from ties
    return made


def alone(model: Any, ids: list[int], numbers: Any = None, temperature: float = 1.0, steps: int = STEPS) -> list[int]:
    """Write after one row without padding, cache, or anything that the product uses."""
    written: list[int] = []
    for step in range(steps):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + written]), use_cache=False).logits[0, -1].double().numpy()
        if numbers is None:
            token = int(logits.argmax())
        else:
            p = np.exp((logits - logits.max()) / temperature)
            token = int(np.searchsorted(p.cumsum() / p.sum(), numbers[step], side="right"))
        written.append(token)
        if token == END:
            break
    return written


def padded(rows: list[list[int]]) -> tuple[Any, Any]:
    width = max(map(len, rows))
    inputs = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return inputs, mask


def settings_of(model: Any, steps: int = STEPS) -> Any:
    return generation_config(model, SimpleNamespace(eos_token_id=END, pad_token_id=PAD), steps)


ROWS = [[5, 9, 30, 12], [7, 8], [5, 9, 30, 12], [44, 3, 3, 60, 61, 62], [5, 9, 30, 12], [100, 101]]


@pytest.mark.parametrize("rows", [ROWS, ROWS[:2], [[9]], [[9], [9], [8, 7]]])
def test_greedy_rows_are_what_each_is_alone(model: Any, rows: list[list[int]]) -> None:
    found = decode(model, *padded(rows), settings_of(model), None)
    assert found == [alone(model, row) for row in rows]


@pytest.mark.parametrize("temperature", [2.0, 4.0])
def test_drawn_rows_follow_their_own_numbers_whatever_is_beside_them(model: Any, temperature: float) -> None:
    draw = draws(temperature, STEPS, len(ROWS), [4, 2])
    assert draw is not None
    numbers = draw.uniform.numpy()
    found = decode(model, *padded(ROWS), settings_of(model), draw)
    assert found == [alone(model, row, numbers[:, i], temperature) for i, row in enumerate(ROWS)]
    assert len({tuple(found[i]) for i in (0, 2, 4)}) > 1, "rows that are asked alike are answered anew"


def test_rows_leave_as_they_end(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [alone(model, row) for row in ROWS]
    first = next(token for row in expected for token in row[1:4])
    sizes: list[int] = []
    through = module._generate  # pyright: ignore[reportPrivateUsage]

    def watched(model: Any, inputs: Any, *rest: Any) -> Any:
        sizes.append(len(inputs))
        return through(model, inputs, *rest)

    monkeypatch.setattr(module, "_generate", watched)
    config = settings_of(model)
    config.eos_token_id = [END, first]
    found = decode(model, *padded(ROWS), config, None)
    assert found == [row[: row.index(first) + 1] if first in row else row for row in expected]
    assert sizes[0] == 4, "equal prompts are read once"
    assert sizes[1] == len(ROWS)
    assert sizes[-1] < len(ROWS)


def test_an_encoder_decoder_decodes_in_one_go() -> None:
    model, rows = make_t5(), torch.tensor([[5, 9, 30], [7, 8, 11]])
    for start in (0, 2):  # some begin an answer with the token that ends one
        config = settings_of(model, 6)
        config.decoder_start_token_id = start
        written: list[list[int]] = []
        for row in rows:
            own = [start]
            while len(own) <= 6 and (len(own) == 1 or own[-1] != END):
                with torch.no_grad():
                    out = model(input_ids=row[None], decoder_input_ids=torch.tensor([own]), use_cache=False)
                own.append(int(out.logits[0, -1].argmax()))
            written.append(own[1:])
        found = decode(model, rows, torch.ones_like(rows), config, None)
        assert [row[: len(own)] for row, own in zip(found, written, strict=True)] == written


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.25, 1.0, 2.0]))
def test_a_draw_finds_its_number_on_the_running_sum(seed: int, temperature: float) -> None:
    rng = np.random.default_rng(seed)
    logits = torch.tensor(rng.normal(size=(5, 17)) * 4, dtype=torch.float32)
    logits[:, 3] = -torch.inf
    uniform = torch.tensor(rng.random((2, 9)))
    rows = torch.tensor([8, 0, 3, 4, 1])
    draw = Draws(temperature, uniform, rows)
    for step in range(2):
        tokens = draw(None, logits).argmax(-1)
        p = torch.softmax(logits.double() / temperature, -1).numpy()
        below = np.concatenate([np.zeros((5, 1)), p.cumsum(1)], 1)
        at = uniform[step, rows].numpy()
        for i, token in enumerate(tokens.tolist()):
            assert below[i, token] - 1e-6 <= at[i] <= below[i, token + 1] + 1e-6
            assert token != 3


def test_draws_have_the_models_law() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]]).expand(20_000, -1)
    draw = draws(1.0, 1, 20_000, [0])
    assert draw is not None
    tokens = draw(None, logits).argmax(-1)
    shares = torch.bincount(tokens, minlength=4).double() / len(tokens)
    expected = torch.softmax(logits[0].double(), -1)
    assert float((shares - expected).abs().max()) < 4 * float((expected * (1 - expected) / len(tokens)).sqrt().max())


def test_texts_of_a_batch_answer_as_they_do_alone(model: Any) -> None:
    tokenizer = make_tokenizer()
    texts = ["the cat", "good bad yes no good bad yes no", "the cat", "x"]
    together = sample(model, tokenizer, texts, 12)
    assert together == [sample(model, tokenizer, text, 12) for text in texts]


def test_torchs_generator_is_left_as_it_was(model: Any) -> None:
    state = torch.get_rng_state()
    sample(model, make_tokenizer(), ["the cat"], 4, temperature=1.0)
    assert torch.equal(state, torch.get_rng_state())
