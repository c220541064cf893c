"""Rows packed as a prefix tree: the same states and gradients as rows by themselves, each shared token once."""

import contextlib
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from consilience.objectives.objective import Objective
from consilience.student.calibration import Batch, Sample
from consilience.student.prefix_tree import packed_inputs, packs, prefix_tree
from consilience.tasks.encoding import Encoded
from consilience.tasks.readout import readout
from consilience.tasks.rows import Row
from tests.student.test_teachers import opened, write_zoo

hf: Any = importlib.import_module("transformers")
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ROWS = ((3, 9, 5, 7, 11), (3, 9, 5, 7, 13, 20, 21), (3, 9, 8), (3, 9, 5, 7, 11), (3, 9, 5))


def _batch(rows: tuple[tuple[int, ...], ...]) -> Batch:
    encoded = [Encoded(i, None, (), row, tuple(range(1, len(row))), ()) for i, row in enumerate(rows)]
    samples = tuple(Sample(0, one, f"row {i}", Row(prompt="x")) for i, one in enumerate(encoded))
    return Batch(0, samples, tuple(range(len(rows))))


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=6))
def test_a_tree_has_every_prefix_once(rows: list[list[int]]) -> None:
    tree = prefix_tree(rows)
    assert len(tree.tokens) == len({tuple(row[: i + 1]) for row in rows for i in range(len(row))})
    for row, nodes in zip(rows, tree.rows, strict=True):
        assert tree.tokens[nodes].tolist() == row
        assert tree.depth[nodes].tolist() == list(range(len(row)))
        for place, node in enumerate(nodes):
            assert set(np.flatnonzero(tree.visible[node])) == set(nodes[: place + 1].tolist())


def _student(model: Any, precision: str = "float64") -> Any:
    return SimpleNamespace(model=model, settings=SimpleNamespace(precision=precision), compute=contextlib.nullcontext)


def _gpt2() -> Any:
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=4, n_positions=32))


def _of(name: str, **changes: Any) -> Any:
    return getattr(hf, f"{name}ForCausalLM")(getattr(hf, f"{name}Config")(**SIZES | changes))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3", "GPT2", "Olmo2"])
def test_states_are_those_of_rows_by_themselves(name: str, attention: str) -> None:
    torch.manual_seed(0)
    model: Any = (_gpt2() if name == "GPT2" else _of(name)).double().eval()
    model.set_attn_implementation(attention)
    probe = _batch((tuple(range(3, 20)),))
    reader = readout(model, probe.samples[0].encoded)
    assert packs(_student(model), reader, probe)
    packed = packed_inputs(_batch(ROWS), model)
    assert packed is not None
    assert packed[0]["input_ids"].shape[1] == 9
    with torch.no_grad():
        states = reader.states(*packed)
        alone = [model(torch.tensor([list(row)]), use_cache=False).logits[0, 1:] for row in ROWS]
    torch.testing.assert_close(reader.logits(states), torch.cat(alone), rtol=1e-10, atol=1e-10)


def test_models_whose_states_depend_on_more_are_left_alone() -> None:
    """A window, positions counted from the mask, a recurrent state: these run on padded rows."""
    probe = _batch((tuple(range(3, 20)),))
    bloom = hf.BloomForCausalLM(hf.BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=4))
    mamba = hf.MambaForCausalLM(hf.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4))
    for model in (bloom, mamba, _of("Mistral", sliding_window=8), _of("Gemma2", head_dim=4, sliding_window=8)):
        whole = model.double().eval()
        assert not packs(_student(whole), readout(whole, probe.samples[0].encoded), probe), type(whole).__name__


def test_a_model_that_ignores_the_mask_is_found_out() -> None:
    model = _of("Llama").double().eval()
    forward = model.model.forward
    probe = _batch((tuple(range(3, 20)),))
    reader = readout(model, probe.samples[0].encoded)
    model.model.forward = lambda *args, **rest: forward(*args, **{**rest, "attention_mask": None})
    assert not packs(_student(model), reader, probe)


def test_little_in_common_is_not_packed() -> None:
    model = _of("Llama").double().eval()
    assert packed_inputs(_batch(((3, 4, 5, 6), (7, 8, 9, 10))), model) is None


def test_losses_and_slopes_are_those_of_padded_rows(tmp_path: Path) -> None:
    """Rows of several experts with adapters and full weights, together, and every token of them compared."""
    zoo = write_zoo(tmp_path / "zoo")
    shared = '{"prompt": "w1 w2 w3 w4 w5 w6 %s"}'
    for name in ("a", "lora", "quiet"):
        path = zoo / "rows" / f"{name}.jsonl"
        path.write_text("\n".join(shared % f"w{10 + i} w{i}" for i in range(4)) + "\n")
    with opened(zoo, layers=(), exclude=("lm_head*",), precision="float64") as shop:
        assert shop.reader.packs
        sizes: list[int] = []
        shop.student.model.model.register_forward_pre_hook(
            lambda _m, _a, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        found: list[Any] = []
        alpha = np.random.default_rng(0).normal(size=(3, shop.bank.count))
        for packed in (True, False):
            shop.reader.packs = packed
            problem = shop.problem(Objective())
            found.append(problem.evaluate(alpha, range(len(shop.samples)), gradient=True))
        assert sizes[0] < 0.5 * sum(sizes[1:])
    (ours, slope), (theirs, expected) = found
    assert ours["logit"] == pytest.approx(theirs["logit"], rel=1e-9)
    np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-6)  # inner products are summed in float32
