"""Measurements against formulas written out plainly, one sequence at a time, in float64."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import make_llama, make_t5, shake

from consilience.errors import InputError
from consilience.tasks import Message, Row, Task, bootstrap, divergence, encode, loss_per_token, measure, rank_accuracy
from consilience.tasks import metrics as metrics_module
from consilience.tasks import readout as readout_module

RESPONSES = Task(
    "responses",
    (
        Row(prompt="is it good?", response="yes"),
        Row(prompt="the cat", response="sat on the mat, and then on another mat"),
        Row(messages=(Message(role="user", content="hi"), Message(role="assistant", content="hello"))),
        Row(prompt="x" * 70, response="z"),
        Row(text="def f(x): return x + 1"),
    ),
)
CHOICES = Task(
    "choices",
    tuple(
        Row(prompt=f"{word} is", choices=("positive", "negative or so", "bad"), label=i % 3)
        for i, word in enumerate("abcdefghijklmno")
    ),
)


def logits_of(model: Any, encoded: Any) -> torch.Tensor:
    with torch.no_grad():
        if encoded.source:
            out = model(
                input_ids=torch.tensor([encoded.source]), decoder_input_ids=torch.tensor([encoded.inputs])
            ).logits
        else:
            out = model(input_ids=torch.tensor([encoded.inputs])).logits
    return out[0][list(encoded.positions)].double()


def nats_of(model: Any, encoded: Any) -> float:
    return float(
        torch.nn.functional.cross_entropy(logits_of(model, encoded), torch.tensor(encoded.targets), reduction="sum")
    )


def expected_loss(model: Any, tokenizer: Any, task: Task, **settings: Any) -> float:
    encoded = encode(task, tokenizer, **settings)
    return sum(nats_of(model, e) for e in encoded) / sum(len(e.targets) for e in encoded)


def brute_kl(model_a: Any, model_b: Any, encoded: Any) -> tuple[float, float]:
    """Summed KL(a || b) and Jensen-Shannon divergence by the definition, over probabilities in float64."""
    a, b = (torch.softmax(logits_of(m, encoded), -1).numpy() for m in (model_a, model_b))
    mean = (a + b) / 2
    js = (a * np.log(a / mean)).sum() / 2 + (b * np.log(b / mean)).sum() / 2
    return float((a * np.log(a / b)).sum()), float(js)


def test_loss_is_the_mean_cross_entropy_of_scored_tokens(llama: Any, tokenizer: Any):
    loss = loss_per_token(llama, tokenizer, RESPONSES)
    encoded = encode(RESPONSES, tokenizer)
    assert loss.value == pytest.approx(expected_loss(llama, tokenizer, RESPONSES), rel=1e-5)
    assert loss.nats == pytest.approx([nats_of(llama, e) for e in encoded], rel=1e-5)
    assert loss.tokens == tuple(len(e.targets) for e in encoded)
    assert (loss.n_examples, loss.n_tokens, loss.rows) == (5, sum(loss.tokens), (0, 1, 2, 3, 4))
    assert loss.interval.low < loss.value < loss.interval.high


def test_an_untrained_model_with_equal_logits_is_uniform(tokenizer: Any):
    model = make_llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # tied: the embeddings are zero too
    assert loss_per_token(model, tokenizer, RESPONSES).value == pytest.approx(math.log(310), rel=1e-6)


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_padding_and_batching_do_not_matter(llama: Any, other_llama: Any, tokenizer: Any, batch_size: int):
    alone = measure(llama, tokenizer, RESPONSES, reference=other_llama, batch_size=1)
    together = measure(llama, tokenizer, RESPONSES, reference=other_llama, batch_size=batch_size)
    assert alone.loss is not None
    assert together.loss is not None
    assert together.loss.nats == pytest.approx(alone.loss.nats, rel=1e-5)
    assert alone.divergence is not None
    assert together.divergence is not None
    assert together.divergence.kl_sums == pytest.approx(alone.divergence.kl_sums, rel=1e-5)


def test_a_small_bound_on_logits_changes_nothing(
    llama: Any, other_llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    whole = measure(llama, tokenizer, RESPONSES, reference=other_llama)
    monkeypatch.setattr(metrics_module, "LOGITS_BYTES", 4 * 310 * 3)  # three tokens at a time
    monkeypatch.setattr(metrics_module, "BATCH_TOKENS", 60)
    parts = measure(llama, tokenizer, RESPONSES, reference=other_llama)
    assert whole.loss is not None
    assert parts.loss is not None
    assert parts.loss.nats == pytest.approx(whole.loss.nats, rel=1e-5)
    assert whole.divergence is not None
    assert parts.divergence is not None
    assert parts.divergence.js_sums == pytest.approx(whole.divergence.js_sums, rel=1e-5)


def test_divergence_by_brute_force(llama: Any, other_llama: Any, tokenizer: Any):
    task = Task("mixed", (*RESPONSES.rows, Row(prompt="no answer here")))
    found = divergence(llama, other_llama, tokenizer, task)
    encoded = encode(task, tokenizer)
    expected = [brute_kl(llama, other_llama, e) for e in encoded]
    n = sum(len(e.positions) for e in encoded)
    assert found.n_tokens == n
    assert found.kl_sums == pytest.approx([kl for kl, _ in expected], rel=1e-4)
    assert found.js_sums == pytest.approx([js for _, js in expected], rel=1e-4)
    assert found.kl == pytest.approx(sum(kl for kl, _ in expected) / n, rel=1e-4)
    assert found.js == pytest.approx(sum(js for _, js in expected) / n, rel=1e-4)


def test_divergence_laws(llama: Any, other_llama: Any, tokenizer: Any):
    same = divergence(llama, make_llama(0), tokenizer, RESPONSES)
    assert same.kl == pytest.approx(0, abs=1e-6)
    assert same.js == pytest.approx(0, abs=1e-6)
    there = divergence(llama, other_llama, tokenizer, RESPONSES)
    back = divergence(other_llama, llama, tokenizer, RESPONSES)
    assert min(there.kl_sums) > 0
    assert there.kl != pytest.approx(back.kl, rel=1e-3)  # a is first
    assert there.js == pytest.approx(back.js, rel=1e-5)
    assert max(js / n for js, n in zip(there.js_sums, there.tokens, strict=True)) <= math.log(2)


def test_kl_where_probabilities_vanish():
    inf = float("inf")
    a = torch.tensor([[0.0, 0.0, -inf], [0.0, 0.0, 0.0], [0.0, -inf, -inf]])
    b = torch.tensor([[0.0, 0.0, -inf], [0.0, 0.0, -inf], [-inf, 0.0, -inf]])
    kl, js = metrics_module.divergences(a, b)
    assert kl.tolist() == [0.0, inf, inf]
    assert js[0] == 0
    assert float(js[2]) == pytest.approx(math.log(2))
    shifted, _ = metrics_module.divergences(torch.randn(4, 9), torch.randn(4, 9) + 1000)
    assert bool((shifted >= 0).all())


@pytest.mark.parametrize("template", [True, False])
def test_rank_accuracy_by_brute_force(llama: Any, tokenizer: Any, plain_tokenizer: Any, template: bool):
    chosen = tokenizer if template else plain_tokenizer
    found = rank_accuracy(llama, chosen, CHOICES, batch_size=4)
    correct: list[bool] = []
    normed: list[bool] = []
    for row in CHOICES.rows:
        assert row.choices is not None
        nats = [nats_of(llama, e) for e in encode(Task("t", (row,)), chosen)]
        per_character = [value / len(choice) for value, choice in zip(nats, row.choices, strict=True)]
        correct.append(int(np.argmin(nats)) == row.gold)
        normed.append(int(np.argmin(per_character)) == row.gold)
    assert found.correct == tuple(correct)
    assert found.correct_norm == tuple(normed)
    assert found.acc == pytest.approx(np.mean(correct))
    assert found.acc_norm == pytest.approx(np.mean(normed))
    assert found.n_examples == len(CHOICES.rows)


def test_the_loss_of_choices_is_that_of_the_right_one(llama: Any, other_llama: Any, tokenizer: Any):
    right = Task("right", tuple(Row(prompt=r.prompt, response=(r.choices or ())[r.gold or 0]) for r in CHOICES.rows))
    ranked = measure(llama, tokenizer, CHOICES, reference=other_llama)
    plain = measure(llama, tokenizer, right, reference=other_llama)
    assert ranked.loss is not None
    assert plain.loss is not None
    assert ranked.loss.nats == pytest.approx(plain.loss.nats, rel=1e-5)
    assert ranked.divergence is not None
    assert plain.divergence is not None
    assert ranked.divergence.kl_sums == pytest.approx(plain.divergence.kl_sums, rel=1e-5)
    assert plain.accuracy is None


def test_encoder_decoder(plain_tokenizer: Any):
    model, other = make_t5(), make_t5(1)
    model.train()  # dropout must be off while measuring, and on again after
    task = Task("t5", (*RESPONSES.rows[:2], Row(prompt="good?", choices=("yes", "no it is"), label=1)))
    result = measure(model, plain_tokenizer, task, reference=other)
    assert model.training
    model.eval()
    encoded = [e for e in encode(task, plain_tokenizer, decoder_start=0) if e.candidate in (None, 1)]
    assert result.loss is not None
    assert result.loss.nats == pytest.approx([nats_of(model, e) for e in encoded], rel=1e-5)
    assert result.divergence is not None
    assert result.divergence.kl_sums == pytest.approx([brute_kl(other, model, e)[0] for e in encoded], rel=1e-4)
    assert result.accuracy is not None
    assert result.accuracy.n_examples == 1


def make_gemma2() -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=310,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=2.0,
        max_position_embeddings=512,
        pad_token_id=0,
    )
    return shake(Gemma2ForCausalLM(config), 0)


def make_cohere() -> Any:
    from transformers import CohereConfig, CohereForCausalLM

    config = CohereConfig(
        vocab_size=310,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        logit_scale=0.25,
        max_position_embeddings=512,
        pad_token_id=0,
    )
    return shake(CohereForCausalLM(config), 0)


def make_gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=310, n_positions=256, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    return shake(GPT2LMHeadModel(config), 0)


@pytest.mark.parametrize("make", [make_gemma2, make_cohere, make_gpt2])
def test_other_architectures_also_those_that_transform_their_logits(make: Any, tokenizer: Any):
    model = make()
    loss = loss_per_token(model, tokenizer, RESPONSES, batch_size=3)
    assert loss.value == pytest.approx(expected_loss(model, tokenizer, RESPONSES), rel=1e-5)


def test_a_model_that_transforms_its_logits_in_secret_is_found_out(tokenizer: Any):
    class Secret(torch.nn.Module):
        """Three times a Llama's logits, with nothing about it in the config."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = make_llama()
            self.config = self.inner.config
            self.device = self.inner.device
            self.get_output_embeddings = self.inner.get_output_embeddings

        def forward(self, **inputs: Any) -> Any:
            out = self.inner(**inputs)
            out.logits = out.logits * 3
            return out

    model = Secret()
    expected = expected_loss(model, tokenizer, RESPONSES)
    assert expected != pytest.approx(expected_loss(make_llama(), tokenizer, RESPONSES), rel=0.01)
    assert loss_per_token(model, tokenizer, RESPONSES).value == pytest.approx(expected, rel=1e-5)


def test_a_transform_that_a_config_names_is_believed_however_weak():
    from transformers import CohereConfig, Gemma2Config, Gemma3TextConfig, GraniteConfig, LlamaConfig

    transforms: Any = readout_module.transforms_logits
    assert transforms(Gemma2Config(final_logit_softcapping=1e6))
    assert transforms(CohereConfig(logit_scale=0.999999))
    assert transforms(GraniteConfig(logits_scaling=8.0))
    assert not transforms(GraniteConfig(logits_scaling=1.0))
    assert not transforms(Gemma3TextConfig(final_logit_softcapping=None, attn_logit_softcapping=30.0))
    assert not transforms(LlamaConfig())


def test_the_head_runs_on_scored_positions_only(tokenizer: Any):
    model = make_llama()
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _m, args, _out: seen.append(args[0].numel() // 32))
    loss = loss_per_token(model, tokenizer, RESPONSES)
    probe = 2 * 8  # both ways of computing the logits of eight tokens are compared once
    assert sum(seen) <= loss.n_tokens + probe + len(RESPONSES.rows)


def test_bfloat16_autocast_is_close_and_sums_in_float32(llama: Any, tokenizer: Any):
    exact = loss_per_token(llama, tokenizer, RESPONSES)
    rounded = loss_per_token(llama, tokenizer, RESPONSES, dtype="bfloat16")
    assert rounded.value == pytest.approx(exact.value, rel=0.02)
    assert rounded.value != exact.value


def test_what_limits_cut_is_reported(llama: Any, tokenizer: Any):
    result = measure(llama, tokenizer, RESPONSES, max_tokens=3, max_examples=2)
    assert result.loss is not None
    whole = [len(e.targets) for e in encode(RESPONSES, tokenizer)][:2]
    assert whole[0] < 3 < whole[1]
    assert result.loss.tokens == (whole[0], 3)
    assert (result.n_examples, result.n_cut, result.dropped_tokens) == (2, 1, whole[1] - 3)
    expected = expected_loss(llama, tokenizer, RESPONSES, max_tokens=3, max_examples=2)
    assert result.loss.value == pytest.approx(expected, rel=1e-5)


def test_unlabelled_rows_have_no_loss(llama: Any, other_llama: Any, tokenizer: Any):
    task = Task("prompts", (Row(prompt="a"), Row(prompt="b")))
    with pytest.raises(InputError, match="no row has a response"):
        measure(llama, tokenizer, task)
    mixed = measure(llama, tokenizer, Task("mixed", (*task.rows, *RESPONSES.rows)))
    alone = measure(llama, tokenizer, RESPONSES)
    assert mixed.loss is not None
    assert alone.loss is not None
    assert mixed.loss.rows == (2, 3, 4, 5, 6)
    assert mixed.loss.value == pytest.approx(alone.loss.value, rel=1e-5)
    assert mixed.input_tokens == alone.input_tokens  # nothing is run for nothing
    result = measure(llama, tokenizer, task, reference=other_llama)
    assert result.loss is None
    assert result.divergence is not None
    assert result.divergence.n_examples == 2
    with pytest.raises(InputError, match="no row has choices"):
        rank_accuracy(llama, tokenizer, RESPONSES)


def test_broken_weights_are_an_error_that_says_where(tokenizer: Any):
    model = make_llama()
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(InputError, match=r"task responses, row 1: the loss is nan: the model's weights"):
        loss_per_token(model, tokenizer, RESPONSES)


def test_vocabularies_must_match(llama: Any, tokenizer: Any):
    with pytest.raises(InputError, match="310 and 320"):
        divergence(make_llama(vocab_size=320), llama, tokenizer, RESPONSES)


def test_measuring_leaves_the_model_as_it_was(tokenizer: Any):
    model = make_llama().train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    measure(model, tokenizer, RESPONSES)
    assert model.training
    assert not model.lm_head._forward_pre_hooks
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in model.named_parameters())
    model(input_ids=torch.tensor([[5, 6]])).logits.sum().backward()  # no inference tensors are left inside


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval():
    values = np.random.default_rng(1).normal(3.0, 2.0, 2000)
    found = bootstrap(values.tolist(), seed=5)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert found.low == pytest.approx(values.mean() - half, abs=0.02)
    assert found.high == pytest.approx(values.mean() + half, abs=0.02)
    assert bootstrap(values.tolist(), seed=5) == found
    assert bootstrap(values.tolist(), seed=6) != found
    assert bootstrap([0.0, 0.0, 1.0]).high == pytest.approx(1.0)  # the first and the last are drawn as well
    assert bootstrap([1.0, 0.0, 0.0]).high == pytest.approx(1.0)


def test_bootstrap_of_a_ratio_weighs_tokens():
    nats, tokens = [10.0, 1.0], [10, 1]
    assert bootstrap(nats, tokens).low == pytest.approx(1.0)  # every example has one nat per token
    assert bootstrap(nats, tokens).high == pytest.approx(1.0)
    with pytest.raises(ValueError, match="one numerator"):
        bootstrap([], [])
