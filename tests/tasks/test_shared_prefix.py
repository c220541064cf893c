"""Sequences that begin alike: shared prefixes give what whole sequences give, where a model allows them."""

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_task_metrics import brute_kl, make_cohere, make_gemma2, make_gpt2, nats_of
from tiny_models import make_llama, shake
from torch import nn

from consilience.tasks import Row, Task, encode, measure, shared_prefix
from consilience.tasks import metrics as metrics_module
from consilience.tasks.encoding import Encoded
from consilience.tasks.readout import readout

#: Questions of unlike lengths, choices of unlike lengths and numbers, one of them the beginning of another.
CHOICES = Task(
    "choices",
    tuple(
        Row(
            prompt=f"is {'it ' * (i % 4)}{word}?",
            choices=("yes", "yes, and no", "no", "perhaps")[: 2 + i % 3],
            label=i % 2,
        )
        for i, word in enumerate("abcdefghij")
    ),
)
ANSWERS = Task("answers", tuple(Row(prompt=f"count to {i}", response="one two " * (1 + i % 3)) for i in range(9)))
MIXED = Task("mixed", (*ANSWERS.rows[:4], *CHOICES.rows[:4]))


def make_opt() -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=310,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        word_embed_proj_dim=32,
        dropout=0.0,
        pad_token_id=1,
    )
    return shake(OPTForCausalLM(config), 0)


def make_bloom() -> Any:
    from transformers import BloomConfig, BloomForCausalLM

    return shake(BloomForCausalLM(BloomConfig(vocab_size=310, hidden_size=32, n_layer=2, n_head=4)), 0)


def make_gpt_neo() -> Any:
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    config = GPTNeoConfig(
        vocab_size=310,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        intermediate_size=48,
        attention_types=[[["global", "local"], 1]],
        window_size=12,
        max_position_embeddings=256,
    )
    return shake(GPTNeoForCausalLM(config), 0)


def make_mistral(window: int | None) -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=310,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=window,
        max_position_embeddings=512,
    )
    return shake(MistralForCausalLM(config), 0)


def make_mamba() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    return shake(MambaForCausalLM(MambaConfig(vocab_size=310, hidden_size=32, num_hidden_layers=2, state_size=4)), 0)


def make_dynamic_rope() -> Any:
    return make_llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})


def tokens_through(model: Any, run: Callable[[], Any]) -> tuple[int, Any]:
    """Run a measurement twice; return the input ids that the second one gave the model, padding included, and it."""
    run()
    seen: list[int] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _m, args, _out: seen.append(args[0].numel()))
    try:
        found = run()
        return sum(seen), found
    finally:
        handle.remove()


def expected_nats(model: Any, tokenizer: Any, task: Task) -> list[float]:
    """Nats of every row's response, or of its right choice, one whole sequence at a time."""
    encoded = encode(task, tokenizer)
    return [nats_of(model, one) for one in encoded if one.candidate in (None, task.rows[one.row].gold)]


def ranked_first(model: Any, tokenizer: Any, task: Task) -> tuple[bool, ...]:
    correct: list[bool] = []
    for row in task.rows:
        nats = [nats_of(model, one) for one in encode(Task("t", (row,)), tokenizer)]
        correct.append(nats.index(min(nats)) == row.gold)
    return tuple(correct)


SHARING = {
    "llama": make_llama,
    "gpt2, learned positions": make_gpt2,
    "opt, positions counted from the mask": make_opt,
    "bloom, no positions": make_bloom,
    "gpt-neo, a window without a cache for it": make_gpt_neo,
    "mistral without a window": lambda: make_mistral(None),
    "cohere, logits had whole": make_cohere,
}
WHOLE = {
    "gemma2, sliding windows": make_gemma2,
    "mistral with a window": lambda: make_mistral(16),
    "mamba, recurrent": make_mamba,
    "llama, frequencies that change with the length": make_dynamic_rope,
}


@pytest.mark.parametrize("name", SHARING)
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_shared_prefixes_give_what_whole_sequences_give(name: str, batch_size: int, tokenizer: Any):
    model = SHARING[name]()
    for task in (CHOICES, ANSWERS, MIXED):
        whole = sum(len(one.inputs) for one in encode(task, tokenizer))
        ran, result = tokens_through(model, lambda task=task: measure(model, tokenizer, task, batch_size=batch_size))
        if batch_size == 1:  # no padding, so that the tokens spared are seen
            assert ran < (0.9 if task is ANSWERS else 0.75) * whole
        assert result.input_tokens == whole
        assert result.loss is not None
        assert result.loss.nats == pytest.approx(expected_nats(model, tokenizer, task), rel=1e-4)
    ranked = measure(model, tokenizer, CHOICES, batch_size=batch_size)
    assert ranked.accuracy is not None
    assert ranked.accuracy.correct == ranked_first(model, tokenizer, CHOICES)


@pytest.mark.parametrize("name", WHOLE)
def test_other_models_run_on_whole_sequences(name: str, tokenizer: Any):
    model = WHOLE[name]()
    whole = sum(len(one.inputs) for one in encode(CHOICES, tokenizer))
    ran, result = tokens_through(model, lambda: measure(model, tokenizer, CHOICES, batch_size=1))
    assert ran >= whole
    assert result.loss.nats == pytest.approx(expected_nats(model, tokenizer, CHOICES), rel=1e-4)


def test_without_anything_in_common_at_the_start_stems_alone_are_shared(plain_tokenizer: Any, llama: Any):
    task = Task("t", tuple(Row(prompt=f"{w} is what?", choices=("yes", "no"), label=0) for w in "abcdef"))
    plain_tokenizer.chat_template = None
    bare = Task("bare", task.rows)
    encoded = [Encoded(e.row, e.candidate, (), e.inputs[1:], tuple(p - 1 for p in e.positions), e.targets)
               for e in encode(bare, plain_tokenizer)]  # fmt: skip
    assert shared_prefix.plan(encoded, 99).trunk == ()
    runs = shared_prefix.passes([readout(llama, encoded[0])], encoded, 4, 64)
    assert runs is not None
    nats = [0.0] * len(encoded)
    with torch.no_grad():
        for members, where, targets, states in runs:
            values = metrics_module.negative_log_likelihood(readout(llama, encoded[0]).logits(states[0]), targets)
            for k, value in zip(where[0].tolist(), values.tolist(), strict=True):
                nats[members[k]] += value
    assert nats == pytest.approx([nats_of(llama, one) for one in encoded], rel=1e-4)


def test_divergences_from_a_reference_share_prefixes_too(llama: Any, other_llama: Any, tokenizer: Any):
    ran, result = tokens_through(llama, lambda: measure(llama, tokenizer, MIXED, reference=other_llama, batch_size=1))
    encoded = [e for e in encode(MIXED, tokenizer) if e.candidate in (None, MIXED.rows[e.row].gold)]
    assert ran < sum(len(e.inputs) for e in encode(MIXED, tokenizer))
    assert result.divergence.kl_sums == pytest.approx([brute_kl(other_llama, llama, e)[0] for e in encoded], rel=1e-4)
    unlabelled = Task(
        "u", (Row(prompt="count to 1"), Row(prompt="count to 2"))
    )  # every position counts: none is shared
    found = measure(llama, tokenizer, unlabelled, reference=other_llama)
    expected = [brute_kl(other_llama, llama, e)[0] for e in encode(unlabelled, tokenizer)]
    assert found.divergence is not None
    assert found.divergence.kl_sums == pytest.approx(expected, rel=1e-4)


def test_a_hook_on_the_model_sees_whole_inputs(tokenizer: Any):
    model = make_llama()
    widths: list[int] = []
    model.register_forward_pre_hook(
        lambda _m, _args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    measure(model, tokenizer, CHOICES, batch_size=1)
    whole = sorted(len(one.inputs) for one in encode(CHOICES, tokenizer))
    assert sorted(widths)[-len(whole) :] == whole  # and a short probe of the output layer


def test_a_model_that_forgets_what_came_before_is_found_out(tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    from transformers import LlamaForCausalLM

    class Forgetful(LlamaForCausalLM):
        """A Llama whose answers ignore half of a prefix: right on whole sequences, wrong on what continues one."""

        def forward(self, *args: Any, **inputs: Any) -> Any:
            before = inputs.get("cache", inputs.get("past_key_values"))  # its name depends on the version
            if before is not None and before.get_seq_length():
                inputs["attention_mask"] = inputs["attention_mask"].clone()
                inputs["attention_mask"][:, : before.get_seq_length() // 2] = 0
            return super().forward(*args, **inputs)

    signature = inspect.signature(LlamaForCausalLM.forward)
    monkeypatch.setattr(Forgetful.forward, "__signature__", signature, raising=False)
    model = Forgetful(make_llama().config)
    model.load_state_dict(make_llama().state_dict())
    ran, result = tokens_through(model.eval(), lambda: measure(model, tokenizer, CHOICES, batch_size=1))
    assert ran >= sum(len(one.inputs) for one in encode(CHOICES, tokenizer))
    assert result.loss.nats == pytest.approx(expected_nats(model, tokenizer, CHOICES), rel=1e-4)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_whatever_a_model_calls_its_cache(name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    own = make_llama()
    theirs = next(n for n in ("cache", "past_key_values") if n in inspect.signature(own.forward).parameters)

    class Renamed(nn.Module):
        """A Llama of another version of transformers."""

        def __init__(self) -> None:
            super().__init__()
            self.own, self.config, self.device = own, own.config, own.device
            self.get_output_embeddings, self.get_input_embeddings = own.get_output_embeddings, own.get_input_embeddings

        def forward(self, **inputs: Any) -> Any:
            inputs = {theirs if key == name else key: value for key, value in inputs.items()}
            out = self.own(**inputs)
            return SimpleNamespace(logits=out.logits, **{name: getattr(out, theirs)})

    names = [name if n == theirs else n for n in inspect.signature(own.forward).parameters if n != "kwargs"]
    parameters = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in ("self", *names)]
    monkeypatch.setattr(Renamed.forward, "__signature__", inspect.Signature(parameters), raising=False)
    model = Renamed()
    ran, result = tokens_through(model, lambda: measure(model, tokenizer, CHOICES, batch_size=1))
    assert ran < 0.75 * sum(len(one.inputs) for one in encode(CHOICES, tokenizer))
    assert result.loss.nats == pytest.approx(expected_nats(own, tokenizer, CHOICES), rel=1e-4)


@pytest.mark.parametrize("tokens", [3, 20, 1024])
def test_bounds_on_memory_change_nothing(llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tokens: int):
    expected = expected_nats(llama, tokenizer, MIXED)
    per_token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, their width, bytes
    monkeypatch.setattr(shared_prefix, "KEYS_BYTES", tokens * per_token)
    longest: list[int] = []
    original = shared_prefix.Decoder.stems

    def stems(self: Any, trunk: Any, parts: Any) -> Any:
        prefix = original(self, trunk, parts)
        longest.append(prefix.mask.numel())
        return prefix

    monkeypatch.setattr(shared_prefix.Decoder, "stems", stems)
    result = measure(llama, tokenizer, MIXED)
    assert result.loss is not None
    assert result.loss.nats == pytest.approx(expected, rel=1e-4)
    assert all(count <= tokens for count in longest[1:])  # the first is the probe's


def test_under_bfloat16_sharing_changes_rounding_only(llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    shared = measure(llama, tokenizer, MIXED, dtype="bfloat16")
    monkeypatch.setattr(shared_prefix, "LEAST_SAVING", 2.0)
    whole = measure(llama, tokenizer, MIXED, dtype="bfloat16")
    assert shared.loss is not None
    assert whole.loss is not None
    assert shared.loss.nats != whole.loss.nats
    assert shared.loss.value == pytest.approx(whole.loss.value, rel=0.01)


def test_measuring_leaves_no_tensors_of_a_prefix_behind(tokenizer: Any):
    model = make_llama()
    measure(model, tokenizer, CHOICES)
    assert not model._forward_pre_hooks
    assert not any(isinstance(value, torch.Tensor) for module in model.modules() for value in vars(module).values())
    model(input_ids=torch.tensor([[5, 6]])).logits.sum().backward()


ids = st.lists(st.integers(0, 2), min_size=1, max_size=7).map(tuple)


@st.composite
def sequences(draw: Any) -> list[Encoded]:
    """Rows that begin alike often, with any positions scored; some have choices."""
    out: list[Encoded] = []
    for row in range(draw(st.integers(1, 5))):
        start = draw(ids)
        choices = draw(st.integers(1, 3))
        for candidate in range(choices):
            inputs = start + draw(ids)
            positions = tuple(sorted(draw(st.sets(st.integers(0, len(inputs) - 1), min_size=1))))
            out.append(Encoded(row, candidate if choices > 1 else None, (), inputs, positions, positions))
    return out


@given(sequences(), st.integers(0, 9), st.integers(1, 4), st.integers(1, 12))
def test_a_plan_covers_every_token_once(examples: list[Encoded], longest: int, batch_size: int, tokens: int):
    sharing = shared_prefix.plan(examples, longest)
    assert sorted(i for unit in sharing.units for i in unit.members) == list(range(len(examples)))
    for unit in sharing.units:
        assert len(sharing.trunk) + len(unit.stem) <= longest
        for i in unit.members:
            before, branch = (*sharing.trunk, *unit.stem), sharing.branches[i]
            assert (*before, *branch.inputs) == examples[i].inputs
            assert tuple(p + len(before) for p in branch.positions) == examples[i].positions
            assert branch.targets == examples[i].targets
            assert min(branch.positions) >= 0
    every = sum(len(one.inputs) for one in examples)
    run = len(sharing.trunk) + sum(len(u.stem) for u in sharing.units) + sum(len(b.inputs) for b in sharing.branches)
    assert sharing.spared() == every - run
    batches = list(shared_prefix.batches(sharing, shared_prefix.Cost(1, 1), batch_size, tokens))
    assert sorted(unit.members for batch in batches for unit in batch) == sorted(u.members for u in sharing.units)
    for batch in batches:
        assert len({bool(unit.stem) for unit in batch}) == 1
        count = sum(len(unit.members) for unit in batch)
        widest = max(len(sharing.branches[i].inputs) for unit in batch for i in unit.members)
        assert len(batch) == 1 or (count <= batch_size and count * widest <= tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_negative_log_likelihood_is_cross_entropy(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(23, 50_000, generator=generator) * 5 + 300).to(dtype)
    targets = torch.randint(0, 50_000, (23,), generator=generator)
    before = logits.clone()
    found = metrics_module.negative_log_likelihood(logits, targets)
    expected = nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(logits, before)
